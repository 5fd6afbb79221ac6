//! What a source owes that cannot hear its destination any more: the memory of a guest that may run there.
//!
//! ```text
//!  source                                             destination
//!  Kept       ── Rejoin ────────────────────────────▶ stands at the door again           Stranded
//!             ◀─ Accept (lane requests) ────────────  or Resident: all of it had come
//!  new lanes  ── Granted (grants, keys) ────────────▶ connects them, the pager goes on
//!             ◀─ LanesReady, Progress … ────────────                                     Resumed
//!             ◀─ Resident ──────────────────────────                                     Resident
//!  Released   ── Release ───────────────────────────▶
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postcopy_transport::{EndpointOptions, Transport};
use tokio::sync::watch;

use super::channel::{Channel, unexpected};
use super::course::{Accepted, Course, micros};
use super::message::Message;
use super::preamble::{Purpose, SessionId};
use super::report::{ArrivalReport, MigrationReport, Phase, Progress};
use super::source::{MigrateOptions, Owner, SourceGuest};
use super::{SessionError, WORK_PATIENCE, blocking};
use crate::export::Export;
use crate::planner::Bandwidth;

/// The rest between two attempts to reach a destination.
const RETRY: Duration = Duration::from_millis(500);

/// Nobody is tried for longer; more would be past what the clock can count.
const MOST_PATIENCE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Memory of a guest that has left, on offer until its destination has all of it. Lanes that still live serve it
/// meanwhile. Dropping it takes the memory back: what the destination has not read is lost then.
pub struct Owed {
    pub(super) course: Course,
    pub(super) export: Export,
    pub(super) owner: Owner,
    /// It was another process that handed the guest over: for how long the guest stood still is not known.
    pub(super) taken_over: bool,
}

impl std::fmt::Debug for Owed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owed").field("peer", &self.course.peer).field("owner", &self.owner).finish()
    }
}

/// How to reach a destination again.
#[derive(Clone, Debug, Default)]
pub struct RecoverOptions {
    /// Where it listens, if that is elsewhere now.
    pub peer: Option<SocketAddr>,
    /// Transports to offer, best first, and how lanes are made over them; `None`: as before.
    pub wire: Option<(Vec<Transport>, EndpointOptions)>,
    /// How much may cross a second where nobody waits for it; `None`: as before.
    pub max_bandwidth: Option<Bandwidth>,
    /// For how long to try, counted anew each time that it was reached.
    pub patience: Duration,
}

/// Reaches the destination again and serves it until it has all of the memory, over new lanes where the old ones are
/// lost.
///
/// Errors: it was not reached in time, or refused. All is then as it was, and this can be tried again.
pub async fn recover(
    mut owed: Box<Owed>,
    options: RecoverOptions,
) -> Result<MigrationReport, (SessionError, Box<Owed>)> {
    let RecoverOptions { peer, wire, max_bandwidth, patience } = options;
    let patience = patience.min(MOST_PATIENCE);
    owed.course.peer = peer.unwrap_or(owed.course.peer);
    if let Some((transports, endpoint)) = wire {
        (owed.course.options.transports, owed.course.options.endpoint) = (transports, endpoint);
    }
    let limit = &mut owed.course.options.max_bandwidth;
    *limit = max_bandwidth.or(*limit);
    let mut until = Instant::now() + patience;
    loop {
        owed.course.enter(Phase::Recovering);
        let error = match owed.rejoin().await {
            Ok((channel, arrival)) => return Ok(owed.release(channel, &arrival).await),
            Err(Attempt::Lost(error)) => {
                until = Instant::now() + patience;
                error
            }
            Err(Attempt::Refused(error)) => return Err((error, owed)),
            Err(Attempt::Unreached(error)) if Instant::now() + RETRY > until => {
                return Err((error, owed));
            }
            Err(Attempt::Unreached(error)) => error,
        };
        tracing::info!(%error, peer = %owed.course.peer, "trying to reach the destination");
        tokio::time::sleep(RETRY).await;
    }
}

/// How an attempt to reach the destination failed.
enum Attempt {
    /// It was not reached, or not for long enough.
    Unreached(SessionError),
    /// It was reached, and lost again.
    Lost(SessionError),
    /// It wants nothing of us.
    Refused(SessionError),
}

impl Attempt {
    fn of(error: SessionError) -> Self {
        match error {
            SessionError::Refused { .. } | SessionError::Version { .. } | SessionError::NotOurs => {
                Self::Refused(error)
            }
            error => Self::Unreached(error),
        }
    }
}

/// A session's name, in text.
pub(super) fn name_of(session: SessionId) -> String {
    format!("{:032x}", u128::from_be_bytes(session))
}

fn session_of(name: &str) -> Option<SessionId> {
    let sane = name.len() == 32 && name.bytes().all(|digit| digit.is_ascii_hexdigit());
    sane.then(|| u128::from_str_radix(name, 16).ok().map(u128::to_be_bytes)).flatten()
}

impl Owed {
    /// The memory of a guest that another process has moved, which has ended before all of it was there: on offer again, under the
    /// name that was [kept](SourceGuest::keep_name). The guest stands still. [`recover`] finds out whether it is at the
    /// destination that listens at `peer`.
    ///
    /// Errors: that is no name, or the memory cannot be offered.
    pub async fn of(
        guest: Arc<dyn SourceGuest>,
        session: &str,
        peer: SocketAddr,
        options: MigrateOptions,
        progress: &watch::Sender<Progress>,
    ) -> Result<Box<Self>, SessionError> {
        let session = session_of(session).ok_or(SessionError::Protocol("that is no session's name"))?;
        let (memory, endpoint) = (guest.memory(), options.endpoint.clone());
        let course = Course::new(&memory, peer, options, session, progress);
        // What lanes are granted for, is registered when the destination has chosen.
        let mut export = blocking(move || Export::new(Transport::Tcp, &memory, &endpoint)).await?;
        export.describe_pages(None)?;
        Ok(Box::new(Self { course, export, owner: Owner::InDoubt, taken_over: true }))
    }

    /// Who has the guest, as far as is known.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// A person knows that the destination runs the guest.
    pub fn resolve(&mut self) {
        self.owner = Owner::Destination;
    }

    /// The guest is there with all its memory.
    pub(super) async fn release(
        self: Box<Self>,
        mut channel: Channel,
        arrival: &ArrivalReport,
    ) -> MigrationReport {
        let Self { course, export, .. } = *self;
        drop(export);
        // Whether this last word arrives changes nothing.
        let _ = channel.send(&Message::Release).await;
        course.finish(arrival)
    }

    async fn rejoin(&mut self) -> Result<(Channel, ArrivalReport), Attempt> {
        let mut channel = self.course.call(Purpose::Rejoin).await.map_err(Attempt::of)?;
        match self.take_up(&mut channel).await.map_err(Attempt::of)? {
            Some(arrival) => Ok((channel, arrival)),
            None => match self.course.serve(&mut channel).await {
                Ok(arrival) => Ok((channel, arrival)),
                Err(error) => Err(Attempt::Lost(error)),
            },
        }
    }

    /// Gives the destination new lanes; or it has all of the memory already.
    async fn take_up(&mut self, channel: &mut Channel) -> Result<Option<ArrivalReport>, SessionError> {
        let transports = self.course.transports()?;
        let max_bandwidth = self.course.options.max_bandwidth;
        channel.send(&Message::Rejoin { transports, max_bandwidth }).await?;
        let answer = channel.receive("Accept or Resident", WORK_PATIENCE).await?;
        if let Message::Resident(arrival) = answer {
            self.is_there();
            return Ok(Some(arrival));
        }
        // The guest stands still: what it uses was noted before, or never will be.
        let Accepted { transport, lanes, .. } = self.course.accepted(answer)?;
        self.is_there();
        let endpoint = self.course.options.endpoint.clone();
        let connected = async {
            self.renew(transport, endpoint).await?;
            self.course.connect(&mut self.export, &lanes, channel).await
        };
        if let Err(error) = connected.await {
            let _ = channel.send(&Message::Refuse(error.to_string())).await;
            return Err(error);
        }
        match channel.receive("LanesReady", WORK_PATIENCE).await? {
            Message::LanesReady => {}
            other => return Err(unexpected(&other, "LanesReady")),
        }
        self.course.enter(Phase::Draining);
        Ok(None)
    }

    /// The destination has spoken of the guest, so it runs there.
    fn is_there(&mut self) {
        self.owner = Owner::Destination;
        if self.course.report.downtime_us == 0 && !self.taken_over {
            // Nobody heard when it was resumed.
            self.course.report.downtime_us = micros(self.course.frozen.elapsed());
        }
    }

    /// Registers the memory for new lanes, and closes the old ones.
    async fn renew(&mut self, transport: Transport, endpoint: EndpointOptions) -> Result<(), SessionError> {
        let again = self.export.again(transport, endpoint);
        self.export.renew(blocking(again).await?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written() {
        let session = *b"\x00\x01sixteen bytes\xff";
        assert_eq!(session_of(&name_of(session)), Some(session));
        for bad in ["", "1", "+0000000000000000000000000000001", &"g".repeat(32), &"0".repeat(33)] {
            assert_eq!(session_of(bad), None, "{bad}");
        }
    }
}
