//! A control connection: messages in and out, each wait bounded.

use std::time::Duration;

use bytes::BytesMut;
use postcopy_transport::tcp::watch_over;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::SessionError;
use super::message::{self, Message};

/// One side of a control connection.
pub(super) struct Channel {
    stream: TcpStream,
    incoming: BytesMut,
    outgoing: BytesMut,
}

impl Channel {
    pub(super) fn new(stream: TcpStream) -> Result<Self, SessionError> {
        let watched = watch_over(&stream).and_then(|()| stream.set_nodelay(true));
        watched.map_err(|source| SessionError::Connection { source })?;
        Ok(Self { stream, incoming: BytesMut::new(), outgoing: BytesMut::new() })
    }

    pub(super) async fn send(&mut self, message: &Message) -> Result<(), SessionError> {
        self.outgoing.clear();
        message::encode(message, &mut self.outgoing)?;
        self.stream.write_all(&self.outgoing).await.map_err(|source| SessionError::Connection { source })
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

    async fn next(&mut self, waiting_for: &'static str) -> Result<Message, SessionError> {
        loop {
            if let Some(message) = message::decode(&mut self.incoming)? {
                return Ok(message);
            }
            match self.stream.read_buf(&mut self.incoming).await {
                Ok(0) => return Err(SessionError::Closed { waiting_for }),
                Ok(_) => {}
                Err(source) => return Err(SessionError::Connection { source }),
            }
        }
    }
}

/// The error for a message that does not belong here.
pub(super) fn unexpected(message: &Message, waiting_for: &'static str) -> SessionError {
    SessionError::Unexpected { message: message.name(), waiting_for }
}
