//! The exporting side of a TCP lane: one thread that answers reads from registered memory.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, IntoBytes};

use super::alive::watch_over;
use super::exports::Exports;
use super::stream::Stream;
use super::vectored::{self, Vectors, Wait};
use super::wire::{OP_READ, REQUEST_BYTES, RESPONSE_BYTES, Request, Response, STATUS_OK, STATUS_REFUSED};
use crate::lane::LaneClass;
use crate::region::MAX_READ;
use crate::sched::{go_first, is_crowded};

/// Requests taken from the socket at once.
const BATCH: usize = 32;
const _: () = assert!(BATCH * 2 <= vectored::MAX_ENTRIES);

/// Bytes given to the kernel at once, about: a thread of the fault path
/// that wakes up meanwhile may have to wait for the end of the call. With less the stream loses rate.
const SEND_BYTES: usize = 512 << 10;

/// What a refused read is padded with, in pieces of this many bytes.
const PADDING: usize = 64 << 10;

/// A running responder. Dropping it closes the connection and ends the thread.
pub(crate) struct Responder {
    socket: TcpStream,
    thread: Option<JoinHandle<()>>,
}

impl Responder {
    /// Starts to answer. For an urgent lane the thread polls for `spin` after each answer before it
    /// sleeps; not while bulk is under way where cores are few, as it would keep those from running that
    /// carry it (docs/adr/0007-who-spins.md).
    pub(crate) fn start(
        mut stream: Stream,
        exports: Arc<Exports>,
        lane: usize,
        class: LaneClass,
        spin: Duration,
    ) -> io::Result<Self> {
        let socket = stream.socket().try_clone()?;
        watch_over(&socket)?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(false)?;
        let thread = std::thread::Builder::new().name(format!("lane-{lane}")).spawn(move || {
            if class == LaneClass::Urgent {
                go_first();
            }
            if let Err(error) = serve(&mut stream, &exports, class, spin) {
                tracing::debug!(lane, %error, "responder ended");
            }
            // The reader must not wait for answers that will not come.
            drop(stream.socket().shutdown(Shutdown::Both));
        })?;
        Ok(Self { socket, thread: Some(thread) })
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        drop(self.socket.shutdown(Shutdown::Both));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Answers until the peer goes away or breaks the protocol.
pub(crate) fn serve(
    stream: &mut Stream,
    exports: &Exports,
    class: LaneClass,
    spin: Duration,
) -> io::Result<()> {
    let crowded = is_crowded();
    let mut buffer = [0u8; BATCH * REQUEST_BYTES];
    let mut filled = 0;
    loop {
        let polls = class == LaneClass::Urgent && !(crowded && exports.is_drained());
        match receive(stream, &mut buffer[filled..], if polls { spin } else { Duration::ZERO }) {
            Ok(0) => return Ok(()),
            Ok(got) => filled += got,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        let whole = filled - filled % REQUEST_BYTES;
        let requests = <[Request]>::ref_from_bytes(&buffer[..whole]).map_err(|_| ErrorKind::InvalidData)?;
        if class == LaneClass::Bulk {
            exports.note_bulk();
        }
        answer(stream, exports, requests)?;
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Receives what is there; if nothing is, polls for `spin` and then sleeps until something comes.
fn receive(stream: &mut Stream, buffer: &mut [u8], spin: Duration) -> io::Result<usize> {
    let mut vectors = Vectors::new();
    vectors.push_mut(buffer);
    let begun = Instant::now();
    while begun.elapsed() < spin {
        match stream.receive(&mut vectors, Wait::No) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            received => return received,
        }
    }
    stream.receive(&mut vectors, Wait::Yes)
}

/// Answers a batch of requests, in order.
fn answer(stream: &mut Stream, exports: &Exports, requests: &[Request]) -> io::Result<()> {
    let mut headers = [[0u8; RESPONSE_BYTES]; BATCH];
    let mut found = [None; BATCH];
    for ((header, found), request) in headers.iter_mut().zip(&mut found).zip(requests) {
        let len = request.len.get();
        if request.opcode.get() != OP_READ || len == 0 || len > MAX_READ {
            return Err(io::Error::new(ErrorKind::InvalidData, "a request that no reader of ours makes"));
        }
        *found = exports.find(request);
        let status = if found.is_some() { STATUS_OK } else { STATUS_REFUSED };
        *header =
            zerocopy::transmute!(Response { tag: request.tag, status: status.into(), len: request.len });
    }
    let found = &found[..requests.len()];
    let padding = vec![0u8; if found.iter().all(Option::is_some) { 0 } else { PADDING }];
    let mut vectors = Vectors::new();
    for ((header, found), request) in headers.iter().zip(found).zip(requests) {
        vectors.push(header.as_bytes());
        let len = request.len.get() as usize;
        match found {
            Some(memory) => {
                let inside = vectors.push_memory(memory, request.addr.get(), len);
                assert!(inside, "find checked the bounds");
            }
            None => pad(stream, &mut vectors, &padding, len)?,
        }
        if vectors.is_full() || vectors.bytes() >= SEND_BYTES {
            send_all(stream, &mut vectors)?;
        }
    }
    send_all(stream, &mut vectors)
}

/// Sends `len` zeros in place of memory that may not be read.
fn pad<'a>(
    stream: &mut Stream,
    vectors: &mut Vectors<'a>,
    padding: &'a [u8],
    mut len: usize,
) -> io::Result<()> {
    while len > 0 {
        let piece = len.min(padding.len());
        vectors.push(&padding[..piece]);
        len -= piece;
        if vectors.is_full() {
            send_all(stream, vectors)?;
        }
    }
    Ok(())
}

fn send_all(stream: &mut Stream, vectors: &mut Vectors<'_>) -> io::Result<()> {
    while !vectors.is_empty() {
        match stream.send(vectors) {
            Ok(sent) => vectors.advance(sent),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
