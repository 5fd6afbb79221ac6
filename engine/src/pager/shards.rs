//! How memory is cut for several pager threads.
//!
//! Each thread (a *shard*) has a part of memory for itself: a userfaultfd, claims, planner, map
//! reader and two lanes, with pages numbered from the part's first. So shards share no state, and
//! all that they have in common is where they tell how far they are.

use std::str::FromStr;

use serde::Serialize;

use crate::memory::{PAGE_SIZE, PageIndex};
use crate::planner::Run;

/// Most shards of one guest.
pub const MAX_SHARDS: usize = 16;

/// Where memory may be cut: at huge pages (2 MiB), so that none lies in two parts.
const CUT: u64 = (2 << 20) / PAGE_SIZE;

/// Into how many parts memory is cut, at most: memory of fewer huge pages has fewer parts. 1 to
/// [`MAX_SHARDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shards(u8);

impl Shards {
    /// One thread for all memory.
    pub const ONE: Self = Self(1);

    /// So many, or `None` if that is none or more than [`MAX_SHARDS`].
    pub fn new(count: usize) -> Option<Self> {
        (1..=MAX_SHARDS).contains(&count).then_some(Self(count as u8))
    }

    /// How many.
    pub fn count(self) -> usize {
        self.0.into()
    }

    /// The parts of memory of so many pages, in ascending order and without gaps. None is empty if
    /// `pages` is not 0.
    pub(super) fn cut(self, pages: u64) -> impl Iterator<Item = Part> {
        let pieces = pages.div_ceil(CUT);
        let parts = pieces.clamp(1, self.0.into());
        let at = move |part: u64| (pieces * part / parts * CUT).min(pages);
        (0..parts).map(move |part| Part { first: at(part), pages: at(part + 1) - at(part) })
    }
}

impl Default for Shards {
    fn default() -> Self {
        Self::ONE
    }
}

impl FromStr for Shards {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let count = text.parse().ok().and_then(Self::new);
        count.ok_or_else(|| format!("a number of 1 to {MAX_SHARDS} is needed"))
    }
}

/// Pages that one shard has for itself, which number them from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The first, as the guest's memory numbers it.
    pub(super) first: u64,
    /// How many.
    pub(super) pages: u64,
}

impl Part {
    /// One behind the last, as the guest's memory numbers it.
    pub(super) fn end(self) -> u64 {
        self.first + self.pages
    }

    /// The number of one of its pages in the guest's memory.
    pub(super) fn global(self, page: PageIndex) -> PageIndex {
        PageIndex(self.first + page.0)
    }

    /// The number here of a page of the guest's memory, if it is of this part.
    pub(super) fn local(self, page: PageIndex) -> Option<PageIndex> {
        page.0.checked_sub(self.first).filter(|page| *page < self.pages).map(PageIndex)
    }

    /// What of a run of the guest's memory lies in this part, by its numbers here.
    pub(super) fn local_run(self, run: Run) -> Option<Run> {
        let (from, to) = (run.first.0.max(self.first), run.end().min(self.end()));
        (from < to).then(|| Run { first: PageIndex(from - self.first), count: (to - from) as u32 })
    }

    /// Offset of its first byte in the guest's memory.
    pub(super) fn offset(self) -> u64 {
        self.first * PAGE_SIZE
    }

    /// Its length in bytes.
    pub(super) fn bytes(self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_of_memory_and_cut_at_huge_pages() {
        for pages in [1, 511, 512, 513, 4096, 4097, 16 * 512, 100_000] {
            for shards in 1..=MAX_SHARDS {
                let parts: Vec<_> = Shards::new(shards).unwrap().cut(pages).collect();
                assert_eq!(parts.len() as u64, pages.div_ceil(CUT).min(shards as u64), "{pages} pages");
                let mut at = 0;
                for part in &parts {
                    assert!(part.first == at && part.pages > 0 && at % CUT == 0, "{pages} pages: {parts:?}");
                    at = part.end();
                }
                assert_eq!(at, pages);
            }
        }
        assert!(Shards::new(0).is_none() && Shards::new(MAX_SHARDS + 1).is_none());
        assert!("0".parse::<Shards>().is_err() && "x".parse::<Shards>().is_err());
    }

    #[test]
    fn a_run_over_a_cut_is_cut_and_pages_come_back_as_they_went() {
        let part = Part { first: 512, pages: 512 };
        let run = |first, count| Run { first: PageIndex(first), count };
        assert_eq!(part.local_run(run(500, 20)), Some(run(0, 8)));
        assert_eq!(part.local_run(run(1020, 20)), Some(run(508, 4)));
        assert_eq!((part.local_run(run(0, 512)), part.local_run(run(1024, 1))), (None, None));
        assert_eq!((part.local(PageIndex(511)), part.local(PageIndex(1024))), (None, None));
        assert_eq!(part.local(PageIndex(1023)).map(|page| part.global(page)), Some(PageIndex(1023)));
    }
}
