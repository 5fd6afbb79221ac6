//! The two calls of the fast path, over storage that is made once: posting a batch of reads, and
//! polling completions. The binding's safe forms allocate at each call, and a pager polls a million
//! times a second.

use std::io;

use rdma_mummy_sys::{
    ibv_poll_cq, ibv_post_send, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wr_opcode,
};
use sideway::ibverbs::completion::{BasicCompletionQueue, CompletionQueue};
use sideway::ibverbs::queue_pair::{BasicQueuePair, QueuePair};

/// Completions taken by one call.
const POLL_BATCH: usize = 16;

/// A read as the device takes it.
#[derive(Clone, Copy)]
pub(crate) struct WorkRequest {
    /// Comes back with the completion.
    pub(crate) number: u64,
    pub(crate) signalled: bool,
    /// Where the bytes land: an address of this process, under `lkey`.
    pub(crate) local: u64,
    pub(crate) lkey: u32,
    /// Where they come from: an address of the peer, under `rkey`.
    pub(crate) remote: u64,
    pub(crate) rkey: u32,
    pub(crate) len: u32,
}

/// Work requests that are posted with one doorbell.
pub(crate) struct Batch {
    requests: Vec<ibv_send_wr>,
    places: Vec<ibv_sge>,
}

// SAFETY: the pointers in `requests` are written and used within one call of `post`; in between
// they mean nothing, on whatever thread.
unsafe impl Send for Batch {}

impl Batch {
    pub(crate) fn new(depth: usize) -> Self {
        Self { requests: Vec::with_capacity(depth), places: Vec::with_capacity(depth) }
    }

    /// Adds a read.
    ///
    /// # Safety
    ///
    /// `local` and `len` must lie in memory registered under `lkey` that stays registered and
    /// mapped until the queue pair that the batch is posted to is destroyed.
    pub(crate) unsafe fn push(&mut self, read: WorkRequest) {
        self.places.push(ibv_sge { addr: read.local, length: read.len, lkey: read.lkey });
        // SAFETY: all zeros is a valid work request: null pointers, numbers and unions of numbers.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = read.number;
        request.opcode = ibv_wr_opcode::IBV_WR_RDMA_READ;
        request.num_sge = 1;
        if read.signalled {
            request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        request.wr.rdma.remote_addr = read.remote;
        request.wr.rdma.rkey = read.rkey;
        self.requests.push(request);
    }

    /// Posts what was added, and forgets it.
    pub(crate) fn post(&mut self, pair: &BasicQueuePair) -> io::Result<()> {
        let (requests, places) = (self.requests.as_mut_ptr(), self.places.as_mut_ptr());
        let count = self.requests.len();
        for (at, request) in self.requests.iter_mut().enumerate() {
            request.sg_list = places.wrapping_add(at);
            let next = requests.wrapping_add(at + 1);
            request.next = if at + 1 < count { next } else { std::ptr::null_mut() };
        }
        // SAFETY: the pointer is used only in this call, while `pair` is borrowed.
        let raw = unsafe { pair.qp() };
        let mut refused = std::ptr::null_mut();
        let mut code = 0;
        if count > 0 {
            // SAFETY: `raw` is a live queue pair; `requests` is a list of `count` requests, each
            // with one place, that the library only reads, and only during the call. What they let
            // the device write was promised to `push`.
            code = unsafe { ibv_post_send(raw.as_ptr(), requests, &mut refused) };
        }
        self.requests.clear();
        self.places.clear();
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
    }
}

/// Room for completions.
pub(crate) struct Completions {
    entries: Box<[ibv_wc; POLL_BATCH]>,
}

impl Completions {
    pub(crate) fn new() -> Self {
        // SAFETY: all zeros is a valid work completion: numbers and a union of numbers.
        let entries = unsafe { std::mem::zeroed() };
        Self { entries: Box::new(entries) }
    }

    /// Takes what has completed, at most [`POLL_BATCH`].
    pub(crate) fn poll(&mut self, queue: &BasicCompletionQueue) -> io::Result<&[ibv_wc]> {
        // SAFETY: the pointer is used only in this call, while `queue` is borrowed.
        let raw = unsafe { queue.cq() };
        // SAFETY: `raw` is a live completion queue, and there is room for as many entries as said.
        let got = unsafe { ibv_poll_cq(raw.as_ptr(), POLL_BATCH as i32, self.entries.as_mut_ptr()) };
        let got = usize::try_from(got).map_err(|_| io::Error::other("ibv_poll_cq failed"))?;
        Ok(&self.entries[..got.min(POLL_BATCH)])
    }
}
