//! A link in virtual time, for tests and simulations; no product feature.
//!
//! Lanes of one [`SimLink`] share one wire, as two queue pairs or two connections between the same
//! hosts do. Nothing happens until the caller advances the clock, and a seed gives the same run
//! every time.
//!
//! ```text
//! post ── one_way ──▶ source ── waits for the wire, bytes / rate ── one_way (+ jitter, loss) ──▶ poll
//! ```
//!
//! Reads land, and complete, in the order of their bytes on the wire unless jitter or loss is asked
//! for. With memory behind the lane the bytes are copied at that moment and not before, so that a
//! reader who looks too early sees it.
//!
//! [`Countdown`] wraps any lane and fails its Nth call.

mod countdown;
mod lane;
mod random;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use countdown::Countdown;
pub use lane::SimLane;
pub use random::Random;

use crate::lane::Read;
use crate::memory::HostMemory;
use crate::region::{LocalRegion, RemoteRegion};

/// What a simulated link is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SimOptions {
    /// Of everything that is left to chance below.
    pub seed: u64,
    /// What the wire carries.
    pub bytes_per_s: u64,
    /// From one end to the other, in nanoseconds.
    pub one_way_ns: u64,
    /// Up to so much is added to the way back of each read: completions change places.
    pub jitter_ns: u64,
    /// The part of reads that are lost once and come again after `retransmit_ns`.
    pub loss: f64,
    /// How late a lost read comes.
    pub retransmit_ns: u64,
    /// The part of reads that complete twice. The [`crate::Lane`] contract forbids it: whoever
    /// reads must notice.
    pub duplicates: f64,
    /// `post` takes only a part of a batch, now and then none.
    pub partial: bool,
    /// Reads that a lane takes at once.
    pub depth: usize,
    /// When every lane breaks.
    pub breaks_at_ns: Option<u64>,
}

impl Default for SimOptions {
    /// 100 Gb/s and 3 µs for a round trip, as RDMA in one rack has it; nothing goes wrong.
    fn default() -> Self {
        Self {
            seed: 1,
            bytes_per_s: 12_500_000_000,
            one_way_ns: 1_500,
            jitter_ns: 0,
            loss: 0.0,
            retransmit_ns: 1_000_000,
            duplicates: 0.0,
            partial: false,
            depth: 64,
            breaks_at_ns: None,
        }
    }
}

/// The wire, its clock, and what is on it.
pub struct SimLink {
    shared: Arc<Mutex<Wire>>,
}

struct Wire {
    options: SimOptions,
    random: Random,
    now: u64,
    /// When the wire has sent what it has been given.
    free_at: u64,
    /// Reads on their way, by lane, by when they complete and in which order they were posted.
    lanes: Vec<BTreeMap<(u64, u64), Read>>,
    posted: u64,
}

impl SimLink {
    /// An idle link, at time 0.
    pub fn new(options: SimOptions) -> Self {
        let random = Random::new(options.seed);
        let wire = Wire { options, random, now: 0, free_at: 0, lanes: Vec::new(), posted: 0 };
        Self { shared: Arc::new(Mutex::new(wire)) }
    }

    /// A lane whose reads move no bytes.
    pub fn lane(&self) -> SimLane {
        self.add(None)
    }

    /// A lane that reads `source` into `landing`.
    pub fn lane_between(&self, source: HostMemory, landing: HostMemory) -> SimLane {
        self.add(Some([source, landing]))
    }

    fn add(&self, memory: Option<[HostMemory; 2]>) -> SimLane {
        let mut wire = lock(&self.shared);
        wire.lanes.push(BTreeMap::new());
        SimLane::new(self.shared.clone(), wire.lanes.len() - 1, memory)
    }

    /// What to read, and where it lands, for memory of `len` bytes.
    pub fn regions(len: u64) -> (RemoteRegion, LocalRegion) {
        (RemoteRegion::new(0, len, 0), LocalRegion { index: 0, len })
    }

    /// The time, in nanoseconds.
    pub fn now(&self) -> u64 {
        lock(&self.shared).now
    }

    /// Moves the clock on, never back.
    pub fn advance_to(&self, now: u64) {
        let mut wire = lock(&self.shared);
        wire.now = wire.now.max(now);
    }

    /// When the next read completes on any lane, if one is on its way.
    pub fn next_completion(&self) -> Option<u64> {
        let wire = lock(&self.shared);
        wire.lanes.iter().filter_map(|lane| lane.keys().next()).map(|(due, _)| *due).min()
    }
}

impl Wire {
    /// Puts a read on the wire of a lane.
    fn send(&mut self, lane: usize, read: Read) {
        let SimOptions { bytes_per_s, one_way_ns, jitter_ns, loss, retransmit_ns, .. } = self.options;
        let begun = self.free_at.max(self.now + one_way_ns);
        let wire_ns = u64::from(read.remote().len()) * 1_000_000_000 / bytes_per_s;
        self.free_at = begun + wire_ns;
        let mut due = self.free_at + one_way_ns;
        if jitter_ns > 0 {
            due += self.random.below(jitter_ns + 1);
        }
        if self.random.chance(loss) {
            due += retransmit_ns;
        }
        self.posted += 1;
        self.lanes[lane].insert((due, self.posted), read);
        if self.random.chance(self.options.duplicates) {
            self.posted += 1;
            self.lanes[lane].insert((due + wire_ns, self.posted), read);
        }
    }

    fn broken(&self) -> bool {
        self.options.breaks_at_ns.is_some_and(|at| self.now >= at)
    }
}

fn lock(shared: &Mutex<Wire>) -> MutexGuard<'_, Wire> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
