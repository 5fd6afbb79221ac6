//! The order of pages in which policies look for neighbours: by address, or by when the guest used them.
//!
//! The paper's pseudo-paging numbers a guest's pages by recency, so that near a pivot are the pages that were used about
//! when the pivot was (Hines, Deshpande and Gopalan, SIGOPS OSR 43(3), 2009, section 4.2; "LRU" in its
//! quicksort figure). Here a page's number stays its address, and its *rank* is its place in that order.
//!
//! An order is kept as stretches, in which page and rank both go up by one: of an order by address there is one.
//! What the source has listed comes first, what it has not follows by address. The source's page map grows by address,
//! so that of any stretch it covers the first pages, perhaps none.

use super::pages::{Pages, Run};
use crate::memory::PageIndex;
use crate::page_set::PageSet;

/// Over how many stretches that are not known to their ends a search looks, while the map grows.
const LOOKS: usize = 64;

/// Consecutive pages with consecutive ranks.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    rank: u64,
    first: u64,
    count: u64,
}

impl Stretch {
    fn end(self) -> u64 {
        self.first + self.count
    }

    fn rank_of(self, page: u64) -> u64 {
        self.rank + (page - self.first)
    }

    /// The page of a rank in the stretch, or the first page if the rank is below it.
    fn page_from(self, rank: u64) -> u64 {
        self.first + rank.saturating_sub(self.rank)
    }

    /// The end of its pages below a rank above its first: that rank's page, or its end if the rank is above it.
    fn end_below(self, rank: u64) -> u64 {
        self.first + (rank - self.rank).min(self.count)
    }
}

/// Each page's place in an order.
#[derive(Debug)]
pub struct Ranks {
    /// How many pages there are.
    total: u64,
    /// By rank, without gaps.
    stretches: Vec<Stretch>,
    /// Which stretch, by its first page.
    by_page: Vec<usize>,
}

impl Ranks {
    /// Each page's rank is its number.
    pub(super) fn by_address(total: u64) -> Self {
        let stretches = vec![Stretch { rank: 0, first: 0, count: total }];
        Self { total, stretches, by_page: vec![0] }
    }

    /// First the pages of these runs one after the other, each where it is listed first; then the others by address.
    /// `None` if there are no such pages. Takes a while where there are many runs.
    pub fn listed(total: u64, runs: &[Run]) -> Option<Self> {
        if runs.iter().any(|run| run.count == 0 || run.end() > total) {
            return None;
        }
        if runs.is_empty() {
            return Some(Self::by_address(total));
        }
        let (mut rest, mut stretches, mut rank) = (PageSet::new(total, true), Vec::new(), 0);
        let mut push = |first, end| {
            match stretches.last_mut().filter(|last: &&mut Stretch| last.end() == first) {
                Some(last) => last.count += end - first,
                None => stretches.push(Stretch { rank, first, count: end - first }),
            }
            rank += end - first;
        };
        for run in runs {
            let mut at = run.first.0;
            while let Some(first) = rest.first(at, run.end(), true) {
                at = rest.first(first, run.end(), false).unwrap_or(run.end());
                rest.put(first, at, false);
                push(first, at);
            }
        }
        for run in rest.runs(u32::MAX) {
            push(run.first.0, run.end());
        }
        let mut by_page: Vec<usize> = (0..stretches.len()).collect();
        by_page.sort_unstable_by_key(|at| stretches[*at].first);
        Some(Self { total, stretches, by_page })
    }

    /// How many pages it is of.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Of a page below the total.
    pub(super) fn rank(&self, PageIndex(page): PageIndex) -> u64 {
        let after = self.by_page.partition_point(|at| self.stretches[*at].first <= page);
        self.stretches[self.by_page[after - 1]].rank_of(page)
    }

    /// The number of the stretch with a rank; of the last, from the total on.
    fn at(&self, rank: u64) -> usize {
        self.stretches.partition_point(|stretch| stretch.rank <= rank) - 1
    }
}

/// Which pages an edge that looks for work passes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passes {
    /// Whatever is not missing.
    Sent,
    /// Only what is zero, which is not sent.
    Zero,
}

/// A place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) rank: u64,
    page: u64,
    /// Pages that have the ranks around it and may be read: from this one, and below that one.
    first: u64,
    end: u64,
}

/// What lies further up.
pub(super) enum Up {
    /// Something here.
    At(Spot),
    /// Nothing below this rank; of the page there nothing is known yet.
    Unknown(u64),
    /// Nothing, whatever comes to be known.
    End,
}

/// What is known of the pages, in their order.
#[derive(Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) pages: &'a Pages,
    pub(super) ranks: &'a Ranks,
    /// Pages below this one are covered by the source's page map. Others are not to be read.
    pub(super) known: u64,
}

impl Ground<'_> {
    /// One above the highest page of a stretch that may be read.
    fn end(&self, stretch: Stretch) -> u64 {
        self.known.clamp(stretch.first, stretch.end())
    }

    /// The place of a rank, if there is one, and its page may be read.
    pub(super) fn spot(&self, rank: u64) -> Option<Spot> {
        let stretch = self.ranks.stretches[self.ranks.at(rank)];
        let (page, first, end) = (stretch.page_from(rank), stretch.first, self.end(stretch));
        (page < end).then_some(Spot { rank, page, first, end })
    }

    /// The first place from `rank` on at which something is.
    pub(super) fn up(&self, rank: u64, passes: Passes) -> Up {
        self.search_up(rank, |from, end| match passes {
            Passes::Sent => self.pages.missing_up(from, end),
            Passes::Zero => self.pages.content_up(from, end),
        })
    }

    /// The first place from `rank` on whose page `found` finds among those that may be read, `from..end`.
    fn search_up(&self, rank: u64, found: impl Fn(u64, u64) -> Option<u64>) -> Up {
        for stretch in &self.ranks.stretches[self.ranks.at(rank)..] {
            let (from, end) = (stretch.page_from(rank), self.end(*stretch));
            if let Some(page) = found(from, end) {
                return Up::At(Spot { rank: stretch.rank_of(page), page, first: stretch.first, end });
            }
            if end.max(from) < stretch.end() {
                return Up::Unknown(stretch.rank_of(end.max(from)));
            }
        }
        Up::End
    }

    /// As [`Ground::up`] for what was not sent, and looks some way past what is not known; also from which rank on to look
    /// the next time.
    pub(super) fn sweep(&self, rank: u64) -> (u64, Option<Spot>) {
        self.search_past(rank, |from, end| self.pages.missing_up(from, end))
    }

    fn search_past(&self, rank: u64, found: impl Fn(u64, u64) -> Option<u64>) -> (u64, Option<Spot>) {
        let (mut at, mut stays) = (rank, None);
        for _ in 0..LOOKS {
            match self.search_up(at, &found) {
                Up::At(spot) => return (stays.unwrap_or(spot.rank), Some(spot)),
                Up::Unknown(rank) => {
                    let stretch = self.ranks.stretches[self.ranks.at(rank)];
                    (at, stays) = (stretch.rank + stretch.count, stays.or(Some(rank)));
                }
                Up::End => return (stays.unwrap_or(self.ranks.total), None),
            }
        }
        (stays.unwrap_or(at), None)
    }

    /// The last place below `rank` at which something is. What is not known yet is left to the sweep.
    pub(super) fn down(&self, rank: u64, passes: Passes) -> Option<Spot> {
        let below = self.ranks.stretches.partition_point(|stretch| stretch.rank < rank);
        self.ranks.stretches[..below].iter().rev().find_map(|stretch| {
            let (first, end) = (stretch.first, stretch.end_below(rank).min(self.end(*stretch)));
            let page = match passes {
                Passes::Sent => self.pages.missing_down(first, end),
                Passes::Zero => self.pages.content_down(first, end),
            };
            page.map(|page| Spot { rank: stretch.rank_of(page), page, first, end })
        })
    }

    /// The longest run of missing pages up from a place, at most `limit` pages; perhaps none.
    pub(super) fn run_up(&self, from: Spot, limit: u32) -> Run {
        self.pages.run_up(from.page, limit, from.end)
    }

    /// The longest run of missing pages down from a place, at most `limit` pages; perhaps none.
    pub(super) fn run_down(&self, from: Spot, limit: u32) -> Run {
        let limit = u64::from(limit).min(from.page + 1 - from.first) as u32;
        self.pages.run_down(from.page, limit)
    }

    /// The first run of kept pages from a rank on, at most `limit` pages, also some way past what is not known; and from
    /// which rank on to look the next time.
    pub(super) fn kept_up(&self, rank: u64, limit: u64) -> (u64, Option<Run>) {
        let first = |from, end| self.pages.kept_up(from, end, 1).map(|run| run.first.0);
        let (next, found) = self.search_past(rank, first);
        (next, found.and_then(|spot| self.pages.kept_up(spot.page, spot.end, limit)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::planner::PageState;

    /// The order as a plain list of pages.
    struct List {
        pages: Vec<u64>,
    }

    impl List {
        fn of(total: u64, runs: &[Run]) -> Self {
            let mut pages: Vec<u64> = Vec::new();
            for page in runs.iter().flat_map(|run| run.pages()).map(|page| page.0) {
                if !pages.contains(&page) {
                    pages.push(page);
                }
            }
            let others: Vec<u64> = (0..total).filter(|page| !pages.contains(page)).collect();
            pages.extend(others);
            Self { pages }
        }

        fn readable(&self, rank: u64, ground: Ground) -> bool {
            self.pages[rank as usize] < ground.known
        }

        fn is(&self, rank: u64, ground: Ground, passes: Passes) -> bool {
            let state = ground.pages.get(PageIndex(self.pages[rank as usize])).unwrap();
            match passes {
                Passes::Sent => state == PageState::Missing,
                Passes::Zero => state != PageState::Zero,
            }
        }

        /// A run of missing pages whose first has this rank.
        fn check_run(&self, first: u64, run: Run, ground: Ground) -> Result<(), TestCaseError> {
            for (rank, page) in (first..).zip(run.pages()) {
                prop_assert_eq!(self.pages[rank as usize], page.0);
                prop_assert!(self.is(rank, ground, Passes::Sent) && self.readable(rank, ground));
            }
            Ok(())
        }

        fn check(&self, ground: Ground, from: u64, passes: Passes) -> Result<(), TestCaseError> {
            let total = self.pages.len() as u64;
            let nothing = |rank| self.readable(rank, ground) && !self.is(rank, ground, passes);
            match ground.up(from, passes) {
                Up::At(spot) => {
                    let run = ground.run_up(spot, 4);
                    prop_assert!(spot.rank >= from && (from..spot.rank).all(nothing));
                    prop_assert!(self.readable(spot.rank, ground) && self.is(spot.rank, ground, passes));
                    prop_assert_eq!(run.count == 0, !self.is(spot.rank, ground, Passes::Sent));
                    self.check_run(spot.rank, run, ground)?;
                }
                Up::Unknown(rank) => {
                    prop_assert!(!self.readable(rank, ground) && (from..rank).all(nothing));
                }
                Up::End => prop_assert!((from..total).all(nothing)),
            }
            let (next, found) = ground.sweep(from);
            let missing = |rank| self.readable(rank, ground) && self.is(rank, ground, Passes::Sent);
            prop_assert_eq!(found.map(|spot| spot.rank), (from..total).find(|rank| missing(*rank)));
            let settled = |rank| self.readable(rank, ground) && !missing(rank);
            prop_assert!((from..next).all(settled) && (next == total || !settled(next)), "{}", next);
            let found = ground.down(from, passes);
            let something = |rank: &u64| self.readable(*rank, ground) && self.is(*rank, ground, passes);
            let below = (0..from).rev().find(something);
            prop_assert_eq!(found.map(|spot| spot.rank), below);
            if let Some(spot) = found {
                let run = ground.run_down(spot, 4);
                prop_assert_eq!(run.count == 0, !self.is(spot.rank, ground, Passes::Sent));
                self.check_run(spot.rank + 1 - u64::from(run.count), run, ground)?;
            }
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn ranks_are_as_a_list_of_pages_has_them(
            total in 1u64..120,
            runs in proptest::collection::vec((0u64..120, 1u32..9), 0..12),
            sent in proptest::collection::vec(0u64..120, 0..90),
            zeros in proptest::collection::vec(0u64..120, 0..20),
            (known, from) in (0u64..121, 0u64..121),
        ) {
            let clip = |(first, count): (u64, u32)| {
                Run { first: PageIndex(first), count: count.min(total.saturating_sub(first) as u32) }
            };
            let runs: Vec<Run> = runs.into_iter().map(clip).filter(|run| run.count > 0).collect();
            let (list, ranks, mut pages) = (List::of(total, &runs), Ranks::listed(total, &runs).unwrap(), Pages::new(total));
            for page in sent.into_iter().filter(|page| *page < total) {
                if pages.missing_up(page, page + 1).is_some() {
                    pages.depart(Run::one(PageIndex(page)));
                }
            }
            for page in zeros.into_iter().filter(|page| *page < total) {
                pages.set_zero(PageIndex(page));
            }
            let ground = Ground { pages: &pages, ranks: &ranks, known: known.min(total) };
            for (rank, page) in (0..).zip(list.pages.iter().copied()) {
                prop_assert_eq!(ranks.rank(PageIndex(page)), rank);
                let spot = ground.spot(rank).map(|spot| (spot.rank, spot.page));
                prop_assert_eq!(spot, list.readable(rank, ground).then_some((rank, page)));
            }
            prop_assert_eq!(ground.spot(total), None);
            for passes in [Passes::Sent, Passes::Zero] {
                list.check(ground, from.min(total), passes)?;
            }
        }
    }
}
