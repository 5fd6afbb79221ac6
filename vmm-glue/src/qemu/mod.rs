//! Stock QEMU guests: unmodified, driven by QMP, their memory brought by our pager.
//!
//! The guest's RAM is a shared file in memory. QEMU's own migration, with the capability
//! `x-ignore-shared`, carries processors and devices only, into and out of our session; the RAM is
//! left to the engine.
//!
//! ```text
//!  source                                      destination
//!  QEMU, any that runs     QMP                 QEMU -incoming defer, libpostcopy_handover.so preloaded
//!    │ RAM file ◀── ram.rs, /proc/PID/fd         │ maps its RAM: userfaultfd, RAM file ──▶ handover.rs
//!    │ `migrate fd:…` ──▶ state as bytes         │ `migrate-incoming unix:…` ◀── state as bytes
//!    ▼                                           ▼
//!  guest.rs: SourceGuest  ── the session ──▶  host.rs: DestinationHost; guest.rs: DestinationGuest
//! ```
//!
//! `facts.rs` says what a QEMU is, and refuses before anything stops what could not be moved;
//! `backend.rs`, what its RAM is made of; `foreign.rs`, who else would reach its memory. `settings.rs` has what QEMU is set to meanwhile, `uses.rs`
//! what it writes and touches. `taken_over.rs` is how a process goes on with what another has taken in that was killed. `balloon.rs` takes what is free out of the guest before, `self_balloon.rs` all the time.

mod backend;
mod balloon;
mod facts;
mod foreign;
mod guest;
mod handover;
mod host;
mod process;
mod qmp;
mod ram;
mod self_balloon;
mod settings;
mod taken_over;
mod uses;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use balloon::Inflated;
pub use facts::Facts;
pub use guest::QemuGuest;
pub use host::{QemuCommand, QemuHost};
pub use process::Ended;
pub use self_balloon::{SelfBalloon, Share, Turn};
pub use taken_over::TakenOver;

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What can go wrong between us and a QEMU. The text says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// Its monitor cannot be reached.
    #[error(
        "cannot reach QEMU's monitor at {path}: {source}; was it started with -qmp unix:{path},server=on,wait=off, \
             and is no other client connected?"
    )]
    Monitor {
        /// The socket.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It ended, or closed its monitor.
    #[error("QEMU has ended{said}")]
    Ended {
        /// What it said last, with a colon before.
        said: String,
    },
    /// It refused a command.
    #[error("QEMU refused `{command}`: {reason}")]
    Command {
        /// Of QMP.
        command: String,
        /// As QEMU says it.
        reason: String,
    },
    /// It answered what QMP does not say.
    #[error("QEMU answered `{command}` in an unknown way: {answer}")]
    Answer {
        /// Of QMP.
        command: String,
        /// What it was.
        answer: String,
    },
    /// Its migration failed.
    #[error("QEMU could not {what}: {reason}")]
    Migration {
        /// Save or load.
        what: &'static str,
        /// As QEMU says it.
        reason: String,
    },
    /// Such a guest cannot be moved.
    #[error("this guest cannot be moved: {0}")]
    Unfit(String),
    /// What is free cannot be taken out of the guest.
    #[error("the guest's free memory cannot be taken: {0}")]
    Balloon(String),
    /// The two sides do not fit.
    #[error("the guest does not fit this side: {0}")]
    Unlike(String),
    /// The command line of a destination is not right.
    #[error("{0}")]
    Arguments(String),
    /// The system refused something.
    #[error("{operation}: {source}")]
    System {
        /// What was tried.
        operation: String,
        /// What it said.
        source: std::io::Error,
    },
}

impl QemuError {
    fn system(operation: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::System { operation, source }
    }
}
