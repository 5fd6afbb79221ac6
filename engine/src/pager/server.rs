//! A thread that serves its own faults, on a lane of its own.
//!
//! The thread that touched a page claims it, reads it and publishes it, and goes on: no event, no
//! wake-up, no other thread on the way. The shard learns of it afterwards, for its policy and its
//! counts. A page that somebody else has claimed is waited for.
//!
//! When the pager fails, whoever's lane it was or whatever else, the thread has nothing to serve itself with until it is given
//! another [`Outfit`]: its touch is tried again and again meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postcopy_transport::{AnyLane, Completion, Lane, LaneError, Read, RemoteRegion, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::claims::{Claim, Claims};
use super::landing::Place;
use super::shards::Part;
use super::trap::PartTrap;
use super::{PagerError, SourceMemory, StopSignal, locked};
use crate::memory::{PAGE_SIZE, PageIndex};
use crate::planner::{Bandwidth, LaneId, Ranks, Run};

/// How long a page that somebody else brings is waited for by giving way, before sleeping between
/// the looks.
const GIVE_WAY: Duration = Duration::from_micros(100);
/// The sleep between the looks.
const NAP: Duration = Duration::from_micros(50);
/// The sleep before a touch is tried again, while nobody can bring what is missing.
const STRANDED_NAP: Duration = Duration::from_millis(10);

/// What other threads tell the shard.
pub(super) enum Note {
    /// It touched this page, and brings it.
    Serving(PageIndex),
    /// It has published it.
    Served(PageIndex, Stamps),
    /// A thread without a lane of its own touched this page, and waits.
    Wanted(PageIndex),
    /// This thread waited so long for a page, whoever brought it.
    Waited(i32, Duration),
    /// The source says that the guest touched these pages last.
    Prefer(Vec<Run>),
    /// The source says in which order pages lie.
    Order(Arc<Ranks>),
    /// So much may cross a second from now on where nobody waits for it.
    Limit(Option<Bandwidth>),
    /// Its lane died, or the kernel refused.
    Failed(PagerError),
}

/// When what happened in a served fault.
#[derive(Clone, Copy)]
pub(super) struct Stamps {
    pub(super) seen: Instant,
    pub(super) posted: Instant,
    pub(super) completed: Instant,
    pub(super) published: Instant,
}

/// What a shard and the threads that serve themselves have in common. Pages are numbered from the
/// first of its part.
pub(super) struct Shared {
    pub(super) part: Part,
    pub(super) claims: Claims,
    pub(super) trap: PartTrap,
    pub(super) memory: RemoteRegion,
    /// Whether the guest's memory has all its pages already (pinned by its registration).
    pub(super) populated: bool,
    pub(super) stop: StopSignal,
    pub(super) notes: Sender<Note>,
    /// The shard has bulk reads in flight: spinning would keep them from the processor.
    pub(super) draining: AtomicBool,
}

impl Shared {
    /// For the part that `trap` is over, and where the shard hears of the others' notes.
    pub(super) fn new(
        trap: PartTrap,
        source: &SourceMemory,
        claims: Claims,
    ) -> Result<(Self, Receiver<Note>), PagerError> {
        let (notes, heard) = channel();
        let part = trap.part();
        let shared = Self {
            part,
            claims,
            trap,
            memory: source.memory,
            populated: source.landing.populated(),
            stop: StopSignal::new()?,
            notes,
            draining: AtomicBool::new(false),
        };
        Ok((shared, heard))
    }

    /// A shard that has ended reads nothing any more.
    pub(super) fn note(&self, note: Note) {
        drop(self.notes.send(note));
    }

    /// The read that brings `run` of the part over `lane`, or `None` if there is no place for it to land
    /// now.
    pub(super) fn read_of(&self, token: Token, run: Run, lane: LaneId, place: &mut Place) -> Option<Read> {
        let run = Run { first: self.part.global(run.first), ..run };
        let local = place.take(lane, run)?;
        let remote = self.memory.slice(run.first.offset(), run.count * PAGE_SIZE as u32);
        let read = remote.and_then(|remote| Read::new(token, local, remote));
        Some(read.expect("the part lies in the source's memory, and a read in the part"))
    }

    /// Has the shard bring a page, and waits until it is there, or some time where nobody can bring it.
    pub(super) fn ask(&self, page: PageIndex) {
        if !self.claims.covers(page) {
            return;
        }
        let Some(serving) = self.claims.enter() else {
            self.turned_away();
            return;
        };
        let seen = Instant::now();
        // If the shard is gone the page never comes, and this thread waits: it must not go on.
        self.note(Note::Wanted(page));
        self.stop.rouse();
        drop(serving);
        self.await_resident(page);
        self.waited(seen.elapsed());
    }

    /// What it is with a page that may not be claimed any more; after a rest, where nobody can bring it.
    fn turned_away(&self) -> Served {
        if self.claims.is_abandoned() { stranded() } else { Served::Here }
    }

    /// Tells that this thread waits no more.
    fn waited(&self, time: Duration) {
        self.note(Note::Waited(THREAD.with(|thread| *thread), time));
    }

    /// Waits until a page that somebody else brings is published, or memory is let go.
    fn await_resident(&self, page: PageIndex) {
        let begun = Instant::now();
        while !self.claims.is_resident(page) && self.claims.enter().is_some() {
            if begun.elapsed() < GIVE_WAY {
                std::thread::yield_now();
            } else {
                std::thread::sleep(NAP);
            }
        }
    }
}

/// What a thread serves itself with.
pub(super) struct Outfit {
    /// In the order of their parts.
    pub(super) shards: Arc<[Arc<Shared>]>,
    /// Until it is lost.
    pub(super) lane: Option<AnyLane>,
    pub(super) place: Place,
}

/// Where a server finds its next outfit.
#[derive(Default)]
pub(super) struct Relay(Mutex<Option<Outfit>>);

impl Relay {
    pub(super) fn give(&self, outfit: Outfit) {
        *locked(&self.0) = Some(outfit);
    }

    fn take(&self) -> Option<Outfit> {
        locked(&self.0).take()
    }
}

/// Whether what a thread touched is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is.
    Here,
    /// The pager has failed, and does not go on yet. The touch is to be tried again; it comes back here.
    Stranded,
}

/// Serves the faults of one thread.
pub struct FaultServer {
    outfit: Outfit,
    relay: Arc<Relay>,
    /// How long to poll for the answer before sleeping.
    spin: Duration,
    /// Whether spinning keeps a background read from the processor.
    crowded: bool,
    completions: Vec<Completion>,
    /// How long it was stranded, as far as that is not told yet.
    stranded: Duration,
}

impl FaultServer {
    pub(super) fn new(outfit: Outfit, relay: Arc<Relay>, spin: Duration) -> Self {
        let crowded = postcopy_transport::is_crowded();
        Self { outfit, relay, spin, crowded, completions: Vec::with_capacity(1), stranded: Duration::ZERO }
    }

    /// Whether it reads the memory of `shared`.
    pub(super) fn is_of(&mut self, shared: &Shared) -> bool {
        self.renew();
        self.outfit.shards.iter().any(|shard| std::ptr::eq(&**shard, shared))
    }

    /// Takes what there is to go on with after the pager has failed.
    fn renew(&mut self) {
        if let Some(outfit) = self.relay.take() {
            self.outfit = outfit;
            self.completions.clear();
        }
    }

    /// Brings a page that this thread touched. Returns when it is published, by whomever, or cannot be
    /// now; touch it again then.
    ///
    /// Errors: the guest has no such page.
    pub fn serve(&mut self, page: PageIndex) -> Result<Served, NoSuchPage> {
        let seen = Instant::now();
        let served = self.try_serve(page, seen);
        if served == Ok(Served::Stranded) {
            self.stranded += seen.elapsed();
        }
        served
    }

    fn try_serve(&mut self, page: PageIndex, seen: Instant) -> Result<Served, NoSuchPage> {
        self.renew();
        if self.outfit.lane.is_none() {
            return Ok(stranded());
        }
        let shards = self.outfit.shards.clone();
        let mut here = shards.iter().filter_map(|shard| Some((&**shard, shard.part.local(page)?)));
        let (shared, page) = here.next().ok_or(NoSuchPage(page))?;
        let Some(serving) = shared.claims.enter() else { return Ok(shared.turned_away()) };
        let served = match shared.claims.claim(page) {
            Claim::Read => self.bring(shared, page, seen),
            Claim::Zero => publish_here(shared, page, || shared.trap.publish_zero(page, shared.populated)),
            Claim::Kept => publish_here(shared, page, || shared.trap.publish(Run::one(page))),
            Claim::Resident => shared.trap.show_again(page),
            Claim::Taken => {
                drop(serving);
                shared.await_resident(page);
                if shared.claims.is_abandoned() {
                    return Ok(Served::Stranded);
                }
                self.waited(shared, seen);
                return Ok(Served::Here);
            }
        };
        if served.is_ok() {
            self.waited(shared, seen);
        }
        drop(serving);
        Ok(match served {
            Ok(()) => Served::Here,
            Err(error) => {
                // Without it the thread does not try by itself again.
                self.outfit.lane = None;
                shared.note(Note::Failed(error));
                shared.stop.rouse();
                Served::Stranded
            }
        })
    }

    /// Tells that the thread waits no more, and with it how long it was stranded before.
    fn waited(&mut self, shared: &Shared, seen: Instant) {
        shared.waited(seen.elapsed() + std::mem::take(&mut self.stranded));
    }

    fn bring(&mut self, shared: &Shared, page: PageIndex, seen: Instant) -> Result<(), PagerError> {
        let read = shared.read_of(Token(page.0), Run::one(page), LaneId::Urgent, &mut self.outfit.place);
        let read = read.ok_or_else(|| failed(LaneError::Closed))?;
        // If it fails it is dropped: what was in flight must not land any more.
        let mut lane = self.outfit.lane.take().ok_or_else(|| failed(LaneError::Closed))?;
        let posted = lane.post(&[read]).map_err(failed)?;
        assert!(posted == 1, "a server has one read in flight, and every lane room for that");
        let posted = Instant::now();
        // Before the wait: what is around the page can be read meanwhile.
        shared.note(Note::Serving(page));
        self.await_read(&mut lane, posted).map_err(failed)?;
        let completed = Instant::now();
        self.outfit.lane = Some(lane);
        let result = self.completions.pop().map_or(Ok(()), |completion| completion.result);
        result.map_err(|source| PagerError::Read { page: shared.part.global(page), source })?;
        let run = Run::one(page);
        let last = shared.claims.publish(run, || self.outfit.place.publish(&shared.trap, run))?;
        let published = Instant::now();
        shared.note(Note::Served(page, Stamps { seen, posted, completed, published }));
        if last {
            shared.stop.rouse();
        }
        Ok(())
    }

    /// Whether bulk reads are under way.
    fn is_drained(&self) -> bool {
        self.outfit.shards.iter().any(|shard| shard.draining.load(Ordering::Relaxed))
    }

    /// Waits for the one read in flight: polls for a while, then sleeps on the descriptor. Where
    /// cores are few and a drain is under way it sleeps at once, so that the drain's threads get
    /// what the wire leaves them.
    fn await_read(&mut self, lane: &mut AnyLane, posted: Instant) -> Result<(), LaneError> {
        loop {
            lane.poll(&mut self.completions)?;
            if !self.completions.is_empty() {
                return Ok(());
            }
            let crowded = self.crowded && self.is_drained();
            if !crowded && posted.elapsed() < self.spin {
                std::hint::spin_loop();
            } else if lane.arm()? {
                let descriptor = PollFd::from_borrowed_fd(lane.descriptor(), PollFlags::IN);
                // A signal is a wake-up like any other: look again.
                let _ = poll(&mut [descriptor], None::<&Timespec>);
            }
        }
    }
}

/// Before a touch is tried again.
fn stranded() -> Served {
    std::thread::sleep(STRANDED_NAP);
    Served::Stranded
}

thread_local! {
    /// This thread's number, asked for once.
    static THREAD: i32 = rustix::thread::gettid().as_raw_nonzero().get();
}

/// Publishes a claimed page that the map was enough for.
fn publish_here(
    shared: &Shared,
    page: PageIndex,
    publish: impl FnOnce() -> Result<(), PagerError>,
) -> Result<(), PagerError> {
    shared.claims.publish(Run::one(page), publish)?;
    shared.note(Note::Serving(page));
    Ok(())
}

fn failed(source: LaneError) -> PagerError {
    PagerError::Server { source }
}

/// The guest has no such page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no page {0:?} in the guest's memory")]
pub struct NoSuchPage(pub PageIndex);
