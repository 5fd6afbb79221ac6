//! The pager: a thread that turns faults into reads and reads into published pages.
//!
//! [`Pager::start`] spawns a thread (a *shard*, see the loop in `shard.rs`) over each part of a
//! [`Trap`] and two lanes. The threads know no session; progress and the end come out of a watch
//! channel. When one ends badly, or panics, the trap stays: the guest waits for its pages and never
//! reads zeros. [`Pager::go_on`] starts others, over new lanes.

mod board;
mod claims;
mod error;
mod huge_pages;
mod landing;
mod ledger;
mod map_reader;
mod rest;
mod round;
mod server;
mod shard;
mod shards;
mod sigbus;
mod status;
mod timing;
mod token;
mod told;
mod trap;
mod waits;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

pub use error::PagerError;
use error::failed;
pub(crate) use huge_pages::is_huge;
pub use huge_pages::{Collapsed, HugePages};
pub use landing::{Landing, LandingMemory};
pub use ledger::{Ledger, Stage};
pub use map_reader::MAP_STRETCH;
use postcopy_transport::{AnyLane, HostMemory, LocalRegion, RemoteRegion};
pub(crate) use round::read_once;
pub use round::{Round, RoundWatch};
use rustix::event::{EventfdFlags, eventfd};
pub use server::{FaultServer, NoSuchPage, Served};
pub use shards::{MAX_SHARDS, Shards};
pub use sigbus::SelfService;
pub use status::{PagerState, PagerStatus};
use tokio::sync::watch;
pub use told::LaidOut;
pub use trap::{FaultsTo, Trap};
pub(crate) use trap::{errno, owned};
pub use waits::Waited;

use self::board::{Board, Past};
use self::claims::Claims;
use self::map_reader::MapReader;
use self::server::{Note, Outfit, Relay, Shared};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::planner::PlannerConfig;
use crate::stats::PagerReport;

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
    /// Spins as [`postcopy_transport::DEFAULT_SPIN`] says.
    fn default() -> Self {
        let (planner, huge_pages) = (PlannerConfig::default(), HugePages::default());
        Self { spin: postcopy_transport::DEFAULT_SPIN, planner, huge_pages }
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

/// What is known when the threads start.
struct Known {
    /// Of each shard's pages.
    claims: Vec<Claims>,
    /// What others have done before, if any.
    past: Option<Past>,
    /// How the pages lie.
    order: LaidOut,
}

/// A running pager.
pub struct Pager {
    status: watch::Receiver<PagerStatus>,
    huge_pages: HugePages,
    threads: Vec<JoinHandle<()>>,
    board: Arc<Board>,
    /// One for each shard, in the order of their parts.
    shards: Arc<[Arc<Shared>]>,
    trap: Trap,
    /// The guest mapping, if it is of this process.
    memory: Option<HostMemory>,
    spin: Duration,
    /// Where pages land, once that was ever chosen here.
    landing: Option<LandingMemory>,
    /// What the round of pre-copy has left here.
    round: Round,
    /// How the guest's pages lie, if not by address.
    order: Mutex<LaidOut>,
    /// Where threads that serve themselves find what to go on with.
    servers: Mutex<Vec<Arc<Relay>>>,
    _signals: Vec<sigbus::Registration>,
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
        let claims = trap.claims(Claims::new);
        let memory = memory.map(|memory| memory.guest().clone());
        trap.ledger().hold(&source.round.held);
        let known = Known { claims, past: None, order: LaidOut::default() };
        Self::begin((trap, memory), source, lanes, config, known)
    }

    /// One that was in another process, which has ended, as it is after [`Pager::part`]: of `memory`, which is under `trap`, as it
    /// was [taken over](Trap::take_over). No thread serves itself.
    pub fn of_another(trap: Trap, memory: &GuestMemory) -> Self {
        let claims = trap.claims(Claims::following);
        let outstanding_pages = claims.iter().map(Claims::outstanding).sum();
        let report = PagerReport { total_pages: trap.pages(), outstanding_pages, ..PagerReport::default() };
        let state = PagerState::Failed(Arc::new(PagerError::Left));
        let (_, status) = watch::channel(PagerStatus { state, report, ..PagerStatus::default() });
        let (board, _) = Board::new(0, Past::default(), None);
        let round = Round { held: trap.ledger().held(), bytes: 0 };
        Self {
            status,
            huge_pages: HugePages::default(),
            threads: Vec::new(),
            board: Arc::new(board),
            shards: Arc::new([]),
            trap,
            memory: Some(memory.guest().clone()),
            spin: postcopy_transport::DEFAULT_SPIN,
            landing: None,
            round,
            order: Mutex::default(),
            servers: Mutex::default(),
            _signals: Vec::new(),
        }
    }

    fn begin(
        (trap, memory): (Trap, Option<HostMemory>),
        source: &SourceMemory,
        lanes: Vec<[AnyLane; 2]>,
        config: PagerConfig,
        known: Known,
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
        let Known { claims, past, order } = known;
        trap.ledger().lands(matches!(source.landing, LandingMemory::InPlace { .. }));
        let first = past.is_none();
        let (board, status) =
            Board::new(trap.shards(), past.unwrap_or_default(), config.planner.max_bandwidth);
        let board = Arc::new(board);
        let (mut shards, mut notes) = (Vec::new(), Vec::new());
        for (trap, claims) in trap.parts().iter().zip(claims) {
            let (shared, heard) = Shared::new(trap.clone(), source, claims)?;
            shards.push(Arc::new(shared));
            notes.push(heard);
        }
        let mut signals = Vec::new();
        for shared in shards.iter().filter(|shared| shared.trap.is_for_self_service()) {
            let registered = sigbus::register(shared.clone());
            signals.push(registered.map_err(failed("handling SIGBUS"))?);
        }
        let (huge_pages, spin) = (config.huge_pages, config.spin);
        let mut pager = Self {
            status,
            huge_pages,
            threads: Vec::new(),
            board,
            shards: shards.into(),
            trap,
            memory,
            spin,
            landing: Some(source.landing.clone()),
            round: source.round.clone(),
            order: Mutex::default(),
            servers: Mutex::default(),
            _signals: signals,
        };
        pager.set_order(order);
        pager.start_threads(source, notes.into_iter().zip(lanes), config, first)?;
        Ok(pager)
    }

    /// If it fails, those that were started end with the pager. They are the `first` to bring pages, or not.
    fn start_threads(
        &mut self,
        source: &SourceMemory,
        each: impl Iterator<Item = (Receiver<Note>, [AnyLane; 2])>,
        mut config: PagerConfig,
        first: bool,
    ) -> Result<(), PagerError> {
        let pages = self.trap.pages();
        // They share the wire that a fault may wait for.
        config.planner.bulk_wait_ns /= self.shards.len() as u64;
        config.planner.max_bandwidth = self.board.share();
        for (at, (shared, (notes, lanes))) in self.shards.iter().zip(each).enumerate() {
            let round = source.round.of(shared.part);
            let precopied = if first { [round.pages(), round.bytes] } else { [0; 2] };
            let map = MapReader::of_frozen(pages, source, (at, shared.part), round.held)?;
            let ways = shard::Ways { lanes, place: source.landing.of_shard(at), map };
            let shard = shard::Shard::new(shared.clone(), notes, ways, precopied, config);
            let (board, shards) = (self.board.clone(), self.shards.clone());
            let work = move || {
                shard::supervise(shard, at, &board);
                // The others have what it had.
                if board.max_bandwidth().is_some() {
                    told::share_out(&board, &shards);
                }
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
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
        let Some(memory) = self.memory.clone() else { return };
        if let Err(error) = huge_pages::begin(memory, self.board.clone()) {
            tracing::warn!(%error, "memory stays in small pages: no thread for the work");
        }
    }

    /// Lets a thread serve its own faults over `lane`, which nobody else uses. The trap must be one
    /// [whose threads are told](FaultsTo::Threads).
    ///
    /// Errors: there are 64 such threads already.
    pub fn server(&self, lane: AnyLane) -> Result<FaultServer, PagerError> {
        let mut servers = self.relays();
        let outfit = self.outfit(servers.len(), lane)?;
        let relay = Arc::<Relay>::default();
        servers.push(relay.clone());
        Ok(FaultServer::new(outfit, relay, self.spin))
    }

    /// What the so manieth thread serves itself with.
    fn outfit(&self, server: usize, lane: AnyLane) -> Result<Outfit, PagerError> {
        let none =
            || failed("giving a thread a place to land in")(std::io::Error::other("there are no more"));
        let place = self.landing.as_ref().and_then(|landing| landing.of_server(server)).ok_or_else(none)?;
        Ok(Outfit { shards: self.shards.clone(), lane: Some(lane), place })
    }

    /// How many pages the guest has.
    pub fn pages(&self) -> u64 {
        self.trap.pages()
    }

    /// How many shards it has.
    pub fn shards(&self) -> usize {
        self.trap.shards()
    }

    /// What is known of the guest's pages.
    pub fn ledger(&self) -> &Ledger {
        self.trap.ledger()
    }

    /// How many threads serve themselves.
    pub fn servers(&self) -> usize {
        self.relays().len()
    }

    fn relays(&self) -> MutexGuard<'_, Vec<Arc<Relay>>> {
        locked(&self.servers)
    }

    /// Whether pages land in the guest's memory, or in a pool. It is so to the end: what has landed in place and is not
    /// published would not be replaced by a copy, and what was copied in and is the guest's would be written over in place.
    pub fn lands_in_place(&self) -> bool {
        self.ledger().lands_in_place()
    }

    /// Stops, and waits until nobody reads into the guest's memory any more. What is here, and what is not,
    /// stays known for [`Pager::go_on`]; what is not stays trapped.
    pub fn part(&mut self) {
        for shared in &*self.shards {
            shared.claims.abandon();
        }
        self.end();
        // A shard that panicked did not.
        for shared in &*self.shards {
            shared.claims.await_left();
        }
    }

    /// Goes on over new lanes, after [`Pager::part`]: as many pairs as it has shards, and one for each thread
    /// that serves itself. Pages that were here stay as they are; those that were on their way are read
    /// again. Pages land [as they did](Pager::lands_in_place), and [as many](Pager::limit) may cross. Its [status](Pager::status) is another from
    /// now on.
    ///
    /// Errors: as [`Pager::start`]; it is then as it was.
    pub fn go_on(
        &mut self,
        source: SourceMemory,
        lanes: Vec<[AnyLane; 2]>,
        servers: Vec<AnyLane>,
        mut config: PagerConfig,
    ) -> Result<(), PagerError> {
        config.planner.max_bandwidth = self.board.max_bandwidth();
        let in_place = self.lands_in_place();
        if in_place != matches!(source.landing, LandingMemory::InPlace { .. }) {
            let source = std::io::Error::other("pages have landed elsewhere before");
            return Err(PagerError::System { operation: "having pages land", source });
        }
        let source = SourceMemory { round: self.round.clone(), ..source };
        let claims = self.trap.claims(Claims::following);
        let known = Known { claims, past: Some(self.board.past()), order: locked(&self.order).clone() };
        let guest = (self.trap.clone(), self.memory.clone());
        let next = Self::begin(guest, &source, lanes, config, known)?;
        let outfits: Result<Vec<_>, _> =
            servers.into_iter().enumerate().map(|(at, lane)| next.outfit(at, lane)).collect();
        let outfits = outfits?;
        let relays = std::mem::take(&mut *self.relays());
        relays.iter().zip(outfits).for_each(|(relay, outfit)| relay.give(outfit));
        *next.relays() = relays;
        // What they wait for was asked of shards that are no more.
        for part in self.trap.parts() {
            part.wake_all()?;
        }
        *self = next;
        Ok(())
    }

    /// Progress, and the end.
    pub fn status(&self) -> watch::Receiver<PagerStatus> {
        self.status.clone()
    }

    /// Waits until it fails. `None`: it has ended well.
    pub async fn failed(&self) -> Option<Arc<PagerError>> {
        let mut status = self.status();
        let ended = status.wait_for(|status| !matches!(status.state, PagerState::Running)).await.ok()?;
        match &ended.state {
            PagerState::Failed(error) => Some(error.clone()),
            _ => None,
        }
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

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
