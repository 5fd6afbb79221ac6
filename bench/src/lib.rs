//! What the benches share: both ends of a lane in one process, and the floors they are read by.
#![allow(clippy::unwrap_used)] // a bench that cannot be set up ends, and says where

pub mod paper;

use std::io::{Read as _, Write};
use std::net::{TcpListener, TcpStream};

use postcopy_transport::{
    AnyLane, EndpointOptions, Exporter, HostMemory, Importer, Lane, LocalRegion, Read, RemoteRegion, Token,
    Transport,
};

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
    pub fn new(transport: Transport) -> Self {
        let memory = HostMemory::anonymous("bench", REGION).unwrap();
        let landing = HostMemory::anonymous("bench-landing", REGION).unwrap();
        assert!(memory.write(0, &vec![7; REGION]) && landing.write(0, &vec![1; REGION]));
        let options = EndpointOptions::default();
        let mut exporter = Exporter::new(transport, &[memory], &options).unwrap();
        let importer = Importer::new(transport, &[landing], &options).unwrap();
        let (pending, request) = importer.request().unwrap();
        let grant = exporter.grant(&request).unwrap();
        let stream = transport.needs_stream().then(|| {
            let (ours, theirs) = socket_pair();
            exporter.attach(theirs).unwrap();
            ours
        });
        let lane = importer.connect(pending, &grant, stream).unwrap();
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
}

/// The floor under a TCP lane: 32 bytes out, `16 + bytes` back, over bare sockets. The server
/// blocks and the client spins, as the lane's ends do.
pub struct PingPong {
    client: TcpStream,
    buffer: Vec<u8>,
}

impl PingPong {
    /// Starts a server that answers with `bytes` of payload.
    pub fn new(bytes: usize) -> Self {
        let (client, mut server) = socket_pair();
        client.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let (mut request, answer) = ([0u8; 32], vec![7u8; 16 + bytes]);
            while server.read_exact(&mut request).and_then(|()| server.write_all(&answer)).is_ok() {}
        });
        Self { client, buffer: vec![0; 16 + bytes] }
    }

    /// One round trip.
    pub fn round_trip(&mut self) {
        self.client.write_all(&[1; 32]).unwrap();
        let mut got = 0;
        while got < self.buffer.len() {
            match self.client.read(&mut self.buffer[got..]) {
                Ok(more) => got += more,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    }
}
