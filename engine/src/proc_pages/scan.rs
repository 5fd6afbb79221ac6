//! The request PAGEMAP_SCAN (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst): the pages of a process that are of
//! some kind, as ranges, instead of an entry for each page.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::memory::PAGE_SIZE;
use crate::page_set::PageSet;
use crate::places::Places;

/// Regions that are asked for at once.
const REGIONS: usize = 512;

/// These of the pages of some places, in the process whose pagemap this is.
///
/// Errors: ENOTTY, the kernel has no such request; EPERM, the pages are not registered for it; or what it refuses.
pub(crate) fn scan(pagemap: &File, places: &Places, which: Which) -> io::Result<PageSet> {
    let mut found = PageSet::new(places.pages(), false);
    let mut regions = [Region { start: 0, end: 0, categories: 0 }; REGIONS];
    for place in places.each() {
        let page = |address: u64| (place.offset + (address - place.address)) / PAGE_SIZE;
        let (mut at, end) = (place.address, place.address + place.len);
        while at < end {
            let mut scan = Scan { start: at, end, ..which.asked(&mut regions) };
            // SAFETY: the request reads and writes its argument, and writes at most `vec_len` regions to `vec`, which are
            // none or `regions`; both are borrowed here alone until it returns.
            let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            if count < 0 {
                return Err(io::Error::last_os_error());
            }
            for region in regions.iter().take(count as usize) {
                found.put(page(region.start), page(region.end), true);
            }
            if scan.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
            }
            at = scan.walk_end;
        }
    }
    Ok(found)
}

/// Pages of a scan. Those that are written or protected must be registered for asynchronous write protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those that are mapped.
    Mapped,
    /// All, which are protected and not told.
    ToProtect,
    /// Those that were written, which are protected again.
    Taken,
    /// Those that were written and are mapped.
    Written,
    /// Those that were written or are not mapped.
    Dirty,
}

impl Which {
    /// What the kernel is asked for, but for the addresses. It may show as much as there are `regions`.
    fn asked(self, regions: &mut [Region]) -> Scan {
        const EITHER: u64 = PAGE_IS_WRITTEN | PAGE_IS_PRESENT;
        let size = size_of::<Scan>() as u64;
        let all = Scan { size, flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, ..Scan::default() };
        let (vec, vec_len) = (regions.as_mut_ptr() as u64, regions.len() as u64);
        let shown = Scan { vec, vec_len, return_mask: PAGE_IS_WRITTEN, ..all };
        let looked_at = Scan { flags: PM_SCAN_CHECK_WPASYNC, ..shown };
        match self {
            Self::Mapped => {
                Scan { flags: 0, category_mask: PAGE_IS_PRESENT, return_mask: PAGE_IS_PRESENT, ..shown }
            }
            Self::ToProtect => all,
            Self::Taken => Scan { category_mask: PAGE_IS_WRITTEN, ..shown },
            Self::Written => Scan { category_mask: EITHER, ..looked_at },
            Self::Dirty => {
                Scan { category_inverted: PAGE_IS_PRESENT, category_anyof_mask: EITHER, ..looked_at }
            }
        }
    }
}

/// PAGEMAP_SCAN and its argument, of linux/fs.h.
const PAGEMAP_SCAN: libc::Ioctl = libc::_IOWR::<Scan>(b'f' as u32, 16);
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// The mapping must be registered for it.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Pages in a row of the same categories, by address.
#[repr(C)]
#[derive(Clone, Copy)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}
