//! A userfaultfd that another process has made to have its own pages watched, and that this one works with.
//!
//! It must be made by the process whose pages they are. That it has one which nobody else uses is told by its
//! features; a duplicate is taken by pidfd_getfd(2), and all requests go by that.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use userfaultfd::{RegisterMode, Uffd};

use crate::pager::{errno, owned};
use crate::places::Places;

/// The feature of the userfaultfd that a process makes to have its writes noted (UFFD_FEATURE_WP_ASYNC of
/// linux/userfaultfd.h, Linux 6.7).
pub const WP_ASYNC: u64 = 1 << 15;
/// UFFD_FEATURE_WP_HUGETLBFS_SHMEM (Linux 5.19), the only feature of that which it makes where there is no other.
pub(crate) const WP_SHMEM: u64 = 1 << 12;
/// What the kernel says besides of one that is set up.
const INITIALIZED: u64 = 1 << 31;

/// A duplicate of such a userfaultfd.
#[derive(Debug)]
pub(crate) struct Tracker(Uffd);

impl Tracker {
    /// That of process `pid` whose features are wanted, if it has one.
    ///
    /// Errors: this process may not take it.
    pub(crate) fn of(pid: i32, wanted: impl Fn(u64) -> bool) -> io::Result<Option<Self>> {
        let process = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let process = pidfd_open(process, PidfdFlags::empty())?;
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            // It may have been closed meanwhile.
            let Ok(link) = std::fs::read_link(entry.path()) else { continue };
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let (Some(number), Some("anon_inode:[userfaultfd]")) = (number, link.to_str()) else { continue };
            let duplicate = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
            if features(&duplicate)?.is_some_and(&wanted) {
                return owned(duplicate).map(|tracker| Some(Self(tracker)));
            }
        }
        Ok(None)
    }

    /// Registers these places in its process for write protection, and protects none.
    ///
    /// Errors: one of them is not one mapping, or another userfaultfd has it.
    pub(crate) fn register(self, places: &Places) -> io::Result<Registered> {
        let mut registered = Registered { tracker: self, places: places.clone(), done: 0 };
        for place in places.each() {
            let (at, len) = (place.address as *mut libc::c_void, place.len as usize);
            let mode = RegisterMode::WRITE_PROTECT;
            registered.tracker.0.register_with_mode(at, len, mode).map_err(errno)?;
            registered.done += 1;
        }
        Ok(registered)
    }
}

/// Features that a userfaultfd of this process was set up with: the second number behind `API:` in its fdinfo.
fn features(descriptor: &OwnedFd) -> io::Result<Option<u64>> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd()))?;
    let line = info.lines().find_map(|line| line.strip_prefix("API:"));
    let features = line.and_then(|line| u64::from_str_radix(line.split(':').nth(1)?.trim(), 16).ok());
    Ok(features.map(|features| features & !INITIALIZED))
}

/// Pages of another process that are registered until this is dropped.
#[derive(Debug)]
pub(crate) struct Registered {
    tracker: Tracker,
    pub(crate) places: Places,
    /// How many of the places are.
    done: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        for place in self.places.each().take(self.done) {
            let (at, len) = (place.address as *mut libc::c_void, place.len as usize);
            if let Err(error) = self.tracker.0.unregister(at, len) {
                // It may have ended.
                tracing::debug!(%error, "pages stay registered, and protected until they are written");
            }
        }
    }
}
