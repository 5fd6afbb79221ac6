//! Forms for other programs: CSV, and the columns of perftest and of the OSU micro-benchmarks.

use std::fmt::Write;

use super::measurement::Reverse;
use super::table::by_size;
use super::times::Times;
use super::{Measurement, Report};

/// Bytes in what perftest calls MB.
const MIB: f64 = 1_048_576.0;
const RULE: &str =
    "---------------------------------------------------------------------------------------\n";

/// One line a measurement, with a header. No field needs quoting: names and numbers only.
pub(super) fn csv(report: &Report) -> String {
    let mut out = format!(
        "transport,bytes,depth,lanes,rate,reads,{CSV_TIMES},mb_per_s,peak_mb_per_s,reads_per_s,reverse_p50_us,\
         reverse_mb_per_s\n"
    );
    let settings = &report.settings;
    let rate = settings.rate.map_or_else(String::new, |rate| rate.to_string());
    for m in by_size(report) {
        let reverse = |of: fn(&Reverse) -> f64| {
            m.reverse.as_ref().map_or_else(String::new, |reverse| format!("{:.3}", of(reverse)))
        };
        let _ = writeln!(
            out,
            "{},{},{},{},{rate},{},{},{:.3},{:.3},{:.3},{},{}",
            m.transport,
            m.bytes,
            settings.depth,
            settings.lanes,
            m.times.latency.count,
            csv_times(&m.times),
            m.mb_per_s,
            m.peak_mb_per_s,
            m.reads_per_s,
            reverse(|r| r.latency.p50_us),
            reverse(|r| r.mb_per_s)
        );
    }
    out
}

/// The measurements of each transport, in the order of their first.
fn by_transport(report: &Report) -> Vec<(&str, Vec<&Measurement>)> {
    let mut groups: Vec<(&str, Vec<&Measurement>)> = Vec::new();
    for measurement in &report.measurements {
        match groups.iter_mut().find(|(transport, _)| *transport == measurement.transport) {
            Some((_, group)) => group.push(measurement),
            None => groups.push((&measurement.transport, vec![measurement])),
        }
    }
    groups
}

/// What ib_read_lat prints, or ib_read_bw if more than one read is in flight; a block a transport.
/// Its units too: MB/sec are 2^20 bytes a second.
pub(super) fn perftest(report: &Report) -> String {
    let mut out = String::new();
    for (transport, measurements) in by_transport(report) {
        let depth = report.settings.depth;
        if !report.is_streaming() {
            let rows = measurements.iter().map(|m| (m.bytes, &m.times));
            perftest_latencies(&mut out, transport, depth, rows);
            continue;
        }
        perftest_head(&mut out, "BW", transport, depth);
        out.push_str(" #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n");
        for m in measurements {
            let _ = writeln!(
                out,
                " {:<7}    {:<10}       {:<7.2}            {:<7.2}\t\t   {:<7.6}",
                m.bytes,
                m.times.latency.count,
                m.peak_mb_per_s * 1e6 / MIB,
                m.mb_per_s * 1e6 / MIB,
                m.reads_per_s / 1e6
            );
        }
        out.push_str(RULE);
    }
    out
}

fn perftest_head(out: &mut String, kind: &str, what: &str, depth: u32) {
    let _ = write!(out, "{RULE}                    RDMA_Read {kind} Test\n Transport       : {what}\n");
    let _ = write!(out, " Outstand reads  : {depth}\n{RULE}");
}

/// A block of what ib_read_lat prints: sizes, and their times.
pub(crate) fn perftest_latencies<'a>(
    out: &mut String,
    what: &str,
    depth: u32,
    rows: impl Iterator<Item = (u32, &'a Times)>,
) {
    perftest_head(out, "Latency", what, depth);
    out.push_str(
        " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    \
         t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec] \n",
    );
    for (bytes, times) in rows {
        let l = &times.latency;
        let _ = writeln!(
            out,
            " {bytes:<7} {}          {:<7.2}        {:<7.2}      {:<7.2}  \t       {:<7.2}     \t{:<7.2}\t\t{:<7.2} \t\t{:<7.2}",
            l.count, l.min_us, l.max_us, l.p50_us, times.mean_us, times.stdev_us, l.p99_us, l.p999_us
        );
    }
    out.push_str(RULE);
}

/// What osu_get_latency prints (the mean), or osu_get_bw if more than one read is in flight.
pub(super) fn osu(report: &Report) -> String {
    let mut out = String::new();
    for (transport, measurements) in by_transport(report) {
        let rows = |m: &&Measurement| match report.is_streaming() {
            true => (m.bytes, m.mb_per_s),
            false => (m.bytes, m.times.mean_us),
        };
        let (kind, column) = match report.is_streaming() {
            true => ("one-sided read Bandwidth", "Bandwidth (MB/s)"),
            false => ("one-sided read latency", "Latency (us)"),
        };
        osu_block(&mut out, &format!("{kind} over {transport}"), column, measurements.iter().map(rows));
    }
    out
}

/// A block of what the OSU micro-benchmarks print: sizes, and a value of each.
pub(crate) fn osu_block(out: &mut String, what: &str, column: &str, rows: impl Iterator<Item = (u32, f64)>) {
    let _ = writeln!(out, "# pcbench {} {what}", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(out, "{:<10}{column:>20}", "# Size");
    for (bytes, value) in rows {
        let _ = writeln!(out, "{bytes:<10}{value:>20.2}");
    }
}

/// The names of [`csv_times`], for a header.
pub(crate) const CSV_TIMES: &str = "min_us,p50_us,p90_us,p99_us,p999_us,p9999_us,max_us,mean_us,stdev_us,\
                                    median_low_us,median_high_us,median_confidence";

/// Times as fields of a CSV.
pub(crate) fn csv_times(times: &Times) -> String {
    let (l, ci) = (&times.latency, &times.median_ci);
    let percentiles = [l.min_us, l.p50_us, l.p90_us, l.p99_us, l.p999_us, l.p9999_us, l.max_us];
    let rest = [times.mean_us, times.stdev_us, ci.low_us, ci.high_us, ci.confidence];
    percentiles.iter().chain(&rest).map(|value| format!("{value:.3}")).collect::<Vec<_>>().join(",")
}
