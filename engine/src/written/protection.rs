//! Writes noted by asynchronous write protection (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst and
//! userfaultfd.rst): a page is protected, the first write to it takes the protection away in the kernel, without
//! anybody being asked, and PAGEMAP_SCAN tells of those without and protects them again, each page at once.
//!
//! The userfaultfd must be made by the process whose pages they are. That it has one which nobody else uses is told
//! by its features; a duplicate is taken by pidfd_getfd(2), and all requests go by that.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use userfaultfd::{RegisterMode, Uffd};

use crate::memory::PAGE_SIZE;
use crate::page_set::PageSet;
use crate::pager::{errno, owned};

/// The feature of the userfaultfd that a process makes to have its writes noted (UFFD_FEATURE_WP_ASYNC of
/// linux/userfaultfd.h).
pub const WP_ASYNC: u64 = 1 << 15;
/// Regions that are asked for at once.
const REGIONS: usize = 512;

/// A duplicate of a userfaultfd that another process has made to have its own pages protected.
#[derive(Debug)]
pub(super) struct Tracker(Uffd);

impl Tracker {
    /// That of process `pid`, if it has one.
    ///
    /// Errors: this process may not take it.
    pub(super) fn of(pid: i32) -> io::Result<Option<Self>> {
        let process = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let process = pidfd_open(process, PidfdFlags::empty())?;
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            // It may have been closed meanwhile.
            let Ok(link) = std::fs::read_link(entry.path()) else { continue };
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let (Some(number), Some("anon_inode:[userfaultfd]")) = (number, link.to_str()) else { continue };
            let duplicate = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
            if features(&duplicate)?.is_some_and(|features| features & WP_ASYNC != 0) {
                return owned(duplicate).map(|tracker| Some(Self(tracker)));
            }
        }
        Ok(None)
    }
}

/// Features that a userfaultfd of this process was set up with: the second number behind `API:` in its fdinfo.
fn features(descriptor: &OwnedFd) -> io::Result<Option<u64>> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd()))?;
    let line = info.lines().find_map(|line| line.strip_prefix("API:"));
    Ok(line.and_then(|line| u64::from_str_radix(line.split(':').nth(1)?.trim(), 16).ok()))
}

/// Pages of another process that are protected until this is dropped.
#[derive(Debug)]
pub(super) struct Protection {
    tracker: Tracker,
    pagemap: File,
    base: u64,
    pages: u64,
}

impl Protection {
    /// Protects `pages` pages from address `base` on in the process of this folder in /proc.
    ///
    /// Errors: they are not one mapping, or another userfaultfd has it.
    pub(super) fn begin(tracker: Tracker, process: &Path, base: u64, pages: u64) -> io::Result<Self> {
        let pagemap = File::open(process.join("pagemap"))?;
        let (at, bytes) = (base as *mut libc::c_void, (pages * PAGE_SIZE) as usize);
        tracker.0.register_with_mode(at, bytes, RegisterMode::WRITE_PROTECT).map_err(errno)?;
        // From here on its end takes the registration with it.
        let protection = Self { tracker, pagemap, base, pages };
        protection.scan(Which::All, |_, _| ())?;
        Ok(protection)
    }

    /// The pages that were written since they were protected; they are again.
    pub(super) fn take(&self) -> io::Result<PageSet> {
        self.those(Which::Taken)
    }

    /// As [`WriteLog::dirty`](super::WriteLog::dirty).
    pub(super) fn dirty(&self) -> io::Result<PageSet> {
        self.those(Which::Dirty)
    }

    /// As [`WriteLog::written`](super::WriteLog::written).
    pub(super) fn written(&self) -> io::Result<PageSet> {
        self.those(Which::Written)
    }

    fn those(&self, which: Which) -> io::Result<PageSet> {
        let mut pages = PageSet::new(self.pages, false);
        self.scan(which, |from, end| pages.put(from, end, true))?;
        Ok(pages)
    }

    /// Shows these pages as the kernel finds them: from one and to another.
    fn scan(&self, which: Which, mut show: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut regions = [Region { start: 0, end: 0, categories: 0 }; REGIONS];
        let (mut at, end) = (self.base, self.base + self.pages * PAGE_SIZE);
        while at < end {
            let mut scan = Scan { start: at, end, ..which.asked(&mut regions) };
            // SAFETY: the request reads and writes its argument, and writes at most `vec_len` regions to `vec`, which are
            // none or `regions`; both are borrowed here alone until it returns.
            let found = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            if found < 0 {
                return Err(io::Error::last_os_error());
            }
            for region in regions.iter().take(found as usize) {
                show((region.start - self.base) / PAGE_SIZE, (region.end - self.base) / PAGE_SIZE);
            }
            if scan.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
            }
            at = scan.walk_end;
        }
        Ok(())
    }
}

impl Drop for Protection {
    fn drop(&mut self) {
        let (at, bytes) = (self.base as *mut libc::c_void, (self.pages * PAGE_SIZE) as usize);
        if let Err(error) = self.tracker.0.unregister(at, bytes) {
            // It may have ended.
            tracing::debug!(%error, "pages stay protected until they are written");
        }
    }
}

/// Pages of a scan.
#[derive(Clone, Copy)]
enum Which {
    /// All, which are protected and not shown.
    All,
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
            Self::All => all,
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
