//! The table, for people.

use std::fmt::Write;

use super::{Measurement, Report, Settings};
use postcopy_tools::size;

/// The whole report as text: machine, figures, verdict.
pub(super) fn table(report: &Report) -> String {
    let mut out = heading(report);
    let bandwidth = report.is_streaming();
    out.push_str(
        "\ntransport  size    reads      min      p50      p90      p99    p99.9   p99.99      max  95% CI of p50",
    );
    out.push_str(if bandwidth { "        MB/s     reads/s\n" } else { "        MB/s\n" });
    let compares = report.measurements.iter().any(|m| m.transport != report.measurements[0].transport);
    let mut last = None;
    for measurement in by_size(report) {
        if compares && last.is_some_and(|bytes| bytes != measurement.bytes) {
            out.push('\n');
        }
        last = Some(measurement.bytes);
        row(&mut out, measurement, bandwidth);
    }
    out.push('\n');
    report.verdict.iter().for_each(|sentence| wrap(&mut out, sentence));
    out
}

/// The measurements of one size beside each other.
pub(super) fn by_size(report: &Report) -> Vec<&Measurement> {
    let mut sorted: Vec<&Measurement> = report.measurements.iter().collect();
    sorted.sort_by_key(|measurement| measurement.bytes);
    sorted
}

/// The machines and how it was measured, a line each.
fn heading(report: &Report) -> String {
    let mut out = format!("{}\n", report.at.environment.line());
    if let Some(server) = &report.at.server {
        let _ = writeln!(out, "reads from {}: {}", server.address, server.machine.line());
    }
    let _ = writeln!(out, "{}; latency in µs", how(&report.settings));
    out
}

/// How it was measured, in words.
pub(super) fn how(settings: &Settings) -> String {
    let Settings { depth, lanes, rounds, .. } = settings;
    let mut out = match settings.rate {
        Some(rate) => format!("open loop at {rate} reads/s, up to {depth} in flight on"),
        None => format!("closed loop, {depth} in flight on"),
    };
    let plural = |count: u32, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
    let _ = write!(out, " {}, {}", plural(*lanes, "lane"), plural(*rounds, "round"));
    let _ = write!(out, ", completions by {}", format!("{:?}", settings.completion).to_lowercase());
    if let Some(span) = settings.span {
        let _ = write!(out, ", from the first {}", size::short(span));
    }
    if let Some(cpus) = &settings.cpus {
        let _ = write!(out, ", on processors {cpus:?}");
    }
    if settings.tls {
        out.push_str(", under TLS");
    }
    if settings.bidirectional {
        out.push_str(", both sides reading");
    }
    if settings.verify {
        out.push_str(", every byte verified");
    }
    out
}

fn row(out: &mut String, m: &Measurement, bandwidth: bool) {
    let l = &m.times.latency;
    let _ = write!(out, "{:<9} {:>5} {:>8}", m.transport, size::short(m.bytes.into()), l.count);
    for us in [l.min_us, l.p50_us, l.p90_us, l.p99_us, l.p999_us, l.p9999_us, l.max_us] {
        let _ = write!(out, " {:>8}", time(us));
    }
    let interval = format!("{}–{}", time(m.times.median_ci.low_us), time(m.times.median_ci.high_us));
    let _ = write!(out, "  {interval:<16} {:>8.1}", m.mb_per_s);
    if bandwidth {
        let _ = write!(out, "  {:>10.0}", m.reads_per_s);
    }
    out.push('\n');
    if let Some(reverse) = &m.reverse {
        let l = &reverse.latency;
        let _ = write!(out, "{:<9} {:>5} {:>8}", " ← server", "", l.count);
        for us in [l.min_us, l.p50_us, l.p90_us, l.p99_us, l.p999_us, l.p9999_us, l.max_us] {
            let _ = write!(out, " {:>8}", time(us));
        }
        let _ = writeln!(out, "  {:<16} {:>8.1}", "", reverse.mb_per_s);
    }
}

/// A time in microseconds with as many digits as tell something.
pub(crate) fn time(us: f64) -> String {
    match us {
        us if us >= 10_000.0 => format!("{us:.0}"),
        us if us >= 100.0 => format!("{us:.1}"),
        us => format!("{us:.2}"),
    }
}

/// A sentence on lines that fit a terminal, after a dash.
pub(crate) fn wrap(out: &mut String, sentence: &str) {
    const WIDTH: usize = 100;
    out.push('-');
    let mut column = 1;
    for word in sentence.split_whitespace() {
        let len = word.chars().count();
        if column + 1 + len > WIDTH {
            out.push_str("\n ");
            column = 1;
        }
        out.push(' ');
        out.push_str(word);
        column += 1 + len;
    }
    if !sentence.is_empty() {
        out.push('\n');
    }
}
