//! Vectored socket I/O straight from and to shared memory.
//!
//! Guest memory must never be seen as a Rust slice (a guest or a device can change it at any
//! moment), so the standard library's vectored calls do not fit: this leaf gives the kernel raw
//! iovecs and nothing else.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::net::RecvFlags;

use crate::memory::HostMemory;

/// Most entries of one call. Far below IOV_MAX (1024): 32 reads with their headers.
pub(crate) const MAX_ENTRIES: usize = 64;

/// A list of places for one call, each borrowed for `'a`.
pub(crate) struct Vectors<'a> {
    entries: Vec<libc::iovec>,
    places: PhantomData<&'a mut [u8]>,
}

impl<'a> Vectors<'a> {
    pub(crate) fn new() -> Self {
        Self { entries: Vec::with_capacity(MAX_ENTRIES), places: PhantomData }
    }

    /// Bytes in all places.
    pub(crate) fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.iov_len).sum()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.entries.len() + 2 > MAX_ENTRIES
    }

    /// Adds bytes to be received into.
    pub(crate) fn push_mut(&mut self, bytes: &'a mut [u8]) {
        self.push_raw(bytes.as_mut_ptr(), bytes.len());
    }

    /// Adds bytes to be sent. Only for [`send`].
    pub(crate) fn push(&mut self, bytes: &'a [u8]) {
        self.push_raw(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Adds `len` bytes of shared memory from `offset`. Returns false if they are out of range.
    #[must_use]
    pub(crate) fn push_memory(&mut self, memory: &'a HostMemory, offset: u64, len: usize) -> bool {
        let Some(at) = memory.at(offset, len) else { return false };
        self.push_raw(at, len);
        true
    }

    fn push_raw(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.entries.push(libc::iovec { iov_base: base.cast(), iov_len: len });
        }
    }

    /// Forgets the first `bytes` bytes, already sent.
    pub(crate) fn advance(&mut self, mut bytes: usize) {
        let whole = self.entries.iter().take_while(|entry| {
            let covered = entry.iov_len <= bytes;
            if covered {
                bytes -= entry.iov_len;
            }
            covered
        });
        let whole = whole.count();
        self.entries.drain(..whole);
        if let Some(first) = self.entries.first_mut() {
            first.iov_base = first.iov_base.wrapping_byte_add(bytes);
            first.iov_len -= bytes;
        }
    }

    /// Lays out as many of `bytes` as there is room for, and goes on behind them. Returns how many. Only for places to be
    /// received into.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for entry in &self.entries {
            let (now, later) = rest.split_at(rest.len().min(entry.iov_len));
            // SAFETY: the entry is `iov_len` bytes, of which no more are written, of an exclusive slice or of a shared
            // mapping, which outlives this; `bytes` is neither, as nothing else refers to the one, and no slice ever to
            // the other.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), entry.iov_base.cast(), now.len()) };
            rest = later;
        }
        let laid = bytes.len() - rest.len();
        self.advance(laid);
        laid
    }

    /// Appends the first bytes of all places, at most `most`, to `bytes`.
    pub(crate) fn copy_to(&self, bytes: &mut Vec<u8>, most: usize) {
        let end = bytes.len() + most;
        for entry in &self.entries {
            let len = entry.iov_len.min(end - bytes.len());
            bytes.reserve(len);
            let room = bytes.spare_capacity_mut().as_mut_ptr();
            // SAFETY: the entry is at least `len` bytes of a slice or of a shared mapping, which outlives this, and there
            // is room for as many; a guest may write the mapping meanwhile, so that what is copied is any bytes, as where
            // the kernel copies it.
            unsafe { std::ptr::copy_nonoverlapping(entry.iov_base.cast(), room, len) };
            // SAFETY: so many have just been written.
            unsafe { bytes.set_len(bytes.len() + len) };
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: msghdr is plain old data for which all zeros is a valid, empty value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.entries.as_mut_ptr();
        message.msg_iovlen = self.entries.len();
        message
    }
}

/// What to do if there is nothing to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Say so.
    No,
    /// Wait until there is; of a socket that does.
    Yes,
}

impl Wait {
    pub(super) fn flags(self) -> RecvFlags {
        match self {
            Self::No => RecvFlags::DONTWAIT,
            Self::Yes => RecvFlags::empty(),
        }
    }
}

/// Receives what is there into `vectors`. `Ok(0)` is the end of the stream.
pub(crate) fn receive(socket: BorrowedFd<'_>, vectors: &mut Vectors<'_>, wait: Wait) -> io::Result<usize> {
    let (mut message, flags) = (vectors.message(), wait.flags().bits() as i32);
    // SAFETY: every entry came from an exclusive slice or from inside a shared mapping, and both
    // outlive `vectors`; the message header is valid and lives across the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Sends from `vectors`, blocking, and says how many bytes went.
pub(crate) fn send(socket: BorrowedFd<'_>, vectors: &mut Vectors<'_>) -> io::Result<usize> {
    let message = vectors.message();
    // SAFETY: as in `receive`; the kernel only reads the entries.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
