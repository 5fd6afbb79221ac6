//! A connection under TLS: records are made of what memory has, and laid out in memory, through buffers that stay in a
//! core's cache.

use std::io::{self, BufRead as _, ErrorKind, Write as _};
use std::net::TcpStream;

use rustix::buffer::spare_capacity;

use super::vectored::{Vectors, Wait};

/// Bytes received from the socket at once: four whole records.
const RECEIVED: usize = 64 << 10;

/// Bytes made into records at once, as many as rustls keeps for a socket that takes nothing.
const SENT: usize = 64 << 10;

/// TLS over a connected socket.
pub(super) struct TlsStream {
    socket: TcpStream,
    connection: rustls::Connection,
    /// What has been received, and where in it that begins which rustls has not taken yet.
    received: Vec<u8>,
    taken: usize,
    /// What is sent next, in clear.
    sent: Vec<u8>,
}

impl TlsStream {
    pub(super) fn new(socket: TcpStream, connection: rustls::Connection) -> Self {
        Self {
            socket,
            connection,
            received: Vec::with_capacity(RECEIVED),
            taken: 0,
            // Who reads sends requests alone, which do not come this way.
            sent: Vec::new(),
        }
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// See [`Stream::receive`](super::stream::Stream::receive).
    pub(super) fn receive(&mut self, vectors: &mut Vectors<'_>, wait: Wait) -> io::Result<usize> {
        let mut got = 0;
        while !vectors.is_empty() {
            match self.connection.reader().fill_buf() {
                Ok([]) => break,
                Ok(clear) => {
                    let laid = vectors.fill(clear);
                    self.connection.reader().consume(laid);
                    got += laid;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.taken == self.received.len() && (got > 0 || self.fetch(wait)? == 0) {
                        break;
                    }
                    self.decrypt()?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(got)
    }

    /// Receives from the socket. All that had come before must be taken.
    fn fetch(&mut self, wait: Wait) -> io::Result<usize> {
        self.received.clear();
        self.taken = 0;
        let (got, _) = rustix::net::recv(&self.socket, spare_capacity(&mut self.received), wait.flags())?;
        Ok(got)
    }

    /// Gives rustls more of what has come, and decrypts what is whole.
    fn decrypt(&mut self) -> io::Result<()> {
        self.taken += self.connection.read_tls(&mut &self.received[self.taken..])?;
        if let Err(error) = self.connection.process_new_packets() {
            // The peer is told, if it still listens.
            let _ = self.connection.write_tls(&mut self.socket);
            return Err(io::Error::new(ErrorKind::InvalidData, error));
        }
        Ok(())
    }

    /// See [`Stream::send`](super::stream::Stream::send).
    pub(super) fn send(&mut self, vectors: &mut Vectors<'_>) -> io::Result<usize> {
        self.sent.clear();
        vectors.copy_to(&mut self.sent, SENT);
        let sent = self.connection.writer().write(&self.sent)?;
        self.flush()?;
        Ok(sent)
    }

    /// See [`Stream::write`](super::stream::Stream::write).
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.connection.writer().write(bytes)? {
            0 => Err(ErrorKind::WouldBlock.into()),
            taken => Ok(taken),
        }
    }

    /// See [`Stream::flush`](super::stream::Stream::flush).
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut self.socket) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// See [`Stream::holds_bytes`](super::stream::Stream::holds_bytes).
    pub(super) fn holds_bytes(&mut self) -> bool {
        self.taken < self.received.len()
            || !matches!(self.connection.reader().fill_buf(), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }
}
