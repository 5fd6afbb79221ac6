//! Which pages another process writes to a part of its address space, seen from outside.
//!
//! The kernel notes it in two ways, each in a file of this folder; the first that can be had is taken:
//!
//! | | needs | looked at and begun anew |
//! |---|---|---|
//! | `protection.rs`: pages are write-protected, the first write takes that away | Linux 6.7, a userfaultfd that the process has made | at once: the process may run |
//! | `soft_dirty.rs`: a bit for each page | CONFIG_MEM_SOFT_DIRTY, and no hugetlbfs | one after the other: the process must not write meanwhile |

mod protection;
mod soft_dirty;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use self::protection::Protection;
use crate::page_set::PageSet;
use crate::places::Places;
use crate::proc_pages::{Entry, each, is_hugetlbfs};
use crate::tracker::Tracker;
pub use crate::tracker::WP_ASYNC;

/// Writes of a process to a part of its address space, noted until this is dropped.
#[derive(Debug)]
pub struct WriteLog {
    process: PathBuf,
    places: Places,
    by: By,
}

/// How writes of a process can be noted.
#[derive(Debug)]
pub struct Way {
    pid: i32,
    /// What its pages are to be protected by; none: soft-dirty bits.
    tracker: Option<Tracker>,
}

#[derive(Debug)]
enum By {
    Protection(Protection),
    SoftDirty,
}

impl Way {
    /// How writes of process `pid` can be noted.
    ///
    /// Errors: they cannot, with the reason; or this process may not look into that one.
    pub fn of(pid: i32) -> io::Result<Self> {
        let without = match Tracker::of(pid, |features| features & WP_ASYNC != 0) {
            Ok(Some(tracker)) => return Ok(Self { pid, tracker: Some(tracker) }),
            Ok(None) => "the process has made no userfaultfd to protect its pages by".to_owned(),
            Err(error) => format!("its userfaultfd cannot be had ({error})"),
        };
        if soft_dirty::is_noted()? {
            return Ok(Self { pid, tracker: None });
        }
        let text = format!(
            "which pages the process writes cannot be seen: this kernel has no bits for it (CONFIG_MEM_SOFT_DIRTY is \
             not set), and {without}"
        );
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }

    /// Begins to note what the process writes to these places.
    ///
    /// A write of a device that took the address before is not seen: what is under way must end before anything
    /// relies on this.
    ///
    /// Errors: one of them is no mapping, or of pages whose writes are not noted in this way; or the process is gone.
    pub fn begin(self, places: Places) -> io::Result<WriteLog> {
        let Self { pid, tracker } = self;
        let process = PathBuf::from(format!("/proc/{pid}"));
        let by = match tracker {
            Some(tracker) => By::Protection(Protection::begin(tracker, &process, &places)?),
            None if is_hugetlbfs(pid, &places)? => {
                let text = "which pages the process writes cannot be seen: they are of hugetlbfs, for which the kernel keeps no \
                            soft-dirty bits, and the process has made no userfaultfd to protect them by";
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            }
            None => {
                soft_dirty::clear(&process)?;
                By::SoftDirty
            }
        };
        tracing::debug!(?process, ?by, "writes of a process are noted");
        Ok(WriteLog { process, places, by })
    }
}

impl WriteLog {
    /// Whether [`WriteLog::take`] misses nothing that is written while it is at work.
    pub fn is_taken_at_once(&self) -> bool {
        matches!(self.by, By::Protection(_))
    }

    /// Pages that may have been written since, more are no harm; and begins anew. Unless it is
    /// [taken at once](WriteLog::is_taken_at_once) nothing may be written meanwhile: it would not be noted.
    ///
    /// Errors: the process is gone.
    pub fn take(&mut self) -> io::Result<PageSet> {
        match &self.by {
            By::Protection(protection) => protection.take(),
            By::SoftDirty => {
                let dirty = self.dirty()?;
                soft_dirty::clear(&self.process)?;
                Ok(dirty)
            }
        }
    }

    /// The pages that may have been written since. A page that is not mapped any more, because it was
    /// given back or went to swap, counts as written.
    ///
    /// Errors: the process is gone.
    pub fn dirty(&self) -> io::Result<PageSet> {
        match &self.by {
            By::Protection(protection) => protection.dirty(),
            By::SoftDirty => self.those(|entry| !entry.is_present() || entry.is_soft_dirty()),
        }
    }

    /// The pages that were written since, as far as they are mapped still.
    ///
    /// Errors: the process is gone.
    pub fn written(&self) -> io::Result<PageSet> {
        match &self.by {
            By::Protection(protection) => protection.written(),
            By::SoftDirty => self.those(|entry| entry.is_present() && entry.is_soft_dirty()),
        }
    }

    fn those(&self, wanted: impl Fn(Entry) -> bool) -> io::Result<PageSet> {
        let mut pages = PageSet::new(self.places.pages(), false);
        each(&self.process, &self.places, |page, entry| {
            if wanted(entry) {
                pages.put(page, page + 1, true);
            }
        })?;
        Ok(pages)
    }
}
