//! A migration's report for people.

use std::fmt::Write;
use std::time::Duration;

use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::session::{MigrationReport, Mode, Phase, Progress};
use postcopy_engine::stats::{PagerReport, Percentiles, StageReport};
use postcopy_tools::size;

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn milliseconds(micros: u64) -> f64 {
    micros as f64 / 1e3
}

/// One line about a migration under way.
pub(crate) fn progress_line(progress: &Progress) -> String {
    match progress.phase {
        Phase::Setup => "setting up; the guest runs at the source".into(),
        Phase::PreCopy => {
            format!("the guest runs at the source, its memory is read once; {}", share_line(&progress.pager))
        }
        Phase::Frozen => "the guest is being stopped, its state is on the way".into(),
        Phase::InDoubt => "handing over".into(),
        Phase::Draining if progress.pager.total_pages == 0 => "the guest runs at the destination".into(),
        Phase::Draining => format!("the guest runs at the destination; {}", pager_line(&progress.pager)),
        Phase::Recovering => {
            format!("the destination is lost and being reached again; {}", pager_line(&progress.pager))
        }
        Phase::Resident if progress.pager.outstanding_pages > 0 => {
            "the guest has ended at the destination, and needs no more".into()
        }
        Phase::Resident => "every page is there".into(),
    }
}

/// How fast pages come, of which so many have come in so much time and others are to come; nothing before that can be said.
pub(crate) fn pace(come: u64, to_come: u64, time: Duration) -> String {
    if come == 0 || time < Duration::from_secs(1) {
        return String::new();
    }
    let a_second = come as f64 / time.as_secs_f64();
    let left = to_come as f64 / a_second;
    format!(", {:.0} MiB/s, {left:.0} s left", a_second * PAGE_SIZE as f64 / f64::from(1 << 20))
}

/// One line about what has arrived.
pub(crate) fn pager_line(pager: &PagerReport) -> String {
    format!("{}, {} network faults", share_line(pager), pager.pages.network_faults)
}

fn share_line(pager: &PagerReport) -> String {
    let arrived = pager.total_pages - pager.outstanding_pages.min(pager.total_pages);
    let share = 100.0 * arrived as f64 / pager.total_pages.max(1) as f64;
    format!("{share:5.1} % of {:.0} MiB{}", mebibytes(pager.total_pages * PAGE_SIZE), limit(pager))
}

/// How pages crossed.
pub(crate) fn wire(report: &MigrationReport) -> String {
    let encrypted = if report.pages_encrypted { ", encrypted" } else { "" };
    format!("{}{encrypted}{}", report.transport, limit(&report.pager))
}

fn limit(pager: &PagerReport) -> String {
    match pager.max_bandwidth {
        0 => String::new(),
        limit => format!(", at most {} a second", size::short(limit)),
    }
}

/// The report as a table.
pub(crate) fn table(report: &MigrationReport) -> String {
    let mut out = String::new();
    let pager = &report.pager;
    let pages = &pager.pages;
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<22} {value}");
    };
    row("transport", wire(report));
    row("memory", format!("{:.0} MiB", mebibytes(report.memory_bytes)));
    row("device state", format!("{} bytes", report.state_bytes));
    row(
        "downtime",
        format!(
            "{:.2} ms (freeze {:.2}, load {:.2})",
            milliseconds(report.downtime_us),
            milliseconds(report.freeze_us),
            milliseconds(report.load_us)
        ),
    );
    row("time to resident", format!("{:.1} ms", milliseconds(report.resident_us)));
    row(
        "total",
        format!("{:.1} ms (setup {:.1})", milliseconds(report.total_us), milliseconds(report.setup_us)),
    );
    row("source's CPU, drain", format!("{:.1} ms", milliseconds(report.source_cpu_us)));
    let line = |count: u64, bytes: u64| format!("{count} pages, {:.1} MiB", mebibytes(bytes));
    if !report.vcpu_blocktime_us.is_empty() {
        let each = report.vcpu_blocktime_us.iter().map(|us| format!("{:.1}", milliseconds(*us)));
        row("vCPUs waited", format!("{} ms", each.collect::<Vec<_>>().join(", ")));
    }
    for (what, count, bytes) in arrived(report) {
        row(what, line(count, bytes));
    }
    if report.mode == Mode::Hybrid {
        row(
            "pre-copy",
            format!(
                "{:.1} ms, {}",
                milliseconds(report.precopy_us),
                line(pager.precopy_pages, pager.precopy_bytes)
            ),
        );
        row("of it kept", line(pages.kept_pages, pages.kept_pages * PAGE_SIZE));
    }
    row(
        "faults",
        format!(
            "{} network, {} minor, {} on zero pages",
            pages.network_faults, pages.minor_faults, pages.zero_faults
        ),
    );
    if let Some(touched) = report.touched_pages {
        let share = 100.0 * pages.network_faults as f64 / touched.max(1) as f64;
        row("touched until then", format!("{touched} pages, {share:.1} % of them by network faults"));
    }
    stages(&mut out, &pager.stages);
    out
}

/// Why pages came: pages and bytes.
fn arrived(report: &MigrationReport) -> Vec<(&'static str, u64, u64)> {
    let (pager, pages) = (&report.pager, &report.pager.pages);
    let mut rows = vec![
        ("by fault", pages.fault_pages, pager.fault_bytes),
        ("by recency", pages.recent_pages, pages.recent_pages * PAGE_SIZE),
        ("by prepaging", pages.prepage_pages, pages.prepage_pages * PAGE_SIZE),
        ("by drain", pages.drain_pages, pager.bulk_bytes),
        ("zero, never sent", pages.zero_pages, 0),
    ];
    if report.ordered_pages > 0 {
        rows.push(("told in order", report.ordered_pages, report.ordered_pages * PAGE_SIZE));
    }
    rows
}

fn stages(out: &mut String, stages: &StageReport) {
    out.push_str("\nstage (µs)        count       p50       p90       p99     p99.9       max\n");
    for (name, stage) in
        [("post", stages.post), ("read", stages.read), ("install", stages.install), ("total", stages.total)]
    {
        let Percentiles { count, p50_us, p90_us, p99_us, p999_us, max_us, .. } = stage;
        let _ = writeln!(
            out,
            "{name:<14} {count:>8} {p50_us:>9.1} {p90_us:>9.1} {p99_us:>9.1} {p999_us:>9.1} {max_us:>9.1}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_fast_pages_come_is_said_once_it_is_known() {
        assert_eq!(pace(512, 1024, Duration::from_secs(2)), ", 1 MiB/s, 4 s left");
        assert_eq!(pace(512, 0, Duration::from_secs(2)), ", 1 MiB/s, 0 s left");
        assert_eq!(pace(0, 1024, Duration::from_secs(9)), "");
        assert_eq!(pace(512, 1024, Duration::from_millis(900)), "");
    }
}
