//! What the destination knows of every page.

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

    /// The pages of the run.
    pub fn pages(self) -> impl Iterator<Item = PageIndex> {
        (self.first.0..self.first.0 + u64::from(self.count)).map(PageIndex)
    }
}

/// The life of a page at the destination. It only ever moves towards [`PageState::Resident`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
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
    states: Vec<PageState>,
    outstanding: u64,
}

impl Pages {
    /// All missing.
    pub fn new(total: u64) -> Self {
        let len = usize::try_from(total).expect("the layout's pages fit this machine's address space");
        Self { states: vec![PageState::Missing; len], outstanding: total }
    }

    /// Number of pages.
    pub fn total(&self) -> u64 {
        self.states.len() as u64
    }

    /// Pages that are missing or in flight.
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// A page's state, or `None` past the end.
    pub fn get(&self, page: PageIndex) -> Option<PageState> {
        self.states.get(usize::try_from(page.0).ok()?).copied()
    }

    /// Sets a page's state.
    pub fn set(&mut self, page: PageIndex, state: PageState) {
        let here = |state| u64::from(matches!(state, PageState::Zero | PageState::Resident));
        let slot = &mut self.states[page.0 as usize];
        self.outstanding = self.outstanding + here(*slot) - here(state);
        *slot = state;
    }

    /// Sets the state of every page of a run.
    pub fn set_run(&mut self, run: Run, state: PageState) {
        for page in run.pages() {
            self.set(page, state);
        }
    }

    /// The longest run of missing pages from `page`, at most `limit` pages and not past `end`.
    pub fn missing_run(&self, page: PageIndex, limit: u32, end: u64) -> Option<Run> {
        let end = end.min(page.0 + u64::from(limit)).min(self.total());
        let count = (page.0..end).take_while(|at| self.states[*at as usize] == PageState::Missing).count();
        (count > 0).then_some(Run { first: page, count: count as u32 })
    }

    /// The first missing page in `from..end`.
    pub fn first_missing(&self, from: u64, end: u64) -> Option<PageIndex> {
        let end = end.min(self.total());
        let range = self.states.get(from as usize..end as usize)?;
        let at = range.iter().position(|state| *state == PageState::Missing)?;
        Some(PageIndex(from + at as u64))
    }
}
