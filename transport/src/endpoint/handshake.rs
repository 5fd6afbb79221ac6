//! The envelope of lane requests and grants: what one lane's paths say, in one blob.
//!
//! ```text
//! 0         1       2       3                        3 + 2 + length
//! | version | class | count |  length: u16 | bytes …  |  … count times     little-endian
//! ```
//!
//! `class` is 0 (urgent) or 1 (bulk); a grant repeats the request's. What the bytes of a path say
//! is its transport's business.

use crate::error::SetupError;
use crate::lane::LaneClass;

/// Version of this envelope.
const VERSION: u8 = 1;
/// Version, class, count.
const HEADER: usize = 3;

/// Most paths of one lane: queue pairs or connections.
pub const MAX_PATHS: usize = 16;

/// Most bytes that one path says. A queue pair with the keys of 8 regions has 97.
pub(super) const MAX_PATH_BYTES: usize = 256;

/// What is said of one lane.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Envelope {
    pub(super) class: LaneClass,
    pub(super) paths: Vec<Vec<u8>>,
}

impl Envelope {
    pub(super) fn encode(&self) -> Vec<u8> {
        assert!((1..=MAX_PATHS).contains(&self.paths.len()), "checked when the lane was planned");
        let class = match self.class {
            LaneClass::Urgent => 0,
            LaneClass::Bulk => 1,
        };
        let mut bytes = vec![VERSION, class, self.paths.len() as u8];
        for path in &self.paths {
            assert!(path.len() <= MAX_PATH_BYTES, "no transport says more");
            bytes.extend((path.len() as u16).to_le_bytes());
            bytes.extend(path);
        }
        bytes
    }

    /// Reads a peer's blob, whatever its bytes.
    pub(super) fn decode(bytes: &[u8], what: &'static str) -> Result<Self, SetupError> {
        Self::parse(bytes).ok_or(SetupError::Malformed { what })
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, mut rest) = bytes.split_at_checked(HEADER)?;
        let class = match header[1] {
            0 => LaneClass::Urgent,
            1 => LaneClass::Bulk,
            _ => return None,
        };
        let count = usize::from(header[2]);
        if header[0] != VERSION || !(1..=MAX_PATHS).contains(&count) {
            return None;
        }
        let mut paths = Vec::with_capacity(count);
        for _ in 0..count {
            let (length, after) = rest.split_first_chunk::<2>()?;
            let length = usize::from(u16::from_le_bytes(*length));
            if length > MAX_PATH_BYTES {
                return None;
            }
            let (path, after) = after.split_at_checked(length)?;
            paths.push(path.to_vec());
            rest = after;
        }
        rest.is_empty().then_some(Self { class, paths })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let envelope = Envelope { class: LaneClass::Bulk, paths: vec![vec![7, 8], vec![]] };
        let golden = [1, 1, 2, 2, 0, 7, 8, 0, 0];
        assert_eq!(envelope.encode(), golden);
        assert_eq!(Envelope::decode(&golden, "request").unwrap(), envelope);
    }

    #[test]
    fn what_no_peer_of_ours_sends_is_refused() {
        for bad in [
            &[][..],
            &[1, 0],
            &[2, 0, 1, 0, 0],
            &[1, 2, 1, 0, 0],
            &[1, 0, 0],
            &[1, 0, 17],
            &[1, 0, 1, 0],
            &[1, 0, 1, 1, 0],
            &[1, 0, 1, 1, 1],
            &[1, 0, 1, 0, 0, 9],
        ] {
            assert!(Envelope::decode(bad, "request").is_err(), "{bad:?}");
        }
    }
}
