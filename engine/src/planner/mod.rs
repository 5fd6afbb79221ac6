//! Which page next: the paging core, without I/O.
//!
//! Events come in as method calls (a fault, a read that landed, more of the source's page map) with
//! the time at which they happened; actions go out into the caller's list. No descriptor, thread or
//! clock is in here, so the same planner runs under the pager, under a simulation and under
//! recorded traces.
//!
//! ```text
//!             fault                      landed
//!  Missing ───────────▶ InFlight ─────────────────────▶ Resident
//!     │    \  prepage,      ▲                            ▲
//!     │     \── drain ──────┘                            │
//!     │ page map: zero                                   │
//!     ├──────────────────▶ Zero ─────────────────────────┤
//!     │ page map: clean            fault: publish zeros  │
//!     └──────────────────▶ Kept ─────────────────────────┘
//!                                  fault: publish it
//! ```
//!
//! [`Planner::drain`] fills the bulk lane up to its window (`link.rs`): first with what the source says
//! was touched last, where it can tell, then in the order of the [`Policy`]: bubbles around faults
//! (`bubble.rs`), streams found in them (`adaptive.rs`), and when those have nothing, a sweep, which alone is
//! the policy `linear`. Near, and next, is by address, or [as the source has listed](Planner::order) the pages
//! (`ranks.rs`).
//!
//! Invariants: a page is in flight at most once; a resident page is never read again (the guest
//! owns it, a late write would corrupt it); a fault is never refused for want of bulk budget; bulk
//! in flight is within its window.
//!
//! A fault on a page in flight is *promoted*: it is not read twice, for two reads of one landing
//! place would let the later one overwrite what the guest has written since. Nor could that pay: by
//! the bound on the window the page lands within the time that a second read might take. What can
//! be sooner is its publication: see [`Planner::awaited`].
//!
//! A lost lane is no event: the pager stops and the guest waits (fail closed). Over new lanes a planner
//! [goes on](Planner::going_on) with what is known of the pages.

mod action;
mod adaptive;
mod bubble;
mod counts;
mod flights;
mod link;
mod pace;
mod pages;
mod policy;
mod ranks;

use std::collections::VecDeque;
use std::sync::Arc;

pub use action::{Action, LaneId, Why};
use adaptive::Streams;
use bubble::{Bubbles, Turn};
pub use counts::PageCounts;
use flights::Flight;
use link::Link;
pub use link::{MAX_READ_PAGES, Nanos};
pub use pace::Bandwidth;
pub(crate) use pace::Pace;
pub use pages::{PageState, Pages, Run};
pub use policy::{Direction, MAX_PIVOTS, PIVOTS, Policy};
use ranks::Ground;
pub use ranks::Ranks;

use crate::memory::PageIndex;

/// A fault on a kept page publishes what else is kept of its block of 64 KiB with it, as far as nothing lies
/// between: as much as the kernel itself maps around a fault (fault_around_bytes). The rest of its block of so
/// many pages is shown before others.
const KEPT_AROUND: u64 = 16;
const KEPT_NEARBY: u64 = 64;

/// Kept pages that are shown in one turn, and runs of them: a fault may wait behind them.
const KEPT_AT_ONCE: u64 = 32;
const KEPT_RUNS: usize = 8;

/// What the source's page map says of pages that it did not cover before.
#[derive(Clone, Debug, Default)]
pub struct News {
    /// The map covers pages below this one now. Of the new ones:
    pub known: u64,
    /// These are zero.
    pub zeros: Vec<PageIndex>,
    /// These are here since the round of pre-copy, and the same.
    pub kept: Vec<PageIndex>,
}

/// What a planner is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannerConfig {
    /// The order of what nobody has asked for.
    pub policy: Policy,
    /// How long a fault's read may wait for the wire behind bulk reads, in nanoseconds. More of it
    /// drains faster where the link's rate or round trip varies.
    pub bulk_wait_ns: u64,
    /// How much may cross a second of what nobody waits for, less what crosses for faults, which are never held back. `None`:
    /// as much as the link carries.
    pub max_bandwidth: Option<Bandwidth>,
}

impl Default for PlannerConfig {
    /// Adaptive, 50 µs, no limit.
    fn default() -> Self {
        Self { policy: Policy::default(), bulk_wait_ns: 50_000, max_bandwidth: None }
    }
}

/// Who decides the order.
#[derive(Debug)]
enum Order {
    Linear,
    Bubbles(Bubbles),
    Streams(Streams),
}

impl Order {
    fn new(policy: Policy) -> Self {
        match policy {
            Policy::Linear => Order::Linear,
            Policy::Bubble(direction) => Order::Bubbles(Bubbles::new(1, direction)),
            Policy::BubbleMulti(pivots, direction) => {
                Order::Bubbles(Bubbles::new(usize::from(pivots), direction))
            }
            Policy::Adaptive => Order::Streams(Streams::default()),
        }
    }
}

/// The paging core of one shard.
#[derive(Debug)]
pub struct Planner {
    pages: Pages,
    counts: PageCounts,
    link: Link,
    pace: Pace,
    policy: Policy,
    order: Order,
    /// In which order pages lie.
    ranks: Arc<Ranks>,
    /// Pages below this one are covered by the source's page map.
    known: u64,
    /// No page below this rank is missing: where the sweep goes on.
    swept: u64,
    /// What the guest touched just before it was frozen, as the source says.
    recent: VecDeque<Run>,
    /// Of that, what is here since the round of pre-copy is shown first.
    recent_kept: VecDeque<Run>,
    /// Kept pages below this rank were shown.
    shown: u64,
    /// Reads under way, oldest first. Bounded by the window and by the faults that can wait.
    flights: Vec<Flight>,
    bulk_in_flight: u32,
    done: bool,
}

impl Planner {
    /// A planner for `total` pages, all missing.
    pub fn new(total: u64, config: PlannerConfig) -> Self {
        Self::going_on(Pages::new(total), config)
    }

    /// A planner for pages of which some are here: another has been at work, until its lanes were lost.
    pub fn going_on(pages: Pages, config: PlannerConfig) -> Self {
        Self {
            counts: PageCounts::default(),
            link: Link::new(config.bulk_wait_ns),
            pace: Pace::new(config.max_bandwidth),
            policy: config.policy,
            order: Order::new(config.policy),
            ranks: Arc::new(Ranks::by_address(pages.total())),
            pages,
            known: 0,
            swept: 0,
            recent: VecDeque::new(),
            recent_kept: VecDeque::new(),
            shown: 0,
            flights: Vec::new(),
            bulk_in_flight: 0,
            done: false,
        }
    }

    /// The counters so far.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Pages still to come.
    pub fn outstanding(&self) -> u64 {
        self.pages.outstanding()
    }

    /// Whether a page is published.
    pub fn is_resident(&self, page: PageIndex) -> bool {
        self.pages.get(page) == Some(PageState::Resident)
    }

    /// Pages covered by the source's page map so far: the drain goes no further.
    pub fn known(&self) -> u64 {
        self.known
    }

    /// Bulk pages that may be in flight now.
    pub fn window(&self) -> u32 {
        self.link.window()
    }

    /// The guest touched a page that was not published.
    ///
    /// Returns false if there is no such page: the caller's bug or a confused kernel.
    #[must_use]
    pub fn fault(&mut self, page: PageIndex, now: Nanos, actions: &mut Vec<Action>) -> bool {
        let Some(state) = self.pages.get(page) else { return false };
        match state {
            PageState::Missing => {
                self.counts.network_faults += 1;
                self.read(Why::Fault, Run::one(page), now, actions);
                self.link.faulted();
                let rank = self.ranks.rank(page);
                match &mut self.order {
                    Order::Linear => {}
                    Order::Bubbles(bubbles) => bubbles.fault(rank),
                    Order::Streams(streams) => streams.fault(rank),
                }
            }
            PageState::InFlight => {
                self.counts.minor_faults += 1;
                self.promote(page);
            }
            PageState::Zero => {
                self.counts.zero_faults += 1;
                self.pages.publish_zero(page);
                actions.push(Action::PublishZero(page));
            }
            PageState::Kept => {
                self.counts.minor_faults += 1;
                let run = self.pages.kept_around(page, KEPT_AROUND);
                self.pages.publish_kept(run);
                actions.push(Action::PublishKept(run));
                let first = PageIndex(page.0 / KEPT_NEARBY * KEPT_NEARBY);
                let count = KEPT_NEARBY.min(self.pages.total() - first.0) as u32;
                self.recent_kept.push_front(Run { first, count });
            }
            PageState::Resident => {
                self.counts.minor_faults += 1;
                actions.push(Action::Wake(page));
            }
        }
        true
    }

    /// The source's page map covers more pages now.
    pub fn map_extended(&mut self, news: News, actions: &mut Vec<Action>) {
        for page in news.zeros {
            self.counts.zero_pages += u64::from(self.pages.set_zero(page));
        }
        for page in news.kept {
            self.counts.kept_pages += u64::from(self.pages.set_kept(page));
        }
        self.known = news.known.clamp(self.known, self.pages.total());
        self.finish(actions);
    }

    /// The source says that the guest touched these pages last, the likeliest first. They are read before
    /// others, whether the map covers them or not.
    ///
    /// Returns false, and does nothing, if there are no such pages.
    #[must_use]
    pub fn prefer(&mut self, runs: &[Run]) -> bool {
        let inside = runs.iter().all(|run| run.count > 0 && run.end() <= self.pages.total());
        if inside {
            self.recent.extend(runs);
            self.recent_kept.extend(runs);
        }
        inside
    }

    /// The order in which pages lie. What faults have shown so far is forgotten.
    ///
    /// Returns false, and does nothing, if it is of another number of pages.
    #[must_use]
    pub fn order(&mut self, ranks: impl Into<Arc<Ranks>>) -> bool {
        let ranks = ranks.into();
        let fits = ranks.total() == self.pages.total();
        if fits {
            self.ranks = ranks;
            self.order = Order::new(self.policy);
            (self.swept, self.shown) = (0, 0);
        }
        fits
    }

    /// Shows the guest some more of what is here since the round of pre-copy.
    pub fn show_kept(&mut self, actions: &mut Vec<Action>) {
        let mut left = KEPT_AT_ONCE;
        for _ in 0..KEPT_RUNS {
            let Some(run) = self.next_kept(left) else { return };
            self.pages.publish_kept(run);
            actions.push(Action::PublishKept(run));
            left -= u64::from(run.count);
        }
    }

    /// What was touched last, as far as the map covers it, then in the order of the pages.
    fn next_kept(&mut self, limit: u64) -> Option<Run> {
        if limit == 0 {
            return None;
        }
        while let Some(run) = self.recent_kept.front() {
            let kept = self.pages.kept_up(run.first.0, run.end(), limit);
            if kept.is_some() || run.end() > self.known {
                return kept;
            }
            self.recent_kept.pop_front();
        }
        let ground = Ground { pages: &self.pages, ranks: &self.ranks, known: self.known };
        let (shown, run) = ground.kept_up(self.shown, limit);
        self.shown = shown;
        run
    }

    /// The pages of `first..end` that nobody has read yet.
    pub fn missing(&self, first: PageIndex, end: PageIndex) -> impl Iterator<Item = PageIndex> {
        let up = move |at: u64| self.pages.missing_up(at, end.0);
        std::iter::successors(up(first.0), move |at| up(at + 1)).map(PageIndex)
    }

    /// The guest has given these missing pages back: they are zero from now on, and not read.
    pub fn discarded(&mut self, pages: &[PageIndex], actions: &mut Vec<Action>) {
        for page in pages {
            self.counts.discarded_pages += u64::from(self.pages.set_zero(*page));
        }
        self.finish(actions);
    }

    /// From now on so much may cross a second.
    pub fn limit(&mut self, max_bandwidth: Option<Bandwidth>) {
        self.pace = Pace::new(max_bandwidth);
    }

    /// How long the drain is held back yet for the sake of a limited bandwidth, in nanoseconds; `None`: it is not.
    pub fn held_back(&self, now: Nanos) -> Option<u64> {
        self.pace.holds(now)
    }

    /// Fills the bulk lane up to its window, with at most `reads` reads, in the policy's order, as far as its bandwidth is
    /// not limited.
    pub fn drain(&mut self, reads: usize, now: Nanos, actions: &mut Vec<Action>) {
        for _ in 0..reads {
            if self.pace.holds(now).is_some() {
                return;
            }
            let room = self.link.window().saturating_sub(self.bulk_in_flight);
            if room < self.link.read_least() {
                return;
            }
            let limit = self.link.read_limit();
            let Some((why, run)) = self.next(room.min(limit)) else { return };
            self.read(why, run, now, actions);
        }
    }

    /// The next run of at most `limit` pages: what was touched last, else by the policy, else by the sweep.
    fn next(&mut self, limit: u32) -> Option<(Why, Run)> {
        while let Some(run) = self.recent.front() {
            if let Some(first) = self.pages.missing_up(run.first.0, run.end()) {
                return Some((Why::Recent, self.pages.run_up(first, limit, run.end())));
            }
            self.recent.pop_front();
        }
        let ground = Ground { pages: &self.pages, ranks: &self.ranks, known: self.known };
        let turn = match &mut self.order {
            Order::Linear => Turn::Sweep,
            Order::Bubbles(bubbles) => bubbles.next(ground, limit),
            Order::Streams(streams) => streams.next(ground, limit),
        };
        if let Turn::Bubble(run) = turn {
            return Some((Why::Prepage, run));
        }
        let (swept, found) = ground.sweep(self.swept);
        let found = found.map(|spot| (Why::Drain, ground.run_up(spot, limit)));
        self.swept = swept;
        found
    }

    fn read(&mut self, why: Why, run: Run, now: Nanos, actions: &mut Vec<Action>) {
        self.pages.depart(run);
        self.pace.cross(run.count, now);
        if why.lane() == LaneId::Bulk {
            self.bulk_in_flight += run.count;
        }
        let awaited = why == Why::Fault;
        self.flights.push(Flight { run, why, posted: self.link.posted(now), awaited });
        actions.push(Action::Read(why, run));
    }

    fn finish(&mut self, actions: &mut Vec<Action>) {
        if self.pages.outstanding() == 0 && !self.done {
            self.done = true;
            actions.push(Action::Done);
        }
    }
}

#[cfg(test)]
mod tests;
