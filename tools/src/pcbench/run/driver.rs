//! The measured loop: one thread that keeps reads in flight on some lanes.
//!
//! *Closed loop*: as many reads as `depth` allows are in flight on each lane; one that ends is
//! followed by the next. A read's time runs from just before its batch is posted to just after the
//! poll that completed it.
//!
//! *Open loop*: reads are due at fixed moments, whatever happened to those before. A read's time
//! runs from the moment when it was *due*: a stall is seen by every read that it delays, not only
//! by the one that it hit (no coordinated omission).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use postcopy_tools::size;
use postcopy_transport::{
    AnyLane, Completion as Done, HostMemory, Lane, LocalRegion, Read, RemoteRegion, Token,
};

use super::recorder::Recorder;
use super::wait::Waiter;
use crate::args::Completion;
use crate::pattern;
use crate::plan::Limit;

/// Reads begin at multiples of this, in bytes.
const ALIGNMENT: u64 = 4096;

/// An open loop that cannot keep up ends after twice its time and this.
const OVERTIME: Duration = Duration::from_secs(1);

/// What to do, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) bytes: u32,
    /// Reads in flight on each lane.
    pub(crate) depth: u32,
    /// How much of the peer's memory is read, in bytes.
    pub(crate) span: Option<u64>,
    pub(crate) completion: Completion,
    pub(crate) limit: Limit,
    /// Reads a second, open loop.
    pub(crate) rate: Option<f64>,
    /// Check every read, not only the last.
    pub(crate) verify: bool,
}

/// What was done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ran {
    pub(crate) reads: u64,
    /// From the first post to the last completion; with one read in flight, without the time that
    /// verification took.
    pub(crate) elapsed: Duration,
}

/// A read in flight.
#[derive(Clone, Copy)]
struct Flight {
    begun: Instant,
    offset: u64,
}

/// Lanes to one peer, and where their reads land.
pub(crate) struct Driver {
    transport: &'static str,
    lanes: Vec<AnyLane>,
    remote: RemoteRegion,
    local: LocalRegion,
    landing: HostMemory,
    patience: Duration,
    stop: Option<Arc<AtomicBool>>,
    random: u64,
}

/// The state of one run of the loop.
struct Turn<'a> {
    load: &'a Load,
    recorder: Option<&'a mut Recorder>,
    /// By lane and slot.
    flights: Vec<Flight>,
    /// Slots of each lane without a read.
    free: Vec<Vec<u32>>,
    begin: Instant,
    end: Instant,
    posted: u64,
    completed: u64,
    verifying: Duration,
    batch: Vec<Read>,
    done: Vec<Done>,
}

impl Driver {
    /// Drives `lanes`, which read `remote` into `landing` (registered as `local`).
    ///
    /// Errors: there is nothing to read.
    pub(crate) fn new(
        transport: &'static str,
        lanes: Vec<AnyLane>,
        remote: RemoteRegion,
        local: LocalRegion,
        landing: HostMemory,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        ensure!(!remote.is_empty() && !lanes.is_empty(), "the peer offers nothing to read");
        Ok(Self { transport, lanes, remote, local, landing, patience, stop: None, random: 1 })
    }

    /// Ends every later run when `stop` is set.
    pub(crate) fn stop_on(&mut self, stop: Arc<AtomicBool>) {
        self.stop = Some(stop);
    }

    /// Checks that the peer's memory and the lanes are large enough for `load`.
    ///
    /// Errors: they are not; the line says what to ask for.
    pub(crate) fn fits(&self, load: &Load) -> anyhow::Result<()> {
        let (bytes, offered) = (u64::from(load.bytes), self.remote.len());
        ensure!(
            bytes > 0 && bytes <= offered,
            "{}: a read of {} is more than the {} that the peer offers; see serve --memory",
            self.transport,
            size::short(bytes),
            size::short(offered)
        );
        let room = self.lanes.iter().map(Lane::room).min().unwrap_or(0);
        ensure!(
            load.depth > 0 && load.depth as usize <= room,
            "{}: a lane holds {room} reads at once, --depth asks for {}; use more --lanes instead",
            self.transport,
            load.depth
        );
        let slots = self.lanes.len() as u64 * u64::from(load.depth);
        let lands = self.landing.len() as u64;
        ensure!(
            slots * bytes <= lands,
            "{}: {slots} reads of {bytes} bytes need more than {lands} bytes to land in",
            self.transport
        );
        Ok(())
    }

    /// Reads until the limit of `load`, and until every read has ended.
    ///
    /// Errors: a lane died, a read was refused, nothing arrived for too long, or what arrived is
    /// not what the peer has there.
    pub(crate) fn run(&mut self, load: &Load, recorder: Option<&mut Recorder>) -> anyhow::Result<Ran> {
        self.fits(load)?;
        let (lanes, depth, now) = (self.lanes.len(), load.depth as usize, Instant::now());
        let mut turn = Turn {
            load,
            recorder,
            flights: vec![Flight { begun: now, offset: 0 }; lanes * depth],
            free: vec![(0..load.depth).rev().collect(); lanes],
            begin: now,
            end: now,
            posted: 0,
            completed: 0,
            verifying: Duration::ZERO,
            batch: Vec::with_capacity(depth),
            done: Vec::with_capacity(depth),
        };
        let mut waiter = Waiter::new(load.completion, self.patience);
        loop {
            let over = self.over(&turn);
            if over && turn.completed == turn.posted {
                break;
            }
            let (posted, due) = if over { (false, None) } else { self.post(&mut turn)? };
            let reaped = self.reap(&mut turn)?;
            if posted || reaped {
                waiter.busy();
            } else if !waiter.idle(&mut self.lanes, due).map_err(|error| self.lost(error))?
                && turn.completed < turn.posted
            {
                bail!(
                    "{}: nothing has arrived for {:?}; the peer or the network hangs",
                    self.transport,
                    self.patience
                );
            }
        }
        if let Some(recorder) = turn.recorder {
            recorder.end(turn.end);
        }
        let elapsed = turn.end.duration_since(turn.begin).saturating_sub(turn.verifying);
        Ok(Ran { reads: turn.completed, elapsed })
    }

    fn lost(&self, error: postcopy_transport::LaneError) -> anyhow::Error {
        anyhow::Error::new(error).context(format!("{}: lost its lane", self.transport))
    }

    fn over(&self, turn: &Turn<'_>) -> bool {
        let Limit { reads, time } = turn.load.limit;
        if turn.posted == 0 {
            return false;
        }
        // Open loop: every read that falls due in the time is posted, however late, or a stall at
        // the end would hide those that it delayed. A rate far beyond reach ends by the clock.
        let (reads, time) = match (turn.load.rate, time) {
            (Some(rate), Some(time)) => {
                let due = (rate * time.as_secs_f64()).ceil().max(1.0) as u64;
                (Some(reads.map_or(due, |reads| reads.min(due))), Some(2 * time + OVERTIME))
            }
            _ => (reads, time),
        };
        reads.is_some_and(|reads| turn.posted >= reads)
            || time.is_some_and(|time| turn.end.duration_since(turn.begin) >= time)
            || self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Acquire))
    }

    /// Posts what is due. Returns whether anything was, and when the next read is due if that is
    /// what it waits for.
    fn post(&mut self, turn: &mut Turn<'_>) -> anyhow::Result<(bool, Option<Instant>)> {
        match turn.load.rate {
            None => Ok((self.refill(turn)?, None)),
            Some(rate) => self.post_due(turn, rate),
        }
    }

    /// Closed loop: fills every lane.
    fn refill(&mut self, turn: &mut Turn<'_>) -> anyhow::Result<bool> {
        let before = turn.posted;
        for lane in 0..self.lanes.len() {
            let rest = turn.load.limit.reads.map_or(u64::MAX, |reads| reads - turn.posted);
            let count = turn.free[lane].len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            if count > 0 {
                self.prepare(turn, lane, count)?;
                self.launch(turn, lane, None)?;
            }
        }
        Ok(turn.posted > before)
    }

    /// Open loop: posts every read whose moment has come, on the lane with the most room.
    fn post_due(&mut self, turn: &mut Turn<'_>, rate: f64) -> anyhow::Result<(bool, Option<Instant>)> {
        let before = turn.posted;
        loop {
            let due = turn.begin + Duration::from_secs_f64(turn.posted as f64 / rate);
            let now = Instant::now();
            if now < due || self.over(turn) {
                return Ok((turn.posted > before, Some(due)));
            }
            let lane = (0..turn.free.len()).max_by_key(|lane| turn.free[*lane].len()).unwrap_or(0);
            if turn.free[lane].is_empty() {
                return Ok((turn.posted > before, None));
            }
            self.prepare(turn, lane, 1)?;
            self.launch(turn, lane, Some(due))?;
        }
    }

    /// Prepares `count` reads of one lane in `turn.batch`, outside of any measured time.
    fn prepare(&mut self, turn: &mut Turn<'_>, lane: usize, count: usize) -> anyhow::Result<()> {
        let (bytes, depth) = (turn.load.bytes, turn.load.depth);
        turn.batch.clear();
        for _ in 0..count {
            let slot = turn.free[lane].pop().context("no free slot")?;
            let at = lane * depth as usize + slot as usize;
            let offset = self.somewhere(turn.load);
            turn.flights[at].offset = offset;
            let remote = self.remote.slice(offset, bytes).context("a read outside of the region")?;
            let local = self.local.slice(at as u64 * u64::from(bytes), bytes).context("no place to land")?;
            turn.batch.push(Read::new(Token(slot.into()), local, remote).context("unlike lengths")?);
        }
        Ok(())
    }

    /// Posts `turn.batch`, whose time begins at `begun`, or now.
    fn launch(&mut self, turn: &mut Turn<'_>, lane: usize, begun: Option<Instant>) -> anyhow::Result<()> {
        let begun = begun.unwrap_or_else(Instant::now);
        let accepted = self.lanes[lane].post(&turn.batch).map_err(|error| self.lost(error))?;
        if turn.posted == 0 {
            turn.begin = begun;
        }
        for (index, read) in turn.batch.iter().enumerate() {
            let slot = read.token().0 as u32;
            match index < accepted {
                true => turn.flights[lane * turn.load.depth as usize + slot as usize].begun = begun,
                false => turn.free[lane].push(slot),
            }
        }
        turn.posted += accepted as u64;
        Ok(())
    }

    /// Takes what has completed. Returns whether anything has.
    fn reap(&mut self, turn: &mut Turn<'_>) -> anyhow::Result<bool> {
        let before = turn.completed;
        for lane in 0..self.lanes.len() {
            self.lanes[lane].poll(&mut turn.done).map_err(|error| self.lost(error))?;
            if turn.done.is_empty() {
                continue;
            }
            let now = Instant::now();
            turn.end = turn.end.max(now);
            let done = std::mem::take(&mut turn.done);
            for completion in &done {
                self.finish(turn, lane, completion, now)?;
            }
            turn.done = done;
            turn.done.clear();
        }
        Ok(turn.completed > before)
    }

    fn finish(&self, turn: &mut Turn<'_>, lane: usize, done: &Done, now: Instant) -> anyhow::Result<()> {
        done.result.with_context(|| format!("{}: a read failed", self.transport))?;
        let slot = usize::try_from(done.token.0).ok().filter(|slot| *slot < turn.load.depth as usize);
        let slot = slot.with_context(|| format!("{}: a completion that nobody awaits", self.transport))?;
        let at = lane * turn.load.depth as usize + slot;
        let flight = turn.flights[at];
        if let Some(recorder) = &mut turn.recorder {
            recorder.record(now, now.saturating_duration_since(flight.begun).as_nanos() as u64)?;
        }
        turn.completed += 1;
        turn.free[lane].push(slot as u32);
        let last = self.over(turn) && turn.completed == turn.posted;
        if turn.load.verify || last {
            let bytes = turn.load.bytes;
            ensure!(
                pattern::matches(&self.landing, at as u64 * u64::from(bytes), flight.offset, bytes),
                "{}: bad data: the {bytes} bytes from offset {} are not what the peer has there",
                self.transport,
                flight.offset
            );
            // With more in flight the others go on meanwhile: that time is theirs.
            if !last && turn.flights.len() == 1 {
                turn.verifying += now.elapsed();
            }
        }
        Ok(())
    }

    /// Another aligned place each time, the same ones in each run.
    fn somewhere(&mut self, load: &Load) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let span = load.span.unwrap_or(u64::MAX).min(self.remote.len());
        let places = span.saturating_sub(load.bytes.into()) / ALIGNMENT + 1;
        (self.random >> 16) % places * ALIGNMENT
    }
}
