//! What a QEMU that runs writes to its guest's RAM, and what it touches of it.

use std::sync::{Arc, Mutex};

use postcopy_engine::page_set::PageSet;
use postcopy_engine::session::{DirtyLog, GuestError, UseLog};
use postcopy_engine::touched::TouchedThere;
use postcopy_engine::written::{Way, WriteLog};
use serde_json::json;

use super::backend::Backend;
use super::qmp::Qmp;
use super::{QemuError, locked, ram};

/// What to do about a QEMU of which nobody sees what it writes.
const NOT_NOTED: &str =
    "use --mode postcopy, or start QEMU with libpostcopy_handover.so preloaded (Linux 6.7)";

/// Begins to note what QEMU writes to its guest's RAM. The guest is stopped for a moment then: a device
/// that had taken an address before, and writes to it unseen, has written when QEMU says that it stands still.
///
/// Errors: that cannot be told here, with the reason.
pub(super) fn log_dirty(qmp: &Arc<Mutex<Qmp>>, ram: &[Backend]) -> Result<Box<dyn DirtyLog>, QemuError> {
    let pid = locked(qmp).peer()?;
    let way = Way::of(pid).map_err(|error| QemuError::Unfit(format!("{error}; {NOT_NOTED}")))?;
    let log = way.begin(ram::places(pid, ram)?).map_err(|error| match error.kind() {
        std::io::ErrorKind::Unsupported => QemuError::Unfit(format!("{error}; {NOT_NOTED}")),
        _ => ram::looking(pid, "what it writes")(error),
    })?;
    while_stopped(&mut locked(qmp), || Ok(()))?;
    let stopped_by = (!log.is_taken_at_once()).then(|| qmp.clone());
    Ok(Box::new(QemuDirtyLog { log, earlier: PageSet::default(), stopped_by }))
}

/// Begins to note what QEMU touches, where it has the library for that preloaded; else what it writes, where that can be
/// had; else nothing. The guest is not stopped, so that of a write that is under way nothing may be seen: it is a hint.
///
/// Errors: it can be had, and was not.
pub(super) fn watch(qmp: &Arc<Mutex<Qmp>>, ram: &[Backend]) -> Result<Option<Box<dyn UseLog>>, QemuError> {
    let pid = locked(qmp).peer()?;
    let places = ram::places(pid, ram)?;
    match TouchedThere::of(pid, &places) {
        Ok(Some(touched)) => return Ok(Some(Box::new(touched))),
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "what the guest touches cannot be seen"),
    }
    let unknown = |error: &std::io::Error| tracing::debug!(%error, "what the guest uses last is not known");
    let Ok(way) = Way::of(pid).inspect_err(unknown) else { return Ok(None) };
    match way.begin(places) {
        Ok(log) => Ok(Some(Box::new(QemuDirtyLog { log, earlier: PageSet::default(), stopped_by: None }))),
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
            unknown(&error);
            Ok(None)
        }
        Err(error) => Err(ram::looking(pid, "what it writes")(error)),
    }
}

/// Does something while the guest stands still with no device at work.
fn while_stopped<T>(qmp: &mut Qmp, work: impl FnOnce() -> Result<T, QemuError>) -> Result<T, QemuError> {
    // Somebody may have stopped it.
    let running = qmp.execute("query-status", &json!({}))?["running"] == true;
    qmp.execute("stop", &json!({}))?;
    let done = work();
    if running {
        qmp.execute("cont", &json!({}))?;
    }
    done
}

/// What a QEMU has written to its guest's RAM.
struct QemuDirtyLog {
    log: WriteLog,
    /// What was written before the mark.
    earlier: PageSet,
    /// Who stops the guest for a mark, where nothing may be missed and something could be.
    stopped_by: Option<Arc<Mutex<Qmp>>>,
}

impl UseLog for QemuDirtyLog {
    /// Where reading what was written and beginning anew are two things, nothing may be written between: the guest is
    /// stopped for a moment.
    fn mark(&mut self) -> Result<(), GuestError> {
        let Self { log, earlier, stopped_by } = self;
        let mut take = || log.take().map_err(QemuError::system("reading what QEMU writes"));
        let taken = match stopped_by {
            None => take(),
            Some(qmp) => while_stopped(&mut locked(qmp), take),
        };
        earlier.add(&taken?);
        Ok(())
    }

    fn mark_stops_guest(&self) -> bool {
        self.stopped_by.is_some()
    }

    fn since_mark(&mut self) -> Result<PageSet, GuestError> {
        Ok(self.log.written()?)
    }
}

impl DirtyLog for QemuDirtyLog {
    fn dirty(self: Box<Self>) -> Result<PageSet, GuestError> {
        let Self { log, mut earlier, .. } = *self;
        earlier.add(&log.dirty()?);
        Ok(earlier)
    }
}
