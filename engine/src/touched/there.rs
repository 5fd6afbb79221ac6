//! What another process touches of mappings of its own.

use std::io;
use std::path::PathBuf;

use super::away::Away;
use crate::page_set::PageSet;
use crate::places::Places;
use crate::proc_pages::mapped_in;
use crate::session::{GuestError, UseLog};
use crate::tracker::{Registered, Tracker, WP_ASYNC, WP_SHMEM};

/// Mappings of another process that are watched until this is dropped. Costs it a minor fault for each page that is
/// touched.
#[derive(Debug)]
pub struct TouchedThere {
    process: PathBuf,
    away: Away,
    /// Registered, no page stands for others.
    pages: Registered,
}

impl TouchedThere {
    /// Begins to watch these places of process `pid`. Nothing, if the
    /// process has not what it takes (libpostcopy_handover.so, Linux 5.19).
    ///
    /// Errors: this process may not look into that one, another userfaultfd has one of them, or its memory is locked.
    pub fn of(pid: i32, places: &Places) -> io::Result<Option<Self>> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let Some(away) = Away::of(&process)? else { return Ok(None) };
        let made_for_it = |features| features & WP_ASYNC != 0 || features == WP_SHMEM;
        let Some(tracker) = Tracker::of(pid, made_for_it)? else { return Ok(None) };
        let watch = Self { process, away, pages: tracker.register(places)? };
        watch.away.take_out()?;
        Ok(Some(watch))
    }
}

/// What it touches counts, whether it reads or writes.
impl UseLog for TouchedThere {
    fn mark(&mut self) -> Result<(), GuestError> {
        Ok(self.away.take_out()?)
    }

    fn since_mark(&mut self) -> Result<PageSet, GuestError> {
        Ok(mapped_in(&self.process, &self.pages.places)?)
    }
}
