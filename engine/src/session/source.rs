//! The source's side of a session. [`migrate`] reads as the protocol.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use postcopy_transport::{EndpointOptions, Transport};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::channel::{Channel, unexpected};
use super::dirty::{DirtyLog, Watched};
use super::message::{GuestDescription, Message, Mode, STATE_PIECE};
use super::preamble::{self, Preamble, Purpose, SessionId};
use super::query_migrate::QueryMigrate;
use super::report::{ArrivalReport, MigrationReport, Phase, Progress, REPORT_VERSION};
use super::{GuestError, STEP_PATIENCE, SessionError, WORK_PATIENCE, blocking};
use crate::export::{Export, LANES, MAX_LANES};
use crate::memory::GuestMemory;
use crate::page_set::PageSet;
use crate::pager::is_huge;
use crate::proc_pages::is_trapped;
use crate::stats::PagerReport;

/// A running guest that can be moved away. Called from a blocking thread.
pub trait SourceGuest: Send + Sync + 'static {
    /// Its memory. All of it must have arrived here: what a trap hides is read as zeros.
    fn memory(&self) -> GuestMemory;

    /// What another VMM needs to know to prepare for it. The layout is filled in by the engine.
    fn describe(&self) -> Result<(String, Vec<u8>), GuestError>;

    /// Stops it, so that neither vCPUs nor devices touch its memory any more, and gives the state
    /// of both.
    fn freeze(&self) -> Result<Frozen, GuestError>;

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

    /// Pages that are written within `time` from now on, about; none where that cannot be told. Asked where no
    /// mapping of ours and no log tells it.
    ///
    /// Errors: it can be told, and was not.
    fn written_within(&self, _time: Duration) -> Result<PageSet, GuestError> {
        Ok(PageSet::default())
    }

    /// Lets it run on after [`SourceGuest::freeze`], also after one that failed.
    fn thaw(&self) -> Result<(), GuestError>;
}

/// A guest that stands still.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// The state of its vCPUs and devices.
    pub state: Vec<u8>,
    /// Since when it stands still. Its downtime counts from here.
    pub since: Instant,
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
    /// Who has the guest now.
    pub owner: Owner,
    /// The memory on offer, where the destination may still need it. Keep it as long as that.
    pub export: Option<Box<Export>>,
}

/// Moves `guest` to the destination that listens at `peer`.
///
/// Returns when every page is there and the source's memory may go. Progress goes to `progress`.
///
/// Errors: see [`Owner`] for who has the guest. Before the commit the guest runs on here, unharmed.
pub async fn migrate(
    guest: Arc<dyn SourceGuest>,
    peer: SocketAddr,
    options: MigrateOptions,
    progress: &watch::Sender<Progress>,
) -> Result<MigrationReport, MigrationError> {
    let mut source = Source::new(guest, peer, options, progress);
    let prepared = source.prepare().await;
    let (mut channel, mut export) = prepared.map_err(|error| failed(error, Owner::Source, None))?;
    if let Err(error) = source.freeze_and_send(&mut channel, &mut export).await {
        return Err(source.run_on(error).await);
    }
    if let Err(error) = source.commit(&mut channel).await {
        return Err(failed(error, Owner::InDoubt, Some(export)));
    }
    match source.serve(&mut channel).await {
        Ok(arrival) => {
            drop(export);
            // The guest is there with all its memory: whether this last word arrives changes nothing.
            let _ = channel.send(&Message::Release).await;
            Ok(source.finish(&arrival))
        }
        Err(error) => Err(failed(error, Owner::Destination, Some(export))),
    }
}

fn failed(error: SessionError, owner: Owner, export: Option<Export>) -> MigrationError {
    MigrationError { error, owner, export: export.map(Box::new) }
}

struct Source<'a> {
    guest: Arc<dyn SourceGuest>,
    peer: SocketAddr,
    options: MigrateOptions,
    progress: &'a watch::Sender<Progress>,
    begun: Instant,
    frozen: Instant,
    /// From the beginning of a round of pre-copy to the freeze.
    watched: Watched,
    report: MigrationReport,
}

impl<'a> Source<'a> {
    fn new(
        guest: Arc<dyn SourceGuest>,
        peer: SocketAddr,
        options: MigrateOptions,
        progress: &'a watch::Sender<Progress>,
    ) -> Self {
        let begun = Instant::now();
        let memory_bytes = guest.memory().layout().total_bytes();
        let (version, mode) = (REPORT_VERSION, options.mode);
        let report = MigrationReport { version, mode, memory_bytes, ..Default::default() };
        Self { guest, peer, options, progress, begun, frozen: begun, watched: Watched::default(), report }
    }

    fn enter(&self, phase: Phase) {
        let elapsed_us = micros(self.begun.elapsed());
        tracing::info!(?phase, elapsed_us, "migration");
        self.progress.send_modify(|progress| {
            progress.phase = phase;
            progress.setup_us = self.report.setup_us;
            progress.downtime_us = self.report.downtime_us;
            progress.total_us = elapsed_us;
        });
    }

    /// What the destination said of its pager.
    fn show(&self, pager: PagerReport) {
        self.progress.send_modify(|progress| {
            progress.pager = pager;
            progress.total_us = micros(self.begun.elapsed());
        });
    }

    /// Everything that can be done while the guest runs.
    async fn prepare(&mut self) -> Result<(Channel, Export), SessionError> {
        self.enter(Phase::Setup);
        let memory = self.guest.memory();
        self.check_arrived(&memory).await?;
        let huge_pages = blocking(move || is_huge(memory.guest())).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "what backs the guest's memory is not known");
            false
        });
        let offer = self.offer(huge_pages)?;
        let session = random_id()?;
        let stream = self.dial(session, Purpose::Control).await?;
        self.options.endpoint.local = stream.local_addr().ok().map(|address| address.ip());
        let mut channel = Channel::new(stream)?;
        channel.send(&offer).await?;
        let (transport, requests) = accepted(channel.receive("Accept", WORK_PATIENCE).await?)?;
        match self.export(transport, requests, session, &mut channel).await {
            Ok(export) => Ok((channel, export)),
            Err(error) => {
                let _ = channel.send(&Message::Refuse(error.to_string())).await;
                Err(error)
            }
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
        let transports = self.transports()?.iter().map(|transport| transport.name().to_owned()).collect();
        let guest = GuestDescription { vmm, layout, config, huge_pages };
        Ok(Message::Offer { guest, transports, mode: self.options.mode })
    }

    /// What to offer: what was asked for, if this machine has it, else all that it has.
    fn transports(&self) -> Result<Vec<Transport>, SessionError> {
        for transport in &self.options.transports {
            transport.available()?;
        }
        if !self.options.transports.is_empty() {
            return Ok(self.options.transports.clone());
        }
        let usable = |transport: &Transport| match transport.available() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "going on without it");
                false
            }
        };
        Ok([Transport::Verbs, Transport::Tcp].into_iter().filter(usable).collect())
    }

    async fn export(
        &mut self,
        transport: Transport,
        requests: Vec<Vec<u8>>,
        session: SessionId,
        channel: &mut Channel,
    ) -> Result<Export, SessionError> {
        self.report.transport = transport.name().into();
        let (memory, endpoint) = (self.guest.memory(), self.options.endpoint.clone());
        let mut export = blocking(move || Export::new(transport, &memory, &endpoint)).await?;
        let (mut lanes, mut streams) = (Vec::new(), Vec::new());
        for request in &requests {
            let before = export.awaited();
            lanes.push(export.grant(request)?);
            streams.push(export.awaited() - before);
        }
        if self.options.mode == Mode::Hybrid {
            self.watched = Watched::begin(self.guest.clone()).await?;
        }
        export.describe_running()?;
        let regions = export.regions().map(|region| region.to_bytes());
        channel.send(&Message::Granted { lanes, regions }).await?;
        for (lane, streams) in streams.into_iter().enumerate() {
            for _ in 0..streams {
                let stream = self.dial(session, Purpose::Lane(lane as u32)).await?;
                let stream = stream.into_std().map_err(|source| SessionError::Connection { source })?;
                export.attach(stream)?;
            }
        }
        self.lanes_ready(channel).await?;
        Ok(export)
    }

    /// Waits until the destination can take the guest: where there is a round of pre-copy, until that
    /// is over.
    async fn lanes_ready(&mut self, channel: &mut Channel) -> Result<(), SessionError> {
        let begun = Instant::now();
        let hybrid = self.options.mode == Mode::Hybrid;
        if hybrid {
            self.enter(Phase::PreCopy);
        }
        loop {
            match channel.receive("LanesReady", WORK_PATIENCE).await? {
                Message::LanesReady => break,
                Message::Progress(pager) if hybrid => self.show(pager),
                other => return Err(unexpected(&other, "LanesReady")),
            }
        }
        if hybrid {
            self.report.precopy_us = micros(begun.elapsed());
        }
        self.watched = std::mem::take(&mut self.watched).watch(self.guest.clone()).await;
        Ok(())
    }

    /// Connects to the destination and says what for. A control connection is answered.
    async fn dial(&self, session: SessionId, purpose: Purpose) -> Result<TcpStream, SessionError> {
        let unreachable =
            |source: std::io::Error| SessionError::Unreachable { peer: self.peer.to_string(), source };
        let dialed = tokio::time::timeout(STEP_PATIENCE, TcpStream::connect(self.peer)).await;
        let timed_out = || std::io::Error::from(std::io::ErrorKind::TimedOut);
        let mut stream = dialed.map_err(|_| unreachable(timed_out()))?.map_err(unreachable)?;
        preamble::write(&mut stream, Preamble { session, purpose }).await?;
        if purpose == Purpose::Control {
            preamble::read(&mut stream, STEP_PATIENCE).await?;
        }
        Ok(stream)
    }

    /// Stops the guest and sends its state; returns when the destination has loaded it.
    async fn freeze_and_send(
        &mut self,
        channel: &mut Channel,
        export: &mut Export,
    ) -> Result<(), SessionError> {
        self.report.setup_us = micros(self.begun.elapsed());
        self.enter(Phase::Frozen);
        let guest = self.guest.clone();
        let frozen = blocking(move || guest.freeze()).await;
        let Frozen { state, since } =
            frozen.map_err(|source| SessionError::Guest { operation: "freezing the guest", source })?;
        self.frozen = since;
        self.report.freeze_us = micros(self.frozen.elapsed());
        self.report.state_bytes = state.len() as u64;
        if self.guest.may_discard() {
            export.check_pages()?;
        }
        let discards = self.guest.may_discard();
        let watched = std::mem::take(&mut self.watched);
        let recent = watched.recent().iter().map(|run| (run.first.0, run.count)).collect();
        export.describe_pages(watched.into_dirty(discards))?;
        channel.send(&Message::Recent(recent)).await?;
        for piece in state.chunks(STATE_PIECE) {
            channel.send(&Message::State(Bytes::copy_from_slice(piece))).await?;
        }
        channel.send(&Message::StateEnd { length: state.len() as u64 }).await?;
        match channel.receive("StateLoaded", WORK_PATIENCE).await? {
            Message::StateLoaded { load_us } => {
                self.report.load_us = load_us;
                Ok(())
            }
            other => Err(unexpected(&other, "StateLoaded")),
        }
    }

    /// The guest stays: let it run on here.
    async fn run_on(&self, error: SessionError) -> MigrationError {
        let guest = self.guest.clone();
        match blocking(move || guest.thaw()).await {
            Ok(()) => failed(error, Owner::Source, None),
            Err(source) => {
                let operation = "letting the guest run on after a failed migration";
                failed(SessionError::Guest { operation, source }, Owner::Source, None)
            }
        }
    }

    /// Hands the guest over. From the first byte of this message on it is not ours.
    async fn commit(&mut self, channel: &mut Channel) -> Result<(), SessionError> {
        self.enter(Phase::InDoubt);
        channel.send(&Message::Commit).await?;
        match channel.receive("Resumed", STEP_PATIENCE).await? {
            Message::Resumed => {
                self.report.downtime_us = micros(self.frozen.elapsed());
                self.enter(Phase::Draining);
                Ok(())
            }
            other => Err(unexpected(&other, "Resumed")),
        }
    }

    /// Keeps the memory on offer until the destination has all of it.
    async fn serve(&mut self, channel: &mut Channel) -> Result<ArrivalReport, SessionError> {
        let before = processor_time();
        loop {
            match channel.receive("progress of the drain", WORK_PATIENCE).await? {
                Message::Progress(pager) => self.show(pager),
                Message::Resident(arrival) => {
                    self.report.source_cpu_us = micros(processor_time().saturating_sub(before));
                    return Ok(arrival);
                }
                other => return Err(unexpected(&other, "Progress or Resident")),
            }
        }
    }

    fn finish(mut self, arrival: &ArrivalReport) -> MigrationReport {
        self.report.resident_us = arrival.resident_us;
        self.report.pager = arrival.pager;
        self.report.total_us = micros(self.begun.elapsed());
        self.progress.send_modify(|progress| progress.pager = arrival.pager);
        self.enter(Phase::Resident);
        self.report.query_migrate = QueryMigrate {
            postcopy_vcpu_blocktime: arrival.vcpu_blocktime_us.iter().map(|us| us / 1000).collect(),
            ..QueryMigrate::from(&*self.progress.borrow())
        };
        self.report.vcpu_blocktime_us.clone_from(&arrival.vcpu_blocktime_us);
        tracing::info!(phase = "Released", elapsed_us = micros(self.begun.elapsed()), "migration");
        self.report
    }
}

/// What the destination accepted, checked.
fn accepted(message: Message) -> Result<(Transport, Vec<Vec<u8>>), SessionError> {
    match message {
        Message::Accept { lanes, .. } if !(LANES..=MAX_LANES).contains(&lanes.len()) => {
            Err(SessionError::Protocol("it asked for an impossible number of lanes"))
        }
        Message::Accept { transport, lanes } => {
            let known =
                transport.parse().map_err(|_| SessionError::Protocol("it accepted an unknown transport"));
            Ok((known?, lanes))
        }
        other => Err(unexpected(&other, "Accept")),
    }
}

fn random_id() -> Result<SessionId, SessionError> {
    let mut id = SessionId::default();
    getrandom::fill(&mut id).map_err(|error| SessionError::Connection { source: error.into() })?;
    Ok(id)
}

/// Processor time of this process so far, in all its threads.
fn processor_time() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
