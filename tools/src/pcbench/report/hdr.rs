//! Files for the usual HdrHistogram viewers.
//!
//! `.hgrm` is a percentile distribution in microseconds, as HistogramLogProcessor prints it.
//! `.hlog` is an interval log of compressed V2 histograms in nanoseconds; its maxima are in
//! milliseconds, as the format wants them.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use super::Circumstances;
use super::times::Times;

/// Steps in each half of the distance to 100 %.
const TICKS_PER_HALF: u32 = 5;
/// Nanoseconds in a millisecond.
const MAX_DIVISOR: f64 = 1e6;

/// The percentile distribution of these times.
pub(super) fn hgrm(times: &Times) -> String {
    let histogram = &times.samples.histogram;
    let mut out =
        format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
    let mut below = 0;
    for step in histogram.iter_quantiles(TICKS_PER_HALF) {
        below += step.count_since_last_iteration();
        let (us, quantile) = (step.value_iterated_to() as f64 / 1e3, step.quantile_iterated_to());
        let _ = match quantile < 1.0 {
            true => writeln!(out, "{us:>12.3} {quantile:>2.12} {below:>10} {:>14.2}", 1.0 / (1.0 - quantile)),
            false => writeln!(out, "{us:>12.3} {quantile:>2.12} {below:>10}"),
        };
    }
    let _ = writeln!(out, "#[Mean    = {:>12.3}, StdDeviation   = {:>12.3}]", times.mean_us, times.stdev_us);
    let _ = writeln!(
        out,
        "#[Max     = {:>12.3}, Total count    = {:>12}]",
        times.pooled.max_us, times.pooled.count
    );
    let _ = writeln!(out, "#[Buckets = {:>12}, SubBuckets     = {:>12}]", histogram.buckets(), SUB_BUCKETS);
    out
}

/// Of a histogram of three digits.
const SUB_BUCKETS: u32 = 2048;

/// The interval log of all that was measured, each by its tag, in the order of time.
///
/// Errors: a histogram that cannot be written down.
pub(super) fn hlog(at: &Circumstances, measured: &[(String, &Times)]) -> anyhow::Result<Vec<u8>> {
    let failed = |error: &dyn std::fmt::Debug| anyhow!("writing the interval log: {error:?}");
    let started = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(at.started_unix_s.max(0.0));
    let (mut out, mut serializer) = (Vec::new(), V2DeflateSerializer::new());
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment(&format!("[Logged with pcbench {}; values in nanoseconds]", at.build.version))
        .with_start_time(started)
        .with_base_time(started)
        .with_max_value_divisor(MAX_DIVISOR)
        .begin_log_with(&mut out, &mut serializer)?;
    let of = |(tag, times): &(String, &'_ Times)| {
        times.samples.intervals.iter().map(|interval| (tag.clone(), interval.clone())).collect::<Vec<_>>()
    };
    let mut intervals: Vec<_> = measured.iter().flat_map(of).collect();
    intervals.sort_by_key(|(_, interval)| interval.start);
    for (tag, interval) in intervals {
        log.write_histogram(&interval.histogram, interval.start, interval.length, Tag::new(&tag))
            .map_err(|error| failed(&error))?;
    }
    drop(log);
    Ok(out)
}
