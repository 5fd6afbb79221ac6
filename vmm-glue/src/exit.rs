//! How the embedder learns that the guest has ended.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest reset itself through the keyboard controller: a reboot, the power-off of a
    /// machine without ACPI, or a panic with `panic=-1`.
    Reset,
    /// A triple fault. Some kernels reboot this way when nothing else works.
    TripleFault,
    /// The user asked for the end at the console (Ctrl-A x).
    ConsoleQuit,
    /// KVM could not run the guest any further.
    Failed(String),
}

impl ExitReason {
    /// Whether it says that something went wrong.
    pub fn failed(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::TripleFault)
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => f.write_str("it reset itself"),
            Self::TripleFault => f.write_str("it ended in a triple fault"),
            Self::ConsoleQuit => f.write_str("it was ended from the console"),
            Self::Failed(what) => write!(f, "KVM could not run it further: {what}"),
        }
    }
}

/// An event that happens at most once: the guest's end. The first reason given stays.
#[derive(Debug)]
pub struct ExitEvent {
    event: EventFd,
    reason: Mutex<Option<ExitReason>>,
    changed: Condvar,
}

impl ExitEvent {
    pub(crate) fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { event, reason: Mutex::new(None), changed: Condvar::new() })
    }

    /// Records the end, unless it has been recorded.
    pub(crate) fn set(&self, reason: ExitReason) {
        let mut current = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if current.is_none() {
            tracing::info!(%reason, "the guest ended");
            *current = Some(reason);
            self.changed.notify_all();
            if let Err(error) = self.event.write(1) {
                tracing::error!(%error, "cannot signal the guest's end");
            }
        }
    }

    /// Why the guest ended, if it has.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the guest ends, at most `timeout`.
    pub fn wait(&self, timeout: Duration) -> Option<ExitReason> {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        let (reason, _) = self
            .changed
            .wait_timeout_while(reason, timeout, |reason| reason.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        reason.clone()
    }
}

/// An eventfd that becomes readable, and stays so, when the guest has ended: for poll(2), epoll(7)
/// or an `AsyncFd`. Nobody needs to read it.
impl AsRawFd for ExitEvent {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl AsFd for ExitEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}
