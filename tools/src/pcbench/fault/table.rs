//! The report of `pcbench fault` for people.

use std::fmt::Write as _;

use postcopy_engine::stats::Percentiles;
use postcopy_tools::size;

use super::report::{Case, FaultReport};
use crate::report::table::wrap;

/// The report as text: machine, what threads waited and how pages came, where the time of a fault went, verdict.
pub(super) fn table(report: &FaultReport) -> String {
    let mut out = format!("{}\n", report.at.environment.line());
    if let Some(server) = &report.at.server {
        let _ = writeln!(out, "memory at {}: {}", server.address, server.machine.line());
    }
    let raw = &report.raw_read.latency;
    let _ = writeln!(
        out,
        "{}\nraw 4 KiB read: p50 {:.1} µs, p99 {:.1} µs; raw bulk: {:.0} MB/s\n",
        how(report),
        raw.p50_us,
        raw.p99_us,
        report.raw_bulk_mb_s,
    );
    stalls(&mut out, report);
    stages(&mut out, report);
    out.push('\n');
    report.verdict.iter().for_each(|sentence| wrap(&mut out, sentence));
    out
}

/// What was measured, in a few words.
pub(super) fn title(report: &FaultReport) -> String {
    match &report.at.server {
        Some(server) => format!("Faults on memory at {}", server.address),
        None => "Faults on memory over the loopback".to_owned(),
    }
}

/// How it was measured, in words.
pub(super) fn how(report: &FaultReport) -> String {
    let limit = match report.max_bandwidth {
        Some(limit) => format!(", at most {} a second unasked,", size::short(limit.bytes())),
        None => String::new(),
    };
    format!(
        "{}{}{} of {} MiB, {:?} {:?}, {} thread(s), {} shard(s), landing {}, medians of {} rounds",
        report.transport,
        if report.tls { ", under TLS," } else { "" },
        limit,
        report.memory_bytes >> 20,
        report.pattern,
        report.access,
        report.threads,
        report.shards,
        report.landing,
        report.rounds,
    )
}

fn head(case: &Case) -> String {
    let [by, drain] = case.words();
    format!("{by:<9} {drain:<22}")
}

fn stalls(out: &mut String, report: &FaultReport) {
    let _ = writeln!(
        out,
        "{:<9} {:<22} {:>8} {:>8} {:>6} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "faults by",
        "drain",
        "stalls",
        "p50 µs",
        "× raw",
        "p90",
        "p99",
        "p99.9",
        "max",
        "resident",
        "MB/s",
        "touched",
        "fetched",
        "prepaged",
        "hits",
        "waste",
    );
    for case in &report.cases {
        let (stall, pages) = (&case.times.latency, &case.pager.pages);
        let _ = writeln!(
            out,
            "{} {:>8} {:>8.1} {:>6.2} {:>8.1} {:>8.1} {:>8.1} {:>9.1} {:>6.0} ms {:>8.0} {:>8} {:>8} {:>8} {:>8} {:>8}",
            head(&case.case),
            case.stalled,
            stall.p50_us,
            case.times_raw,
            stall.p90_us,
            stall.p99_us,
            stall.p999_us,
            stall.max_us,
            case.resident_ms,
            case.drain_mb_s,
            case.touched_pages,
            pages.fault_pages,
            pages.prepage_pages,
            case.hit_pages,
            case.wasted_pages,
        );
    }
}

/// The stages of the faults that went to the wire, as the thread that served them saw them.
fn stages(out: &mut String, report: &FaultReport) {
    let columns = ["post", "read", "install", "total"].map(|name| format!("{name:>16}")).concat();
    let _ = writeln!(out, "\n{:<32}{columns}   (µs: p50, p99)", "stages of a fault");
    for case in &report.cases {
        let stages = &case.pager.stages;
        let cell =
            |stage: &Percentiles| format!("{:>16}", format!("{:.1} {:>7.1}", stage.p50_us, stage.p99_us));
        let cells = [&stages.post, &stages.read, &stages.install, &stages.total].map(cell).concat();
        let _ = writeln!(out, "{}{cells}", head(&case.case));
    }
}
