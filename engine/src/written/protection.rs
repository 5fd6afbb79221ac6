//! Writes noted by asynchronous write protection (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst and
//! userfaultfd.rst): a page is protected, the first write to it takes the protection away in the kernel, without
//! anybody being asked, and PAGEMAP_SCAN tells of those without and protects them again, each page at once.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::page_set::PageSet;
use crate::places::Places;
use crate::proc_pages::{Which, scan};
use crate::tracker::{Registered, Tracker};

/// Pages of another process that are protected until this is dropped.
#[derive(Debug)]
pub(super) struct Protection {
    pagemap: File,
    pages: Registered,
}

impl Protection {
    /// Protects the pages of these places in the process of this folder in /proc.
    ///
    /// Errors: one of them is not one mapping, or another userfaultfd has it.
    pub(super) fn begin(tracker: Tracker, process: &Path, places: &Places) -> io::Result<Self> {
        let pagemap = File::open(process.join("pagemap"))?;
        let protection = Self { pagemap, pages: tracker.register(places)? };
        protection.those(Which::ToProtect)?;
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
        scan(&self.pagemap, &self.pages.places, which)
    }
}
