//! Guest memory: one memfd, two mappings.
//!
//! The wire writes the *landing* mapping; the guest runs on the *guest* mapping, which is
//! registered with userfaultfd while pages are missing. A page becomes visible to the guest only
//! when it is published (UFFDIO_CONTINUE), so a half-arrived page is never seen, and no byte is
//! copied between the two: they are the same pages of the same file.
//!
//! Pages are numbered by their offset in the memfd. Guest physical addresses differ from that
//! only where the layout has a hole (below 4 GiB on x86); [`MemoryLayout`] converts.

use std::fs::File;
use std::io;
use std::sync::Arc;

use postcopy_transport::HostMemory;
use serde::{Deserialize, Serialize};

/// Bytes in a page. x86-64 small pages; the engine's unit of transfer and of publication.
pub const PAGE_SIZE: u64 = 4096;

/// Most regions a layout may have. A PC guest needs two (below and above the PCI hole); 32 leaves
/// room for hot-plugged memory and bounds what a peer may announce.
pub const MAX_REGIONS: usize = 32;

/// A guest physical address in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

/// A page of guest memory, numbered by its offset in the memfd divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Offset of the page's first byte in the memfd.
    pub fn offset(self) -> u64 {
        self.0 * PAGE_SIZE
    }

    /// The page that holds byte `offset` of the memfd.
    pub fn containing(offset: u64) -> Self {
        Self(offset / PAGE_SIZE)
    }
}

/// A run of guest physical memory and its place in the memfd. All in bytes, page-aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Its length.
    pub len: u64,
    /// Where it starts in the memfd.
    pub offset: u64,
}

/// How guest physical memory maps to the memfd: regions in ascending order of both, with no gap
/// in the memfd. Checked on construction, also when it came from a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<MemoryRegion>", into = "Vec<MemoryRegion>")]
pub struct MemoryLayout {
    regions: Vec<MemoryRegion>,
}

/// Why a layout was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("memory layout refused: {0}")]
pub struct LayoutError(&'static str);

impl TryFrom<Vec<MemoryRegion>> for MemoryLayout {
    type Error = LayoutError;

    fn try_from(regions: Vec<MemoryRegion>) -> Result<Self, LayoutError> {
        Self::new(regions)
    }
}

impl From<MemoryLayout> for Vec<MemoryRegion> {
    fn from(layout: MemoryLayout) -> Self {
        layout.regions
    }
}

impl MemoryLayout {
    /// Checks `regions` and makes a layout of them.
    ///
    /// Errors: none or too many regions, one that is empty or unaligned, regions out of order or
    /// overlapping, a gap in the memfd, or an end past the 52-bit physical address space.
    pub fn new(regions: Vec<MemoryRegion>) -> Result<Self, LayoutError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(LayoutError("it must have 1 to 32 regions"));
        }
        let mut offset = 0u64;
        let mut gpa_end = 0u64;
        for region in &regions {
            let aligned = [region.gpa.0, region.len, region.offset].iter().all(|v| v % PAGE_SIZE == 0);
            if !aligned || region.len == 0 {
                return Err(LayoutError("a region is empty or not page-aligned"));
            }
            if region.offset != offset || region.gpa.0 < gpa_end {
                return Err(LayoutError("regions overlap, are out of order, or leave a gap in the file"));
            }
            let end = region.gpa.0.checked_add(region.len).filter(|end| *end <= 1 << 52);
            gpa_end = end.ok_or(LayoutError("a region ends past the 52-bit address space"))?;
            offset += region.len;
        }
        Ok(Self { regions })
    }

    /// A PC's memory of `bytes`: one region from 0, and a second from 4 GiB for what does not fit
    /// below `hole` (where the PCI hole starts).
    ///
    /// Errors: as [`MemoryLayout::new`].
    pub fn pc(bytes: u64, hole: u64) -> Result<Self, LayoutError> {
        let low = bytes.min(hole);
        let mut regions = vec![MemoryRegion { gpa: Gpa(0), len: low, offset: 0 }];
        if bytes > low {
            regions.push(MemoryRegion { gpa: Gpa(1 << 32), len: bytes - low, offset: low });
        }
        Self::new(regions)
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Bytes of guest memory in all regions.
    pub fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// Pages of guest memory in all regions.
    pub fn total_pages(&self) -> u64 {
        self.total_bytes() / PAGE_SIZE
    }

    /// Offset in the memfd of a guest physical address, if it is memory.
    pub fn offset_of(&self, gpa: Gpa) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let within = gpa.0.checked_sub(region.gpa.0)?;
            (within < region.len).then_some(region.offset + within)
        })
    }
}

/// A guest's memory at one side of a migration: the memfd and its two mappings.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    layout: Arc<MemoryLayout>,
    guest: HostMemory,
    landing: HostMemory,
}

impl GuestMemory {
    /// Makes a new memfd for `layout`, all holes, and maps it twice.
    ///
    /// Errors: memfd_create(2), ftruncate(2) or mmap(2) refuse (too little address space, limits).
    pub fn new(layout: MemoryLayout) -> io::Result<Self> {
        let len = usize::try_from(layout.total_bytes()).map_err(io::Error::other)?;
        let guest = HostMemory::anonymous("guest-memory", len)?;
        Self::with(layout, guest)
    }

    /// Maps a file that another program has made and uses as a guest's memory, twice. Whoever holds
    /// it can change it, and can end this process by making it shorter.
    ///
    /// Errors: the file is shorter than the layout, or mmap(2) refuses.
    pub fn of_file(layout: MemoryLayout, file: File) -> io::Result<Self> {
        let len = layout.total_bytes();
        Self::of_files(layout, [(file, len)])
    }

    /// As [`GuestMemory::of_file`], of several files one after the other, and how many bytes of each.
    ///
    /// Errors: one is shorter than that, all together are not as long as the layout, or mmap(2) refuses.
    pub fn of_files(layout: MemoryLayout, files: impl IntoIterator<Item = (File, u64)>) -> io::Result<Self> {
        let long_enough = |(file, len): (File, u64)| {
            let found = file.metadata()?.len();
            if found < len {
                return Err(io::Error::other(format!("the file has {found} bytes, the guest {len}")));
            }
            Ok((file, usize::try_from(len).map_err(io::Error::other)?))
        };
        let files = files.into_iter().map(long_enough).collect::<io::Result<Vec<_>>>()?;
        let guest = HostMemory::map_all(files)?;
        let (len, found) = (layout.total_bytes(), guest.len());
        if found as u64 != len {
            return Err(io::Error::other(format!("the files have {found} bytes, the guest {len}")));
        }
        Self::with(layout, guest)
    }

    fn with(layout: MemoryLayout, guest: HostMemory) -> io::Result<Self> {
        let landing = guest.map_again()?;
        Ok(Self { layout: Arc::new(layout), guest, landing })
    }

    /// How guest physical memory maps to the memfd.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The mapping that the guest runs on: what a VMM gives to KVM as memslots.
    pub fn guest(&self) -> &HostMemory {
        &self.guest
    }

    /// The mapping of the wire: at the source reads are served from it; at the destination they land in it, and
    /// only the pager writes it, and only pages that it has not published.
    pub fn landing(&self) -> &HostMemory {
        &self.landing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pc_layout_splits_at_the_hole_and_converts_addresses() {
        let layout = MemoryLayout::pc(4 << 30, 3 << 30).unwrap();
        assert_eq!(layout.total_bytes(), 4 << 30);
        assert_eq!(layout.offset_of(Gpa(0x1000)), Some(0x1000));
        assert_eq!(layout.offset_of(Gpa(3 << 30)), None);
        assert_eq!(layout.offset_of(Gpa(1 << 32)), Some(3 << 30));
        assert_eq!(layout.offset_of(Gpa((1 << 32) + (1 << 30))), None);
    }

    #[test]
    fn layouts_that_a_peer_could_send_to_confuse_us_are_refused() {
        let region = |gpa, len, offset| MemoryRegion { gpa: Gpa(gpa), len, offset };
        let bad = [
            vec![],
            vec![region(0, 0, 0)],
            vec![region(0, 100, 0)],
            vec![region(0, 4096, 4096)],
            vec![region(0, 8192, 0), region(4096, 4096, 8192)],
            vec![region(u64::MAX - 4095, 4096, 0)],
            vec![region(0, 4096, 0); 33],
        ];
        for regions in bad {
            assert!(MemoryLayout::new(regions.clone()).is_err(), "{regions:?}");
        }
    }

    #[test]
    fn both_mappings_are_the_same_pages() {
        let memory = GuestMemory::new(MemoryLayout::pc(1 << 20, 3 << 30).unwrap()).unwrap();
        assert!(memory.landing().write(5000, b"landed"));
        let mut seen = [0; 6];
        assert!(memory.guest().read(5000, &mut seen));
        assert_eq!(&seen, b"landed");
        assert!(!memory.guest().write((1 << 20) - 2, b"over"));
    }
}
