//! The control plane: one guest's move from source to destination.
//!
//! ```text
//!  source                                             destination
//!  Running    ── Offer ─────────────────────────────▶ prepares memory, trap, device
//!             ◀─ Accept (lane requests) ────────────
//!  exports    ── Granted (grants, keys) ────────────▶ connects lanes, starts the pager
//!             ◀─ Progress … ────────────────────────  hybrid: reads all of it once
//!             ◀─ LanesReady ────────────────────────
//!             ── Order … ───────────────────────────▶ where it asked for one: lays out the pages
//!  saves      ── State … ───────────────────────────▶ loads it                        Prepared
//!  Frozen     ── Recent, StateEnd ──────────────────▶ may read memory, and has loaded
//!             ◀─ StateLoaded ───────────────────────
//!  HandedOver ── Commit ────────────────────────────▶ resumes the guest           Resumed
//!             ◀─ Resumed, Progress … ───────────────  faults and drain, one-sided
//!             ◀─ Resident ──────────────────────────  every page is here          Resident
//!  Released   ── Release ───────────────────────────▶
//! ```
//!
//! One owner at any time. Before Commit the guest is the source's: whatever goes wrong, it runs
//! on there. From the moment Commit may have left, the source never runs it by itself: if the
//! answer does not come, the guest is *in doubt*, and a person ends that. When the two sides lose each other
//! after that, the source keeps the memory and comes back: see `owed.rs`.

mod channel;
mod course;
mod destination;
mod dirty;
mod dock;
mod door;
mod drain;
mod message;
mod owed;
mod preamble;
mod query_migrate;
mod report;
mod round;
mod source;
mod state;
mod tls;
mod track;
mod unpack;

use std::net::SocketAddr;
use std::time::Duration;

pub use destination::{Arrived, DestinationGuest, DestinationHost, ReceiveOptions, receive};
pub use dirty::{DirtyLog, RECENCY_LAPS, UseLog, last_first};
pub use drain::{Drain, Limiter, Parted, Rejoined};
#[cfg(feature = "fuzz")]
pub(crate) use message::fuzz_frame;
pub use message::{GuestDescription, Mode, PageOrder};
pub use owed::{Owed, RecoverOptions, recover};
pub use preamble::PROTOCOL_VERSION;
#[cfg(feature = "fuzz")]
pub(crate) use preamble::fuzz_preamble;
pub use query_migrate::{QueryMigrate, QueryRam};
pub use report::{ArrivalReport, MigrationReport, Phase, Progress, REPORT_VERSION};
pub use source::{MigrateOptions, MigrationError, Owner, SourceGuest, migrate};
pub use tls::{DestinationTls, SourceTls, TlsError};

use crate::pager::PagerError;

/// What a VMM reports when a guest operation fails. The message should say what to do.
pub type GuestError = Box<dyn std::error::Error + Send + Sync>;

/// How long to wait for a message that needs little work of the peer.
pub const STEP_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a message that needs much: registering memory, loading state. 256 GiB
/// register in some 60 s.
pub const WORK_PATIENCE: Duration = Duration::from_secs(120);
/// How long to wait for progress of the drain, which is told ten times a second.
pub const DRAIN_PATIENCE: Duration = postcopy_transport::tcp::LOST_AFTER;

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Nobody listens there, or no way leads there.
    #[error("cannot reach {peer}: {source}; is the destination listening there?")]
    Unreachable {
        /// Who.
        peer: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another port, or end what uses it")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The peer speaks something else.
    #[error("the peer does not speak this protocol; is it another program's port?")]
    NotOurs,
    /// The peer speaks another version.
    #[error(
        "the peer speaks protocol version {theirs}, this program {ours}; use the same release on both sides"
    )]
    Version {
        /// The peer's.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
    /// The peer closed the connection.
    #[error(
        "the peer closed the connection while this side waited for {waiting_for}; see its log for the reason"
    )]
    Closed {
        /// What was due.
        waiting_for: &'static str,
    },
    /// The peer said nothing in time.
    #[error("the peer said nothing for {patience:?} while this side waited for {waiting_for}")]
    Silent {
        /// What was due.
        waiting_for: &'static str,
        /// How long.
        patience: Duration,
    },
    /// [`MigrateOptions::called_off`] said so.
    #[error("it was called off")]
    CalledOff,
    /// The destination was lost after the handover, and could not be reached again.
    #[error("{first}; and it was not reached again: {last}")]
    NotReached {
        /// How it was lost.
        first: Box<SessionError>,
        /// What came of the last attempt.
        last: Box<SessionError>,
    },
    /// The connection broke.
    #[error("the control connection broke: {source}")]
    Connection {
        /// What the system said.
        source: std::io::Error,
    },
    /// One side wants to know who the other is, and that one does not say.
    #[error("{}", if *ours {
        "this side is set up for TLS, and the peer is not; give the peer certificates too (--tls)"
    } else {
        "the peer is set up for TLS, and this side is not; give this side certificates too (--tls)"
    })]
    OneSided {
        /// Whether it is this side that does.
        ours: bool,
    },
    /// The two sides do not trust each other.
    #[error("the peer is not who it has to be, or does not take this side for it: {source}; see docs/tls.md")]
    Untrusted {
        /// What TLS says of it.
        source: std::io::Error,
    },
    /// The peer said no.
    #[error("the peer refused: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// Nothing that the source offered can be used here.
    #[error("no transport of those offered ({offered}) works here: {reason}")]
    NoTransport {
        /// Their names.
        offered: String,
        /// Why not, for each.
        reason: String,
    },
    /// The peer sent a message that does not belong here.
    #[error("the peer sent {message} while this side waited for {waiting_for}")]
    Unexpected {
        /// Its name.
        message: &'static str,
        /// What was due.
        waiting_for: &'static str,
    },
    /// The peer sent bytes that no message has.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// A transport could not be set up.
    #[error(transparent)]
    Transport(#[from] postcopy_transport::SetupError),
    /// The pager could not start, or stopped.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// The VMM failed.
    #[error("{operation}: {source}")]
    Guest {
        /// What was asked of it.
        operation: &'static str,
        /// What it said.
        source: GuestError,
    },
    /// No memory for the guest.
    #[error("cannot make {bytes} bytes of guest memory: {source}")]
    Memory {
        /// How much.
        bytes: u64,
        /// What the system said.
        source: std::io::Error,
    },
}

impl SessionError {
    /// Whether the peer was not heard, so that it may be heard later.
    fn is_of_the_network(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Closed { .. } | Self::Silent { .. } | Self::Connection { .. }
        )
    }
}

/// Runs blocking work off the control plane's thread, from now on; the result can be awaited.
fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> {
    let begun = tokio::task::spawn_blocking(work);
    async {
        match begun.await {
            Ok(done) => done,
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }
}
