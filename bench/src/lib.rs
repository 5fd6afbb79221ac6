//! What the benches share: both ends of a lane in one process, and the floors they are read by.
#![allow(clippy::unwrap_used)] // a bench that cannot be set up ends, and says where

pub mod paper;

use std::io::{ErrorKind, Read as _, Write};
use std::net::{TcpListener, TcpStream};

use postcopy_transport::{
    AnyLane, EndpointOptions, Exporter, HostMemory, Importer, Lane, LaneClass, LocalRegion, Read,
    RemoteRegion, Token, Transport,
};
use rustix::event::{PollFd, PollFlags, poll};

/// Memory that is read from.
pub const REGION: usize = 64 << 20;

/// Two connected sockets on the loopback.
pub fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    one.set_nodelay(true).unwrap();
    other.set_nodelay(true).unwrap();
    (one, other)
}

/// A lane between two ends in this process.
pub struct Loopback {
    lane: AnyLane,
    remote: RemoteRegion,
    local: LocalRegion,
    at: u64,
    _exporter: Exporter,
}

impl Loopback {
    /// Connects one.
    pub fn new(transport: Transport, class: LaneClass) -> Self {
        let options = EndpointOptions::default();
        let memory = HostMemory::anonymous("bench", REGION).unwrap();
        let landing = HostMemory::anonymous("bench-landing", REGION).unwrap();
        assert!(memory.write(0, &vec![7; REGION]) && landing.write(0, &vec![1; REGION]));
        let mut exporter = Exporter::new(transport, &[memory], &options).unwrap();
        let importer = Importer::new(transport, &[landing], &options).unwrap();
        let lane = importer.connect_local(&mut exporter, class).unwrap();
        let (remote, local) = (exporter.regions()[0], importer.regions()[0]);
        Self { lane, remote, local, at: 0, _exporter: exporter }
    }

    /// One read of `bytes` from the next place, waited for.
    pub fn read(&mut self, bytes: u32) {
        self.at = (self.at + 1_048_573 * 4096) % (REGION as u64 - u64::from(bytes)) / 4096 * 4096;
        let remote = self.remote.slice(self.at, bytes).unwrap();
        let local = self.local.slice(self.at, bytes).unwrap();
        let read = Read::new(Token(self.at), local, remote).unwrap();
        assert_eq!(self.lane.post(&[read]).unwrap(), 1);
        let mut done = Vec::with_capacity(1);
        while done.is_empty() {
            self.lane.poll(&mut done).unwrap();
        }
        done.pop().unwrap().result.unwrap();
    }

    /// Moves the whole region once, in reads of `bytes`, as many in flight as the lane takes and
    /// waiting on its descriptor: as the drain does.
    pub fn move_all(&mut self, bytes: u32) {
        let (mut next, mut left) = (0, REGION as u64 / u64::from(bytes));
        let (mut reads, mut done) = (Vec::new(), Vec::new());
        while left > 0 {
            while next < REGION as u64 && reads.len() < self.lane.room() {
                let (remote, local) = (self.remote.slice(next, bytes), self.local.slice(next, bytes));
                reads.push(Read::new(Token(next), local.unwrap(), remote.unwrap()).unwrap());
                next += u64::from(bytes);
            }
            let posted = self.lane.post(&reads).unwrap();
            reads.drain(..posted);
            self.lane.poll(&mut done).unwrap();
            if done.is_empty() && self.lane.arm().unwrap() {
                let descriptor = PollFd::from_borrowed_fd(self.lane.descriptor(), PollFlags::IN);
                poll(&mut [descriptor], None).unwrap();
            }
            left -= done.len() as u64;
            done.drain(..).for_each(|completion| completion.result.unwrap());
        }
    }
}

/// The floor under a read over TCP: 32 bytes out, `16 + bytes` back, over bare sockets, both ends
/// spinning.
pub struct PingPong {
    client: TcpStream,
    buffer: Vec<u8>,
}

impl PingPong {
    /// Starts a server that answers with `bytes` of payload.
    pub fn new(bytes: usize) -> Self {
        let (client, server) = socket_pair();
        client.set_nonblocking(true).unwrap();
        server.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let (mut request, answer) = ([0u8; 32], vec![7u8; 16 + bytes]);
            while receive_all(&server, &mut request) && send_all(&server, &answer) {}
        });
        Self { client, buffer: vec![0; 16 + bytes] }
    }

    /// One round trip.
    pub fn round_trip(&mut self) {
        assert!(send_all(&self.client, &[1; 32]) && receive_all(&self.client, &mut self.buffer));
    }
}

/// Sends everything, spinning. False if the peer is gone.
fn send_all(mut stream: &TcpStream, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(_) => return false,
        }
    }
    true
}

/// Receives a whole buffer, spinning. False if the peer is gone.
fn receive_all(mut stream: &TcpStream, mut buffer: &mut [u8]) -> bool {
    while !buffer.is_empty() {
        match stream.read(buffer) {
            Ok(0) => return false,
            Ok(got) => buffer = &mut std::mem::take(&mut buffer)[got..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(_) => return false,
        }
    }
    true
}

/// The floor under the drain over TCP: a bare socket stream that moves the same memory, from one
/// mapping into another, in pieces of `piece` bytes. Both ends block.
pub struct Stream {
    client: TcpStream,
    landing: Vec<u8>,
    piece: usize,
}

impl Stream {
    /// Starts a server that sends [`REGION`] bytes for each byte that it gets.
    pub fn new(piece: usize) -> Self {
        let (client, mut server) = socket_pair();
        std::thread::spawn(move || {
            let (memory, mut go) = (vec![7u8; REGION], [0u8]);
            while server.read_exact(&mut go).is_ok() {
                for bytes in memory.chunks(piece) {
                    server.write_all(bytes).unwrap();
                }
            }
        });
        Self { client, landing: vec![1; REGION], piece }
    }

    /// Moves the whole region once.
    pub fn run(&mut self) {
        self.client.write_all(&[1]).unwrap();
        for bytes in self.landing.chunks_mut(self.piece) {
            self.client.read_exact(bytes).unwrap();
        }
    }
}
