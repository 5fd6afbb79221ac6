//! The paper's quicksort in P processes: real sorts, whose page accesses are recorded.
//!
//! P processes sort an array each, by turns of a scheduler; the guest is moved in the middle of it.
//! The paper does not say which quicksort; this is that of Kernighan and Ritchie ("The C Programming
//! Language", 4.10), over records of 64 bytes.

use postcopy_transport::sim::Random;

use super::trace::{Trace, Used};
use super::traces::{Generated, shuffled};

/// Records of a page.
const RECORDS: usize = 64;
/// What a comparison, and perhaps an exchange, costs: a pass over a page takes 3 µs.
const STEP_NS: u64 = 48;
/// A process runs for so long, on average, before the next one does.
const SLICE_NS: u64 = 1_000_000;

/// Pages that lie together in the guest's memory. A kernel that has run for a while hands out
/// memory in pieces; arrays that are contiguous to their processes are not to the machine.
const PIECE: u64 = 16;

/// One process: its array, and the ranges (first, end) that it has still to sort.
struct Process {
    first_page: u64,
    keys: Vec<u32>,
    ranges: Vec<(usize, usize)>,
    partition: Option<Partition>,
}

/// A partition under way: `at` looks at each record in turn, and those below the pivot, which is at
/// `first`, are gathered up to `last`.
struct Partition {
    first: usize,
    end: usize,
    last: usize,
    at: usize,
}

impl Process {
    fn new(first_page: u64, pages: usize, random: &mut Random) -> Self {
        let keys: Vec<u32> = (0..pages * RECORDS).map(|_| random.next_u64() as u32).collect();
        let ranges = vec![(0, keys.len())];
        Self { first_page, keys, ranges, partition: None }
    }

    fn page_of(&self, record: usize) -> u64 {
        self.first_page + (record / RECORDS) as u64
    }

    /// One comparison, or what is done around one. Reports the page; `None` when all is sorted.
    fn step(&mut self) -> Option<u64> {
        let Some(Partition { first, end, last, at }) = &mut self.partition else {
            let (first, end) = self.ranges.pop()?;
            let middle = first + (end - first) / 2;
            self.keys.swap(first, middle);
            self.partition = Some(Partition { first, end, last: first, at: first + 1 });
            return Some(self.page_of(middle));
        };
        if *at < *end {
            let looked_at = *at;
            if self.keys[looked_at] < self.keys[*first] {
                *last += 1;
                self.keys.swap(*last, looked_at);
            }
            *at += 1;
            return Some(self.page_of(looked_at));
        }
        let (first, last, end) = (*first, *last, *end);
        self.keys.swap(first, last);
        self.partition = None;
        // The upper part waits while the lower is sorted.
        self.ranges
            .extend([(last + 1, end), (first, last)].into_iter().filter(|(from, end)| from + 1 < *end));
        Some(self.page_of(last))
    }
}

/// A guest in which `processes` processes sort `mib` MiB in all, beside `idle_mib` MiB that nobody
/// touches, moved after `moved_at` of their comparisons (a part of 1).
pub fn quicksort(processes: u64, mib: u64, idle_mib: u64, moved_at: f64, seed: u64) -> Trace {
    let mut random = Random::new(seed);
    let each = mib * 256 / processes;
    let idle = idle_mib * 256;
    let new = |index| Process::new(index * each, each as usize, &mut random);
    let mut running: Vec<Process> = (0..processes).map(new).collect();
    let records = (each * processes) as f64 * RECORDS as f64;
    // A sort of n records makes about 1.39 n log2 n comparisons.
    let moved_at = (moved_at * 1.39 * records * (each as f64 * RECORDS as f64).log2()) as u64;
    let (mut guest, mut used) =
        (Generated::new(idle + each * processes), vec![0u64; (idle + mib * 256) as usize]);
    let pieces = shuffled(each * processes / PIECE, &mut random);
    let place = |page: u64| idle + pieces[(page / PIECE) as usize] * PIECE + page % PIECE;
    let mut steps = 0u64;
    while !running.is_empty() {
        running.retain_mut(|process| {
            let slice = random.below(2 * SLICE_NS / STEP_NS);
            let mut before = None;
            for _ in 0..slice {
                let Some(page) = process.step().map(place) else { return false };
                steps += 1;
                if steps <= moved_at {
                    used[page as usize] = steps;
                    continue;
                }
                guest.think(STEP_NS);
                if before != Some(page) {
                    guest.touch(page);
                    before = Some(page);
                }
            }
            true
        });
    }
    let pages = (0..).zip(&used).filter(|(_, step)| **step > 0);
    let mut used: Vec<Used> =
        pages.map(|(page, step)| Used { page, ago_ns: (moved_at - step) * STEP_NS }).collect();
    used.sort_by_key(|used| std::cmp::Reverse(used.ago_ns));
    guest.named(format!("quicksort P={processes}"), used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sorts() {
        let mut process = Process::new(0, 4, &mut Random::new(1));
        let mut expected = process.keys.clone();
        expected.sort_unstable();
        while let Some(page) = process.step() {
            assert!(page < 4);
        }
        assert_eq!(process.keys, expected);
    }

    #[test]
    fn a_move_in_the_middle_leaves_a_past_and_a_future() {
        let trace = quicksort(2, 1, 1, 0.2, 1);
        assert_eq!(trace.pages, 512);
        assert!(!trace.used.is_empty() && !trace.touches.is_empty());
        assert!(trace.touches.iter().all(|touch| touch.page >= 256), "nobody touches idle memory");
        assert_eq!(trace, quicksort(2, 1, 1, 0.2, 1));
    }
}
