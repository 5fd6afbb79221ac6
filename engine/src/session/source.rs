//! The source's side of a session. [`migrate`] reads as the protocol.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postcopy_transport::{EndpointOptions, Transport};
use tokio::sync::watch;

use super::channel::{Channel, unexpected};
use super::course::{Accepted, Course, micros};
use super::dirty::{DirtyLog, MOST_RUNS, UseLog, WATCH, Watched};
use super::message::{GuestDescription, Message, Mode, PageOrder};
use super::owed::{Owed, RecoverOptions, name_of, recover};
use super::preamble::{Purpose, SessionId};
use super::report::{MigrationReport, Phase, Progress};
use super::state::outgoing;
use super::tls::SourceTls;
use super::{GuestError, STEP_PATIENCE, SessionError, WORK_PATIENCE, blocking};
use crate::export::Export;
use crate::memory::GuestMemory;
use crate::pager::is_huge;
use crate::planner::{Bandwidth, Run};
use crate::proc_pages::is_trapped;

/// A running guest that can be moved away. Called from a blocking thread.
pub trait SourceGuest: Send + Sync + 'static {
    /// Its memory. All of it must have arrived here: what a trap hides is read as zeros.
    fn memory(&self) -> GuestMemory;

    /// What another VMM needs to know to prepare for it. The layout is filled in by the engine.
    fn describe(&self) -> Result<(String, Vec<u8>), GuestError>;

    /// Stops it, so that neither vCPUs nor devices touch its memory any more, and writes the state
    /// of both. Returns since when it stands still: its downtime counts from there.
    ///
    /// What is written, and flushed, is loaded at once at the destination; a VMM may begin before the guest stands still,
    /// with what takes long. Loading that touches the guest's memory waits until this has returned.
    fn freeze(&self, state: &mut dyn Write) -> Result<Instant, GuestError>;

    /// Whether it may give pages back while it runs (a balloon).
    fn may_discard(&self) -> bool {
        false
    }

    /// Whether the guest touches its memory through [`GuestMemory::guest`] of this process, so that what
    /// it touches last can be seen there.
    fn runs_on_our_mapping(&self) -> bool {
        false
    }

    /// Begins to note which pages of its memory are written, by its vCPUs and its devices; it runs on.
    ///
    /// Errors: that cannot be told of this guest here, so that it can only be moved by
    /// [`Mode::Postcopy`].
    fn log_dirty(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Err("nothing tells which pages this guest writes".into())
    }

    /// Begins to note which pages of its memory are used, touched or at least written: an idea of it, for which the guest is
    /// not held up. Nothing where that cannot be had. Asked where no mapping of ours and no log tells it.
    ///
    /// Errors: it can be had, and was not.
    fn watch_uses(&self) -> Result<Option<Box<dyn UseLog>>, GuestError> {
        Ok(None)
    }

    /// Keeps the name of the session that it moves in where that outlives this process, for who takes its place
    /// ([`Owed::of`](super::Owed::of)). It runs. Not kept, if not said otherwise.
    ///
    /// Errors: it was not kept; the move goes on without.
    fn keep_name(&self, _session: &str) -> Result<(), GuestError> {
        Ok(())
    }

    /// Lets it run on after [`SourceGuest::freeze`], also after one that failed.
    fn thaw(&self) -> Result<(), GuestError>;
}

/// How to move a guest.
#[derive(Clone, Debug, Default)]
pub struct MigrateOptions {
    /// Transports to offer, best first. Empty: all that this machine has but shared memory.
    pub transports: Vec<Transport>,
    /// RDMA device and addresses. `local` is found from the control connection.
    pub endpoint: EndpointOptions,
    /// When memory moves.
    pub mode: Mode,
    /// How much may cross a second where nobody waits for it, if the destination does not allow less.
    pub max_bandwidth: Option<Bandwidth>,
    /// For how long to try to reach a destination again that is lost after the handover; not at all, if not
    /// said otherwise.
    pub patience: Duration,
    /// Whom to speak with. `None`: whoever listens there, in clear.
    pub tls: Option<SourceTls>,
    /// Says true if the migration is to be called off. That is heeded for as long as the guest has not been stopped
    /// ([`Phase::is_before_stop`]); it runs on then.
    pub called_off: Option<watch::Receiver<bool>>,
}

/// Who has the guest after a migration that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source: it runs there as before.
    Source,
    /// The destination may or may not have resumed it. It must not run here unless somebody knows
    /// that it does not run there.
    InDoubt,
    /// The destination runs it. If its memory has not all arrived, it needs this side's.
    Destination,
}

/// A migration that failed, and who has the guest.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct MigrationError {
    /// What went wrong.
    pub error: SessionError,
    /// The memory on offer, where the destination may still need it. Keep it as long as that:
    /// [`recover`](super::recover) serves it again. `None`: the guest runs on here.
    pub owed: Option<Box<Owed>>,
}

impl MigrationError {
    /// Who has the guest now.
    pub fn owner(&self) -> Owner {
        self.owed.as_ref().map_or(Owner::Source, |owed| owed.owner())
    }
}

/// Moves `guest` to the destination that listens at `peer`.
///
/// Returns when every page is there and the source's memory may go. Progress goes to `progress`. A destination that is
/// lost after the handover is tried again for as long as the options say.
///
/// Errors: see [`Owner`] for who has the guest. Before the commit the guest runs on here, unharmed.
pub async fn migrate(
    guest: Arc<dyn SourceGuest>,
    peer: SocketAddr,
    options: MigrateOptions,
    progress: &watch::Sender<Progress>,
) -> Result<MigrationReport, MigrationError> {
    let mut source = Source::new(guest, peer, options, progress).map_err(kept)?;
    let (mut channel, mut export) = source.prepare().await.map_err(kept)?;
    if let Err(error) = source.freeze_and_send(&mut channel, &mut export).await {
        return Err(source.run_on(error).await);
    }
    let committed = source.commit(&mut channel).await;
    let (course, owner) = (source.course, Owner::InDoubt);
    let mut owed = Box::new(Owed { course, export, owner, taken_over: false });
    let served = match committed {
        Ok(()) => {
            owed.owner = Owner::Destination;
            owed.course.serve(&mut channel).await
        }
        Err(error) => Err(error),
    };
    match served {
        Ok(arrival) => Ok(owed.release(channel, &arrival).await),
        Err(error) if owed.course.options.patience.is_zero() => {
            Err(MigrationError { error, owed: Some(owed) })
        }
        Err(first) => {
            tracing::warn!(error = %first, "the destination is lost");
            let options = RecoverOptions { patience: owed.course.options.patience, ..Default::default() };
            recover(owed, options).await.map_err(|(last, owed)| {
                let error = SessionError::NotReached { first: Box::new(first), last: Box::new(last) };
                MigrationError { error, owed: Some(owed) }
            })
        }
    }
}

/// What comes of `work`, unless the migration is called off first.
async fn unless<T>(
    called_off: Option<watch::Receiver<bool>>,
    work: impl Future<Output = Result<T, SessionError>>,
) -> Result<T, SessionError> {
    let called_off = async {
        let Some(mut said) = called_off else { return std::future::pending().await };
        if said.wait_for(|called_off| *called_off).await.is_err() {
            std::future::pending().await
        }
    };
    tokio::select! {
        biased;
        () = called_off => Err(SessionError::CalledOff),
        done = work => done,
    }
}

/// The guest runs on here.
fn kept(error: SessionError) -> MigrationError {
    MigrationError { error, owed: None }
}

struct Source {
    guest: Arc<dyn SourceGuest>,
    course: Course,
    /// From the beginning of a round of pre-copy on.
    watched: Watched,
}

impl Source {
    fn new(
        guest: Arc<dyn SourceGuest>,
        peer: SocketAddr,
        options: MigrateOptions,
        progress: &watch::Sender<Progress>,
    ) -> Result<Self, SessionError> {
        let course = Course::new(&guest.memory(), peer, options, random_id()?, progress);
        Ok(Self { guest, course, watched: Watched::default() })
    }

    /// Everything that can be done while the guest runs.
    async fn prepare(&mut self) -> Result<(Channel, Export), SessionError> {
        self.course.enter(Phase::Setup);
        let memory = self.guest.memory();
        self.check_arrived(&memory).await?;
        let huge_pages = blocking(move || is_huge(memory.guest())).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "what backs the guest's memory is not known");
            false
        });
        let offer = self.offer(huge_pages)?;
        let called_off = self.course.options.called_off.clone();
        let mut channel = unless(called_off, self.course.call(Purpose::Control)).await?;
        channel.send(&offer).await?;
        match self.export(&mut channel).await {
            Ok(export) => {
                self.keep_name().await;
                Ok((channel, export))
            }
            Err(error) => {
                let _ = channel.send(&Message::Refuse(error.to_string())).await;
                Err(error)
            }
        }
    }

    async fn keep_name(&self) {
        let (guest, name) = (self.guest.clone(), name_of(self.course.session));
        if let Err(error) = blocking(move || guest.keep_name(&name)).await {
            tracing::warn!(%error, "nobody can take this process's place if it is killed");
        }
    }

    /// Refuses a guest of which pages have not come here yet.
    async fn check_arrived(&self, memory: &GuestMemory) -> Result<(), SessionError> {
        let addresses = memory.guest().addresses();
        let trapped = blocking(move || is_trapped(std::process::id() as i32, addresses)).await;
        let source: GuestError = match trapped {
            Ok(false) => return Ok(()),
            Ok(true) => "it has not all arrived here yet: wait until it has".into(),
            Err(error) => error.into(),
        };
        Err(SessionError::Guest { operation: "looking at the guest's memory", source })
    }

    fn offer(&self, huge_pages: bool) -> Result<Message, SessionError> {
        let (vmm, config) = self
            .guest
            .describe()
            .map_err(|source| SessionError::Guest { operation: "describing the guest", source })?;
        let layout = self.guest.memory().layout().clone();
        let transports = self.course.transports()?;
        let guest = GuestDescription { vmm, layout, config, huge_pages };
        let MigrateOptions { mode, max_bandwidth, .. } = self.course.options;
        Ok(Message::Offer { guest, transports, mode, max_bandwidth })
    }

    async fn export(&mut self, channel: &mut Channel) -> Result<Export, SessionError> {
        let called_off = self.course.options.called_off.clone();
        let answer = unless(called_off.clone(), channel.receive("Accept", WORK_PATIENCE)).await?;
        let Accepted { transport, lanes, order } = self.course.accepted(answer)?;
        let (memory, endpoint) = (self.guest.memory(), self.course.options.endpoint.clone());
        let mut export = blocking(move || Export::new(transport, &memory, &endpoint)).await?;
        if self.course.options.mode == Mode::Hybrid {
            self.watched = Watched::begin(self.guest.clone()).await?;
        }
        export.describe_running()?;
        self.course.connect(&mut export, &lanes, channel).await?;
        self.lanes_ready(channel).await?;
        self.watch(channel, &export, order).await?;
        unless(called_off, std::future::ready(Ok(export))).await
    }

    /// Waits until the destination can take the guest: where there is a round of pre-copy, until that
    /// is over.
    async fn lanes_ready(&mut self, channel: &mut Channel) -> Result<(), SessionError> {
        let begun = Instant::now();
        let hybrid = self.course.options.mode == Mode::Hybrid;
        if hybrid {
            self.course.enter(Phase::PreCopy);
        }
        let called_off = &self.course.options.called_off.clone();
        loop {
            match unless(called_off.clone(), channel.receive("LanesReady", WORK_PATIENCE)).await? {
                Message::LanesReady => break,
                Message::Progress(pager) if hybrid => self.course.show(pager),
                other => return Err(unexpected(&other, "LanesReady")),
            }
        }
        if hybrid {
            self.course.report.precopy_us = micros(begun.elapsed());
        }
        Ok(())
    }

    /// Lets the guest run a little longer, to learn what it uses, and tells in which order it has, if that was asked for.
    async fn watch(
        &mut self,
        channel: &mut Channel,
        export: &Export,
        order: PageOrder,
    ) -> Result<(), SessionError> {
        let watched = std::mem::take(&mut self.watched).watch(self.guest.clone(), order);
        (self.watched, ()) = tokio::join!(watched, looked_through(export));
        if order == PageOrder::Recency {
            let runs = self.watched.order();
            self.course.report.ordered_pages = runs.iter().map(|run| u64::from(run.count)).sum();
            let mut pieces = runs.chunks(MOST_RUNS).peekable();
            while let Some(piece) = pieces.next() {
                let (runs, more) = (pairs(piece), pieces.peek().is_some());
                channel.send(&Message::Order { runs, more }).await?;
            }
        }
        Ok(())
    }

    /// Stops the guest and sends its state; returns when the destination has loaded it.
    async fn freeze_and_send(
        &mut self,
        channel: &mut Channel,
        export: &mut Export,
    ) -> Result<(), SessionError> {
        self.course.report.setup_us = micros(self.course.begun.elapsed());
        self.course.enter(Phase::Frozen);
        self.course.frozen = self.freeze(channel).await?;
        self.course.report.freeze_us = micros(self.course.frozen.elapsed());
        if self.guest.may_discard() {
            export.check_pages()?;
        }
        let discards = self.guest.may_discard();
        let recent = pairs(self.watched.recent());
        export.describe_pages(self.watched.dirty(discards))?;
        channel.send(&Message::Recent(recent)).await?;
        channel.send(&Message::StateEnd { length: self.course.report.state_bytes }).await?;
        match channel.receive("StateLoaded", WORK_PATIENCE).await? {
            Message::StateLoaded { load_us } => {
                self.course.report.load_us = load_us;
                Ok(())
            }
            other => Err(unexpected(&other, "StateLoaded")),
        }
    }

    /// Stops the guest, and sends its state while it is saved. Says since when it stands still.
    async fn freeze(&mut self, channel: &mut Channel) -> Result<Instant, SessionError> {
        let (mut state, pieces) = outgoing();
        let guest = self.guest.clone();
        let saving =
            blocking(move || guest.freeze(&mut state).and_then(|since| Ok((since, state.flush()?).0)));
        let sending = async {
            // If they cannot be sent, whoever saves hears of it by the end of this.
            let mut pieces = pieces;
            while let Some(piece) = pieces.recv().await {
                self.course.report.state_bytes += piece.len() as u64;
                channel.send(&Message::State(piece)).await?;
            }
            Ok::<_, SessionError>(())
        };
        let (frozen, sent) = tokio::join!(saving, sending);
        sent?;
        frozen.map_err(|source| SessionError::Guest { operation: "freezing the guest", source })
    }

    /// The guest stays: let it run on here.
    async fn run_on(&self, error: SessionError) -> MigrationError {
        let guest = self.guest.clone();
        match blocking(move || guest.thaw()).await {
            Ok(()) => kept(error),
            Err(source) => {
                let operation = "letting the guest run on after a failed migration";
                kept(SessionError::Guest { operation, source })
            }
        }
    }

    /// Hands the guest over. From the first byte of this message on it is not ours.
    async fn commit(&mut self, channel: &mut Channel) -> Result<(), SessionError> {
        self.course.enter(Phase::InDoubt);
        channel.send(&Message::Commit).await?;
        match channel.receive("Resumed", STEP_PATIENCE).await? {
            Message::Resumed => {
                self.course.report.downtime_us = micros(self.course.frozen.elapsed());
                self.course.enter(Phase::Draining);
                Ok(())
            }
            other => Err(unexpected(&other, "Resumed")),
        }
    }
}

/// Waits until the guest's memory has been looked through while it runs: that is not to be done while it stands still,
/// beside what saves and loads its state. Of a large guest, as much as there is time for.
async fn looked_through(export: &Export) {
    let end = Instant::now() + 2 * WATCH;
    while !export.is_described() && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Runs as messages have them.
fn pairs(runs: &[Run]) -> Vec<(u64, u32)> {
    runs.iter().map(|run| (run.first.0, run.count)).collect()
}

fn random_id() -> Result<SessionId, SessionError> {
    let mut id = SessionId::default();
    getrandom::fill(&mut id).map_err(|error| SessionError::Connection { source: error.into() })?;
    Ok(id)
}
