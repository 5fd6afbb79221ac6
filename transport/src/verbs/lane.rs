//! The reading side of a verbs lane: RDMA READ straight into the landing place.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use sideway::ibverbs::queue_pair::{PostSendGuard, QueuePair, SetScatterGatherEntry, WorkRequestFlags};

use super::device::Registered;
use super::notify;
use super::queue_pair::Connection;
use crate::error::LaneError;
use crate::lane::{Completion, Lane, Read, Token};

/// One-sided reads over a reliable-connected queue pair. Every read is signalled.
///
/// Dropping the lane destroys the queue pair: no read writes to its landing place after that.
pub struct VerbsLane {
    connection: Connection,
    memories: Arc<Vec<Registered>>,
    depth: usize,
    in_flight: usize,
    armed: bool,
}

impl VerbsLane {
    pub(crate) fn new(connection: Connection, memories: Arc<Vec<Registered>>, depth: usize) -> Self {
        Self { connection, memories, depth, in_flight: 0, armed: false }
    }

    fn failure(&self, status: u32, vendor: u32, token: Token) -> LaneError {
        let queue_pair = self.connection.pair.qp_number();
        LaneError::QueuePair { queue_pair, status: status_name(status), vendor, token }
    }
}

impl Lane for VerbsLane {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        let accepted = reads.len().min(self.room());
        if accepted == 0 {
            return Ok(0);
        }
        let mut batch = self.connection.pair.start_post_send();
        for read in &reads[..accepted] {
            let (local, remote) = (read.local(), read.remote());
            let memory = &self.memories[usize::from(local.region)];
            let address = memory.memory.at(local.offset, local.len as usize);
            let address = address.expect("a LocalSlice lies in its region by construction");
            let request = batch.construct_wr(read.token().0, WorkRequestFlags::Signaled);
            let target = request.setup_read(remote.key as u32, remote.addr);
            // SAFETY: the range was just checked to lie inside the registered memory, which
            // `self.memories` keeps registered and mapped until the queue pair is gone.
            unsafe { target.setup_sge(memory.key.lkey(), address as u64, local.len) };
        }
        batch.post().map_err(|error| io::Error::other(format!("posting reads: {error}")))?;
        self.in_flight += accepted;
        Ok(accepted)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        let queue = self.connection.completions.clone();
        let Ok(poller) = queue.start_poll() else { return Ok(()) };
        for done in poller {
            let token = Token(done.wr_id());
            if done.status() != 0 {
                return Err(self.failure(done.status(), done.vendor_err(), token));
            }
            self.in_flight -= 1;
            self.armed = false;
            completions.push(Completion { token, result: Ok(()) });
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.depth - self.in_flight
    }

    fn in_flight(&self) -> usize {
        self.in_flight
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
