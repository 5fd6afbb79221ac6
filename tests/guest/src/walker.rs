//! The walked memory and the walk: touch, verify, rewrite, count.

use std::io;
use std::time::Instant;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use crate::order::Walk;
use crate::params::{Access, Params};
use crate::pattern::{Contents, Mismatch, Page};
use crate::stats::Times;

const PAGE_BYTES: usize = 4096;

/// Anonymous memory of this process, in pages. It is never given back.
struct Memory(&'static mut [Page]);

impl Memory {
    fn new(params: &Params) -> io::Result<Self> {
        let len = usize::try_from(params.mb << 20).map_err(io::Error::other)?;
        let populate = if params.populate { MapFlags::POPULATE } else { MapFlags::empty() };
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | populate);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        let advice = if params.thp { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        // SAFETY: the advice does not change what the mapping holds. A kernel without huge pages
        // refuses it, which does no harm.
        let _ = unsafe { madvise(base, len, advice) };
        // SAFETY: the mapping is readable, writable, zero, page-aligned, `len` bytes long, never
        // unmapped and used by nobody else; any bytes are valid words.
        Ok(Self(unsafe { std::slice::from_raw_parts_mut(base.cast::<Page>(), len / PAGE_BYTES) }))
    }
}

/// See the module.
pub struct Walker {
    memory: Memory,
    generations: Vec<u32>,
    contents: Contents,
    access: Access,
    walk: Walk,
    /// Pages verified.
    pub verified: u64,
    /// Pages that were wrong.
    pub bad: u64,
    /// Times of first accesses, since the start or the last reset, and since the last command.
    pub stalls: [Times; 2],
    /// Times of the very first access to each page.
    pub first_touches: Times,
}

impl Walker {
    /// Maps the memory and fills every page of it.
    ///
    /// Errors: not enough memory.
    pub fn new(params: &Params) -> io::Result<Self> {
        let memory = Memory::new(params)?;
        let pages = memory.0.len();
        let (contents, mut first_touches) = (Contents::new(params.seed), Times::default());
        for (page, words) in (0..).zip(memory.0.iter_mut()) {
            let start = Instant::now();
            // SAFETY: an aligned word of a live page.
            unsafe { std::ptr::write_volatile(&raw mut words[0], 0) };
            first_touches.record(start.elapsed().as_nanos() as u64);
            contents.fill(page, 0, words);
        }
        Ok(Self {
            memory,
            generations: vec![0; pages],
            contents,
            access: params.access,
            walk: Walk::new(params.pattern, pages as u64, params.stride, params.seed),
            verified: 0,
            bad: 0,
            stalls: Default::default(),
            first_touches,
        })
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.memory.0.len()
    }

    /// Passes completed.
    pub fn pass(&self) -> u64 {
        self.walk.pass()
    }

    /// Visits the next page of the walk.
    ///
    /// Errors: the page is not what it should be. It is then made right.
    pub fn step(&mut self) -> Result<(), Box<Mismatch>> {
        let page = self.walk.next_page();
        let index = page as usize;
        let generation = self.generations[index];
        let words = &mut self.memory.0[index];
        let start = Instant::now();
        // SAFETY: an aligned, initialised word of a live page.
        unsafe { std::ptr::read_volatile(&raw const words[0]) };
        let ns = start.elapsed().as_nanos() as u64;
        self.stalls.iter_mut().for_each(|times| times.record(ns));
        let result = self.contents.verify(page, generation, words);
        self.verified += 1;
        if self.access == Access::Write {
            let next = generation.wrapping_add(1);
            self.generations[index] = next;
            self.contents.fill(page, next, words);
        } else if result.is_err() {
            self.contents.fill(page, generation, words);
        }
        self.bad += u64::from(result.is_err());
        result
    }

    /// Verifies every page in ascending order, changing nothing. Gives what is wrong.
    pub fn verify_all(&self) -> impl Iterator<Item = Box<Mismatch>> {
        (0..)
            .zip(self.memory.0.iter())
            .zip(&self.generations)
            .filter_map(|((page, words), generation)| self.contents.verify(page, *generation, words).err())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Pattern;

    fn walker(access: Access) -> Walker {
        Walker::new(&Params { mb: 1, access, pattern: Pattern::Random, ..Params::default() }).unwrap()
    }

    #[test]
    fn an_undisturbed_walk_finds_nothing_wrong_and_counts_every_page() {
        for access in [Access::Read, Access::Write] {
            let mut walker = walker(access);
            for _ in 0..3 * walker.pages() {
                assert_eq!(walker.step(), Ok(()));
            }
            assert_eq!((walker.verified, walker.bad), (768, 0));
            assert_eq!(walker.verify_all().count(), 0);
            assert_eq!(walker.stalls[0].percentiles().count, 768);
            let written = walker.generations.iter().all(|g| *g == 3 * u32::from(access == Access::Write));
            assert!(written);
        }
    }

    #[test]
    fn a_damaged_page_is_found_once_and_made_right() {
        let mut walker = walker(Access::Read);
        walker.memory.0[17][300] ^= 1 << 40;
        assert_eq!(walker.verify_all().map(|m| (m.page, m.offset)).collect::<Vec<_>>(), [(17, 2405)]);
        let bad = (0..256).filter(|_| walker.step().is_err()).count();
        assert_eq!((bad, walker.bad), (1, 1));
        assert_eq!(walker.verify_all().count(), 0);
    }
}
