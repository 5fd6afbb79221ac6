//! One shard: the event loop of the fault path.
//!
//! Each turn: take faults from the trap, poll the urgent lane, poll the bulk lane, let the drain
//! fill the bulk lane, and carry out what the planner decided: publish, and post reads. A fault's
//! read is posted in the turn in which the fault was seen, before any bulk read of that turn. Of
//! what arrived on the bulk lane no more than one large read's worth is published a turn, what the guest
//! waits for before the rest, so that a fault waits behind at most that.

mod notes;
mod publish;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use postcopy_transport::{AnyLane, Completion, Lane, LaneError, Read, go_first};
use rustix::fd::AsFd;
use userfaultfd::EventBuffer;

use super::board::{Board, End};
use super::landing::Place;
use super::map_reader::{Landed, MAP_PATIENCE, MapReader};
use super::rest::Rest;
use super::server::{Note, Shared};
use super::timing::Timing;
use super::token::{is_map, run_of, token_of};
use super::trap::TrapEvent;
use super::{PagerConfig, PagerError, PagerState};
use crate::memory::{PAGE_SIZE, PageIndex};
use crate::planner::{Action, LaneId, Nanos, Planner, Run, Why};
use crate::stats::PagerReport;

/// Fault events taken in one turn.
const FAULT_BATCH: usize = 64;
/// Of what arrived on the bulk lane, pages that are published in one turn, and runs of them; a longer run
/// has a turn to itself. A turn costs more than a small run does: it sends and it wakes who answers.
const BULK_PAGES: u32 = 16;
const BULK_RUNS: usize = 8;
/// How often progress is published.
const PROGRESS: Duration = Duration::from_millis(100);
/// How long a sleep lasts while other threads serve faults: they rouse the shard only if they must.
const NOTES_PATIENCE: Duration = Duration::from_millis(10);

/// Everything that one pager thread owns.
pub(super) struct Shard {
    /// What threads that serve their own faults share with it.
    shared: Arc<Shared>,
    notes: Receiver<Note>,
    /// Pages that the planner wanted read and another thread had claimed, with the lane that the
    /// planner believes them on.
    elsewhere: HashMap<PageIndex, LaneId>,
    planner: Planner,
    map: MapReader,
    /// When to ask for more of the map.
    map_due: Instant,
    /// Urgent, bulk.
    lanes: [AnyLane; 2],
    /// Where reads land.
    place: Place,
    /// Runs to be read that had no place to land yet, by lane.
    unplaced: [VecDeque<Run>; 2],
    /// Reads that their lane had no room for yet, by lane.
    waiting: [Vec<Read>; 2],
    timing: Timing,
    /// The planner's time counts from here.
    start: Instant,
    bytes: [u64; 2],
    /// Pages and bytes that the round of pre-copy has brought.
    precopied: [u64; 2],
    self_served: u64,
    rest: Rest,
    actions: Vec<Action>,
    completions: Vec<Completion>,
    /// What has arrived on the bulk lane and is not published yet.
    arrived: VecDeque<Completion>,
    seen: Vec<TrapEvent>,
    events: EventBuffer,
    pieces: Vec<Run>,
    taken: Vec<PageIndex>,
    done: bool,
    /// Something has happened since progress was published.
    unreported: bool,
}

/// The ways to the source.
pub(super) struct Ways {
    /// Urgent, bulk.
    pub(super) lanes: [AnyLane; 2],
    pub(super) place: Place,
    pub(super) map: MapReader,
}

/// Runs the loop and tells how it ended, also when it panicked.
pub(super) fn supervise(mut shard: Shard, number: usize, board: &Board) {
    let tell = |report| board.tell(number, report);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| shard.run(tell)));
    let state = match outcome {
        Ok(Ok(state)) => state,
        Ok(Err(error)) => {
            shard.abandon();
            PagerState::Failed(Arc::new(error))
        }
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            shard.shared.claims.abandon();
            PagerState::Failed(Arc::new(PagerError::Panicked(said.into())))
        }
    };
    let (report, timing) = (shard.report(), std::mem::take(&mut shard.timing));
    // The lanes close before anybody learns of the end, so the source may go when they do.
    drop(shard);
    board.end(number, End { state, report, timing });
}

impl Shard {
    /// `precopied` has the pages and bytes that the round of pre-copy has brought of its part, if that is to
    /// be counted here.
    pub(super) fn new(
        shared: Arc<Shared>,
        notes: Receiver<Note>,
        Ways { lanes, place, map }: Ways,
        precopied: [u64; 2],
        config: PagerConfig,
    ) -> Self {
        let planner = Planner::going_on(shared.claims.pages(), config.planner);
        Self {
            shared,
            notes,
            elsewhere: HashMap::new(),
            planner,
            map,
            map_due: Instant::now(),
            lanes,
            place,
            unplaced: [VecDeque::new(), VecDeque::new()],
            waiting: [Vec::new(), Vec::new()],
            timing: Timing::default(),
            start: Instant::now(),
            bytes: [0; 2],
            precopied,
            self_served: 0,
            rest: Rest::new(config.spin),
            actions: Vec::new(),
            completions: Vec::new(),
            arrived: VecDeque::new(),
            seen: Vec::new(),
            events: EventBuffer::new(FAULT_BATCH),
            pieces: Vec::new(),
            taken: Vec::new(),
            done: false,
            unreported: true,
        }
    }

    fn run(&mut self, tell: impl Fn(PagerReport)) -> Result<PagerState, PagerError> {
        // Over verbs it was a loss (docs/adr/0007-who-spins.md).
        if !self.shared.trap.is_for_self_service()
            && matches!(self.lanes[LaneId::Urgent as usize], AnyLane::Tcp(_))
        {
            go_first();
        }
        let mut reported = Instant::now();
        while !self.shared.stop.asked.load(Ordering::Acquire) {
            let now = Instant::now();
            let mut busy = self.take_faults(now)?;
            busy |= self.take_notes()?;
            busy |= self.poll_urgent()?;
            busy |= self.poll_bulk()?;
            busy |= self.drain(now)?;
            if self.done {
                self.timing.last_page = Some(Instant::now());
                // Nobody may be reading a page when the guest is let at all of them.
                self.shared.claims.close();
                self.shared.trap.release()?;
                self.hear_the_last();
                return Ok(PagerState::Resident);
            }
            self.unreported |= busy;
            if self.unreported && now.duration_since(reported) >= PROGRESS {
                (reported, self.unreported) = (now, false);
                tell(self.report());
            }
            if busy {
                self.rest.busy();
            } else {
                self.idle(now)?;
            }
        }
        // What was served before is counted.
        if self.shared.claims.is_abandoned() {
            self.abandon();
        } else {
            self.take_notes()?;
        }
        Ok(PagerState::Stopped)
    }

    fn take_faults(&mut self, now: Instant) -> Result<bool, PagerError> {
        let mut seen = std::mem::take(&mut self.seen);
        self.shared.trap.take(&mut self.events, &mut seen)?;
        let when = self.nanos(now);
        for event in &seen {
            let page = match *event {
                TrapEvent::Fault { page, thread } => {
                    self.timing.waits.begin(thread, page, now);
                    page
                }
                TrapEvent::Discarded { first, end } => {
                    self.discarded(first, end);
                    continue;
                }
            };
            if !self.planner.fault(page, when, &mut self.actions) {
                return Err(PagerError::StrayFault(self.shared.part.global(page)));
            }
            if self.actions.last() == Some(&Action::Read(Why::Fault, Run::one(page))) {
                self.timing.seen(page, now);
            }
        }
        let any = !seen.is_empty();
        seen.clear();
        self.seen = seen;
        if any {
            self.carry_out()?;
        }
        Ok(any)
    }

    /// The guest has given pages back: what has not come of them need not.
    fn discarded(&mut self, first: PageIndex, end: PageIndex) {
        let mut zeros: Vec<PageIndex> = self.planner.missing(first, end).collect();
        zeros.retain(|page| self.shared.claims.zero(*page));
        self.planner.discarded(&zeros, &mut self.actions);
    }

    fn poll_urgent(&mut self) -> Result<bool, PagerError> {
        let mut completions = self.poll(LaneId::Urgent)?;
        let completed = (!completions.is_empty()).then(Instant::now);
        for completion in completions.drain(..) {
            self.landed(LaneId::Urgent, &completion, completed.unwrap_or(self.start))?;
        }
        self.completions = completions;
        if let Some(completed) = completed {
            self.carry_out()?;
            let planner = &self.planner;
            self.timing.published(completed, |page| planner.is_resident(page));
        }
        Ok(completed.is_some())
    }

    fn poll_bulk(&mut self) -> Result<bool, PagerError> {
        let mut completions = self.poll(LaneId::Bulk)?;
        self.arrived.extend(completions.drain(..));
        self.completions = completions;
        if self.arrived.is_empty() {
            return Ok(false);
        }
        let (now, mut left) = (Instant::now(), BULK_PAGES);
        for taken in 0..BULK_RUNS {
            let awaited = |arrived: &Completion| self.planner.awaited(run_of(arrived.token));
            let next = self.arrived.iter().position(awaited).unwrap_or(0);
            let count = self.arrived.get(next).map_or(u32::MAX, |arrived| run_of(arrived.token).count);
            if taken > 0 && count > left {
                break;
            }
            let Some(completion) = self.arrived.remove(next) else { break };
            self.landed(LaneId::Bulk, &completion, now)?;
            left = left.saturating_sub(count);
        }
        self.carry_out()?;
        Ok(true)
    }

    /// What has completed on a lane; the list is [`Shard::completions`], to be given back.
    fn poll(&mut self, lane: LaneId) -> Result<Vec<Completion>, PagerError> {
        let mut completions = std::mem::take(&mut self.completions);
        let polled = self.lanes[lane as usize].poll(&mut completions);
        polled.map_err(|error| self.lane_failed(lane as usize, error))?;
        Ok(completions)
    }

    fn landed(&mut self, lane: LaneId, completion: &Completion, now: Instant) -> Result<(), PagerError> {
        if is_map(completion.token) {
            completion.result.map_err(|source| PagerError::Read { page: PageIndex(0), source })?;
            return self.map_landed();
        }
        let run = run_of(completion.token);
        let page = self.shared.part.global(run.first);
        completion.result.map_err(|source| PagerError::Read { page, source })?;
        let when = self.nanos(now);
        if !self.planner.landed(lane, run, when, &mut self.actions) {
            let broken = LaneError::Protocol("it completed a read that is not in flight");
            return Err(self.lane_failed(lane as usize, broken));
        }
        self.bytes[lane as usize] += u64::from(run.count) * PAGE_SIZE;
        Ok(())
    }

    fn map_landed(&mut self) -> Result<(), PagerError> {
        match self.map.landed()? {
            Landed::Read(read) => self.waiting[LaneId::Urgent as usize].push(read),
            Landed::Known(mut news) => {
                // What another thread brings comes as it is, and counts as what it brought.
                news.zeros.retain(|page| self.shared.claims.zero(*page));
                news.kept.retain(|page| self.shared.claims.keep(*page));
                self.planner.map_extended(news, &mut self.actions);
                // It is being filled, and more of it in some time is as good, unless the drain is out of work.
                if self.map.caught_up() && self.lanes[LaneId::Bulk as usize].in_flight() > 0 {
                    self.map_due = Instant::now() + MAP_PATIENCE;
                }
            }
            Landed::NothingNew(patience) => self.map_due = Instant::now() + patience,
        }
        Ok(())
    }

    /// Asks for more of the page map, keeps the bulk lane filled with pages that it says have content, and
    /// shows some of what is here already: the wire carries the rest meanwhile.
    fn drain(&mut self, now: Instant) -> Result<bool, PagerError> {
        let bulk = LaneId::Bulk as usize;
        let room = self.lanes[bulk].room().saturating_sub(self.waiting[bulk].len());
        let room = room.min(self.place.room(LaneId::Bulk)).saturating_sub(self.unplaced[bulk].len());
        let when = self.nanos(now);
        self.planner.drain(room.saturating_sub(1), when, &mut self.actions);
        // Over the urgent lane: it is little, and spares faults the wire.
        if now >= self.map_due {
            let next = self.map.next();
            self.waiting[LaneId::Urgent as usize].extend(next);
        }
        self.planner.show_kept(&mut self.actions);
        let any = !self.actions.is_empty();
        self.carry_out()?;
        self.shared.draining.store(self.lanes[bulk].in_flight() > 0, Ordering::Relaxed);
        Ok(any)
    }

    /// Carries out what the planner decided, and posts what lanes have room for.
    fn carry_out(&mut self) -> Result<(), PagerError> {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Read(why, run) => self.read(why, run),
                Action::Publish(run) => self.publish(run)?,
                Action::PublishZero(page) => self.publish_zero(page)?,
                Action::PublishKept(run) => self.publish_kept(run)?,
                Action::Wake(page) => self.show_again(page)?,
                Action::Done => self.done = true,
            }
        }
        self.actions = actions;
        self.post(LaneId::Urgent)?;
        self.post(LaneId::Bulk)
    }

    /// Has those pages of a run read that no other thread has claimed.
    fn read(&mut self, why: Why, run: Run) {
        let lane = why.lane();
        self.shared.claims.claim_run(run, &mut self.pieces, &mut self.taken);
        if !self.taken.is_empty() {
            let taken = self.taken.iter().map(|page| Run::one(*page));
            self.planner.split(lane, run, self.pieces.iter().copied().chain(taken));
        }
        self.unplaced[lane as usize].extend(self.pieces.drain(..));
        self.elsewhere.extend(self.taken.drain(..).map(|page| (page, lane)));
    }

    fn post(&mut self, way: LaneId) -> Result<(), PagerError> {
        let lane = way as usize;
        while let Some(&run) = self.unplaced[lane].front() {
            let Some(read) = self.shared.read_of(token_of(run), run, way, &mut self.place) else { break };
            self.waiting[lane].push(read);
            self.unplaced[lane].pop_front();
        }
        if self.waiting[lane].is_empty() {
            return Ok(());
        }
        let posted = self.lanes[lane].post(&self.waiting[lane]);
        let posted = posted.map_err(|error| self.lane_failed(lane, error))?;
        self.waiting[lane].drain(..posted);
        if way == LaneId::Urgent && posted > 0 {
            let faults = self.waiting[lane].iter().filter(|read| !is_map(read.token())).count();
            self.timing.posted(faults + self.unplaced[lane].len());
        }
        Ok(())
    }

    fn idle(&mut self, now: Instant) -> Result<(), PagerError> {
        let limits = [
            self.map.wants_more().then(|| self.map_due.saturating_duration_since(now)),
            self.shared.trap.is_for_self_service().then_some(NOTES_PATIENCE),
            self.unreported.then_some(PROGRESS),
            self.planner.held_back(self.nanos(now)).map(Duration::from_nanos),
        ];
        let limit = limits.into_iter().flatten().min();
        let others = [self.shared.trap.as_fd(), self.shared.stop.wake.as_fd()];
        let rested = self.rest.idle(now, &mut self.lanes, others, limit);
        rested.map_err(|(lane, error)| self.lane_failed(lane, error))
    }

    /// The planner's time.
    fn nanos(&self, at: Instant) -> Nanos {
        Nanos(at.saturating_duration_since(self.start).as_nanos() as u64)
    }

    fn lane_failed(&self, lane: usize, source: LaneError) -> PagerError {
        let name = ["urgent", "bulk"][lane];
        let page = match &source {
            LaneError::QueuePair { token, .. } if !is_map(*token) => {
                Some(self.shared.part.global(run_of(*token).first))
            }
            _ => None,
        };
        PagerError::Lane { page, lane: name, outstanding: self.planner.outstanding(), source }
    }

    fn report(&self) -> PagerReport {
        PagerReport {
            shards: 1,
            total_pages: self.shared.part.pages,
            outstanding_pages: self.planner.outstanding(),
            pages: self.planner.counts(),
            fault_bytes: self.bytes[LaneId::Urgent as usize],
            bulk_bytes: self.bytes[LaneId::Bulk as usize],
            map_bytes: self.map.bytes,
            precopy_pages: self.precopied[0],
            precopy_bytes: self.precopied[1],
            self_served_faults: self.self_served,
            latencies: self.timing.latencies,
            ..PagerReport::default()
        }
    }
}
