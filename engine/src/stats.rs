//! What a migration cost, measured in stages.

mod distribution;

pub use distribution::{BUCKETS, Distribution};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::pager::Collapsed;
use crate::planner::PageCounts;

/// Longest time that a stage histogram tells apart: one minute, in nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;
/// Significant digits of a stage histogram.
const DIGITS: u8 = 3;

/// The stages of a fault, each a histogram in nanoseconds.
#[derive(Clone, Debug)]
pub struct Stages {
    /// From the fault's event read to its read posted.
    pub post: Histogram<u64>,
    /// From the read posted to its completion polled.
    pub read: Histogram<u64>,
    /// From the completion to the page published and the thread woken.
    pub install: Histogram<u64>,
    /// All of it: from the event read to the page published. What the guest saw is this and the
    /// way from its touch to the event, and from the wake to its next instruction.
    pub total: Histogram<u64>,
}

impl Default for Stages {
    fn default() -> Self {
        let empty = || Histogram::new_with_max(LONGEST_NS, DIGITS).expect("constant bounds are valid");
        Self { post: empty(), read: empty(), install: empty(), total: empty() }
    }
}

impl Stages {
    /// Adds what another shard saw.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self { post, read, install, total } = self;
        let pairs =
            [(post, &other.post), (read, &other.read), (install, &other.install), (total, &other.total)];
        for (all, more) in pairs {
            all.add(more).expect("histograms of stages have one shape");
        }
    }
}

/// Percentiles of one stage, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Number of samples.
    pub count: u64,
    /// The smallest.
    pub min_us: f64,
    /// The median.
    pub p50_us: f64,
    /// 90 % were no longer.
    pub p90_us: f64,
    /// 99 % were no longer.
    pub p99_us: f64,
    /// 99.9 % were no longer.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl From<&Histogram<u64>> for Percentiles {
    fn from(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            count: histogram.len(),
            min_us: histogram.min() as f64 / 1e3,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: histogram.max() as f64 / 1e3,
        }
    }
}

/// The stages of a fault as percentiles, for reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// See [`Stages::post`].
    pub post: Percentiles,
    /// See [`Stages::read`].
    pub read: Percentiles,
    /// See [`Stages::install`].
    pub install: Percentiles,
    /// See [`Stages::total`].
    pub total: Percentiles,
}

impl From<&Stages> for StageReport {
    fn from(stages: &Stages) -> Self {
        Self {
            post: (&stages.post).into(),
            read: (&stages.read).into(),
            install: (&stages.install).into(),
            total: (&stages.total).into(),
        }
    }
}

/// The stages of a fault as distributions, which are told while they grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// See [`Stages::post`].
    pub post: Distribution,
    /// See [`Stages::read`].
    pub read: Distribution,
    /// See [`Stages::install`].
    pub install: Distribution,
    /// See [`Stages::total`].
    pub total: Distribution,
}

impl Latencies {
    fn add(&mut self, other: &Self) {
        self.post.add(&other.post);
        self.read.add(&other.read);
        self.install.add(&other.install);
        self.total.add(&other.total);
    }
}

/// What the destination's pager did, at one moment or at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PagerReport {
    /// Threads that bring pages.
    #[serde(default)]
    pub shards: u32,
    /// Pages of the guest.
    pub total_pages: u64,
    /// Pages still to come.
    pub outstanding_pages: u64,
    /// How pages came.
    pub pages: PageCounts,
    /// Bytes of page content read over the urgent lane.
    pub fault_bytes: u64,
    /// Bytes of page content read over the bulk lane.
    pub bulk_bytes: u64,
    /// Bytes of the source's page map read.
    pub map_bytes: u64,
    /// Pages that were read before the guest was stopped, in the round of pre-copy.
    #[serde(default)]
    pub precopy_pages: u64,
    /// Bytes of that round, of pages and of the page map.
    #[serde(default)]
    pub precopy_bytes: u64,
    /// Of the faults that went to the wire, those that the faulting thread served itself.
    #[serde(default)]
    pub self_served_faults: u64,
    /// Bytes a second that may cross where nobody waits for them; 0: as many as the link carries.
    #[serde(default)]
    pub max_bandwidth: u64,
    /// The stages of faults that went to the wire. Percentiles are there at the end.
    pub stages: StageReport,
    /// The same, at any time.
    #[serde(default)]
    pub latencies: Latencies,
    /// What was put together to huge pages, after everything was here.
    #[serde(default)]
    pub huge_pages: Collapsed,
}

impl PagerReport {
    /// Adds what another shard did. Stages are left out: percentiles have no sum. What all may have a second is one figure.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self {
            shards,
            total_pages,
            outstanding_pages,
            pages,
            fault_bytes,
            bulk_bytes,
            map_bytes,
            precopy_pages,
            precopy_bytes,
            self_served_faults,
            max_bandwidth: _,
            stages: _,
            latencies,
            huge_pages,
        } = other;
        self.shards += shards;
        self.total_pages += total_pages;
        self.outstanding_pages += outstanding_pages;
        self.pages.add(pages);
        self.fault_bytes += fault_bytes;
        self.bulk_bytes += bulk_bytes;
        self.map_bytes += map_bytes;
        self.precopy_pages += precopy_pages;
        self.precopy_bytes += precopy_bytes;
        self.self_served_faults += self_served_faults;
        self.latencies.add(latencies);
        self.huge_pages.bytes += huge_pages.bytes;
        self.huge_pages.refused_bytes += huge_pages.refused_bytes;
    }
}
