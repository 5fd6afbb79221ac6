//! The seam: a lane is a queue of one-sided reads.

use std::os::fd::BorrowedFd;

use crate::error::{LaneError, ReadError};
use crate::region::{LocalSlice, RemoteSlice};

/// The caller's name for a read; comes back with its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What a lane is for. Both sides know it, and serve it accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LaneClass {
    /// Somebody waits for each read: latency first.
    Urgent,
    /// Many reads in flight: rate first.
    Bulk,
}

/// One one-sided read: so many bytes from there to here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    token: Token,
    local: LocalSlice,
    remote: RemoteSlice,
}

impl Read {
    /// A read of `remote` into `local`, or `None` if their lengths differ.
    pub fn new(token: Token, local: LocalSlice, remote: RemoteSlice) -> Option<Self> {
        (local.len == remote.len).then_some(Self { token, local, remote })
    }

    /// The caller's name for it.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Where the bytes land.
    pub fn local(&self) -> LocalSlice {
        self.local
    }

    /// Where the bytes come from.
    pub fn remote(&self) -> RemoteSlice {
        self.remote
    }
}

/// The end of a read. On `Ok` every byte is in its landing place; on `Err` the landing place may
/// hold anything, and nothing more will be written there.
#[derive(Debug)]
pub struct Completion {
    /// The read that ended.
    pub token: Token,
    /// How it ended.
    pub result: Result<(), ReadError>,
}

/// A queue of one-sided reads over one connection. Completions may come in any order.
///
/// A lane that returned a [`LaneError`] is dead. Its reads in flight will not complete, and once
/// the lane has been *dropped* none of them writes to its landing place any more: drop first, read
/// again on another lane after.
pub trait Lane: Send {
    /// Posts as many of `reads` as there is room for, in order, and says how many that was.
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError>;

    /// Appends what has completed to `completions`. Never blocks.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError>;

    /// How many more reads can be posted now.
    fn room(&self) -> usize;

    /// Reads posted and not yet completed.
    fn in_flight(&self) -> usize;

    /// Prepares to sleep on [`Lane::descriptor`]: after `Ok(true)` the descriptor becomes readable
    /// when there is something to poll; `Ok(false)` says poll once more first.
    fn arm(&mut self) -> Result<bool, LaneError>;

    /// The descriptor to wait on, for reading, after [`Lane::arm`].
    fn descriptor(&self) -> BorrowedFd<'_>;
}
