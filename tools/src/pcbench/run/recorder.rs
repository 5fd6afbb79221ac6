//! Where times go: histograms by interval, and what a histogram would round.
//!
//! A histogram keeps three digits. Minimum, maximum, mean and deviation are kept beside it exactly,
//! in whole nanoseconds.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Significant digits of a histogram.
const DIGITS: u8 = 3;
/// Length of an interval at first.
const INTERVAL: Duration = Duration::from_millis(50);
/// Most intervals of one round; past this, neighbours are joined and intervals are twice as long.
const MAX_INTERVALS: usize = 64;

/// Percentiles of latencies, in microseconds. A percentile that has fewer than one sample above it
/// is the maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Latency {
    /// Number of samples.
    pub(crate) count: u64,
    pub(crate) min_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) p9999_us: f64,
    pub(crate) max_us: f64,
}

/// Count, extremes and sums of latencies in nanoseconds, exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moments {
    pub(crate) count: u64,
    pub(crate) min: u64,
    pub(crate) max: u64,
    sum: u128,
    squares: u128,
}

impl Default for Moments {
    fn default() -> Self {
        Self { count: 0, min: u64::MAX, max: 0, sum: 0, squares: 0 }
    }
}

impl Moments {
    fn record(&mut self, ns: u64) {
        self.count += 1;
        self.min = self.min.min(ns);
        self.max = self.max.max(ns);
        self.sum += u128::from(ns);
        self.squares += u128::from(ns) * u128::from(ns);
    }

    /// These and `other` together.
    pub(crate) fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.sum += other.sum;
        self.squares += other.squares;
    }

    /// The mean, in microseconds.
    pub(crate) fn mean_us(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum as f64 / self.count as f64 / 1e3 }
    }

    /// The sample standard deviation (n − 1), in microseconds. The sums are whole numbers, so
    /// nothing is lost where times are long and alike.
    pub(crate) fn stdev_us(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let n = u128::from(self.count);
        // n·Σx² − (Σx)², never negative; saturating for sums that no run reaches.
        let spread = self.squares.saturating_mul(n).saturating_sub(self.sum.saturating_mul(self.sum));
        (spread as f64 / (n * (n - 1)) as f64).sqrt() / 1e3
    }
}

/// The times of one interval.
#[derive(Clone, Debug)]
pub(crate) struct Interval {
    /// From the beginning of the run.
    pub(crate) start: Duration,
    pub(crate) length: Duration,
    pub(crate) histogram: Histogram<u64>,
    pub(crate) moments: Moments,
}

/// Records the times of one round.
pub(crate) struct Recorder {
    epoch: Instant,
    length: Duration,
    intervals: Vec<Interval>,
}

fn empty() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new(DIGITS)?)
}

impl Recorder {
    /// `epoch` is the beginning of the run.
    ///
    /// Errors: none in practice; the histogram's bounds are constant.
    pub(crate) fn new(epoch: Instant) -> anyhow::Result<Self> {
        Ok(Self { epoch, length: INTERVAL, intervals: Vec::with_capacity(MAX_INTERVALS) })
    }

    /// Records a read that took `ns` nanoseconds and ended at `now`.
    pub(crate) fn record(&mut self, now: Instant, ns: u64) -> anyhow::Result<()> {
        let at = now.saturating_duration_since(self.epoch);
        let ended = self.intervals.last().is_none_or(|last| at >= last.start + last.length);
        if ended {
            self.begin(at)?;
        }
        if let Some(last) = self.intervals.last_mut() {
            last.histogram.record(ns)?;
            last.moments.record(ns);
        }
        Ok(())
    }

    fn begin(&mut self, at: Duration) -> anyhow::Result<()> {
        if self.intervals.len() == MAX_INTERVALS {
            self.join();
        }
        let (histogram, moments) = (empty()?, Moments::default());
        self.intervals.push(Interval { start: at, length: self.length, histogram, moments });
        Ok(())
    }

    /// Joins each interval with the next.
    fn join(&mut self) {
        let mut joined: Vec<Interval> = Vec::with_capacity(MAX_INTERVALS);
        for (index, interval) in self.intervals.drain(..).enumerate() {
            match joined.last_mut() {
                Some(last) if index % 2 == 1 => {
                    // Both resize themselves, so nothing can fail to fit.
                    let _ = last.histogram.add(&interval.histogram);
                    last.moments.add(&interval.moments);
                    last.length = (interval.start + interval.length).saturating_sub(last.start);
                }
                _ => joined.push(interval),
            }
        }
        self.intervals = joined;
        self.length *= 2;
    }

    /// Ends the last interval at `now`.
    pub(crate) fn end(&mut self, now: Instant) {
        let at = now.saturating_duration_since(self.epoch);
        if let Some(last) = self.intervals.last_mut() {
            last.length = at.saturating_sub(last.start).min(last.length).max(Duration::from_micros(1));
        }
    }

    /// The intervals, at the end.
    pub(crate) fn into_intervals(self) -> Vec<Interval> {
        self.intervals
    }

    /// All times so far.
    pub(crate) fn latency(&self) -> Latency {
        latency_of(&self.intervals)
    }
}

/// What the times of several intervals together come to.
pub(crate) fn latency_of(intervals: &[Interval]) -> Latency {
    let (histogram, moments) = pooled(intervals);
    latency(&histogram, &moments)
}

/// The times of several intervals together.
pub(crate) fn pooled<'a>(intervals: impl IntoIterator<Item = &'a Interval>) -> (Histogram<u64>, Moments) {
    let mut moments = Moments::default();
    let mut all = Histogram::<u64>::new(DIGITS).expect("three digits are valid");
    for interval in intervals {
        let _ = all.add(&interval.histogram);
        moments.add(&interval.moments);
    }
    (all, moments)
}

/// Percentiles by nearest rank, never outside the true minimum and maximum.
pub(crate) fn latency(histogram: &Histogram<u64>, moments: &Moments) -> Latency {
    if moments.count == 0 {
        return Latency::default();
    }
    let us = |ns: u64| ns as f64 / 1e3;
    let at = |quantile| us(histogram.value_at_quantile(quantile).clamp(moments.min, moments.max));
    Latency {
        count: moments.count,
        min_us: us(moments.min),
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        p999_us: at(0.999),
        p9999_us: at(0.9999),
        max_us: us(moments.max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(times: &[u64]) -> Recorder {
        let mut recorder = Recorder::new(Instant::now()).unwrap();
        let now = Instant::now();
        times.iter().for_each(|ns| recorder.record(now, *ns).unwrap());
        recorder
    }

    #[test]
    fn extremes_and_deviation_are_exact() {
        let recorder = recorded(&[1_000_003, 1_000_005, 1_000_007, 123_456_789]);
        let (_, moments) = pooled(&recorder.intervals);
        let latency = recorder.latency();
        assert_eq!((latency.min_us, latency.max_us), (1000.003, 123_456.789));
        assert_eq!(moments.mean_us(), (1000.003 + 1000.005 + 1000.007 + 123_456.789) / 4.0);
        let alike = pooled(&recorded(&[10_000_000_001, 10_000_000_002, 10_000_000_003]).intervals).1;
        assert!((alike.stdev_us() - 0.001).abs() < 1e-12, "{}", alike.stdev_us());
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let times: Vec<u64> = (1..=1000).collect();
        let latency = recorded(&times).latency();
        assert_eq!((latency.p50_us, latency.p90_us, latency.p99_us), (0.5, 0.9, 0.99));
        assert_eq!((latency.p9999_us, latency.max_us), (1.0, 1.0));
        assert_eq!(Recorder::new(Instant::now()).unwrap().latency(), Latency::default());
    }

    #[test]
    fn a_long_run_keeps_a_bounded_number_of_intervals_and_every_sample() {
        let epoch = Instant::now();
        let mut recorder = Recorder::new(epoch).unwrap();
        for step in 0..10_000u64 {
            recorder.record(epoch + Duration::from_millis(step * 40), 1000 + step).unwrap();
        }
        assert!(recorder.intervals.len() <= MAX_INTERVALS);
        let latency = recorder.latency();
        assert_eq!((latency.count, latency.min_us, latency.max_us), (10_000, 1.0, 10.999));
        let ends: Vec<_> = recorder.intervals.iter().map(|i| (i.start, i.start + i.length)).collect();
        assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ends:?}");
    }
}
