//! Capabilities to memory: what may be read at the peer, and where it may land here.
//!
//! A [`RemoteRegion`] is everything needed to read a peer's region: address, length and key travel
//! together, and the only way to a part of it is [`RemoteRegion::slice`], which checks bounds. The
//! exporter checks them once more (the NIC does for verbs), so a wrong slice fails a read and never
//! reads elsewhere.

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most bytes in one read. Bounds what a responder sends for one request; 8 MiB is the largest
/// size that `pcbench` measures and far more than the pager asks for.
pub const MAX_READ: u32 = 8 << 20;

/// A peer's exported memory, as a capability. 24 bytes on the wire, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RemoteRegion {
    addr: U64,
    len: U64,
    key: U64,
}

const _: () = assert!(size_of::<RemoteRegion>() == 24);

impl RemoteRegion {
    pub(crate) fn new(addr: u64, len: u64, key: u64) -> Self {
        Self { addr: addr.into(), len: len.into(), key: key.into() }
    }

    /// The capability as bytes for the control channel: address, length, key, little-endian.
    pub fn to_bytes(&self) -> [u8; 24] {
        zerocopy::transmute!(*self)
    }

    /// The capability from a peer's bytes. Any bytes are a capability; a false one opens nothing.
    pub fn from_bytes(bytes: [u8; 24]) -> Self {
        zerocopy::transmute!(bytes)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len.get()
    }

    /// True if the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The capability to its first `len` bytes alone, or `None` if it has fewer.
    pub fn first(&self, len: u64) -> Option<Self> {
        (len <= self.len()).then(|| Self { len: len.into(), ..*self })
    }

    /// `len` bytes from `offset`, or `None` if they do not lie in the region, if `len` is zero or
    /// more than [`MAX_READ`].
    pub fn slice(&self, offset: u64, len: u32) -> Option<RemoteSlice> {
        let end = offset.checked_add(len.into())?;
        let addr = self.addr.get().checked_add(offset)?;
        let fits = end <= self.len() && len > 0 && len <= MAX_READ;
        fits.then_some(RemoteSlice { addr, key: self.key.get(), len })
    }
}

/// A bounds-checked part of a [`RemoteRegion`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteSlice {
    pub(crate) addr: u64,
    pub(crate) key: u64,
    pub(crate) len: u32,
}

impl RemoteSlice {
    /// Length in bytes, 1 to [`MAX_READ`].
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Never true: an empty slice cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Memory of this process that an importer registered for landing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalRegion {
    pub(crate) index: u16,
    pub(crate) len: u64,
}

impl LocalRegion {
    /// `len` bytes from `offset`, or `None` if they do not lie in the region or `len` is zero.
    pub fn slice(&self, offset: u64, len: u32) -> Option<LocalSlice> {
        let end = offset.checked_add(len.into())?;
        (end <= self.len && len > 0).then_some(LocalSlice { region: self.index, offset, len })
    }
}

/// A bounds-checked part of a [`LocalRegion`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalSlice {
    pub(crate) region: u16,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_outside_its_region_cannot_be_made() {
        let remote = RemoteRegion::new(1 << 40, 8192, 7);
        assert!(remote.slice(4096, 4096).is_some());
        for (offset, len) in [(4096, 4097), (8192, 1), (u64::MAX, 1), (0, 0), (0, MAX_READ + 1)] {
            assert_eq!(remote.slice(offset, len), None, "{offset} {len}");
        }
        let first = remote.first(4096).unwrap();
        assert!(first.slice(0, 4096).is_some() && first.slice(4096, 1).is_none());
        assert_eq!(remote.first(8193), None);
        let local = LocalRegion { index: 0, len: 8192 };
        assert!(local.slice(0, 8192).is_some());
        for (offset, len) in [(1, 8192), (u64::MAX, 2), (0, 0)] {
            assert_eq!(local.slice(offset, len), None, "{offset} {len}");
        }
    }

    #[test]
    fn a_region_near_the_end_of_the_address_space_does_not_wrap() {
        let remote = RemoteRegion::new(u64::MAX - 100, 8192, 7);
        assert_eq!(remote.slice(200, 100), None);
    }

    #[test]
    fn the_wire_layout_is_address_length_key() {
        let mut golden = [0u8; 24];
        golden[0] = 1;
        golden[8] = 2;
        golden[16] = 3;
        assert_eq!(RemoteRegion::new(1, 2, 3).to_bytes(), golden);
        assert_eq!(RemoteRegion::from_bytes(golden), RemoteRegion::new(1, 2, 3));
    }
}
