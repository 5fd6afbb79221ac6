//! What a page holds: 512 words computed from the seed, the page's number and its generation.

use serde::Serialize;

/// Words in a page.
pub const PAGE_WORDS: usize = 512;

/// A page's contents.
pub type Page = [u64; PAGE_WORDS];

/// Scrambles a word (the finaliser of splitmix64).
pub fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Where a page is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mismatch {
    /// The page's number in the walked memory.
    pub page: u64,
    /// First wrong byte.
    pub offset: usize,
    /// The word there, as it should be.
    pub expected: String,
    /// The word there.
    pub found: String,
}

/// The contents of all pages.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    seed: u64,
}

impl Contents {
    /// Contents that `seed` decides.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Every word of the page, cheap enough to be compared at memory speed: one multiplication
    /// each, from a start that is well mixed.
    fn words(self, page: u64, generation: u32) -> impl Iterator<Item = u64> {
        let start = mix(mix(self.seed ^ page).wrapping_add(u64::from(generation)));
        (0..PAGE_WORDS as u64).map(move |index| {
            let word = (start ^ index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word ^ (word >> 32)
        })
    }

    /// Writes the whole page.
    pub fn fill(self, page: u64, generation: u32, to: &mut Page) {
        to.iter_mut().zip(self.words(page, generation)).for_each(|(to, word)| *to = word);
    }

    /// Compares the whole page.
    ///
    /// Errors: the first wrong byte.
    pub fn verify(self, page: u64, generation: u32, found: &Page) -> Result<(), Box<Mismatch>> {
        let difference = found
            .iter()
            .zip(self.words(page, generation))
            .fold(0, |difference, (found, expected)| difference | (found ^ expected));
        if difference == 0 { Ok(()) } else { Err(self.describe(page, generation, found)) }
    }

    fn describe(self, page: u64, generation: u32, found: &Page) -> Box<Mismatch> {
        let mut pairs = found.iter().zip(self.words(page, generation)).enumerate();
        let wrong = |(_, (found, expected)): &(usize, (&u64, u64))| *found != expected;
        let (index, (found, expected)) = pairs.find(wrong).unwrap_or((0, (&found[0], 0)));
        let byte = (found ^ expected).trailing_zeros() as usize / 8;
        Box::new(Mismatch {
            page,
            offset: index * 8 + byte.min(7),
            expected: format!("{expected:#018x}"),
            found: format!("{found:#018x}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pages_and_generations_differ() {
        let contents = Contents::new(1);
        let mut first = [0; PAGE_WORDS];
        contents.fill(0, 0, &mut first);
        for (page, generation) in [(1, 0), (0, 1), (1, 1), (1 << 40, 0)] {
            let mut other = [0; PAGE_WORDS];
            contents.fill(page, generation, &mut other);
            assert!(first.iter().zip(other).filter(|(a, b)| **a == *b).count() < 3);
        }
        assert!(contents.verify(0, 0, &[0; PAGE_WORDS]).is_err(), "a zero page is never right");
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_found(
            seed: u64, page in 0u64..1 << 30, generation: u32, offset in 0usize..4096, flip in 1u8..,
        ) {
            let contents = Contents::new(seed);
            let mut words = [0; PAGE_WORDS];
            contents.fill(page, generation, &mut words);
            prop_assert!(contents.verify(page, generation, &words).is_ok());
            words[offset / 8] ^= u64::from(flip) << (offset % 8 * 8);
            let mismatch = contents.verify(page, generation, &words).unwrap_err();
            prop_assert_eq!(mismatch.offset, offset);
            prop_assert_eq!(mismatch.page, page);
        }
    }
}
