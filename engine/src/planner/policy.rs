//! The names of the policies, as configuration and reports have them.

use std::fmt;
use std::str::FromStr;

/// Pivots of `bubble-multi` where nothing is said: what the paper found best.
pub const PIVOTS: u8 = 7;
/// Most pivots: past some tens each bubble's turn comes too late to matter.
pub const MAX_PIVOTS: u8 = 64;

/// Which way a bubble grows from its pivot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To higher pages.
    Forward,
    /// Both ways by turns.
    Dual,
    /// To lower pages.
    Backward,
}

/// In which order pages come that nobody has asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// By address, whatever faults: the paper's active push.
    Linear,
    /// A bubble around the last network fault (the paper's prepaging with one pivot).
    Bubble(Direction),
    /// Bubbles around the last so many network faults (the paper's multi-pivot bubbling).
    BubbleMulti(u8, Direction),
    /// Streams, found in the faults.
    #[default]
    Adaptive,
}

impl Policy {
    /// The fixed policies, with as many pivots as the paper found best.
    pub const FIXED: [Policy; 7] = [
        Policy::Linear,
        Policy::Bubble(Direction::Forward),
        Policy::Bubble(Direction::Dual),
        Policy::Bubble(Direction::Backward),
        Policy::BubbleMulti(PIVOTS, Direction::Forward),
        Policy::BubbleMulti(PIVOTS, Direction::Dual),
        Policy::BubbleMulti(PIVOTS, Direction::Backward),
    ];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Forward => "forward",
            Direction::Dual => "dual",
            Direction::Backward => "backward",
        })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Linear => f.write_str("linear"),
            Policy::Bubble(direction) => write!(f, "bubble:{direction}"),
            Policy::BubbleMulti(PIVOTS, direction) => write!(f, "bubble-multi:{direction}"),
            Policy::BubbleMulti(pivots, direction) => write!(f, "bubble-multi:{pivots}:{direction}"),
            Policy::Adaptive => f.write_str("adaptive"),
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    /// `adaptive`, `linear`, `bubble[:DIRECTION]` or `bubble-multi[:PIVOTS][:DIRECTION]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || {
            format!(
                "there is no policy `{text}`; use adaptive, linear, bubble[:DIRECTION] or \
                 bubble-multi[:PIVOTS][:DIRECTION], with forward, dual or backward and 1 to {MAX_PIVOTS} pivots"
            )
        };
        let (mut pivots, mut direction) = (None, None);
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        for part in parts {
            let way = [Direction::Forward, Direction::Dual, Direction::Backward];
            let way = way.into_iter().find(|way| way.to_string() == part);
            let count = part.parse().ok().filter(|count| (1..=MAX_PIVOTS).contains(count));
            match (way, count) {
                (Some(_), _) if direction.is_none() => direction = way,
                (None, Some(_)) if pivots.is_none() && direction.is_none() => pivots = count,
                _ => return Err(refused()),
            }
        }
        let dual = direction.unwrap_or(Direction::Dual);
        match (name, pivots, direction) {
            ("adaptive", None, None) => Ok(Policy::Adaptive),
            ("linear", None, None) => Ok(Policy::Linear),
            ("bubble", None, _) => Ok(Policy::Bubble(dual)),
            ("bubble-multi", _, _) => Ok(Policy::BubbleMulti(pivots.unwrap_or(PIVOTS), dual)),
            _ => Err(refused()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_is_parsed_from_its_own_name() {
        let odd = Policy::BubbleMulti(3, Direction::Backward);
        for policy in Policy::FIXED.into_iter().chain([Policy::Adaptive, odd]) {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert_eq!("bubble".parse(), Ok(Policy::Bubble(Direction::Dual)));
        assert_eq!("bubble-multi:5".parse(), Ok(Policy::BubbleMulti(5, Direction::Dual)));
        for bad in ["", "lru", "linear:dual", "bubble:7", "bubble-multi:0", "bubble-multi:65", "bubble:up"] {
            assert!(bad.parse::<Policy>().is_err_and(|said| said.contains("adaptive")), "{bad}");
        }
    }
}
