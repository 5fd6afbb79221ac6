//! A destination's door: those who come to its port are greeted side by side, so that one who says nothing keeps
//! nobody else waiting.

use std::collections::VecDeque;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use super::channel::Channel;
use super::message::Message;
use super::preamble::{self, Preamble, Purpose, SessionId};
use super::tls::DestinationTls;
use super::{STEP_PATIENCE, SessionError};

/// How many are greeted at a time. When more come, the one that has taken longest goes.
const GREETED: usize = 64;

/// A port, and who stands there. Dropping it turns away whoever still does.
pub(super) struct Door<'a, T> {
    listener: &'a TcpListener,
    greetings: JoinSet<Option<T>>,
    /// Of the greetings that go on, the oldest first.
    oldest: VecDeque<AbortHandle>,
}

impl<'a, T: Send + 'static> Door<'a, T> {
    pub(super) fn at(listener: &'a TcpListener) -> Self {
        Self { listener, greetings: JoinSet::new(), oldest: VecDeque::new() }
    }

    /// Greets those who come, until `greet` lets one in.
    ///
    /// Cancel-safe: greetings that have begun go on.
    ///
    /// Errors: nobody can be heard at the port.
    pub(super) async fn next<G>(
        &mut self,
        greet: impl Fn(TcpStream, SocketAddr) -> G,
    ) -> Result<T, SessionError>
    where
        G: Future<Output = Option<T>> + Send + 'static,
    {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => {
                    let (stream, from) = accepted.map_err(|source| SessionError::Connection { source })?;
                    self.begin(greet(stream, from));
                }
                Some(greeted) = self.greetings.join_next() => {
                    if let Ok(Some(one)) = greeted {
                        return Ok(one);
                    }
                }
            }
        }
    }

    fn begin(&mut self, greeting: impl Future<Output = Option<T>> + Send + 'static) {
        self.oldest.retain(|greeting| !greeting.is_finished());
        if self.oldest.len() == GREETED {
            tracing::warn!("{GREETED} connections say too little; the oldest goes");
            self.oldest.pop_front().inspect(AbortHandle::abort);
        }
        self.oldest.push_back(self.greetings.spawn(greeting));
    }
}

/// Somebody who wants to speak, and what was said first.
pub(super) struct Caller {
    pub(super) channel: Channel,
    pub(super) session: SessionId,
    pub(super) said: Message,
}

/// The first who wants to speak, is who it has to be, is `awaited`, and says what for. Others are logged and turned away,
/// those who want to speak with the reason.
pub(super) async fn await_call(
    listener: &TcpListener,
    tls: Option<&DestinationTls>,
    awaited: impl Fn(&Preamble) -> bool + Copy + Send + 'static,
    else_told: &'static str,
) -> Result<Caller, SessionError> {
    let greet = |stream, from| {
        let tls = tls.cloned();
        async move {
            match greeted(stream, tls.as_ref()).await {
                Ok((mut channel, theirs)) if awaited(&theirs) => {
                    match channel.receive("what it comes for", STEP_PATIENCE).await {
                        Ok(said) => {
                            tracing::info!(%from, "the source is here");
                            return Some(Caller { channel, session: theirs.session, said });
                        }
                        Err(error) => tracing::warn!(%from, %error, "a source that is gone again"),
                    }
                }
                Ok((mut channel, theirs)) => {
                    tracing::warn!(%from, ?theirs, "turned away: {else_told}");
                    channel.turn_away(else_told).await;
                }
                Err(error) => tracing::warn!(%from, %error, "a connection that is no source"),
            }
            None
        }
    };
    Door::at(listener).next(greet).await
}

/// A connection to speak over, and what its peer wants.
///
/// Errors: it is a lane, or not to be spoken with.
async fn greeted(
    mut stream: TcpStream,
    tls: Option<&DestinationTls>,
) -> Result<(Channel, Preamble), SessionError> {
    let theirs = preamble::read(&mut stream, STEP_PATIENCE).await;
    if matches!(theirs, Ok(Preamble { purpose: Purpose::Lane(_), .. })) {
        return Err(SessionError::Protocol("a lane without a session"));
    }
    // Answer a peer of another version too, so that it can say what is wrong.
    if matches!(theirs, Ok(_) | Err(SessionError::Version { .. })) {
        preamble::write(&mut stream, Preamble::answer(tls.is_some())).await?;
    }
    let theirs = theirs?;
    theirs.agrees(tls.is_some())?;
    Ok((Channel::accepted(stream, tls).await?, theirs))
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::session::message;

    #[tokio::test]
    async fn those_who_say_nothing_keep_nobody_waiting() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let dial = async || TcpStream::connect(address).await.unwrap();
        let mut silent = Vec::new();
        for _ in 0..GREETED - 4 {
            silent.push(dial().await);
        }
        let ours = Preamble { session: [7; 16], purpose: Purpose::Control, tls: false };
        // One is greeted and says nothing more, one is gone then.
        let mut greeted = dial().await;
        preamble::write(&mut greeted, ours).await.unwrap();
        preamble::write(&mut dial().await, ours).await.unwrap();
        let mut speaker = dial().await;
        preamble::write(&mut speaker, ours).await.unwrap();
        let mut said = BytesMut::new();
        message::encode(&Message::LanesReady, &mut said).unwrap();
        speaker.write_all(&said).await.unwrap();
        let caller = await_call(&listener, None, |_| true, "nobody").await.unwrap();
        assert_eq!((caller.session, caller.said), (ours.session, Message::LanesReady));
    }

    #[tokio::test]
    async fn of_too_many_the_oldest_goes_and_the_others_are_heard() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut callers = Vec::new();
        for _ in 0..=GREETED {
            callers.push(TcpStream::connect(address).await.unwrap());
        }
        let mut door = Door::at(&listener);
        let greet = |mut stream: TcpStream, _| async move { stream.read_u8().await.ok() };
        let closed = async { callers[0].read(&mut [0]).await };
        tokio::select! {
            read = closed => assert_eq!(read.unwrap(), 0, "it is closed, and nothing said"),
            heard = door.next(greet) => panic!("nobody has spoken: {heard:?}"),
        }
        // What has begun goes on, and in any order.
        for at in [GREETED, 1] {
            callers[at].try_write(&[at as u8]).unwrap();
            assert_eq!(door.next(greet).await.unwrap() as usize, at);
        }
    }
}
