//! `pcbench compare`: two reports, line by line, with the confidence of each difference.
//!
//! Exit status: 0, no worse than allowed; 1, worse; 2, the files cannot be compared. A median is
//! worse only if the confidence intervals of both medians do not overlap: noise fails no build.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow, ensure};
use postcopy_tools::cli;
use postcopy_tools::size;
use postcopy_tools::text::printable;
use serde::Serialize;

use crate::args::CompareArgs;
use crate::report::{Measurement, Report};
use crate::{Ended, Failure};

/// Version of the JSON.
const VERSION: u32 = 1;

/// The whole comparison.
#[derive(Debug, Serialize)]
struct Comparison {
    version: u32,
    /// Percent; absent if nothing fails.
    fail_above: Option<f64>,
    worse: bool,
    differences: Vec<Difference>,
    /// Measurements that only one report has.
    unmatched: Vec<String>,
    /// What differs between the circumstances.
    warnings: Vec<String>,
}

/// One size over one transport in both.
#[derive(Debug, Serialize)]
struct Difference {
    transport: String,
    bytes: u32,
    before_p50_us: f64,
    after_p50_us: f64,
    /// Change of the median in percent; positive is slower. Low and high are its bounds.
    p50_percent: f64,
    low_percent: f64,
    high_percent: f64,
    p99_percent: f64,
    p999_percent: f64,
    /// Change of the bandwidth in percent; positive is faster.
    bandwidth_percent: f64,
    verdict: Verdict,
}

/// What a difference says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// The intervals overlap.
    Same,
    Faster,
    Slower,
    /// Slower by more than is allowed.
    Worse,
}

/// Runs `pcbench compare`.
pub(crate) fn compare(args: &CompareArgs) -> Ended {
    let fail_above = args.fail_above.as_deref().map(percent).transpose().map_err(Failure::Usage)?;
    let before = load(&args.before).map_err(Failure::Usage)?;
    let after = load(&args.after).map_err(Failure::Usage)?;
    let comparison = Comparison::new(&before, &after, fail_above).map_err(Failure::Usage)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&comparison).map_err(anyhow::Error::from)? + "\n",
        false => comparison.table(),
    };
    cli::print(&text).map_err(anyhow::Error::from)?;
    Ok(if comparison.worse { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn percent(text: &str) -> anyhow::Result<f64> {
    let number = text.trim().trim_end_matches('%').trim_end().parse::<f64>().ok();
    let sane = number.filter(|percent| percent.is_finite() && *percent >= 0.0);
    sane.ok_or_else(|| {
        anyhow!("--fail-above {} is no percentage; write something like 5%", printable(text, 40))
    })
}

fn load(path: &Path) -> anyhow::Result<Report> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Report::parse(&text).with_context(|| format!("{} is no report of `pcbench --json`", path.display()))
}

impl Comparison {
    fn new(before: &Report, after: &Report, fail_above: Option<f64>) -> anyhow::Result<Self> {
        let pairs = before.measurements.iter().filter_map(|m| Some((m, same(m, after)?)));
        let differences: Vec<Difference> = pairs.map(|(a, b)| Difference::new(a, b, fail_above)).collect();
        ensure!(!differences.is_empty(), "the two reports have no transport and size in common");
        let only = |one: &Report, other: &Report, which: &str| -> Vec<String> {
            let alone = one.measurements.iter().filter(|m| same(m, other).is_none());
            alone.map(|m| format!("{} only in the {which} report", name(m))).collect()
        };
        let mut unmatched = only(before, after, "first");
        unmatched.extend(only(after, before, "second"));
        let worse = differences.iter().any(|difference| difference.verdict == Verdict::Worse);
        Ok(Self {
            version: VERSION,
            fail_above,
            worse,
            differences,
            unmatched,
            warnings: warnings(before, after),
        })
    }

    fn table(&self) -> String {
        let mut out = String::from(
            "transport  size      p50 µs  →     p50 µs     change  (95% bounds)            p99     p99.9  bandwidth\n",
        );
        for d in &self.differences {
            let bounds = format!("({:+.1}% to {:+.1}%)", d.low_percent, d.high_percent);
            let _ = writeln!(
                out,
                "{:<9} {:>5} {:>11.2}  → {:>10.2} {:>+9.1}%  {bounds:<20} {:>+8.1}% {:>+8.1}% {:>+9.1}%  {}",
                printable(&d.transport, 9),
                size::short(d.bytes.into()),
                d.before_p50_us,
                d.after_p50_us,
                d.p50_percent,
                d.p99_percent,
                d.p999_percent,
                d.bandwidth_percent,
                d.verdict.word()
            );
        }
        for line in self.unmatched.iter().chain(&self.warnings) {
            let _ = writeln!(out, "- {line}");
        }
        if let Some(percent) = self.fail_above {
            let worse = self.differences.iter().filter(|d| d.verdict == Verdict::Worse).count();
            let _ = match worse {
                0 => writeln!(out, "No median is worse by more than {percent} %."),
                count => writeln!(out, "Medians that are worse by more than {percent} %: {count}."),
            };
        }
        out
    }
}

fn same<'a>(measurement: &Measurement, report: &'a Report) -> Option<&'a Measurement> {
    let is_same = |m: &&Measurement| m.transport == measurement.transport && m.bytes == measurement.bytes;
    report.measurements.iter().find(is_same)
}

fn name(measurement: &Measurement) -> String {
    format!("{} at {}", printable(&measurement.transport, 20), size::short(measurement.bytes.into()))
}

/// What makes two reports hard to compare.
fn warnings(before: &Report, after: &Report) -> Vec<String> {
    let mut out = Vec::new();
    let mut differs = |what: &str, a: String, b: String| {
        if a != b {
            out.push(format!("{what} differs: {} and {}", printable(&a, 120), printable(&b, 120)));
        }
    };
    differs("the machine", before.at.environment.line(), after.at.environment.line());
    differs("the build", before.at.build.profile.clone(), after.at.build.profile.clone());
    let (a, b) = (&before.settings, &after.settings);
    differs("the depth", a.depth.to_string(), b.depth.to_string());
    differs("the number of lanes", a.lanes.to_string(), b.lanes.to_string());
    differs("the span", format!("{:?}", a.span), format!("{:?}", b.span));
    differs("the rate", format!("{:?}", a.rate), format!("{:?}", b.rate));
    differs("completion", format!("{:?}", a.completion), format!("{:?}", b.completion));
    differs("direction", a.bidirectional.to_string(), b.bidirectional.to_string());
    out
}

/// Change from `before` to `after`, in percent.
fn change(before: f64, after: f64) -> f64 {
    if before > 0.0 { 100.0 * (after / before - 1.0) } else { 0.0 }
}

impl Difference {
    fn new(before: &Measurement, after: &Measurement, fail_above: Option<f64>) -> Self {
        let (a, b) = (&before.times.latency, &after.times.latency);
        // The bounds that both intervals allow: at best, at worst.
        let low_percent = change(before.times.median_ci.high_us, after.times.median_ci.low_us);
        let high_percent = change(before.times.median_ci.low_us, after.times.median_ci.high_us);
        let p50_percent = change(a.p50_us, b.p50_us);
        let verdict = match (low_percent > 0.0, high_percent < 0.0) {
            (true, _) if fail_above.is_some_and(|allowed| p50_percent > allowed) => Verdict::Worse,
            (true, _) => Verdict::Slower,
            (_, true) => Verdict::Faster,
            _ => Verdict::Same,
        };
        Self {
            transport: before.transport.clone(),
            bytes: before.bytes,
            before_p50_us: a.p50_us,
            after_p50_us: b.p50_us,
            p50_percent,
            low_percent,
            high_percent,
            p99_percent: change(a.p99_us, b.p99_us),
            p999_percent: change(a.p999_us, b.p999_us),
            bandwidth_percent: change(before.mb_per_s, after.mb_per_s),
            verdict,
        }
    }
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Same => "within noise",
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Worse => "WORSE",
        }
    }
}
