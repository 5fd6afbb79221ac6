//! The pager: a thread that turns faults into reads and reads into published pages.
//!
//! [`Pager::start`] spawns one thread (a *shard*, see the loop in `shard.rs`) over a [`Trap`] and two
//! lanes. The thread knows no session; progress and the end come out of a watch channel. When it
//! ends badly, or panics, the trap stays: the guest waits for its pages and never reads zeros.

mod claims;
mod huge_pages;
mod map_reader;
mod rest;
mod round;
mod server;
mod shard;
mod sigbus;
mod timing;
mod token;
mod trap;
mod waits;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) use huge_pages::is_huge;
pub use huge_pages::{Collapsed, HugePages};
use postcopy_transport::{AnyLane, HostMemory, LaneError, LocalRegion, Read, ReadError, RemoteRegion, Token};
pub(crate) use round::read_once;
pub use round::{Round, RoundWatch};
use rustix::event::{EventfdFlags, eventfd};
pub use server::{FaultFailed, FaultServer};
pub use sigbus::SelfService;
use tokio::sync::watch;
pub use trap::{Trap, TrapEvent};
pub use waits::Waited;

use self::claims::Claims;
use self::server::{Note, Shared};
use crate::memory::{GuestMemory, PAGE_SIZE, PageIndex};
use crate::planner::{PlannerConfig, Run};
use crate::stats::PagerReport;

/// Why the pager stopped. The guest waits wherever it touched a page that is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// This process may not use userfaultfd.
    #[error(
        "userfaultfd is refused ({source}): run as root, give this program CAP_SYS_PTRACE, or allow its \
         user to open /dev/userfaultfd (or set the sysctl vm.unprivileged_userfaultfd to 1)"
    )]
    UserfaultRefused {
        /// What the system said.
        source: std::io::Error,
    },
    /// A userfaultfd operation failed.
    #[error("{operation} failed: {source}")]
    Userfault {
        /// Which.
        operation: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A lane died.
    #[error("the {lane} lane failed{}: {source}; the guest waits for {outstanding} pages of its memory", at(*page))]
    Lane {
        /// The page whose read failed, where the device tells.
        page: Option<PageIndex>,
        /// urgent or bulk.
        lane: &'static str,
        /// Pages that had not arrived.
        outstanding: u64,
        /// Why.
        source: LaneError,
    },
    /// The lane of a thread that serves its own faults died.
    #[error("the lane of a thread that serves itself failed: {source}; the guest waits")]
    Server {
        /// Why.
        source: LaneError,
    },
    /// The source refused a read.
    #[error("the source refused to give page {page:?}: {source}")]
    Read {
        /// The first page of the read.
        page: PageIndex,
        /// Why.
        source: ReadError,
    },
    /// The source's memory is not what it said.
    #[error("the source broke the protocol: {0}")]
    Peer(&'static str),
    /// Nobody waits for the round of pre-copy any more.
    #[error("the round of pre-copy was ended early")]
    RoundEnded,
    /// The kernel reported a fault outside guest memory.
    #[error("a fault at {0:?}, outside guest memory")]
    StrayFault(PageIndex),
    /// The system refused something else.
    #[error("{operation} failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The thread panicked: a bug in the engine.
    #[error("the pager thread panicked: {0}; the guest waits, please report this")]
    Panicked(String),
}

fn at(page: Option<PageIndex>) -> String {
    page.map(|page| format!(" at page {:#x}", page.0)).unwrap_or_default()
}

/// Where the pager stands.
#[derive(Clone, Debug, Default)]
pub enum PagerState {
    /// At work.
    #[default]
    Running,
    /// Every page is here.
    Resident,
    /// It was told to stop.
    Stopped,
    /// It failed; the guest waits.
    Failed(Arc<PagerError>),
}

/// What the watch channel carries.
#[derive(Clone, Debug, Default)]
pub struct PagerStatus {
    /// Where it stands.
    pub state: PagerState,
    /// What it has done, up to a tenth of a second ago. Stage percentiles are filled in at the end.
    pub report: PagerReport,
    /// Who waited for pages and how long, at the end. A wait that ends with the last page may be missing.
    pub waited: Vec<Waited>,
}

/// How the pager behaves.
#[derive(Clone, Copy, Debug)]
pub struct PagerConfig {
    /// How long to poll without anything happening before sleeping on descriptors. Spinning pays
    /// where there is a core to spare.
    pub spin: Duration,
    /// Which page comes next, and how much may be in flight.
    pub planner: PlannerConfig,
    /// Whether memory is put together to huge pages when it is here.
    pub huge_pages: HugePages,
}

impl Default for PagerConfig {
    /// Spins as [`postcopy_transport::default_spin`] says.
    fn default() -> Self {
        let (planner, huge_pages) = (PlannerConfig::default(), HugePages::default());
        Self { spin: postcopy_transport::default_spin(), planner, huge_pages }
    }
}

/// The source's memory as the destination reads it.
pub struct SourceMemory {
    /// Guest memory at the source.
    pub memory: RemoteRegion,
    /// Its page map.
    pub map: RemoteRegion,
    /// Where guest memory lands.
    pub landing: LocalRegion,
    /// Where the page map lands.
    pub map_landing: LocalRegion,
    /// The memory behind `map_landing`.
    pub map_memory: HostMemory,
    /// Whether landing memory is populated already (pinned by its registration).
    pub populated: bool,
    /// What of it is here already.
    pub round: Round,
}

impl SourceMemory {
    fn check(&self, pages: u64) -> Result<(), PagerError> {
        let fits = self.memory.len() == pages * PAGE_SIZE && self.landing.slice(0, 1).is_some();
        fits.then_some(()).ok_or(PagerError::Peer("its memory region has the wrong size"))
    }

    /// The read that brings `run`, or `None` if the source's or this side's memory ends before.
    fn read_of(&self, token: Token, run: Run) -> Option<Read> {
        read_between(self.landing, self.memory, token, run)
    }
}

fn read_between(landing: LocalRegion, memory: RemoteRegion, token: Token, run: Run) -> Option<Read> {
    let len = run.count * PAGE_SIZE as u32;
    let local = landing.slice(run.first.offset(), len)?;
    Read::new(token, local, memory.slice(run.first.offset(), len)?)
}

/// A running pager.
pub struct Pager {
    status: watch::Receiver<PagerStatus>,
    huge_pages: HugePages,
    thread: Option<JoinHandle<watch::Sender<PagerStatus>>>,
    shared: Arc<Shared>,
    spin: Duration,
    _signals: Option<sigbus::Registration>,
}

/// Asks the thread to stop, or to look at its notes, also while it sleeps.
struct StopSignal {
    asked: AtomicBool,
    wake: rustix::fd::OwnedFd,
}

impl StopSignal {
    /// Ends a sleep, or the next.
    fn rouse(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Pager {
    /// Starts the thread.
    ///
    /// Errors: the source's regions do not fit the guest's memory, or the system refuses a thread
    /// or a descriptor.
    pub fn start(
        trap: Trap,
        memory: &GuestMemory,
        source: SourceMemory,
        urgent: AnyLane,
        bulk: AnyLane,
        config: PagerConfig,
    ) -> Result<Self, PagerError> {
        let failed = |operation| move |source: std::io::Error| PagerError::System { operation, source };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|errno| failed("eventfd")(errno.into()))?;
        let stop = Arc::new(StopSignal { asked: AtomicBool::new(false), wake });
        let (sender, status) = watch::channel(PagerStatus::default());
        let pages = memory.layout().total_pages();
        let (notes, heard) = std::sync::mpsc::channel();
        let shared = Arc::new(Shared {
            claims: Claims::new(pages),
            trap,
            memory: source.memory,
            landing: source.landing,
            populated: source.populated,
            stop,
            notes,
            draining: AtomicBool::new(false),
        });
        let shard = shard::Shard::new(shared.clone(), heard, pages, source, [urgent, bulk], config)?;
        let signals = match shared.trap.is_for_self_service() {
            true => Some(sigbus::register(shared.clone()).map_err(failed("handling SIGBUS"))?),
            false => None,
        };
        let work = move || {
            shard::supervise(shard, &sender);
            sender
        };
        let thread = std::thread::Builder::new().name("pager".into()).spawn(work);
        let thread = Some(thread.map_err(failed("starting the pager thread"))?);
        let PagerConfig { spin, huge_pages, .. } = config;
        Ok(Self { status, huge_pages, thread, shared, spin, _signals: signals })
    }

    /// Begins to put memory together to huge pages, if it is all here and [`HugePages::On`] was
    /// chosen. Goes on when the pager is dropped; [`PagerReport::huge_pages`] says how far it is. No
    /// device may have the memory pinned any more.
    pub fn collapse(&mut self) {
        let resident = matches!(self.status.borrow().state, PagerState::Resident);
        if !resident || self.huge_pages != HugePages::On {
            return;
        }
        // Its work is done.
        let Some(Ok(sender)) = self.thread.take().map(JoinHandle::join) else { return };
        if let Err(error) = huge_pages::begin(self.shared.trap.guest().clone(), sender) {
            tracing::warn!(%error, "memory stays in small pages: no thread for the work");
        }
    }

    /// Lets a thread serve its own faults over `lane`, which nobody else uses. The trap must be one
    /// [for self-service](Trap::register_for_self_service).
    pub fn server(&self, lane: AnyLane) -> FaultServer {
        FaultServer::new(self.shared.clone(), lane, self.spin)
    }

    /// Has these pages read before others, the first first: the guest touched them just before it was
    /// stopped. They must be pages of the guest.
    pub fn prefer(&self, runs: Vec<Run>) {
        // A pager that has ended reads nothing any more.
        drop(self.shared.notes.send(Note::Prefer(runs)));
        self.shared.stop.rouse();
    }

    /// Progress, and the end.
    pub fn status(&self) -> watch::Receiver<PagerStatus> {
        self.status.clone()
    }

    /// Stops the thread and waits for it. Pages that have not arrived stay trapped as long as the
    /// returned trap lives.
    pub fn stop(mut self) -> Trap {
        self.end();
        self.shared.trap.clone()
    }

    fn end(&mut self) {
        self.shared.stop.asked.store(true, Ordering::Release);
        self.shared.stop.rouse();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.end();
    }
}
