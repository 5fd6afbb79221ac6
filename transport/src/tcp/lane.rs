//! The reading side of a TCP lane.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};

use zerocopy::{FromBytes, IntoBytes};

use super::alive::watch_over;
use super::stream::Stream;
use super::vectored::{Vectors, Wait};
use super::wire::{OP_READ, REQUEST_BYTES, RESPONSE_BYTES, Request, Response, STATUS_OK, STATUS_REFUSED};
use crate::error::{LaneError, ReadError};
use crate::lane::{Completion, Lane, Read};
use crate::memory::HostMemory;

/// Reads in flight on one lane. 64 requests of 32 bytes fit any socket buffer, so posting does not
/// wait; 64 reads of 64 KiB are more than a bandwidth-delay product of 100 Gbit/s × 100 µs.
const DEPTH: usize = 64;

/// Bytes received in one [`Lane::poll`], about: some 50 µs of copying, so that who polls several
/// lanes gets round to the others.
const POLL_BYTES: usize = 128 << 10;

/// A read whose response is awaited: its header as far as it has arrived, and its payload's count.
struct Awaited {
    read: Read,
    header: [u8; RESPONSE_BYTES],
    got: usize,
}

impl Awaited {
    fn total(&self) -> usize {
        RESPONSE_BYTES + self.read.remote().len() as usize
    }

    /// Checks the header, which must be complete.
    fn verdict(&self) -> Result<Result<(), ReadError>, LaneError> {
        let header =
            Response::read_from_bytes(&self.header).map_err(|_| LaneError::Protocol("short header"))?;
        if header.tag.get() != self.read.token().0 {
            return Err(LaneError::Protocol("a response out of order"));
        }
        if header.len.get() != self.read.remote().len() {
            return Err(LaneError::Protocol("a response of the wrong length"));
        }
        match header.status.get() {
            STATUS_OK => Ok(Ok(())),
            STATUS_REFUSED => Ok(Err(ReadError::Refused)),
            _ => Err(LaneError::Protocol("an unknown status")),
        }
    }
}

/// One-sided reads over a TCP connection to a responder of [`super::TcpExporter`].
pub struct TcpLane {
    stream: Stream,
    memories: Vec<HostMemory>,
    awaited: VecDeque<Awaited>,
    unsent: Vec<u8>,
}

impl TcpLane {
    pub(crate) fn new(stream: Stream, memories: Vec<HostMemory>) -> io::Result<Self> {
        stream.socket().set_nodelay(true)?;
        Self::over(stream, memories)
    }

    /// A lane over any stream of bytes.
    pub(crate) fn over(stream: Stream, memories: Vec<HostMemory>) -> io::Result<Self> {
        watch_over(&stream)?;
        stream.socket().set_nonblocking(true)?;
        Ok(Self { stream, memories, awaited: VecDeque::with_capacity(DEPTH), unsent: Vec::new() })
    }

    /// Sends what the peer takes now. True: that was all.
    fn flush(&mut self) -> Result<bool, LaneError> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        match self.stream.flush() {
            Ok(()) => Ok(self.unsent.is_empty()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives once, into as many awaited responses as one call takes. `None`: nothing there.
    fn receive(&mut self) -> Result<Option<usize>, LaneError> {
        let (mut vectors, mut room) = (Vectors::new(), POLL_BYTES);
        for awaited in &mut self.awaited {
            if vectors.is_full() || room == 0 {
                break;
            }
            let payload_got = awaited.got.saturating_sub(RESPONSE_BYTES);
            if awaited.got < RESPONSE_BYTES {
                vectors.push_mut(&mut awaited.header[awaited.got..]);
            }
            let local = awaited.read.local();
            let memory = &self.memories[usize::from(local.region)];
            let rest = local.len as usize - payload_got;
            let inside = vectors.push_memory(memory, local.offset + payload_got as u64, rest);
            assert!(inside, "a LocalSlice lies in its region by construction");
            room = room.saturating_sub(rest);
        }
        match self.stream.receive(&mut vectors, Wait::No) {
            Ok(0) => Err(LaneError::Closed),
            Ok(got) => Ok(Some(got)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(Some(0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Accounts for `got` received bytes and completes the reads that they finish.
    fn account(&mut self, mut got: usize, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        while got > 0 {
            let Some(first) = self.awaited.front_mut() else {
                return Err(LaneError::Protocol("bytes that nobody asked for"));
            };
            let taken = got.min(first.total() - first.got);
            first.got += taken;
            got -= taken;
            if first.got >= RESPONSE_BYTES {
                let result = first.verdict()?;
                if first.got == first.total() {
                    completions.push(Completion { token: first.read.token(), result });
                    self.awaited.pop_front();
                }
            }
        }
        Ok(())
    }
}

impl Lane for TcpLane {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        let accepted = reads.len().min(self.room());
        self.unsent.reserve(accepted * REQUEST_BYTES);
        for read in &reads[..accepted] {
            let remote = read.remote();
            let request = Request {
                opcode: OP_READ.into(),
                len: remote.len.into(),
                tag: read.token().0.into(),
                key: remote.key.into(),
                addr: remote.addr.into(),
            };
            self.unsent.extend_from_slice(request.as_bytes());
            self.awaited.push_back(Awaited { read: *read, header: [0; RESPONSE_BYTES], got: 0 });
        }
        self.flush()?;
        Ok(accepted)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        self.flush()?;
        if !self.awaited.is_empty()
            && let Some(got) = self.receive()?
        {
            self.account(got, completions)?;
        }
        Ok(())
    }

    fn room(&self) -> usize {
        DEPTH - self.awaited.len()
    }

    fn in_flight(&self) -> usize {
        self.awaited.len()
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        // Level-triggered: a readable socket stays readable. Requests that the peer has not taken
        // yet are sent by `poll`, so they must go before anybody sleeps; and of what has been received
        // under TLS and not laid out, the socket tells nothing.
        Ok(self.flush()? && !self.stream.holds_bytes())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
