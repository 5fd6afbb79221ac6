//! The reading side of a verbs lane: RDMA READ straight into the landing place.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rdma_mummy_sys::ibv_wc_status;
use sideway::ibverbs::queue_pair::QueuePair;

use super::device::Registered;
use super::notify;
use super::queue_pair::Connection;
use super::queues::{Batch, Completions, WorkRequest};
use super::wire::KeyPair;
use crate::error::LaneError;
use crate::lane::{Completion, Lane, LaneClass, Read, Token};

/// On a bulk lane one read of so many is signalled, and the last of each batch. A completion says
/// that all reads before it are complete too: a queue pair completes in order.
const SIGNAL_EVERY: usize = 4;

/// One-sided reads over a reliable-connected queue pair. On an urgent lane every read is signalled.
///
/// Dropping the lane destroys the queue pair: no read writes to its landing place after that.
pub struct VerbsLane {
    connection: Connection,
    memories: Arc<Vec<Registered>>,
    keys: Vec<KeyPair>,
    depth: usize,
    signal_every: usize,
    /// Reads posted and not completed, in order.
    posted: VecDeque<Token>,
    /// How many reads were completed: the number of the first in `posted`.
    completed: u64,
    armed: bool,
    batch: Batch,
    polled: Completions,
}

impl VerbsLane {
    pub(crate) fn new(
        connection: Connection,
        memories: Arc<Vec<Registered>>,
        keys: Vec<KeyPair>,
        depth: usize,
        class: LaneClass,
    ) -> Self {
        let signal_every = if class == LaneClass::Urgent { 1 } else { SIGNAL_EVERY };
        let posted = VecDeque::with_capacity(depth);
        let (batch, polled) = (Batch::new(depth), Completions::new());
        let (completed, armed) = (0, false);
        Self { connection, memories, keys, depth, signal_every, posted, completed, armed, batch, polled }
    }
}

impl Lane for VerbsLane {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        let accepted = reads.len().min(self.room());
        if accepted == 0 {
            return Ok(0);
        }
        for (at, read) in reads[..accepted].iter().enumerate() {
            let (local, remote) = (read.local(), read.remote());
            let memory = &self.memories[usize::from(local.region)];
            let address = memory.memory.at(local.offset, local.len as usize);
            let address = address.expect("a LocalSlice lies in its region by construction");
            let request = WorkRequest {
                number: self.completed + self.posted.len() as u64,
                signalled: at + 1 == accepted || (at + 1) % self.signal_every == 0,
                local: address as u64,
                lkey: memory.key.lkey(),
                remote: remote.addr,
                rkey: KeyPair::translate(&self.keys, remote.key),
                len: local.len,
            };
            // SAFETY: the range was just checked to lie inside the registered memory, which
            // `self.memories` keeps registered and mapped until the queue pair is gone.
            unsafe { self.batch.push(request) };
            self.posted.push_back(read.token());
        }
        let posted = self.batch.post(&self.connection.pair);
        posted.map_err(|error| io::Error::other(format!("posting reads: {error}")))?;
        Ok(accepted)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        for done in self.polled.poll(&self.connection.completions)? {
            if done.status != ibv_wc_status::IBV_WC_SUCCESS {
                let at = done.wr_id.wrapping_sub(self.completed) as usize;
                return Err(LaneError::QueuePair {
                    queue_pair: self.connection.pair.qp_number(),
                    status: status_name(done.status),
                    vendor: done.vendor_err,
                    token: self.posted.get(at).copied().unwrap_or(Token(u64::MAX)),
                });
            }
            self.armed = false;
            while self.completed <= done.wr_id {
                let Some(token) = self.posted.pop_front() else {
                    return Err(LaneError::Protocol("the device completed a read that was not posted"));
                };
                self.completed += 1;
                completions.push(Completion { token, result: Ok(()) });
            }
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.depth - self.posted.len()
    }

    fn in_flight(&self) -> usize {
        self.posted.len()
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        // The request is good for one event, and a completion that came before it raises none. So:
        // request, have the caller poll once more, and only then let it sleep. A stale event means
        // that the request may be used up: ask again.
        let stale = notify::drain(&self.connection.channel);
        if self.armed && !stale {
            return Ok(true);
        }
        notify::request(&self.connection.completions)?;
        self.armed = true;
        Ok(false)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.connection.descriptor()
    }
}

/// The names of ibv_wc_status, as ibv_wc_status_str(3) has them.
fn status_name(status: u32) -> &'static str {
    const NAMES: [&str; 22] = [
        "success",
        "local length error",
        "local QP operation error",
        "local EE context operation error",
        "local protection error",
        "work request flushed",
        "memory window bind error",
        "bad response",
        "local access error",
        "remote invalid request",
        "remote access error (key revoked, or out of bounds)",
        "remote operation error",
        "transport retry counter exceeded (the peer does not answer)",
        "RNR retry counter exceeded",
        "local RDD violation",
        "remote invalid RD request",
        "remote abort",
        "invalid EE context number",
        "invalid EE context state",
        "fatal device error",
        "response timeout",
        "general error",
    ];
    NAMES.get(status as usize).copied().unwrap_or("unknown status")
}
