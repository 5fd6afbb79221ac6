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
    /// Longest time between two turns of the loop since the start or the last `reset`.
    pub longest_pause_ms: f64,
    /// Pages verified a second since the last report.
    pub rate_pages_s: f64,
    /// The last block of the journal that the disk has acknowledged; only where there is a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_blocks: Option<u64>,
}
