//! Generated guests: sequential stress, strides, streams, random and Zipf.

use postcopy_transport::sim::Random;

use super::quicksort::quicksort;
use super::trace::{Touch, Trace, Used};

/// Pages of a mebibyte.
const MIB: u64 = 256;
/// What the guest computes on a page that it walks over: 4 KiB at about 1 GB/s.
const WALK_NS: u64 = 4_000;
/// Memory of the guest's kernel and other programs, beside the working set.
const SYSTEM_PAGES: u64 = 4 * MIB;
/// The guest's kernel touches a page of its own once in so many pages of the program.
const SYSTEM_EVERY: u64 = 128;

/// Collects touches, and keeps of each page the first.
pub(super) struct Generated {
    seen: Vec<bool>,
    touches: Vec<Touch>,
    think_ns: u64,
}

impl Generated {
    /// A guest of so many pages that has touched nothing.
    pub(super) fn new(pages: u64) -> Self {
        Self { seen: vec![false; pages as usize], touches: Vec::new(), think_ns: 0 }
    }

    /// The guest computes.
    pub(super) fn think(&mut self, ns: u64) {
        self.think_ns += ns;
    }

    /// The guest touches a page.
    pub(super) fn touch(&mut self, page: u64) {
        if !std::mem::replace(&mut self.seen[page as usize], true) {
            self.touches.push(Touch { page, think_ns: std::mem::take(&mut self.think_ns) });
        }
    }

    /// The trace.
    pub(super) fn named(self, name: String, used: Vec<Used>) -> Trace {
        Trace { name, pages: self.seen.len() as u64, touches: self.touches, used }
    }
}

/// A working set that is walked in an order given by index, the kernel's touches in between.
fn walk(name: String, working_set: u64, seed: u64, order: impl Iterator<Item = u64>) -> Trace {
    let mut random = Random::new(seed);
    let mut guest = Generated::new(SYSTEM_PAGES + working_set);
    for (at, page) in order.enumerate() {
        guest.think(WALK_NS);
        guest.touch(SYSTEM_PAGES + page);
        if (at as u64).is_multiple_of(SYSTEM_EVERY) {
            guest.touch(random.below(SYSTEM_PAGES));
        }
    }
    guest.named(name, Vec::new())
}

/// The paper's sequential stress: a program that walks over its working set again and again, and
/// is somewhere in it when it is moved.
pub fn sequential(mib: u64, seed: u64) -> Trace {
    let pages = mib * MIB;
    let start = Random::new(seed ^ 1).below(pages);
    walk(format!("sequential {mib} MiB"), pages, seed, (0..pages).map(|at| (start + at) % pages))
}

/// As [`sequential`], from the top down.
pub fn descending(mib: u64, seed: u64) -> Trace {
    let pages = mib * MIB;
    let start = Random::new(seed ^ 1).below(pages);
    walk(format!("descending {mib} MiB"), pages, seed, (0..pages).map(|at| (start + pages - at) % pages))
}

/// A walk down the columns of a matrix whose rows are `stride` pages long.
pub fn strided(mib: u64, stride: u64, seed: u64) -> Trace {
    let pages = mib * MIB;
    let columns = (0..stride).flat_map(|column| (column..pages).step_by(stride as usize));
    walk(format!("stride {stride}"), pages, seed, columns)
}

/// Several walks at once, each over its part of the working set, a page of each by turns.
pub fn streams(mib: u64, count: u64, seed: u64) -> Trace {
    let part = mib * MIB / count;
    let turns = (0..part).flat_map(|at| (0..count).map(move |stream| stream * part + at));
    walk(format!("{count} streams"), part * count, seed, turns)
}

/// Every page of the working set in random order.
pub fn random(mib: u64, seed: u64) -> Trace {
    let order = shuffled(mib * MIB, &mut Random::new(seed ^ 2));
    walk(format!("random {mib} MiB"), mib * MIB, seed, order.into_iter())
}

/// Pages by Zipf's law (exponent 1), scattered over the working set; four draws a page.
pub fn zipf(mib: u64, seed: u64) -> Trace {
    let pages = mib * MIB;
    let mut chance = Random::new(seed ^ 3);
    let place = shuffled(pages, &mut chance);
    // The continuous law of the same exponent: the rank is exponential in its quantile.
    let draw = move |_| place[(pages as f64).powf(chance.unit()) as usize - 1];
    walk(format!("Zipf {mib} MiB"), pages, seed, (0..4 * pages).map(draw))
}

/// A real program, and real guests in which a compiler and a server work: `bench/README.md` has how they were
/// recorded.
const RECORDED: [&[u8]; 3] = [
    include_bytes!("../../traces/sort.trace"),
    include_bytes!("../../traces/compile.trace"),
    include_bytes!("../../traces/redis.trace"),
];

/// The traces on which policies are compared: generated ones with `mib` MiB of working set, and recorded ones.
pub fn suite_traces(mib: u64, seed: u64) -> Vec<Trace> {
    let mut all = vec![sequential(mib, seed), descending(mib, seed)];
    all.extend([2, 7, 64].map(|stride| strided(mib, stride, seed)));
    all.extend([3, 12].map(|count| streams(mib, count, seed)));
    all.extend([random(mib, seed), zipf(mib, seed)]);
    all.extend([8, 16, 32, 64, 128].map(|processes| quicksort(processes, mib, mib, 0.2, seed)));
    all.extend(RECORDED.map(|bytes| Trace::from_bytes(bytes).expect("the traces in the tree are whole")));
    all
}

/// The numbers below `count` in random order.
pub(super) fn shuffled(count: u64, random: &mut Random) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, random.below(at as u64 + 1) as usize);
    }
    order
}
