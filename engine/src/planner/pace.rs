//! A limit to the bandwidth of what nobody waits for.
//!
//! Faults are never held back, and what crosses for them is taken off what the others may have: together they
//! keep to the limit for as long as faults alone do. It is the virtual scheduling form of a leaky bucket (ITU-T I.371, the
//! generic cell rate algorithm): all that is kept is when the next read is due.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::link::Nanos;
use crate::memory::PAGE_SIZE;

/// How much may be made up for after a pause, and how much of what faults took is held against the others: so much
/// time's worth. A thread that sleeps until a read is due may be late by a tick of the scheduler, 4 ms.
const SLACK_NS: u64 = 10_000_000;

/// Bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bandwidth(NonZeroU64);

impl Bandwidth {
    /// So many bytes a second, or `None` if that is none.
    pub fn new(bytes: u64) -> Option<Self> {
        NonZeroU64::new(bytes).map(Self)
    }

    /// Bytes a second.
    pub fn bytes(self) -> u64 {
        self.0.get()
    }

    /// What each of so many shards has of it.
    pub(crate) fn shared_by(self, shards: usize) -> Self {
        Self::new(self.bytes() / shards.max(1) as u64).unwrap_or(Self(NonZeroU64::MIN))
    }

    /// The limit where each side may have one.
    pub(crate) fn least(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        one.into_iter().chain(other).min()
    }
}

/// When the next read that nobody waits for is due.
#[derive(Debug)]
pub(crate) struct Pace {
    limit: Option<Bandwidth>,
    due: Nanos,
}

impl Pace {
    pub(crate) fn new(limit: Option<Bandwidth>) -> Self {
        Self { limit, due: Nanos(0) }
    }

    /// How long the next read is held back yet, in nanoseconds; `None`: it is not.
    pub(crate) fn holds(&self, now: Nanos) -> Option<u64> {
        Some(self.due.since(now)).filter(|left| *left > 0)
    }

    /// So many pages cross.
    pub(crate) fn cross(&mut self, pages: u32, now: Nanos) {
        let Some(limit) = self.limit else { return };
        let (earliest, latest) = (now.0.saturating_sub(SLACK_NS), now.0.saturating_add(SLACK_NS));
        let takes = u128::from(pages) * u128::from(PAGE_SIZE) * 1_000_000_000 / u128::from(limit.bytes());
        let takes = u64::try_from(takes).unwrap_or(u64::MAX);
        self.due = Nanos(self.due.0.clamp(earliest, latest).saturating_add(takes));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_lesser_limit_counts_and_shards_share_it() {
        let limit = |bytes| Bandwidth::new(bytes);
        assert_eq!(Bandwidth::least(limit(7), limit(3)), limit(3));
        assert_eq!(Bandwidth::least(None, limit(3)), limit(3));
        assert_eq!(Bandwidth::least(limit(7), None), limit(7));
        assert_eq!(Bandwidth::least(None, None), None);
        assert_eq!(limit(0), None);
        assert_eq!(limit(10).map(|all| all.shared_by(4)), limit(2));
        assert_eq!(limit(1).map(|all| all.shared_by(16)), limit(1));
    }

    #[test]
    fn without_a_limit_nothing_is_held_and_with_the_least_one_nothing_overflows() {
        let mut free = Pace::new(None);
        free.cross(u32::MAX, Nanos(5));
        assert_eq!(free.holds(Nanos(5)), None);
        let mut least = Pace::new(Bandwidth::new(1));
        least.cross(u32::MAX, Nanos(u64::MAX - 1));
        assert_eq!(least.holds(Nanos(u64::MAX - 1)), Some(1));
    }

    proptest! {
        /// Whatever is waited for and however late its reader wakes, in no stretch of time more crosses than its share, the
        /// slack and one read.
        #[test]
        fn no_stretch_of_time_has_more_than_its_share(
            limit in MIB..10_000 * MIB,
            steps in proptest::collection::vec((1u32..33, 0u64..20_000_000), 1..200),
        ) {
            let mut pace = Pace::new(Bandwidth::new(limit));
            let (mut now, mut crossed) = (Nanos(0), vec![]);
            for (pages, late) in steps {
                now = Nanos(now.0 + pace.holds(now).unwrap_or(0) + late);
                pace.cross(pages, now);
                crossed.push((now, u64::from(pages) * PAGE_SIZE));
            }
            for (at, (begun, _)) in crossed.iter().enumerate() {
                let mut bytes = 0;
                for (end, more) in &crossed[at..] {
                    let share = u128::from(limit) * u128::from(end.since(*begun) + SLACK_NS) / 1_000_000_000;
                    prop_assert!(bytes <= share as u64 + PAGE_SIZE, "{bytes} bytes in {} ns", end.since(*begun));
                    bytes += more;
                }
            }
        }
    }
}
