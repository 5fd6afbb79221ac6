//! A histogram that is small enough to be told while it grows: buckets of powers of two, as QEMU's
//! `postcopy-latency-dist` has them.

use serde::{Deserialize, Serialize};

/// Buckets of a [`Distribution`].
pub const BUCKETS: usize = 24;

/// Counts of times by their power of two in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// All of them together, in nanoseconds.
    pub sum_ns: u64,
    /// How many took from 2^N µs up to but not 2^(N+1) µs, in the N-th. The first has what was shorter
    /// too, the last what was longer.
    pub buckets: [u64; BUCKETS],
}

impl Distribution {
    /// Adds one.
    pub fn record(&mut self, ns: u64) {
        let power = (ns / 1000).checked_ilog2().unwrap_or(0) as usize;
        self.buckets[power.min(BUCKETS - 1)] += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }

    /// Adds all of another.
    pub(crate) fn add(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(other.buckets).for_each(|(bucket, more)| *bucket += more);
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        // A peer may have said anything.
        self.buckets.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Their mean in nanoseconds; 0 if there are none.
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns / self.count().max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_qemus() {
        let mut distribution = Distribution::default();
        // "The 8th element stores how many remote faults got resolved within [256us, 512us)."
        for ns in [256_000, 511_999] {
            distribution.record(ns);
        }
        assert_eq!(distribution.buckets[8], 2);
        for ns in [0, 999, 1_000, 1_999] {
            distribution.record(ns);
        }
        assert_eq!(distribution.buckets[0], 4);
        distribution.record(2_000);
        assert_eq!(distribution.buckets[1], 1);
        distribution.record(u64::MAX);
        assert_eq!((distribution.buckets[23], distribution.sum_ns), (1, u64::MAX));
        assert_eq!(distribution.count(), 8);
    }
}
