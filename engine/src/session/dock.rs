//! Where a destination is reached: it takes lanes in at its port, for what it has registered.

use std::net::SocketAddr;

use postcopy_transport::tcp::Stream;
use postcopy_transport::{LaneRequest, Transport};
use tokio::net::{TcpListener, TcpStream};

use super::channel::{Addresses, Channel};
use super::destination::ReceiveOptions;
use super::door::Door;
use super::message::Message;
use super::preamble::{self, Preamble, Purpose, SessionId};
use super::round::Connected;
use super::tls::{DestinationTls, Shown, taken_unasked};
use super::track;
use super::unpack::granted;
use super::{STEP_PATIENCE, SessionError, WORK_PATIENCE, blocking};
use crate::import::Import;
use crate::memory::GuestMemory;
use crate::pager::{Landing, Round};

/// A port, and the source that lanes are taken in from there.
pub(super) struct Dock<'a> {
    listener: &'a TcpListener,
    pub(super) options: ReceiveOptions,
    peer: Option<SocketAddr>,
    shown: Option<Shown>,
    pub(super) session: SessionId,
}

impl<'a> Dock<'a> {
    /// For the source at the other end of a control connection, whose address here is that of the lanes too, and whose certificate.
    pub(super) fn of(
        listener: &'a TcpListener,
        channel: &Channel,
        session: SessionId,
        mut options: ReceiveOptions,
    ) -> Self {
        let (Addresses { local, peer }, shown) = (channel.addresses(), channel.shown());
        options.endpoint.local = local;
        Self { listener, options, peer, shown, session }
    }

    /// Registers memory for the first offered transport that works here.
    pub(super) async fn import(
        &self,
        offered: &[Transport],
        memory: &GuestMemory,
        (shards, landing): (usize, impl Fn(Transport) -> Landing),
    ) -> Result<(Transport, Import), SessionError> {
        let ours = |transport: &&Transport| {
            self.options.transports.is_empty() || self.options.transports.contains(transport)
        };
        let (mut refusals, tls) = (Vec::new(), self.options.tls.is_some());
        for transport in offered.iter().filter(ours).copied() {
            if self.options.transports.is_empty() && !taken_unasked(transport, tls) {
                refusals.push(format!(
                    "over {transport} pages cross in clear, and this side is set up for TLS: it takes them so \
                     where it is told to (--transport {transport})"
                ));
                continue;
            }
            let landing = landing(transport);
            let (memory, endpoint) = (memory.clone(), self.options.endpoint.clone());
            match blocking(move || Import::new(transport, &memory, (landing, shards), &endpoint)).await {
                Ok(import) => return Ok((transport, import)),
                Err(error) => {
                    tracing::warn!(%transport, %error, "a transport does not work here");
                    refusals.push(error.to_string());
                }
            }
        }
        let reason = if refusals.is_empty() { "none is accepted".into() } else { refusals.join("; ") };
        let names: Vec<&str> = offered.iter().map(|transport| transport.name()).collect();
        Err(SessionError::NoTransport { offered: names.join(", "), reason })
    }

    /// Connects the lanes.
    pub(super) async fn connect(
        &self,
        channel: &mut Channel,
        transport: Transport,
        import: Import,
        (shards, threads): (usize, usize),
    ) -> Result<Connected, SessionError> {
        let (requests, lanes) = import.request(shards, threads)?;
        let order = self.options.order;
        channel.send(&Message::Accept { transport: transport.name().into(), lanes, order }).await?;
        let (grants, regions) = granted(channel.receive("Granted", WORK_PATIENCE).await?)?;
        let needed: Vec<usize> = requests.iter().map(LaneRequest::streams).collect();
        let streams = self.accept_lanes(&needed).await?;
        let connected = blocking(move || {
            let lanes = import.connect(shards, requests, &grants, streams)?;
            Ok(Connected { import, lanes, regions, round: Round::none() })
        });
        connected.await
    }

    /// Accepts the source's lane connections, so many for each lane, in any order; others are not
    /// let in.
    async fn accept_lanes(&self, needed: &[usize]) -> Result<Vec<Vec<Stream>>, SessionError> {
        let mut lanes: Vec<Vec<Stream>> = needed.iter().map(|_| Vec::new()).collect();
        let (mut door, session, source) = (Door::at(self.listener), self.session, self.peer);
        let trust = (self.options.tls.clone(), self.shown.clone());
        while lanes.iter().zip(needed).any(|(lane, needed)| lane.len() < *needed) {
            let next = door.next(|stream, from| lane_of(stream, session, trust.clone(), (from, source)));
            let silent = SessionError::Silent { waiting_for: "its lanes", patience: STEP_PATIENCE };
            let (lane, stream) = tokio::time::timeout(STEP_PATIENCE, next).await.map_err(|_| silent)??;
            let slot = lanes.get_mut(lane).filter(|slot| slot.len() < needed[lane]);
            let slot = slot.ok_or(SessionError::Protocol("a lane that was not granted"))?;
            slot.push(stream);
        }
        Ok(lanes)
    }
}

/// Which lane of the session a connection is for. None: it is not of the session.
async fn lane_of(
    mut stream: TcpStream,
    session: SessionId,
    (tls, shown): (Option<DestinationTls>, Option<Shown>),
    (from, source): (SocketAddr, Option<SocketAddr>),
) -> Option<(usize, Stream)> {
    let greeted = preamble::read(&mut stream, STEP_PATIENCE).await;
    let refused = match greeted {
        Ok(Preamble { session: theirs, purpose: Purpose::Lane(lane), tls: under_tls })
            if theirs == session && under_tls == tls.is_some() =>
        {
            match track::accepted(stream, tls.as_ref(), shown).await {
                Ok(track) => return Some((lane as usize, track)),
                Err(error) => error.to_string(),
            }
        }
        other => format!("{other:?}"),
    };
    tracing::warn!(%from, ?source, refused, "a connection that is no lane of this session");
    None
}
