//! What the times of several rounds come to: of reads, or of stalls.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

use crate::run::recorder::{Interval, Latency, latency, latency_of, pooled};

/// Fewest rounds whose medians give a confidence interval by themselves.
const ENOUGH_ROUNDS: usize = 5;
/// Wanted confidence of an interval, and the normal distribution's quantile for it.
const CONFIDENCE: f64 = 0.95;
const NORMAL: f64 = 1.959_964;

/// The times of one thing that was measured in rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Times {
    /// Each percentile is the median over the rounds of that round's; count, minimum and maximum
    /// are of all of them.
    pub(crate) latency: Latency,
    /// Percentiles of all rounds together.
    pub(crate) pooled: Latency,
    /// Of all.
    pub(crate) mean_us: f64,
    /// Of all; n − 1.
    pub(crate) stdev_us: f64,
    pub(crate) median_ci: Confidence,
    /// How far the rounds' medians lie apart, as a part of the smallest.
    #[serde(skip)]
    pub(crate) spread: f64,
    pub(crate) timeline: Vec<Moment>,
    /// All of them in nanoseconds: HdrHistogram V2, compressed, in base64.
    pub(crate) histogram: String,
    #[serde(skip)]
    pub(crate) samples: Samples,
}

/// What the figures were made of, for the forms that show it all.
#[derive(Clone, Debug)]
pub(crate) struct Samples {
    pub(crate) histogram: Histogram<u64>,
    pub(crate) intervals: Vec<Interval>,
}

impl Default for Samples {
    fn default() -> Self {
        let histogram = Histogram::new(3).expect("three digits are valid");
        Self { histogram, intervals: Vec::new() }
    }
}

/// An interval in which the true median lies with some confidence, by order statistics: no shape of
/// the distribution is assumed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Confidence {
    pub(crate) low_us: f64,
    pub(crate) high_us: f64,
    /// From 0 to 1.
    pub(crate) confidence: f64,
    pub(crate) basis: Basis,
}

/// Whose order it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Basis {
    /// The rounds' medians: sees what changes from one round to the next.
    Rounds,
    /// Single reads, as if each were independent, and wide enough for every round's median.
    Samples,
}

/// A short time of the run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Moment {
    /// Since the first round began, in seconds.
    pub(crate) start_s: f64,
    pub(crate) seconds: f64,
    pub(crate) reads: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
}

impl Times {
    /// What the intervals of each round come to.
    ///
    /// Errors: a histogram that cannot be written down.
    pub(crate) fn new(rounds: &[&[Interval]]) -> anyhow::Result<Self> {
        let each: Vec<Latency> = rounds.iter().map(|intervals| latency_of(intervals)).collect();
        let intervals: Vec<Interval> =
            rounds.iter().flat_map(|intervals| intervals.iter().cloned()).collect();
        let (histogram, moments) = pooled(&intervals);
        let all = latency(&histogram, &moments);
        let medians: Vec<f64> = each.iter().map(|round| round.p50_us).collect();
        Ok(Self {
            latency: over_rounds(each.iter().copied()),
            pooled: all,
            mean_us: moments.mean_us(),
            stdev_us: moments.stdev_us(),
            median_ci: confidence(&medians, &histogram, &all),
            spread: spread(&medians),
            timeline: intervals.iter().map(moment).collect(),
            histogram: encode(&histogram)?,
            samples: Samples { histogram, intervals },
        })
    }
}

/// How far medians lie apart, as a part of the smallest.
fn spread(medians: &[f64]) -> f64 {
    let (low, high) =
        (medians.iter().copied().fold(f64::INFINITY, f64::min), medians.iter().copied().fold(0.0, f64::max));
    if low > 0.0 && low.is_finite() { high / low - 1.0 } else { 0.0 }
}

fn moment(interval: &Interval) -> Moment {
    let latency = latency(&interval.histogram, &interval.moments);
    Moment {
        start_s: interval.start.as_secs_f64(),
        seconds: interval.length.as_secs_f64(),
        reads: latency.count,
        p50_us: latency.p50_us,
        p99_us: latency.p99_us,
        max_us: latency.max_us,
    }
}

/// The median; of an even number, the mean of the middle two.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

pub(super) fn over_rounds(rounds: impl Iterator<Item = Latency> + Clone) -> Latency {
    let of = |value: fn(&Latency) -> f64| median(rounds.clone().map(|latency| value(&latency)));
    Latency {
        count: rounds.clone().map(|latency| latency.count).sum(),
        min_us: rounds.clone().map(|latency| latency.min_us).fold(f64::INFINITY, f64::min),
        p50_us: of(|latency| latency.p50_us),
        p90_us: of(|latency| latency.p90_us),
        p99_us: of(|latency| latency.p99_us),
        p999_us: of(|latency| latency.p999_us),
        p9999_us: of(|latency| latency.p9999_us),
        max_us: rounds.clone().map(|latency| latency.max_us).fold(0.0, f64::max),
    }
}

/// An interval for the median: by the order of the rounds' medians where there are enough of them,
/// else by the order of the reads, widened to what the rounds differ by.
fn confidence(medians: &[f64], histogram: &Histogram<u64>, all: &Latency) -> Confidence {
    if medians.len() >= ENOUGH_ROUNDS {
        let mut sorted = medians.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (skipped, confidence) = order_statistics(sorted.len());
        let (low_us, high_us) = (sorted[skipped], sorted[sorted.len() - 1 - skipped]);
        return Confidence { low_us, high_us, confidence, basis: Basis::Rounds };
    }
    let n = all.count.max(1) as f64;
    let at = |rank: f64| {
        let ns = histogram.value_at_quantile((rank / n).clamp(0.0, 1.0));
        (ns as f64 / 1e3).clamp(all.min_us, all.max_us)
    };
    let half = NORMAL * n.sqrt() / 2.0;
    let (low, high) = (at((n / 2.0 - half).floor()), at((n / 2.0 + half).ceil() + 1.0));
    let (low_us, high_us) =
        (medians.iter().copied().fold(low, f64::min), medians.iter().copied().fold(high, f64::max));
    Confidence { low_us, high_us, confidence: CONFIDENCE, basis: Basis::Samples }
}

/// How many of `n` sorted values to leave out at either end so that the others enclose the median
/// with at least 95 % confidence, and with how much they then do. The number of values below the
/// median is binomial with probability one half.
fn order_statistics(n: usize) -> (usize, f64) {
    let (mut below, mut term) = (0.0, 0.5f64.powi(n as i32));
    let mut best = (0, 1.0 - 2.0 * term);
    for skipped in 0..n / 2 {
        below += term;
        let confidence = 1.0 - 2.0 * below;
        if confidence < CONFIDENCE {
            break;
        }
        best = (skipped, confidence);
        term *= (n - skipped) as f64 / (skipped + 1) as f64;
    }
    best
}

fn encode(histogram: &Histogram<u64>) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    V2DeflateSerializer::new()
        .serialize(histogram, &mut bytes)
        .map_err(|error| anyhow::anyhow!("writing a histogram: {error:?}"))?;
    Ok(BASE64_STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_statistics_are_those_of_the_tables() {
        // Two-sided 95 % intervals for a median, as tabulated: ranks (1,6) of 6, (1,7), (1,8),
        // (2,8) of 9, (2,9) of 10, (6,15) of 20.
        for (n, skipped) in [(6, 0), (7, 0), (8, 0), (9, 1), (10, 1), (20, 5)] {
            assert_eq!(order_statistics(n).0, skipped, "{n}");
        }
        assert!((order_statistics(6).1 - 0.96875).abs() < 1e-12);
        assert!((order_statistics(5).1 - 0.9375).abs() < 1e-12);
        assert!((order_statistics(9).1 - 0.9609375).abs() < 1e-12);
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert_eq!(median(std::iter::empty()), 0.0);
    }
}
