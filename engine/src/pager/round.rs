//! The round of pre-copy: the source's memory is read once while its guest still runs there.
//!
//! What lands is not published. When the guest is frozen the source says which pages it has not
//! written since the round began ([`Said::Clean`](crate::pagemap::Said)); those need not cross again.
//! A page is read as it is at some moment or, if it is being written, as it never was: it is dirty
//! then, and read again.
//!
//! Nobody waits for a page, so the bulk lane is kept full, as far as its bandwidth is not limited.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postcopy_transport::{AnyLane, Lane, LaneError, LocalRegion, Read};
use rustix::event::{PollFd, PollFlags, poll};

use super::landing::LandingMemory;
use super::map_reader::{Landed, MapReader};
use super::rest::timeout;
use super::shards::Part;
use super::token::{is_map, run_of, token_of};
use super::{PagerError, SourceMemory, failed};
use crate::memory::{PAGE_SIZE, PageIndex};
use crate::page_set::PageSet;
use crate::planner::{Bandwidth, MAX_READ_PAGES, Nanos, News, Pace, Run};

/// How long a sleep lasts at most, so that an order to stop is heard.
const PATIENCE: Duration = Duration::from_millis(50);

/// What a round has brought.
#[derive(Clone, Debug)]
pub struct Round {
    /// Pages that have landed, as they were at some moment.
    pub(super) held: PageSet,
    /// Bytes that crossed, of pages and of the page map.
    pub(super) bytes: u64,
}

impl Round {
    /// There was none.
    pub fn none() -> Self {
        Self { held: PageSet::new(0, false), bytes: 0 }
    }

    /// What a shard has of it. The bytes that crossed are the first's.
    pub(super) fn of(&self, part: Part) -> Self {
        let bytes = if part.first == 0 { self.bytes } else { 0 };
        Self { held: self.held.part(part.first, part.pages), bytes }
    }

    /// Pages that have landed.
    pub fn pages(&self) -> u64 {
        self.held.len()
    }
}

/// Watches a round from another thread, and can end it.
#[derive(Debug, Default)]
pub struct RoundWatch {
    read: AtomicU64,
    stop: AtomicBool,
}

impl RoundWatch {
    /// Pages read so far, or found to be zero.
    pub fn pages_done(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Ends the round early, with an error.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Where a round stands.
struct Reader<'a> {
    source: &'a SourceMemory,
    landing: LocalRegion,
    lane: &'a mut AnyLane,
    map: MapReader,
    zero: PageSet,
    round: Round,
    pace: Pace,
    begun: Instant,
    pages: u64,
    /// Pages below this one are known to be zero or not.
    known: u64,
    /// Pages below this one are posted, or zero.
    next: u64,
    waiting: Vec<Read>,
}

/// Reads all of the source's `pages` once over `lane`, but for those that its map calls zero, at this bandwidth at most.
///
/// Errors: the lane fails, the source breaks the protocol, reads land in a pool, or `watch` says to stop.
pub(crate) fn read_once(
    source: &SourceMemory,
    pages: u64,
    lane: &mut AnyLane,
    max_bandwidth: Option<Bandwidth>,
    watch: &RoundWatch,
) -> Result<Round, PagerError> {
    source.check(pages)?;
    let LandingMemory::InPlace { region, .. } = source.landing else {
        let stays = "what it brings stays where it lands: have pages land in place (--landing in-place)";
        return Err(failed("the round of pre-copy")(std::io::Error::other(stays)));
    };
    let map = MapReader::of_running(pages, source)?;
    let round = Round { held: PageSet::new(pages, false), bytes: 0 };
    let zero = PageSet::new(pages, false);
    let mut reader = Reader {
        source,
        landing: region,
        lane,
        map,
        zero,
        round,
        pace: Pace::new(max_bandwidth),
        begun: Instant::now(),
        pages,
        known: 0,
        next: 0,
        waiting: Vec::new(),
    };
    let mut completions = Vec::new();
    while !reader.finished() {
        if watch.stop.load(Ordering::Relaxed) {
            return Err(PagerError::RoundEnded);
        }
        reader.fill()?;
        reader.lane.poll(&mut completions).map_err(|error| reader.failed(error))?;
        if completions.is_empty() {
            reader.rest()?;
        }
        for completion in completions.drain(..) {
            let first = if is_map(completion.token) { PageIndex(0) } else { run_of(completion.token).first };
            completion.result.map_err(|source| PagerError::Read { page: first, source })?;
            match is_map(completion.token) {
                true => reader.map_landed(watch)?,
                false => reader.landed(run_of(completion.token), watch),
            }
        }
    }
    reader.round.bytes += reader.map.bytes;
    Ok(reader.round)
}

impl Reader<'_> {
    fn finished(&self) -> bool {
        self.next == self.pages && self.waiting.is_empty() && self.lane.in_flight() == 0
    }

    /// Keeps the lane full: what is known of the map, then more of the map.
    fn fill(&mut self) -> Result<(), PagerError> {
        let room = self.lane.room().saturating_sub(self.waiting.len());
        for _ in 1..room {
            let now = self.now();
            if self.pace.holds(now).is_some() {
                break;
            }
            let Some(run) = self.next_run() else {
                self.waiting.extend(self.map.next());
                break;
            };
            let (at, len) = (run.first.offset(), run.count * PAGE_SIZE as u32);
            let sides = self.landing.slice(at, len).zip(self.source.memory.slice(at, len));
            let read = sides.and_then(|(local, remote)| Read::new(token_of(run), local, remote));
            self.waiting.push(read.ok_or(PagerError::Peer("its memory region has the wrong size"))?);
            self.pace.cross(run.count, now);
        }
        let posted = self.lane.post(&self.waiting).map_err(|error| self.failed(error))?;
        self.waiting.drain(..posted);
        Ok(())
    }

    fn next_run(&mut self) -> Option<Run> {
        let first = self.zero.first(self.next, self.known, false);
        self.next = first.unwrap_or(self.known);
        let first = first?;
        let limit = self.known.min(first + u64::from(MAX_READ_PAGES));
        self.next = self.zero.first(first, limit, true).unwrap_or(limit);
        Some(Run { first: PageIndex(first), count: (self.next - first) as u32 })
    }

    fn landed(&mut self, run: Run, watch: &RoundWatch) {
        self.round.held.put(run.first.0, run.end(), true);
        self.round.bytes += u64::from(run.count) * PAGE_SIZE;
        watch.read.fetch_add(run.count.into(), Ordering::Relaxed);
    }

    fn map_landed(&mut self, watch: &RoundWatch) -> Result<(), PagerError> {
        match self.map.landed()? {
            Landed::Read(read) => self.waiting.push(read),
            Landed::Known(News { known, zeros, .. }) => {
                watch.read.fetch_add(zeros.len() as u64, Ordering::Relaxed);
                zeros.iter().for_each(|page| self.zero.put(page.0, page.0 + 1, true));
                self.known = known;
            }
            // It is asked again in the next turn, and not without a pause.
            Landed::NothingNew(patience) => std::thread::sleep(patience),
        }
        Ok(())
    }

    fn rest(&mut self) -> Result<(), PagerError> {
        if self.lane.arm().map_err(|error| self.failed(error))? {
            let descriptor = PollFd::from_borrowed_fd(self.lane.descriptor(), PollFlags::IN);
            let held = self.pace.holds(self.now()).map(Duration::from_nanos);
            let limit = held.map_or(PATIENCE, |held| held.min(PATIENCE));
            // A signal is a wake-up like any other: look again.
            let _ = poll(&mut [descriptor], timeout(limit).as_ref());
        }
        Ok(())
    }

    fn now(&self) -> Nanos {
        Nanos(self.begun.elapsed().as_nanos() as u64)
    }

    fn failed(&self, source: LaneError) -> PagerError {
        PagerError::Lane { page: None, lane: "bulk", outstanding: self.pages - self.round.pages(), source }
    }
}
