//! Forms for other programs: CSV, and the columns of perftest and of the OSU micro-benchmarks.

use std::fmt::Write;

use super::table::by_size;
use super::{Measurement, Report};

/// Bytes in what perftest calls MB.
const MIB: f64 = 1_048_576.0;
const RULE: &str =
    "---------------------------------------------------------------------------------------\n";

/// One line a measurement, with a header. No field needs quoting: names and numbers only.
pub(super) fn csv(report: &Report) -> String {
    let mut out = String::from(
        "transport,bytes,depth,lanes,rate,reads,min_us,p50_us,p90_us,p99_us,p999_us,p9999_us,max_us,\
         mean_us,stdev_us,median_low_us,median_high_us,median_confidence,mb_per_s,peak_mb_per_s,reads_per_s,\
         reverse_p50_us,reverse_mb_per_s\n",
    );
    let settings = &report.settings;
    let rate = settings.rate.map_or_else(String::new, |rate| rate.to_string());
    for m in by_size(report) {
        let (l, ci) = (&m.latency, &m.median_ci);
        let reverse = m.reverse.as_ref();
        let reverse = |of: fn(&super::measurement::Reverse) -> f64| {
            reverse.map_or_else(String::new, |reverse| format!("{:.3}", of(reverse)))
        };
        let _ = write!(
            out,
            "{},{},{},{},{rate},{}",
            m.transport, m.bytes, settings.depth, settings.lanes, l.count
        );
        for value in
            [l.min_us, l.p50_us, l.p90_us, l.p99_us, l.p999_us, l.p9999_us, l.max_us, m.mean_us, m.stdev_us]
        {
            let _ = write!(out, ",{value:.3}");
        }
        for value in [ci.low_us, ci.high_us, ci.confidence, m.mb_per_s, m.peak_mb_per_s, m.reads_per_s] {
            let _ = write!(out, ",{value:.3}");
        }
        let _ = writeln!(out, ",{},{}", reverse(|r| r.latency.p50_us), reverse(|r| r.mb_per_s));
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
        let kind = if report.is_streaming() { "BW" } else { "Latency" };
        let _ =
            write!(out, "{RULE}                    RDMA_Read {kind} Test\n Transport       : {transport}\n");
        let _ = write!(out, " Outstand reads  : {}\n{RULE}", report.settings.depth);
        out.push_str(match report.is_streaming() {
            true => " #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n",
            false => {
                " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    \
                 t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec] \n"
            }
        });
        for m in measurements {
            let (l, count) = (&m.latency, m.latency.count);
            let _ = match report.is_streaming() {
                true => writeln!(
                    out,
                    " {:<7}    {count:<10}       {:<7.2}            {:<7.2}\t\t   {:<7.6}",
                    m.bytes,
                    m.peak_mb_per_s * 1e6 / MIB,
                    m.mb_per_s * 1e6 / MIB,
                    m.reads_per_s / 1e6
                ),
                false => writeln!(
                    out,
                    " {:<7} {count}          {:<7.2}        {:<7.2}      {:<7.2}  \t       {:<7.2}     \t{:<7.2}\t\t{:<7.2} \t\t{:<7.2}",
                    m.bytes, l.min_us, l.max_us, l.p50_us, m.mean_us, m.stdev_us, l.p99_us, l.p999_us
                ),
            };
        }
        out.push_str(RULE);
    }
    out
}

/// What osu_get_latency prints (the mean), or osu_get_bw if more than one read is in flight.
pub(super) fn osu(report: &Report) -> String {
    let mut out = String::new();
    for (transport, measurements) in by_transport(report) {
        let (kind, column) = match report.is_streaming() {
            true => ("Bandwidth", "Bandwidth (MB/s)"),
            false => ("latency", "Latency (us)"),
        };
        let _ = writeln!(out, "# pcbench {} one-sided read {kind} over {transport}", report.build.version);
        let _ = writeln!(out, "{:<10}{column:>20}", "# Size");
        for m in measurements {
            let value = if report.is_streaming() { m.mb_per_s } else { m.mean_us };
            let _ = writeln!(out, "{:<10}{value:>20.2}", m.bytes);
        }
    }
    out
}
