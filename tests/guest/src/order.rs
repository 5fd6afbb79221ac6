//! The order in which pages are walked. Every pass visits every page exactly once, and no table
//! is kept that would itself have to be fetched after a move.

use crate::params::Pattern;
use crate::pattern::mix;

/// An endless walk, pass after pass.
#[derive(Clone, Debug)]
pub struct Walk {
    pattern: Pattern,
    pages: u64,
    stride: u64,
    seed: u64,
    pass: u64,
    next: u64,
}

impl Walk {
    /// A walk over `pages` pages, at least one.
    pub fn new(pattern: Pattern, pages: u64, stride: u64, seed: u64) -> Self {
        Self { pattern, pages: pages.max(1), stride: stride.max(1), seed, pass: 0, next: 0 }
    }

    /// Passes completed.
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// The page to visit now.
    pub fn next_page(&mut self) -> u64 {
        if self.next == self.pages {
            self.next = 0;
            self.pass += 1;
        }
        let page = self.place(self.next);
        self.next += 1;
        page
    }

    fn place(&self, index: u64) -> u64 {
        match self.pattern {
            Pattern::Sequential => index,
            Pattern::Strided => strided(index, self.pages, self.stride),
            Pattern::Random => permuted(index, self.pages, mix(self.seed ^ mix(self.pass))),
        }
    }
}

/// The `index`-th page of 0, s, 2s, …, 1, s+1, 2s+1, …
fn strided(index: u64, pages: u64, stride: u64) -> u64 {
    let stride = stride.min(pages);
    let (rows, longer) = (pages / stride, pages % stride);
    let in_longer = longer * (rows + 1);
    match index.checked_sub(in_longer) {
        None => index / (rows + 1) + index % (rows + 1) * stride,
        Some(rest) => longer + rest / rows + rest % rows * stride,
    }
}

/// A keyed permutation of `0..pages`: a four-round Feistel network on the next even power of two,
/// walked along its cycle until it falls into the range.
fn permuted(index: u64, pages: u64, key: u64) -> u64 {
    let half_bits = (u64::BITS - (pages - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half_bits) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(key ^ right ^ (round << 56)) & mask));
        }
        value = left << half_bits | right;
        if value < pages {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_of_every_pattern_visits_every_page_once() {
        for pattern in [Pattern::Random, Pattern::Sequential, Pattern::Strided] {
            for (pages, stride) in [(1, 1), (2, 3), (7, 3), (64, 16), (1000, 7), (4096, 4096)] {
                let mut walk = Walk::new(pattern, pages, stride, 42);
                for pass in 0..3 {
                    let mut seen: Vec<u64> = (0..pages).map(|_| walk.next_page()).collect();
                    assert_eq!(walk.pass(), pass);
                    seen.sort_unstable();
                    assert!(seen.iter().copied().eq(0..pages), "{pattern:?} {pages} {stride}");
                }
            }
        }
    }

    #[test]
    fn random_passes_differ_and_jump() {
        let mut walk = Walk::new(Pattern::Random, 1000, 1, 1);
        let first: Vec<u64> = (0..1000).map(|_| walk.next_page()).collect();
        let second: Vec<u64> = (0..1000).map(|_| walk.next_page()).collect();
        assert_ne!(first, second);
        let neighbours = first.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) < 2).count();
        assert!(neighbours < 20, "{neighbours}");
    }
}
