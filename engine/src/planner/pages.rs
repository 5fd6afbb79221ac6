//! What the destination knows of every page: four bitmaps, 4 bits a page.

use crate::memory::PageIndex;
use crate::page_set::PageSet;

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
    /// Landed in the round of pre-copy, and known to be the same since; not published either.
    Kept,
    /// Published to the guest, which owns it now: the engine never writes it again.
    Resident,
}

/// The state of every page, and how many are still to come.
#[derive(Debug)]
pub struct Pages {
    total: u64,
    outstanding: u64,
    missing: PageSet,
    flying: PageSet,
    zero: PageSet,
    kept: PageSet,
}

impl Pages {
    /// All missing.
    pub fn new(total: u64) -> Self {
        let [missing, flying, zero, kept] = [true, false, false, false].map(|full| PageSet::new(total, full));
        Self { total, outstanding: total, missing, flying, zero, kept }
    }

    /// Those of which something is known already; none is in flight.
    pub fn of(total: u64, state: impl Fn(PageIndex) -> PageState) -> Self {
        let mut pages = Self::new(total);
        for page in (0..total).map(PageIndex) {
            match state(page) {
                PageState::Missing => {}
                PageState::Zero => _ = pages.set_zero(page),
                PageState::Kept => _ = pages.set_kept(page),
                PageState::Resident | PageState::InFlight => {
                    pages.missing.put(page.0, page.0 + 1, false);
                    pages.outstanding -= 1;
                }
            }
        }
        pages
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
            (&self.kept, PageState::Kept),
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
        Self::turn_out(&mut self.missing, &mut self.zero, &mut self.outstanding, page)
    }

    /// A page turned out to be here already. Returns whether it was missing, and counts as kept now.
    pub fn set_kept(&mut self, page: PageIndex) -> bool {
        Self::turn_out(&mut self.missing, &mut self.kept, &mut self.outstanding, page)
    }

    fn turn_out(from: &mut PageSet, to: &mut PageSet, outstanding: &mut u64, page: PageIndex) -> bool {
        let missing = from.has(page.0);
        if missing {
            from.shift(to, page.0);
            *outstanding -= 1;
        }
        missing
    }

    /// The kept pages around a kept one, within its block of `pages` pages.
    pub fn kept_around(&self, page: PageIndex, pages: u64) -> Run {
        let (first, end) = (page.0 / pages * pages, (page.0 / pages + 1) * pages);
        let first = self.kept.last(first, page.0, false).map_or(first, |other| other + 1);
        let end = self.kept.first(page.0, end, false).unwrap_or(end);
        Run { first: PageIndex(first), count: (end - first) as u32 }
    }

    /// The first run of kept pages of `from..end`, at most `limit` pages.
    pub fn kept_up(&self, from: u64, end: u64, limit: u64) -> Option<Run> {
        let first = self.kept.first(from, end.min(self.total), true)?;
        let end = end.min(self.total).min(first + limit);
        let end = self.kept.first(first, end, false).unwrap_or(end);
        Some(Run { first: PageIndex(first), count: (end - first) as u32 })
    }

    /// Kept pages are published.
    pub fn publish_kept(&mut self, run: Run) {
        self.kept.put(run.first.0, run.end(), false);
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

    /// The last missing page of `from..end`.
    pub fn missing_down(&self, from: u64, end: u64) -> Option<u64> {
        self.missing.last(from, end.min(self.total), true)
    }

    /// The first page of `from..end` that is not zero.
    pub fn content_up(&self, from: u64, end: u64) -> Option<u64> {
        self.zero.first(from, end.min(self.total), false)
    }

    /// The last page of `from..end` that is not zero.
    pub fn content_down(&self, from: u64, end: u64) -> Option<u64> {
        self.zero.last(from, end.min(self.total), false)
    }
}
