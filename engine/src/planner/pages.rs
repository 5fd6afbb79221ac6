//! What the destination knows of every page: three bitmaps, 3 bits a page.

use super::bits::Bits;
use crate::memory::PageIndex;

/// A run of consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: PageIndex,
    /// How many, at least one.
    pub count: u32,
}

impl Run {
    /// A run of one page.
    pub fn one(page: PageIndex) -> Self {
        Self { first: page, count: 1 }
    }

    /// The page after the last.
    pub fn end(self) -> u64 {
        self.first.0 + u64::from(self.count)
    }

    /// Whether `page` is one of the run's.
    pub fn contains(self, page: PageIndex) -> bool {
        (self.first.0..self.end()).contains(&page.0)
    }

    /// The pages of the run.
    pub fn pages(self) -> impl Iterator<Item = PageIndex> {
        (self.first.0..self.end()).map(PageIndex)
    }
}

/// The life of a page at the destination. It only ever moves towards [`PageState::Resident`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// At the source, content not known to be zero.
    Missing,
    /// A read of it is posted.
    InFlight,
    /// Known to be zero; not published, since nobody has touched it.
    Zero,
    /// Published to the guest, which owns it now: the engine never writes it again.
    Resident,
}

/// The state of every page, and how many are still to come.
#[derive(Debug)]
pub struct Pages {
    total: u64,
    outstanding: u64,
    missing: Bits,
    flying: Bits,
    zero: Bits,
}

impl Pages {
    /// All missing.
    pub fn new(total: u64) -> Self {
        let [missing, flying, zero] = [true, false, false].map(|full| Bits::new(total, full));
        Self { total, outstanding: total, missing, flying, zero }
    }

    /// Number of pages.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Pages that are missing or in flight.
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// A page's state, or `None` past the end.
    pub fn get(&self, page: PageIndex) -> Option<PageState> {
        let states = [
            (&self.missing, PageState::Missing),
            (&self.flying, PageState::InFlight),
            (&self.zero, PageState::Zero),
        ];
        let state = states.iter().find(|(set, _)| set.has(page.0)).map(|(_, state)| *state);
        (page.0 < self.total).then(|| state.unwrap_or(PageState::Resident))
    }

    /// A read of a missing run is posted.
    pub fn depart(&mut self, run: Run) {
        debug_assert!(run.pages().all(|page| self.missing.has(page.0)), "{run:?} is not all missing");
        self.missing.put(run.first.0, run.end(), false);
        self.flying.put(run.first.0, run.end(), true);
    }

    /// A run in flight has landed.
    pub fn arrive(&mut self, run: Run) {
        debug_assert!(run.pages().all(|page| self.flying.has(page.0)), "{run:?} is not all in flight");
        self.flying.put(run.first.0, run.end(), false);
        self.outstanding -= u64::from(run.count);
    }

    /// A page turned out to be zero. Returns whether it was missing, and counts as zero now.
    pub fn set_zero(&mut self, page: PageIndex) -> bool {
        let missing = self.missing.has(page.0);
        if missing {
            self.missing.shift(&mut self.zero, page.0);
            self.outstanding -= 1;
        }
        missing
    }

    /// A zero page is published.
    pub fn publish_zero(&mut self, page: PageIndex) {
        self.zero.put(page.0, page.0 + 1, false);
    }

    /// The longest run of missing pages up from `first`, at most `limit` pages and below `end`; perhaps
    /// none.
    pub fn run_up(&self, first: u64, limit: u32, end: u64) -> Run {
        let end = end.min(first + u64::from(limit)).min(self.total);
        let stop = self.missing.first(first, end, false).unwrap_or(end);
        Run { first: PageIndex(first), count: (stop - first) as u32 }
    }

    /// The longest run of missing pages that ends with `last`, at most `limit` pages; perhaps none.
    pub fn run_down(&self, last: u64, limit: u32) -> Run {
        let lowest = (last + 1).saturating_sub(u64::from(limit));
        let first = self.missing.last(lowest, last + 1, false).map_or(lowest, |other| other + 1);
        Run { first: PageIndex(first), count: (last + 1 - first) as u32 }
    }

    /// The first missing page of `from..end`.
    pub fn missing_up(&self, from: u64, end: u64) -> Option<u64> {
        self.missing.first(from, end.min(self.total), true)
    }

    /// The last missing page below `end`.
    pub fn missing_down(&self, end: u64) -> Option<u64> {
        self.missing.last(0, end.min(self.total), true)
    }

    /// The first page of `from..end` that is not zero.
    pub fn content_up(&self, from: u64, end: u64) -> Option<u64> {
        self.zero.first(from, end.min(self.total), false)
    }

    /// The last page below `end` that is not zero.
    pub fn content_down(&self, end: u64) -> Option<u64> {
        self.zero.last(0, end.min(self.total), false)
    }
}
