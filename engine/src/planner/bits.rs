//! A set of pages as a bitmap, searched a word at a time.

const WORD: u64 = 64;

/// A set of page numbers below a fixed total.
#[derive(Debug)]
pub(super) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// Every page below `total` (`full`), or none.
    pub(super) fn new(total: u64, full: bool) -> Self {
        let len = usize::try_from(total.div_ceil(WORD)).expect("a bitmap of all pages fits memory");
        let mut bits = Self { words: vec![0; len] };
        if full {
            bits.put(0, total, true);
        }
        bits
    }

    /// Whether `at` is in the set.
    pub(super) fn has(&self, at: u64) -> bool {
        self.words.get((at / WORD) as usize).is_some_and(|word| word >> (at % WORD) & 1 == 1)
    }

    /// Moves one page from one set to another.
    pub(super) fn shift(&mut self, to: &mut Bits, at: u64) {
        let (word, bit) = ((at / WORD) as usize, 1 << (at % WORD));
        self.words[word] &= !bit;
        to.words[word] |= bit;
    }

    /// Puts the pages `from..end` into the set, or takes them out.
    pub(super) fn put(&mut self, mut from: u64, end: u64, inside: bool) {
        while from < end {
            let stop = end.min((from / WORD + 1) * WORD);
            let mask = (u64::MAX >> (WORD - (stop - from))) << (from % WORD);
            let word = &mut self.words[(from / WORD) as usize];
            *word = if inside { *word | mask } else { *word & !mask };
            from = stop;
        }
    }

    /// The first page of `from..end` that is in the set (`inside`), or is not.
    pub(super) fn first(&self, from: u64, end: u64, inside: bool) -> Option<u64> {
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
    pub(super) fn last(&self, from: u64, mut end: u64, inside: bool) -> Option<u64> {
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
            let mut bits = Bits::new(total, false);
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
        }
    }
}
