//! What can go wrong, by what it costs: a set-up, a lane, or one read.

use std::io;

use crate::lane::Token;

/// A set-up failed: a device, a registration, an offer from the peer. Nothing was moved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// This build or this machine has no such transport.
    #[error("transport {transport} is not available here: {reason}")]
    Unavailable {
        /// Its name.
        transport: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// An option that makes no sense, here or on this device.
    #[error("{reason}")]
    Option {
        /// Which, and what would do.
        reason: String,
    },
    /// Registering memory with the device failed.
    #[error(
        "cannot register {bytes} bytes of memory with {device}: {source}; \
         if this is ENOMEM, raise the locked-memory limit (ulimit -l, now {memlock}) and try again"
    )]
    Register {
        /// The RDMA device.
        device: String,
        /// Length of the memory.
        bytes: usize,
        /// The limit in force, in words.
        memlock: String,
        /// What the verbs library said.
        source: io::Error,
    },
    /// A verbs call on the way to a connected lane failed.
    #[error("verbs: {operation} on {device} failed: {reason}")]
    Verbs {
        /// The call.
        operation: &'static str,
        /// The RDMA device.
        device: String,
        /// What the library said.
        reason: String,
    },
    /// The peer's set-up message does not say what it must.
    #[error("the peer's {what} is malformed; both sides must run the same protocol version")]
    Malformed {
        /// Which message.
        what: &'static str,
    },
    /// The system refused something.
    #[error("{operation} failed: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl SetupError {
    pub(crate) fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }
}

/// A lane is dead. Reads in flight on it are lost; other lanes go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// The peer closed the connection.
    #[error("the peer closed the lane")]
    Closed,
    /// The connection broke.
    #[error("the lane's connection broke: {0}")]
    Io(#[from] io::Error),
    /// The peer broke the protocol.
    #[error("the peer broke the lane protocol: {0}")]
    Protocol(&'static str),
    /// A queue pair went into the error state.
    #[error("queue pair {queue_pair:#x} failed: {status} (vendor error {vendor:#x}) at read {token:?}")]
    QueuePair {
        /// Its number.
        queue_pair: u32,
        /// The work completion status.
        status: &'static str,
        /// The device's own code.
        vendor: u32,
        /// The read that failed first.
        token: Token,
    },
}

/// One read failed; the lane goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The peer refused the key or the bounds.
    #[error("the peer refused access: unknown key or out of bounds")]
    Refused,
}
