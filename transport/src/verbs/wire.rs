//! How the two queue pairs of a lane find each other. Little-endian, fixed size, version first.
//!
//! ```text
//! 0         2     4     6       7     8            12           16                          32
//! | version | mtu | lid | atoms | pad | queue pair | first PSN  |            GID            |
//! ```
//!
//! A request is the rail's number (one byte) and this; a grant is this and, for each memory, its
//! key on the first rail and its key on the path's rail.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::SetupError;

/// Version of this message.
const VERSION: u16 = 1;

/// One queue pair's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct QueuePairAddress {
    version: U16,
    /// Path MTU as the verbs code (1 = 256 … 5 = 4096 bytes).
    pub(crate) mtu: U16,
    /// Local identifier; zero over Ethernet.
    pub(crate) lid: U16,
    /// Outstanding reads that this side can serve or issue.
    pub(crate) read_atoms: u8,
    reserved: u8,
    pub(crate) number: U32,
    pub(crate) psn: U32,
    pub(crate) gid: [u8; 16],
}

const _: () = assert!(size_of::<QueuePairAddress>() == 32);

impl QueuePairAddress {
    pub(crate) fn new(number: u32, psn: u32, mtu: u16, lid: u16, read_atoms: u8, gid: [u8; 16]) -> Self {
        Self {
            version: VERSION.into(),
            mtu: mtu.into(),
            lid: lid.into(),
            read_atoms,
            reserved: 0,
            number: number.into(),
            psn: psn.into(),
            gid,
        }
    }

    /// Reads a peer's message.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, SetupError> {
        let malformed = SetupError::Malformed { what: "queue pair address" };
        let Ok(address) = Self::read_from_bytes(bytes) else { return Err(malformed) };
        let known = address.version.get() == VERSION && address.reserved == 0;
        let sane = (1..=5).contains(&address.mtu.get()) && address.read_atoms > 0;
        let numbers = address.number.get() < 1 << 24 && address.psn.get() < 1 << 24;
        if known && sane && numbers { Ok(address) } else { Err(malformed) }
    }
}

/// A memory's keys: on the first rail, which its capability has, and on another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct KeyPair {
    first: U32,
    own: U32,
}

impl KeyPair {
    pub(crate) fn new(first: u32, own: u32) -> Self {
        Self { first: first.into(), own: own.into() }
    }

    /// Reads the end of a peer's grant: whole pairs.
    pub(crate) fn decode_all(bytes: &[u8]) -> Option<Vec<Self>> {
        <[Self]>::ref_from_bytes(bytes).ok().map(<[Self]>::to_vec)
    }

    /// The key that opens, on the path's rail, what `key` opens on the first. A key that is not
    /// known opens nothing on any rail.
    pub(crate) fn translate(pairs: &[Self], key: u64) -> u32 {
        let known = pairs.iter().find(|pair| u64::from(pair.first.get()) == key);
        known.map_or(key as u32, |pair| pair.own.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> QueuePairAddress {
        QueuePairAddress::new(0x11, 0x22, 5, 3, 16, [9; 16])
    }

    #[test]
    fn golden_bytes() {
        let mut golden = [0u8; 32];
        (golden[0], golden[2], golden[4], golden[6]) = (1, 5, 3, 16);
        (golden[8], golden[12]) = (0x11, 0x22);
        golden[16..].fill(9);
        assert_eq!(example().as_bytes(), golden);
        assert_eq!(QueuePairAddress::decode(&golden).unwrap(), example());
    }

    #[test]
    fn keys_are_translated_by_rail() {
        let bytes = [KeyPair::new(5, 50), KeyPair::new(6, 60)].as_bytes().to_vec();
        assert_eq!(bytes, [5, 0, 0, 0, 50, 0, 0, 0, 6, 0, 0, 0, 60, 0, 0, 0]);
        let pairs = KeyPair::decode_all(&bytes).unwrap();
        assert_eq!([5, 6, 7].map(|key| KeyPair::translate(&pairs, key)), [50, 60, 7]);
        assert!(KeyPair::decode_all(&bytes[..15]).is_none());
    }

    #[test]
    fn what_no_peer_of_ours_sends_is_refused() {
        let good = example().as_bytes().to_vec();
        assert!(QueuePairAddress::decode(&good[..31]).is_err());
        assert!(QueuePairAddress::decode(&[good.clone(), vec![0]].concat()).is_err());
        for (at, byte) in [(0, 2), (2, 6), (2, 0), (6, 0), (7, 1), (11, 1), (15, 1)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(QueuePairAddress::decode(&bad).is_err(), "byte {at} = {byte}");
        }
    }
}
