//! Which page next: the paging core, without I/O.
//!
//! Events come in as method calls (a fault, a run that landed, more of the source's page map), actions go out into the caller's list. No descriptor, thread or clock is in here, so
//! the same planner runs under the pager, under a simulation and under recorded traces.
//!
//! ```text
//!             fault                      landed
//!  Missing ───────────▶ InFlight ─────────────────────▶ Resident
//!     │    \     drain      ▲                            ▲
//!     │     \───────────────┘                            │
//!     │ page map: zero                                   │
//!     └──────────────────▶ Zero ─────────────────────────┘
//!                                  fault: publish zeros
//! ```
//!
//! Invariants: a page is in flight at most once; a resident page is never read again (the guest
//! owns it, a late write would corrupt it); a fault is never refused for want of bulk budget.
//! A lost lane is not an event yet: the pager stops and the guest waits (fail closed).

mod pages;

pub use pages::{PageState, Pages, Run};
use serde::{Deserialize, Serialize};

use crate::memory::PageIndex;

/// Bulk pages in flight while nothing faults: 8 reads of 64 KiB.
pub const BULK_WINDOW_MAX: u32 = 128;
/// Bulk pages in flight just after a fault, so that the fault's read waits behind little wire.
pub const BULK_WINDOW_MIN: u32 = 8;
/// Pages of one bulk read: 64 KiB.
pub const BULK_READ_PAGES: u32 = 16;

const _: () = assert!(BULK_WINDOW_MIN <= BULK_READ_PAGES && BULK_READ_PAGES <= BULK_WINDOW_MAX);

/// Which of a shard's two lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LaneId {
    /// Faults.
    Urgent,
    /// Everything else.
    Bulk,
}

/// What the pager has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read a run into the landing mapping.
    Read(LaneId, Run),
    /// Publish a run that has landed, and wake who waits for it.
    Publish(Run),
    /// Publish a page of zeros, and wake who waits for it.
    PublishZero(PageIndex),
    /// Wake who waits for a page that is there.
    Wake(PageIndex),
    /// Every page is here or known to be zero: let go of the memory.
    Done,
}

/// Counts of pages, by how they came and what faults found. The paper's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Faults that went to the wire.
    pub network_faults: u64,
    /// Faults on a page in flight or resident by the time they were seen.
    pub minor_faults: u64,
    /// Faults on a page known to be zero: answered without the wire.
    pub zero_faults: u64,
    /// Pages brought by the background drain.
    pub drain_pages: u64,
    /// Pages brought ahead of a fault by prepaging.
    pub prepage_pages: u64,
    /// Pages brought by faults.
    pub fault_pages: u64,
    /// Pages that never crossed, being zero.
    pub zero_pages: u64,
}

/// The paging core of one shard.
#[derive(Debug)]
pub struct Planner {
    pages: Pages,
    counts: PageCounts,
    /// Pages below this one are covered by the source's page map.
    known: u64,
    /// Where the linear drain goes on.
    cursor: u64,
    bulk_in_flight: u32,
    window: u32,
    done: bool,
}

impl Planner {
    /// A planner for `total` pages, all missing.
    pub fn new(total: u64) -> Self {
        Self {
            pages: Pages::new(total),
            counts: PageCounts::default(),
            known: 0,
            cursor: 0,
            bulk_in_flight: 0,
            window: BULK_WINDOW_MAX,
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

    /// The guest touched a page that was not published.
    ///
    /// Returns false if there is no such page: the caller's bug or a confused kernel.
    #[must_use]
    pub fn fault(&mut self, page: PageIndex, actions: &mut Vec<Action>) -> bool {
        let Some(state) = self.pages.get(page) else { return false };
        self.window = BULK_WINDOW_MIN;
        match state {
            PageState::Missing => {
                self.counts.network_faults += 1;
                self.read(LaneId::Urgent, Run::one(page), actions);
            }
            PageState::InFlight => self.counts.minor_faults += 1,
            PageState::Zero => {
                self.counts.zero_faults += 1;
                self.pages.set(page, PageState::Resident);
                actions.push(Action::PublishZero(page));
            }
            PageState::Resident => {
                self.counts.minor_faults += 1;
                actions.push(Action::Wake(page));
            }
        }
        true
    }

    /// A read has landed.
    pub fn landed(&mut self, lane: LaneId, run: Run, actions: &mut Vec<Action>) {
        match lane {
            LaneId::Urgent => self.counts.fault_pages += u64::from(run.count),
            LaneId::Bulk => {
                self.bulk_in_flight -= run.count;
                self.counts.drain_pages += u64::from(run.count);
                self.window = (self.window * 2).min(BULK_WINDOW_MAX);
            }
        }
        self.pages.set_run(run, PageState::Resident);
        actions.push(Action::Publish(run));
        self.finish(actions);
    }

    /// The source's page map now covers pages up to `known`; `zeros` are those of the new part
    /// that are zero.
    pub fn map_extended(
        &mut self,
        known: u64,
        zeros: impl Iterator<Item = PageIndex>,
        actions: &mut Vec<Action>,
    ) {
        for page in zeros {
            if self.pages.get(page) == Some(PageState::Missing) {
                self.pages.set(page, PageState::Zero);
                self.counts.zero_pages += 1;
            }
        }
        self.known = known.clamp(self.known, self.pages.total());
        self.finish(actions);
    }

    /// Fills the bulk lane up to its window, with at most `reads` reads: the linear drain.
    pub fn drain(&mut self, reads: usize, actions: &mut Vec<Action>) {
        for _ in 0..reads {
            let budget = self.window.saturating_sub(self.bulk_in_flight);
            if budget == 0 {
                return;
            }
            let Some(page) = self.pages.first_missing(self.cursor, self.known) else { return };
            let run = self.pages.missing_run(page, budget.min(BULK_READ_PAGES), self.known);
            let run = run.expect("the page was just found missing");
            self.cursor = page.0 + u64::from(run.count);
            self.read(LaneId::Bulk, run, actions);
        }
    }

    fn read(&mut self, lane: LaneId, run: Run, actions: &mut Vec<Action>) {
        self.pages.set_run(run, PageState::InFlight);
        if lane == LaneId::Bulk {
            self.bulk_in_flight += run.count;
        }
        actions.push(Action::Read(lane, run));
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
