//! A shared mapping of files, where huge pages can be mapped.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::ptr::null_mut;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use rustix::param::page_size;

use super::{FilePart, HUGE_PAGE, hugetlbfs_page};

/// A shared mapping of the first bytes of files, one after the other. One that is as long as a huge page begins at a
/// multiple of that, so that a huge page of the first file is one of the mapping, and one of each that follows on such
/// a multiple; larger ones of hugetlbfs likewise.
pub(super) struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: a mapping is an address and a length; what is there is reached by raw pointers only, by
// whoever has unsafe code of his own.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the files, one after the other.
    ///
    /// Errors: the length of one that others follow is no multiple of a page's, or what mmap(2) reports.
    pub(super) fn new(files: &[FilePart], protection: ProtFlags) -> io::Result<Self> {
        let whole = |part: &FilePart| part.len.is_multiple_of(page_size());
        let sum = files.iter().try_fold(0usize, |sum, part| sum.checked_add(part.len));
        let len = sum.filter(|_| files.iter().rev().skip(1).all(whole)).ok_or(io::ErrorKind::InvalidInput)?;
        if let ([FilePart { file, .. }], ..HUGE_PAGE) = (files, len) {
            // SAFETY: the kernel chooses the place, so nothing that is mapped is replaced.
            let base = unsafe { mmap(null_mut(), len, protection, MapFlags::SHARED, file, 0) }?;
            return Ok(Self { base: base.cast(), len });
        }
        let mut align = HUGE_PAGE;
        for FilePart { file, .. } in files {
            align = align.max(hugetlbfs_page(file.as_fd())?.map_or(0, |page| page as usize));
        }
        let room = len.checked_add(align).ok_or(io::ErrorKind::InvalidInput)?;
        let none = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: as above.
        let room_at = unsafe { mmap_anonymous(null_mut(), room, ProtFlags::empty(), none) }?;
        // Never unmapped as a whole: where a file cannot be mapped, the kernel may have left a gap in
        // it, which is somebody else's by then. What stays then are addresses, not memory.
        let room = ManuallyDrop::new(Self { base: room_at.cast(), len: room });
        let skipped = room.base.addr().wrapping_neg() % align;
        let base = room.base.wrapping_add(skipped);
        let fixed = MapFlags::SHARED | MapFlags::FIXED;
        // Unmapped, should one of them fail.
        let mut mapped = Self { base, len: 0 };
        for FilePart { file, len } in files {
            let at = base.wrapping_add(mapped.len);
            // SAFETY: the place lies in what was reserved just now, which nobody else knows; all files together are
            // shorter by what it is aligned to, and less than that is skipped.
            unsafe { mmap(at.cast(), *len, protection, fixed, file, 0) }?;
            mapped.len += len;
        }
        // The kernel has mapped whole pages.
        let end = skipped + len.next_multiple_of(page_size());
        drop(Self { base: room.base, len: skipped });
        drop(Self { base: room.base.wrapping_add(end), len: room.len - end });
        Ok(mapped)
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: these pages were mapped by `new` and belong to this value alone.
            let unmapped = unsafe { munmap(self.base.cast(), self.len) };
            debug_assert!(unmapped.is_ok(), "{unmapped:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostMemory;
    use super::*;

    /// Mappings of this process that have `name` in their line, as address ranges.
    fn mapped(name: &str) -> Vec<(usize, usize)> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let hex = |text: &str| usize::from_str_radix(text, 16).unwrap();
        let range = |line: &str| {
            let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
            (hex(from), hex(to))
        };
        maps.lines().filter(|line| line.contains(name)).map(range).collect()
    }

    #[test]
    fn long_mappings_begin_at_a_huge_page_and_leave_nothing_behind() {
        for len in [1, 4096, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE + 4096] {
            let name = format!("mapping-test-{len}-");
            let memory = HostMemory::anonymous(&name, len).unwrap();
            let again = memory.map_again().unwrap();
            for one in [&memory, &again] {
                assert!(len < HUGE_PAGE || one.base().addr().is_multiple_of(HUGE_PAGE), "{len}");
                assert!(one.write(len as u64 - 1, &[7]) && !one.write(len as u64, &[7]));
            }
            let all = mapped(&name);
            assert_eq!(all.iter().map(|(from, to)| to - from).sum::<usize>(), 2 * len.next_multiple_of(4096));
            drop((memory, again));
            assert!(mapped(&name).is_empty(), "{len}");
        }
    }
}
