//! The figures of a migration that mean the same as QEMU's, by the names and in the units of its
//! `query-migrate`: what reads QEMU's statistics reads these.
//!
//! What is not here has no equal. `docs/control.md` has the table.

use serde::{Deserialize, Serialize};

use super::report::Progress;
use crate::memory::PAGE_SIZE;
use crate::stats::{BUCKETS, PagerReport};

/// QEMU's `MigrationInfo`, as far as it applies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct QueryMigrate {
    /// Milliseconds since the first connection.
    pub total_time: u64,
    /// Milliseconds that the guest stood still.
    pub downtime: u64,
    /// Milliseconds from the first connection until the guest was stopped.
    pub setup_time: u64,
    /// Mean latency, in nanoseconds, of the faults that went to the wire.
    pub postcopy_latency: u64,
    /// How many of them took 2^N to 2^(N+1) microseconds.
    pub postcopy_latency_dist: [u64; BUCKETS],
    /// Milliseconds that each vCPU waited for pages, at the end; not there before, or if unknown.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub postcopy_vcpu_blocktime: Vec<u64>,
    /// Guest memory.
    pub ram: QueryRam,
}

/// QEMU's `MigrationRAMStats`, as far as it applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct QueryRam {
    /// Bytes of guest memory.
    pub total: u64,
    /// Bytes still to come.
    pub remaining: u64,
    /// Bytes that have crossed, the page map among them.
    pub transferred: u64,
    /// Pages that were zero, and did not cross.
    pub duplicate: u64,
    /// Pages that crossed.
    pub normal: u64,
    /// Their bytes.
    pub normal_bytes: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// Faults that went to the wire.
    pub postcopy_requests: u64,
    /// Bytes that crossed before the guest was stopped, in the round of pre-copy.
    pub precopy_bytes: u64,
    /// Bytes that crossed after the guest was resumed.
    pub postcopy_bytes: u64,
}

impl From<&Progress> for QueryMigrate {
    fn from(progress: &Progress) -> Self {
        Self {
            total_time: progress.total_us / 1000,
            downtime: progress.downtime_us / 1000,
            setup_time: progress.setup_us / 1000,
            ..Self::from(&progress.pager)
        }
    }
}

impl From<&PagerReport> for QueryMigrate {
    fn from(pager: &PagerReport) -> Self {
        let latency = &pager.latencies.total;
        Self {
            postcopy_latency: latency.mean_ns(),
            postcopy_latency_dist: latency.buckets,
            ram: QueryRam::from(pager),
            ..Self::default()
        }
    }
}

impl From<&PagerReport> for QueryRam {
    fn from(pager: &PagerReport) -> Self {
        // A peer may have said anything.
        let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE);
        let sum = |all: &[u64]| all.iter().fold(0, |sum: u64, one| sum.saturating_add(*one));
        let pages = &pager.pages;
        let after = [pages.fault_pages, pages.recent_pages, pages.prepage_pages, pages.drain_pages];
        let normal = sum(&after).saturating_add(pager.precopy_pages);
        let crossed = sum(&[pager.fault_bytes, pager.bulk_bytes, pager.map_bytes]);
        Self {
            total: bytes(pager.total_pages),
            remaining: bytes(pager.outstanding_pages),
            transferred: crossed.saturating_add(pager.precopy_bytes),
            duplicate: pages.zero_pages,
            normal,
            normal_bytes: bytes(normal),
            page_size: PAGE_SIZE,
            postcopy_requests: pages.network_faults,
            precopy_bytes: pager.precopy_bytes,
            postcopy_bytes: crossed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_qemus() {
        let pager = PagerReport { total_pages: 2, outstanding_pages: u64::MAX, ..Default::default() };
        let progress = Progress { pager, downtime_us: 1999, ..Default::default() };
        let text = serde_json::to_string(&QueryMigrate::from(&progress)).unwrap();
        for part in [
            r#""downtime":1,"#,
            r#""total-time":0,"#,
            r#""setup-time":0,"#,
            r#""postcopy-latency":0,"#,
            r#""postcopy-latency-dist":[0,"#,
            r#""total":8192,"#,
            r#""remaining":18446744073709551615,"#,
            r#""normal-bytes":0,"#,
            r#""page-size":4096,"#,
            r#""postcopy-requests":0,"#,
            r#""precopy-bytes":0,"#,
            r#""postcopy-bytes":0"#,
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
