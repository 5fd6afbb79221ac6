//! A set of pages as a bitmap, searched a word at a time.

use crate::memory::PageIndex;
use crate::planner::Run;

const WORD: u64 = 64;

/// A set of page numbers below a fixed total.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// Every page below `total` (`full`), or none.
    pub fn new(total: u64, full: bool) -> Self {
        let len = usize::try_from(total.div_ceil(WORD)).expect("a bitmap of all pages fits memory");
        let mut set = Self { words: vec![0; len] };
        if full {
            set.put(0, total, true);
        }
        set
    }

    /// The pages that a dirty log has: bit N of word M is page 64 M + N, as KVM_GET_DIRTY_LOG and others
    /// write it. `first` is the number of the log's first page; pages from `total` on are left out.
    pub fn add_log(&mut self, first: u64, log: &[u64], total: u64) {
        for (word, bits) in log.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            let base = first + word as u64 * WORD;
            for at in (0..WORD).filter(|bit| bits >> bit & 1 == 1).map(|bit| base + bit) {
                if at < total {
                    self.put(at, at + 1, true);
                }
            }
        }
    }

    /// The `count` pages from `first` on, a multiple of 64, numbered from 0.
    pub(crate) fn part(&self, first: u64, count: u64) -> Self {
        let (from, words) = ((first / WORD) as usize, count.div_ceil(WORD) as usize);
        Self { words: self.words.iter().skip(from).take(words).copied().collect() }
    }

    /// Adds the pages of another set.
    pub fn add(&mut self, other: &Self) {
        self.words.resize(self.words.len().max(other.words.len()), 0);
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// The pages that both sets have.
    pub fn common(&self, other: &Self) -> Self {
        Self { words: self.words.iter().zip(&other.words).map(|(one, two)| one & two).collect() }
    }

    /// The pages that the other set has not.
    pub fn without(&self, other: &Self) -> Self {
        let others = other.words.iter().chain(std::iter::repeat(&0));
        Self { words: self.words.iter().zip(others).map(|(one, two)| one & !two).collect() }
    }

    /// All pages below `total` of those blocks of 16 pages, 64 KiB, of which one is in the set.
    pub(crate) fn blocks(&self, total: u64) -> Self {
        let block = |at: u32| 0xffff << (16 * at);
        let widened = |word: &u64| (0..4).map(block).filter(|block| word & block != 0).sum();
        let mut blocks = Self { words: self.words.iter().map(widened).collect() };
        blocks.put(total, (blocks.words.len() as u64 * WORD).max(total), false);
        blocks
    }

    /// Runs of consecutive pages of the set, ascending, each at most `longest` pages.
    pub fn runs(&self, longest: u32) -> impl Iterator<Item = Run> {
        let end = self.words.len() as u64 * WORD;
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.first(at, end, true)?;
            let limit = end.min(first + u64::from(longest));
            at = self.first(first, limit, false).unwrap_or(limit);
            Some(Run { first: PageIndex(first), count: (at - first) as u32 })
        })
    }

    /// How many pages are in the set.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether `at` is in the set.
    pub fn has(&self, at: u64) -> bool {
        self.words.get((at / WORD) as usize).is_some_and(|word| word >> (at % WORD) & 1 == 1)
    }

    /// Moves one page from one set to another.
    pub(crate) fn shift(&mut self, to: &mut PageSet, at: u64) {
        let (word, bit) = ((at / WORD) as usize, 1 << (at % WORD));
        self.words[word] &= !bit;
        to.words[word] |= bit;
    }

    /// Puts the pages `from..end` into the set, or takes them out.
    pub fn put(&mut self, mut from: u64, end: u64, inside: bool) {
        while from < end {
            let stop = end.min((from / WORD + 1) * WORD);
            let mask = (u64::MAX >> (WORD - (stop - from))) << (from % WORD);
            let word = &mut self.words[(from / WORD) as usize];
            *word = if inside { *word | mask } else { *word & !mask };
            from = stop;
        }
    }

    /// The first page of `from..end` that is in the set (`inside`), or is not.
    pub(crate) fn first(&self, from: u64, end: u64, inside: bool) -> Option<u64> {
        let flip = if inside { 0 } else { u64::MAX };
        let mut at = from;
        while at < end {
            let word = (self.words[(at / WORD) as usize] ^ flip) >> (at % WORD);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at / WORD + 1) * WORD;
        }
        None
    }

    /// The last page of `from..end` that is in the set (`inside`), or is not.
    pub(crate) fn last(&self, from: u64, mut end: u64, inside: bool) -> Option<u64> {
        let flip = if inside { 0 } else { u64::MAX };
        while from < end {
            let top = (end - 1) % WORD;
            let word = (self.words[((end - 1) / WORD) as usize] ^ flip) << (WORD - 1 - top);
            if word != 0 {
                let found = end - 1 - u64::from(word.leading_zeros());
                return (found >= from).then_some(found);
            }
            end -= top + 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bitmap_answers_as_a_set_does(
            total in 1u64..300,
            puts in proptest::collection::vec((0u64..300, 0u64..300, any::<bool>()), 0..20),
            from in 0u64..300,
            end in 0u64..300,
        ) {
            let mut bits = PageSet::new(total, false);
            let mut model = BTreeSet::new();
            for (a, b, inside) in puts {
                let range = a.min(b).min(total)..a.max(b).min(total);
                bits.put(range.start, range.end, inside);
                for at in range {
                    if inside { model.insert(at) } else { model.remove(&at) };
                }
            }
            let end = end.min(total);
            for inside in [false, true] {
                let hit = |at: &u64| model.contains(at) == inside;
                prop_assert_eq!(bits.first(from, end, inside), (from..end).find(hit));
                prop_assert_eq!(bits.last(from, end, inside), (from..end).rev().find(hit));
            }
            prop_assert_eq!(bits.has(from), model.contains(&from));
            prop_assert!(bits.runs(7).flat_map(Run::pages).map(|page| page.0).eq(model.iter().copied()));
            let low = BTreeSet::from_iter(0..from.min(total));
            let mut other = PageSet::new(total, false);
            other.put(0, from.min(total), true);
            let pages = |set: &PageSet| set.runs(64).flat_map(Run::pages).map(|page| page.0).collect::<Vec<_>>();
            prop_assert_eq!(pages(&bits.common(&other)), model.intersection(&low).copied().collect::<Vec<_>>());
            prop_assert_eq!(pages(&bits.without(&other)), model.difference(&low).copied().collect::<Vec<_>>());
            prop_assert_eq!(bits.len(), model.len() as u64);
        }
    }
}
