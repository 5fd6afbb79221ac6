//! The rest of a session at its destination: the guest runs, its memory follows. [`Drain::finish`] reads as the
//! protocol, and [`Parted::rejoin`] as what follows when the source is out of hearing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use postcopy_transport::Transport;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::channel::Channel;
use super::course::micros;
use super::destination::{DestinationGuest, ReceiveOptions, passed};
use super::dock::Dock;
use super::door::{Caller, await_call};
use super::message::Message;
use super::preamble::{Preamble, Purpose, SessionId};
use super::report::ArrivalReport;
use super::round::Connected;
use super::unpack::rejoins;
use super::{STEP_PATIENCE, SessionError, blocking};
use crate::memory::GuestMemory;
use crate::pager::{Landing, Pager, PagerError, PagerState, PagerStatus, Stage, Trap};
use crate::planner::Bandwidth;

/// How often the source hears of progress.
pub(super) const PROGRESS: Duration = Duration::from_millis(100);

/// See the module.
pub struct Drain {
    /// To the source. `None`: it was another process that spoke with it.
    channel: Option<Channel>,
    /// Whoever has it keeps the trap: without it the guest would read zeros.
    pager: Arc<Mutex<Pager>>,
    guest: Arc<dyn DestinationGuest>,
    memory: GuestMemory,
    session: SessionId,
    options: ReceiveOptions,
    begun: Instant,
    resumed: Instant,
}

impl Drain {
    pub(super) fn new(
        channel: Option<Channel>,
        pager: Pager,
        (guest, memory): (Arc<dyn DestinationGuest>, GuestMemory),
        (session, options): (SessionId, ReceiveOptions),
        begun: Instant,
    ) -> Self {
        let (pager, resumed) = (Arc::new(Mutex::new(pager)), Instant::now());
        Self { channel, pager, guest, memory, session, options, begun, resumed }
    }

    /// Where the pager stands, for whoever watches.
    pub fn status(&self) -> watch::Receiver<PagerStatus> {
        locked(&self.pager).status()
    }

    /// For whoever decides how much may cross.
    pub fn limiter(&self) -> Limiter {
        Limiter(Arc::downgrade(&self.pager))
    }

    /// Waits until every page is here, or the guest has [ended](DestinationGuest::has_ended), telling the source on the way, and
    /// lets the source go.
    ///
    /// A broken control connection does not matter as long as the lanes live.
    ///
    /// Errors: the pager failed, or the source did not hear that it can go. See [`Parted`].
    pub async fn finish(mut self) -> Result<ArrivalReport, Parted> {
        let mut status = self.status();
        loop {
            let ended = status.wait_for(|status| !matches!(status.state, PagerState::Running));
            let ended = tokio::time::timeout(PROGRESS, ended).await.map(|ended| ended.map(|s| s.clone()));
            match ended {
                Err(_) if self.guest.has_ended() => return Ok(self.guest_ended().await),
                Err(_) => {
                    let report = status.borrow().report;
                    self.tell(&Message::Progress(report)).await;
                }
                Ok(Ok(PagerStatus { state: PagerState::Failed(error), .. })) => {
                    if ends(self.guest.clone()).await {
                        return Ok(self.guest_ended().await);
                    }
                    self.tell(&Message::Refuse(error.to_string())).await;
                    return Err(Parted { drain: self, why: Why::Stranded(error) });
                }
                Ok(Ok(status)) => return self.release(status).await,
                Ok(Err(_)) => {
                    let gone = Arc::new(PagerError::Panicked("it vanished".into()));
                    return Err(Parted { drain: self, why: Why::Stranded(gone) });
                }
            }
        }
    }

    async fn release(
        mut self,
        PagerStatus { report: pager, waited, .. }: PagerStatus,
    ) -> Result<ArrivalReport, Parted> {
        self.guest.memory_arrived();
        let resident_us = micros(self.resumed.elapsed());
        let blocked =
            |thread| waited.iter().find(|waited| waited.thread == thread).map(|waited| waited.total);
        let each = self.guest.vcpu_threads().into_iter().map(blocked);
        let vcpu_blocktime_us = each.map(|blocked| blocked.map_or(0, micros)).collect();
        let guest = self.guest.clone();
        let touched_pages = blocking(move || guest.touched_pages()).await;
        let guest_ended = false;
        let arrival = ArrivalReport { resident_us, pager, vcpu_blocktime_us, touched_pages, guest_ended };
        passed("Resident", self.begun);
        let released = match &mut self.channel {
            Some(channel) => released(channel, &arrival).await,
            None => Err(SessionError::Protocol("there is nobody to tell")),
        };
        locked(&self.pager).collapse();
        if let Err(error) = released {
            tracing::warn!(%error, "the source did not confirm; every page is here all the same");
            return Err(Parted { drain: self, why: Why::Unheard(Box::new(arrival)) });
        }
        self.over();
        Ok(arrival)
    }

    /// Lets the source go, whose guest has ended here.
    async fn guest_ended(mut self) -> ArrivalReport {
        let (resident_us, pager) = (micros(self.resumed.elapsed()), self.status().borrow().report);
        let arrival = ArrivalReport { resident_us, pager, guest_ended: true, ..ArrivalReport::default() };
        passed("Ended", self.begun);
        if let Some(channel) = &mut self.channel
            && let Err(error) = released(channel, &arrival).await
        {
            tracing::warn!(%error, "the source was not told that its guest has ended");
        }
        self.over();
        arrival
    }

    /// The source knows that every page is here.
    fn over(&self) {
        locked(&self.pager).ledger().is_at(Stage::Over);
        passed("Released", self.begun);
    }

    async fn tell(&mut self, message: &Message) {
        let Some(channel) = &mut self.channel else { return };
        if let Err(error) = channel.send(message).await {
            tracing::debug!(%error, message = message.name(), "the source could not be told");
        }
    }

    /// Gives the pager lanes to a source that has come back.
    async fn go_on(
        &mut self,
        channel: &mut Channel,
        offered: &[Transport],
        dock: Dock<'_>,
    ) -> Result<(), SessionError> {
        let pager = self.pager.clone();
        let parted = blocking(move || {
            let mut pager = locked(&pager);
            pager.part();
            (pager.shards(), pager.servers(), pager.lands_in_place())
        });
        let (shards, servers, in_place) = parted.await;
        let landing = if in_place { Landing::InPlace } else { Landing::Pool };
        let (transport, import) = dock.import(offered, &self.memory, (shards, |_| landing)).await?;
        let connected = dock.connect(channel, transport, import, (shards, servers)).await?;
        let (pager, config) = (self.pager.clone(), self.options.pager);
        let gone_on = blocking(move || {
            let Connected { import, lanes, regions, .. } = connected;
            import.go_on(&mut locked(&pager), lanes, regions, config)
        });
        Ok(gone_on.await?)
    }
}

/// Whether a guest is at its end: its memory goes first, and the pager may see that before anybody sees the rest.
async fn ends(guest: Arc<dyn DestinationGuest>) -> bool {
    for _ in 0..10 {
        if guest.has_ended() {
            return true;
        }
        tokio::time::sleep(PROGRESS / 10).await;
    }
    false
}

/// Changes how much may cross a second where nobody waits for it.
#[derive(Clone)]
pub struct Limiter(Weak<Mutex<Pager>>);

impl Limiter {
    /// From now on so much; `None`: as much as the link carries. Nothing, if the guest is no more. May wait for a pager that is
    /// being given other lanes.
    pub fn set(&self, max_bandwidth: Option<Bandwidth>) {
        if let Some(pager) = self.0.upgrade() {
            locked(&pager).limit(max_bandwidth);
        }
    }
}

fn locked(pager: &Mutex<Pager>) -> MutexGuard<'_, Pager> {
    pager.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the source that it can go, and hears that it does.
async fn released(channel: &mut Channel, arrival: &ArrivalReport) -> Result<(), SessionError> {
    channel.send(&Message::Resident(arrival.clone())).await?;
    channel.receive("Release", STEP_PATIENCE).await.map(drop)
}

/// A guest that runs here, with its source out of hearing: it waits for pages that do not come, or every page is here
/// and the source does not know. It must not be resumed anywhere else. While this lives its touches of what is
/// missing wait.
pub struct Parted {
    drain: Drain,
    why: Why,
}

enum Why {
    Stranded(Arc<PagerError>),
    Unheard(Box<ArrivalReport>),
}

/// What a source that has come back brings.
pub enum Rejoined {
    /// The way to what is missing.
    Draining(Box<Drain>),
    /// Nothing: every page was here, and it knows now.
    Released(Box<ArrivalReport>),
}

impl Parted {
    /// That of a guest which another process has taken in that has ended: by the trap that was
    /// [taken over](Trap::take_over) and its [ledger](Trap::ledger), which says that it
    /// [drains](Stage::Draining). Whoever shows that he knows the session is taken for its source, under
    /// whatever certificate of our authority: which one it was is not known.
    pub fn of_another(
        trap: Trap,
        (guest, memory): (Arc<dyn DestinationGuest>, GuestMemory),
        options: ReceiveOptions,
    ) -> Self {
        let (session, pager) = (trap.ledger().session(), Pager::of_another(trap, &memory));
        pager.limit(options.pager.planner.max_bandwidth);
        let drain = Drain::new(None, pager, (guest, memory), (session, options), Instant::now());
        Self { drain, why: Why::Stranded(Arc::new(PagerError::Left)) }
    }

    /// Where the pager stood, for whoever watches.
    pub fn status(&self) -> watch::Receiver<PagerStatus> {
        self.drain.status()
    }

    /// For whoever decides how much may cross when it goes on.
    pub fn limiter(&self) -> Limiter {
        self.drain.limiter()
    }

    /// What happened, in words.
    pub fn reason(&self) -> String {
        match &self.why {
            Why::Stranded(error) => error.to_string(),
            Why::Unheard(_) => "the source was not heard; every page is here all the same".into(),
        }
    }

    /// Whether every page is here.
    pub fn is_resident(&self) -> bool {
        matches!(self.why, Why::Unheard(_))
    }

    /// Waits at `listener` for the source to come back ([`recover`](super::recover)) and takes new lanes in.
    ///
    /// Errors: it came and could not be taken in. All is as it was, and this can be tried again.
    pub async fn rejoin(mut self, listener: &TcpListener) -> Result<Rejoined, (SessionError, Self)> {
        match self.take_up(listener).await {
            Ok(()) => Ok(match self.why {
                Why::Stranded(_) => Rejoined::Draining(Box::new(self.drain)),
                Why::Unheard(arrival) => Rejoined::Released(arrival),
            }),
            Err(error) => Err((error, self)),
        }
    }

    async fn take_up(&mut self, listener: &TcpListener) -> Result<(), SessionError> {
        let options = self.drain.options.clone();
        let session = self.drain.session;
        let is_source =
            move |theirs: &Preamble| theirs.session == session && theirs.purpose == Purpose::Rejoin;
        let else_told = "a guest is here already, and its own source is waited for";
        let Caller { mut channel, said, .. } =
            await_call(listener, options.tls.as_ref(), is_source, else_told).await?;
        if self.drain.channel.as_ref().is_some_and(|before| before.shown() != channel.shown()) {
            channel.turn_away("a guest is here already, whose source has another certificate").await;
            return Err(SessionError::Protocol("it shows another certificate than the guest's source"));
        }
        let dock = Dock::of(listener, &channel, session, options);
        let (offered, max_bandwidth) = rejoins(said)?;
        locked(&self.drain.pager).limit_further(max_bandwidth);
        if let Why::Unheard(arrival) = &self.why {
            released(&mut channel, arrival).await?;
            self.drain.over();
            return Ok(());
        }
        if let Err(error) = self.drain.go_on(&mut channel, &offered, dock).await {
            // If it was lost once more it is to come again, and is not told to stay away.
            if !error.is_of_the_network() {
                let _ = channel.send(&Message::Refuse(error.to_string())).await;
            }
            return Err(error);
        }
        passed("Rejoined", self.drain.begun);
        self.drain.channel = Some(channel);
        // If it does not hear it, its lanes serve all the same.
        self.drain.tell(&Message::LanesReady).await;
        Ok(())
    }
}
