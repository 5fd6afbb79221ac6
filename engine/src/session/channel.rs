//! A control connection: messages in and out, each wait bounded.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use postcopy_transport::tcp::watch_over;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls;

use super::message::{self, Message};
use super::tls::{DestinationTls, Shown, SourceTls};
use super::{STEP_PATIENCE, SessionError, WORK_PATIENCE};

/// One side of a control connection.
pub(super) struct Channel {
    line: Box<dyn Line>,
    addresses: Addresses,
    shown: Option<Shown>,
    incoming: BytesMut,
    outgoing: BytesMut,
}

/// What bytes go over.
trait Line: AsyncRead + AsyncWrite + Send + Unpin {}
impl<L: AsyncRead + AsyncWrite + Send + Unpin> Line for L {}

/// The ends of a connection, as far as the system says.
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    pub(super) local: Option<IpAddr>,
    pub(super) peer: Option<SocketAddr>,
}

impl Channel {
    /// For a connection that this side has dialed to `peer`; it has been greeted.
    pub(super) async fn dialed(
        stream: TcpStream,
        peer: IpAddr,
        tls: Option<&SourceTls>,
    ) -> Result<Self, SessionError> {
        let addresses = watched(&stream)?;
        let line: Box<dyn Line> = match tls {
            None => Box::new(stream),
            Some(tls) => Box::new(agreed(tls.dial(stream, peer)).await?),
        };
        Ok(Self::over(line, addresses, None))
    }

    /// For one that this side has accepted, and greeted.
    pub(super) async fn accepted(
        stream: TcpStream,
        tls: Option<&DestinationTls>,
    ) -> Result<Self, SessionError> {
        let addresses = watched(&stream)?;
        let Some(tls) = tls else { return Ok(Self::over(Box::new(stream), addresses, None)) };
        let line = agreed(tls.accept(stream)).await?;
        let shown = Shown::by(line.get_ref().1);
        Ok(Self::over(Box::new(line), addresses, shown))
    }

    fn over(line: Box<dyn Line>, addresses: Addresses, shown: Option<Shown>) -> Self {
        Self { line, addresses, shown, incoming: BytesMut::new(), outgoing: BytesMut::new() }
    }

    pub(super) fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The certificate of who has dialed, if that is under TLS.
    pub(super) fn shown(&self) -> Option<Shown> {
        self.shown.clone()
    }

    pub(super) async fn send(&mut self, message: &Message) -> Result<(), SessionError> {
        self.outgoing.clear();
        message::encode(message, &mut self.outgoing)?;
        self.line.write_all(&self.outgoing).await.map_err(broken)?;
        self.line.flush().await.map_err(broken)
    }

    /// Tells the peer why it cannot be served. If it is gone, nobody needs that.
    pub(super) async fn turn_away(&mut self, reason: &str) {
        let _ = self.send(&Message::Refuse(reason.into())).await;
    }

    /// The next message. A refusal by the peer is an error with its reason.
    ///
    /// Cancel-safe: bytes read so far are kept.
    pub(super) async fn receive(
        &mut self,
        waiting_for: &'static str,
        patience: Duration,
    ) -> Result<Message, SessionError> {
        let received = tokio::time::timeout(patience, self.next(waiting_for)).await;
        match received.map_err(|_| SessionError::Silent { waiting_for, patience })?? {
            Message::Refuse(reason) => Err(SessionError::Refused { reason }),
            message => Ok(message),
        }
    }

    /// What is wrong, where nothing is to be said before this side does: that something was, or that nobody is there any more. Pending
    /// as long as nothing is.
    pub(super) async fn broken_into(&mut self, waiting_for: &'static str) -> SessionError {
        match self.receive(waiting_for, WORK_PATIENCE).await {
            Ok(early) => unexpected(&early, waiting_for),
            Err(lost) => lost,
        }
    }

    async fn next(&mut self, waiting_for: &'static str) -> Result<Message, SessionError> {
        loop {
            if let Some(message) = message::decode(&mut self.incoming)? {
                return Ok(message);
            }
            match self.line.read_buf(&mut self.incoming).await {
                Ok(0) => return Err(SessionError::Closed { waiting_for }),
                Ok(_) => {}
                // TLS: without a word of goodbye.
                Err(source) if source.kind() == ErrorKind::UnexpectedEof => {
                    return Err(SessionError::Closed { waiting_for });
                }
                Err(source) => return Err(broken(source)),
            }
        }
    }
}

fn watched(stream: &TcpStream) -> Result<Addresses, SessionError> {
    let watched = watch_over(stream).and_then(|()| stream.set_nodelay(true));
    watched.map_err(|source| SessionError::Connection { source })?;
    let local = stream.local_addr().ok().map(|address| address.ip());
    Ok(Addresses { local, peer: stream.peer_addr().ok() })
}

/// Waits until both sides know who they are.
pub(super) async fn agreed<L>(handshake: impl Future<Output = io::Result<L>>) -> Result<L, SessionError> {
    let (waiting_for, patience) = ("its part of the TLS handshake", STEP_PATIENCE);
    let agreed = tokio::time::timeout(patience, handshake).await;
    agreed.map_err(|_| SessionError::Silent { waiting_for, patience })?.map_err(broken)
}

/// A peer that is not trusted, or does not trust this side, may say so at any time: TLS 1.3 does not wait for it.
fn broken(source: io::Error) -> SessionError {
    match source.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
        true => SessionError::Untrusted { source },
        false => SessionError::Connection { source },
    }
}

/// The error for a message that does not belong here.
pub(super) fn unexpected(message: &Message, waiting_for: &'static str) -> SessionError {
    SessionError::Unexpected { message: message.name(), waiting_for }
}
