//! What the bytes of a lane go over: a connection, in clear or under TLS.

use std::io::{self, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::tls::TlsStream;
use super::vectored::{self, Vectors, Wait};

/// A connection that a lane can be made of: [`From`] one in clear, or under [TLS](Stream::under_tls).
pub struct Stream(Kind);

enum Kind {
    Clear(TcpStream),
    Tls(Box<TlsStream>),
}

impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Self {
        Self(Kind::Clear(socket))
    }
}

impl Stream {
    /// One over which TLS is spoken: its handshake is done, and of what came after that nothing is lost if `connection`
    /// has seen it.
    pub fn under_tls(socket: TcpStream, connection: impl Into<rustls::Connection>) -> Self {
        Self(Kind::Tls(Box::new(TlsStream::new(socket, connection.into()))))
    }

    /// For how long it waits where it does.
    ///
    /// Errors: the system refuses.
    pub fn set_timeouts(&self, patience: Option<Duration>) -> io::Result<()> {
        self.socket().set_read_timeout(patience)?;
        self.socket().set_write_timeout(patience)
    }

    pub(super) fn socket(&self) -> &TcpStream {
        match &self.0 {
            Kind::Clear(socket) => socket,
            Kind::Tls(stream) => stream.socket(),
        }
    }

    /// Receives what is there. `Ok(0)` is the end of the stream.
    ///
    /// Errors: nothing is there and `wait` says not to wait for it (`WouldBlock`), or the connection failed.
    pub(super) fn receive(&mut self, vectors: &mut Vectors<'_>, wait: Wait) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Clear(socket) => vectored::receive(socket.as_fd(), vectors, wait),
            Kind::Tls(stream) => stream.receive(vectors, wait),
        }
    }

    /// Sends the first of `vectors`, and says how many bytes of them went. The socket must be one that waits.
    pub(super) fn send(&mut self, vectors: &mut Vectors<'_>) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Clear(socket) => vectored::send(socket.as_fd(), vectors),
            Kind::Tls(stream) => stream.send(vectors),
        }
    }

    /// Takes bytes to be sent, and says how many. They may be here until [`Stream::flush`] succeeds.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Clear(socket) => socket.write(bytes),
            Kind::Tls(stream) => stream.write(bytes),
        }
    }

    /// Errors: not all of it has gone, as the socket takes no more without waiting (`WouldBlock`), or the connection failed.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Kind::Clear(_) => Ok(()),
            Kind::Tls(stream) => stream.flush(),
        }
    }

    /// Whether there are bytes that nothing on the socket tells of any more: somebody who slept would miss them.
    pub(super) fn holds_bytes(&mut self) -> bool {
        match &mut self.0 {
            Kind::Clear(_) => false,
            Kind::Tls(stream) => stream.holds_bytes(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}
