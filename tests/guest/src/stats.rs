//! What the walk has seen: stalls, pauses, pages.

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest stall that is told apart from longer ones.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// A distribution of times in nanoseconds.
#[derive(Clone, Debug)]
pub struct Times(Histogram<u64>);

/// Its percentiles, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// How many there were.
    pub count: u64,
    /// Half were shorter.
    pub p50: f64,
    /// Nine tenths were shorter.
    pub p90: f64,
    /// 99 % were shorter.
    pub p99: f64,
    /// 99.9 % were shorter.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Default for Times {
    fn default() -> Self {
        Self(Histogram::new_with_max(LONGEST_NS, 3).unwrap_or_else(|_| unreachable!("constant bounds")))
    }
}

impl Times {
    /// Adds one; longer than an hour counts as an hour.
    pub fn record(&mut self, ns: u64) {
        self.0.saturating_record(ns);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.reset();
    }

    /// How much longer than `floor_ns` they were, in total, in nanoseconds; shorter ones do not count.
    pub fn above(&self, floor_ns: u64) -> u64 {
        let each = self.0.iter_recorded();
        each.map(|at| at.value_iterated_to().saturating_sub(floor_ns).saturating_mul(at.count_at_value()))
            .sum()
    }

    /// Half were shorter, in nanoseconds.
    pub fn median_ns(&self) -> u64 {
        self.0.value_at_quantile(0.5)
    }

    /// The distribution so far.
    pub fn percentiles(&self) -> Percentiles {
        let at = |quantile| round(self.0.value_at_quantile(quantile) as f64 / 1000.0);
        Percentiles {
            count: self.0.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: round(self.0.max() as f64 / 1000.0),
        }
    }
}

/// To three decimals.
pub fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A time between two turns of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pause {
    /// When it ended, in milliseconds since the start or the last `reset`.
    pub at_ms: f64,
    /// How long it was.
    pub ms: f64,
}

/// The times between two turns of the loop so far.
#[derive(Clone, Debug)]
pub struct Pauses {
    start_ns: u64,
    all: Times,
    /// Descending by length.
    longest: Vec<Pause>,
}

impl Pauses {
    /// How many are kept.
    const KEPT: usize = 5;

    /// None yet, and their times count from `now_ns`.
    pub fn new(now_ns: u64) -> Self {
        Self { start_ns: now_ns, all: Times::default(), longest: Vec::with_capacity(Self::KEPT + 1) }
    }

    /// A pause has ended.
    pub fn note(&mut self, length_ns: u64, now_ns: u64) {
        self.all.record(length_ns);
        let (ms, at_ms) = (length_ns as f64 / 1e6, now_ns.saturating_sub(self.start_ns) as f64 / 1e6);
        if self.longest.len() == Self::KEPT && self.longest.last().is_some_and(|least| least.ms >= ms) {
            return;
        }
        let place = self.longest.partition_point(|longer| longer.ms >= ms);
        self.longest.insert(place, Pause { at_ms: round(at_ms), ms: round(ms) });
        self.longest.truncate(Self::KEPT);
    }

    /// How much longer than half of them they were, in total, in nanoseconds: for so long nothing went on.
    pub fn stood_still_ns(&self) -> u64 {
        self.all.above(self.all.median_ns())
    }

    /// The longest first.
    pub fn longest(&self) -> &[Pause] {
        &self.longest
    }
}

/// One line about the walk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// CLOCK_BOOTTIME.
    pub uptime_s: f64,
    /// No clock went back.
    pub monotonic_ok: bool,
    /// 100 ms sleeps that a second thread has finished.
    pub ticks: u64,
    /// Passes completed.
    pub pass: u64,
    /// Pages verified since the start.
    pub pages: u64,
    /// Pages that were wrong since the start.
    pub bad: u64,
    /// Times of first accesses since the start or the last `reset`.
    pub stall_us: Percentiles,
    /// The same since the last command; only in answer to `report`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_command_us: Option<Percentiles>,
    /// Median time of the very first access to a page, in memory that is its own from the start.
    pub first_touch_us: f64,
    /// What accesses since the start or the last `reset` took longer than that, in total.
    pub lost_ms: f64,
    /// Longest time between two turns of the loop since the start or the last `reset`.
    pub longest_pause_ms: f64,
    /// What all turns since then took longer than half of them, in total: whatever it was that they waited for.
    pub stood_still_ms: f64,
    /// The longest ones, the longest first.
    pub pauses: Vec<Pause>,
    /// Pages verified a second since the last report.
    pub rate_pages_s: f64,
    /// The last block of the journal that the disk has acknowledged; only where there is a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_blocks: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_above_the_floor_is_lost() {
        let mut times = Times::default();
        [100, 1_000, 1_000, 50_000].into_iter().for_each(|ns| times.record(ns));
        let near = |a: u64, b: u64| a.abs_diff(b) * 100 < b;
        assert!(near(times.above(600), 2 * 400 + 49_400), "{}", times.above(600));
        assert_eq!((times.above(60_000), times.median_ns()), (0, 1_000));
    }

    #[test]
    fn the_longest_pauses_are_kept_with_their_times() {
        let mut pauses = Pauses::new(5_000_000);
        for (at, ms) in [3, 1, 9, 4, 9, 2, 7, 1].into_iter().enumerate() {
            pauses.note(ms * 1_000_000, 5_000_000 + at as u64 * 1_000_000);
        }
        let kept: Vec<_> = pauses.longest().iter().map(|pause| (pause.at_ms, pause.ms)).collect();
        assert_eq!(kept, [(2.0, 9.0), (4.0, 9.0), (6.0, 7.0), (3.0, 4.0), (0.0, 3.0)]);
        // Half are of 3 ms or less.
        assert_eq!((pauses.stood_still_ns() + 500_000) / 1_000_000, 6 + 1 + 6 + 4);
    }
}
