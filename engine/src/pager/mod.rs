//! The pager: a thread that turns faults into reads and reads into published pages.
//!
//! [`Pager::start`] spawns a thread (a *shard*, see the loop in `shard.rs`) over each part of a
//! [`Trap`] and two lanes. The threads know no session; progress and the end come out of a watch
//! channel. When one ends badly, or panics, the trap stays: the guest waits for its pages and never
//! reads zeros.

mod board;
mod claims;
mod huge_pages;
mod landing;
mod map_reader;
mod rest;
mod round;
mod server;
mod shard;
mod shards;
mod sigbus;
mod timing;
mod token;
mod trap;
mod waits;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) use huge_pages::is_huge;
pub use huge_pages::{Collapsed, HugePages};
pub use landing::{Landing, LandingMemory};
use postcopy_transport::{AnyLane, HostMemory, LaneError, LocalRegion, ReadError, RemoteRegion};
pub(crate) use round::read_once;
pub use round::{Round, RoundWatch};
use rustix::event::{EventfdFlags, eventfd};
pub use server::{FaultFailed, FaultServer};
pub use shards::{MAX_SHARDS, Shards};
pub use sigbus::SelfService;
use tokio::sync::watch;
pub use trap::{FaultsTo, Trap};
pub use waits::Waited;

use self::board::Board;
use self::map_reader::MapReader;
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
    pub landing: LandingMemory,
    /// Where the page map lands.
    pub map_landing: LocalRegion,
    /// The memory behind `map_landing`.
    pub map_memory: HostMemory,
    /// What of it is here already.
    pub round: Round,
}

impl SourceMemory {
    /// For memory of so many pages.
    fn check(&self, pages: u64) -> Result<(), PagerError> {
        let fits = self.memory.len() == pages * PAGE_SIZE;
        fits.then_some(()).ok_or(PagerError::Peer("its memory region has the wrong size"))
    }
}

/// A running pager.
pub struct Pager {
    status: watch::Receiver<PagerStatus>,
    huge_pages: HugePages,
    threads: Vec<JoinHandle<Arc<Board>>>,
    /// One for each shard, in the order of their parts.
    shards: Arc<[Arc<Shared>]>,
    trap: Trap,
    /// The guest mapping, if it is of this process.
    memory: Option<HostMemory>,
    spin: Duration,
    landing: LandingMemory,
    /// Threads that serve themselves.
    servers: AtomicUsize,
    _signals: Vec<sigbus::Registration>,
}

/// An error of the system's in this operation.
fn failed(operation: &'static str) -> impl Fn(std::io::Error) -> PagerError {
    move |source| PagerError::System { operation, source }
}

/// Asks the thread to stop, or to look at its notes, also while it sleeps.
struct StopSignal {
    asked: AtomicBool,
    wake: rustix::fd::OwnedFd,
}

impl StopSignal {
    fn new() -> Result<Self, PagerError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|errno| failed("eventfd")(errno.into()))?;
        Ok(Self { asked: AtomicBool::new(false), wake })
    }

    /// Ends a sleep, or the next.
    fn rouse(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Pager {
    /// Starts a thread for each shard of the trap. `memory` is what it is under, unless that is another
    /// program's and this one has it not; `lanes` are as many pairs of urgent and bulk.
    ///
    /// Errors: the source's regions do not fit the guest's memory, there are not as many lanes, or the
    /// system refuses a thread or a descriptor.
    pub fn start(
        trap: Trap,
        memory: Option<&GuestMemory>,
        source: &SourceMemory,
        lanes: Vec<[AnyLane; 2]>,
        config: PagerConfig,
    ) -> Result<Self, PagerError> {
        let pages = trap.pages();
        source.check(pages)?;
        if lanes.len() != trap.shards() || !source.landing.fits(pages, trap.shards()) {
            let source = std::io::Error::other(format!("{} shards, {} pairs", trap.shards(), lanes.len()));
            return Err(PagerError::System {
                operation: "giving each shard its lanes and landing place",
                source,
            });
        }
        let (board, status) = Board::new(trap.shards());
        let (mut shards, mut notes) = (Vec::new(), Vec::new());
        for trap in trap.parts() {
            let (shared, heard) = Shared::new(trap.clone(), source)?;
            shards.push(Arc::new(shared));
            notes.push(heard);
        }
        let mut signals = Vec::new();
        for shared in shards.iter().filter(|shared| shared.trap.is_for_self_service()) {
            let registered = sigbus::register(shared.clone());
            signals.push(registered.map_err(failed("handling SIGBUS"))?);
        }
        let (huge_pages, spin) = (config.huge_pages, config.spin);
        let memory = memory.map(|memory| memory.guest().clone());
        let mut pager = Self {
            status,
            huge_pages,
            threads: Vec::new(),
            shards: shards.into(),
            trap,
            memory,
            spin,
            landing: source.landing.clone(),
            servers: AtomicUsize::new(0),
            _signals: signals,
        };
        pager.start_threads(pages, source, notes.into_iter().zip(lanes), config, &Arc::new(board))?;
        Ok(pager)
    }

    /// If it fails, those that were started end with the pager.
    fn start_threads(
        &mut self,
        pages: u64,
        source: &SourceMemory,
        each: impl Iterator<Item = (Receiver<Note>, [AnyLane; 2])>,
        mut config: PagerConfig,
        board: &Arc<Board>,
    ) -> Result<(), PagerError> {
        // They share the wire that a fault may wait for.
        config.planner.bulk_wait_ns /= self.shards.len() as u64;
        for (at, (shared, (notes, lanes))) in self.shards.iter().zip(each).enumerate() {
            let round = source.round.of(shared.part);
            let precopied = [round.pages(), round.bytes];
            let map = MapReader::of_frozen(pages, source, (at, shared.part), round.held)?;
            let ways = shard::Ways { lanes, place: source.landing.of_shard(at), map };
            let shard = shard::Shard::new(shared.clone(), notes, ways, precopied, config);
            let board = board.clone();
            let work = move || {
                shard::supervise(shard, at, &board);
                board
            };
            let thread = std::thread::Builder::new().name(format!("pager-{at}")).spawn(work);
            self.threads.push(thread.map_err(failed("starting a pager thread"))?);
        }
        Ok(())
    }

    /// Begins to put memory of this process together to huge pages, if it is all here and
    /// [`HugePages::On`] was chosen. Goes on when the pager is dropped; [`PagerReport::huge_pages`] says how far it is. No
    /// device may have the memory pinned any more.
    pub fn collapse(&mut self) {
        let resident = matches!(self.status.borrow().state, PagerState::Resident);
        if !resident || self.huge_pages != HugePages::On {
            return;
        }
        // Their work is done.
        let ended: Vec<_> = self.threads.drain(..).filter_map(|thread| thread.join().ok()).collect();
        let last = ended.into_iter().next_back();
        let Some((board, memory)) = last.zip(self.memory.clone()) else { return };
        if let Err(error) = huge_pages::begin(memory, board) {
            tracing::warn!(%error, "memory stays in small pages: no thread for the work");
        }
    }

    /// Lets a thread serve its own faults over `lane`, which nobody else uses. The trap must be one
    /// [whose threads are told](FaultsTo::Threads).
    ///
    /// Errors: there are 64 such threads already.
    pub fn server(&self, lane: AnyLane) -> Result<FaultServer, PagerError> {
        let none =
            || failed("giving a thread a place to land in")(std::io::Error::other("there are no more"));
        let place = self.landing.of_server(self.servers.fetch_add(1, Ordering::Relaxed));
        Ok(FaultServer::new(self.shards.clone(), lane, place.ok_or_else(none)?, self.spin))
    }

    /// Has these pages read before others, the first first: the guest touched them just before it was
    /// stopped. They must be pages of the guest.
    pub fn prefer(&self, runs: &[Run]) {
        for shared in &*self.shards {
            let here = runs.iter().filter_map(|run| shared.part.local_run(*run)).collect();
            // A shard that has ended reads nothing any more.
            drop(shared.notes.send(Note::Prefer(here)));
            shared.stop.rouse();
        }
    }

    /// Progress, and the end.
    pub fn status(&self) -> watch::Receiver<PagerStatus> {
        self.status.clone()
    }

    /// Stops the threads and waits for them. Pages that have not arrived stay trapped as long as the
    /// returned trap lives.
    pub fn stop(mut self) -> Trap {
        self.end();
        self.trap.clone()
    }

    fn end(&mut self) {
        for shared in &*self.shards {
            shared.stop.asked.store(true, Ordering::Release);
            shared.stop.rouse();
        }
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.end();
    }
}
