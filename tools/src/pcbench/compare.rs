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
use crate::fault::{FaultReport, Faulted};
use crate::report::{Circumstances, Confidence, Measurement, Report};
use crate::run::recorder::Latency;
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

/// One size over one transport, or one case of faults, in both.
#[derive(Debug, Serialize)]
struct Difference {
    #[serde(flatten)]
    what: What,
    before_p50_us: f64,
    after_p50_us: f64,
    /// Change of the median in percent; positive is slower. Low and high are its bounds.
    p50_percent: f64,
    low_percent: f64,
    high_percent: f64,
    p99_percent: f64,
    p999_percent: f64,
    /// Change of the bandwidth in percent, or of how fast all of memory came; positive is faster.
    bandwidth_percent: f64,
    verdict: Verdict,
}

/// What was measured, as two reports have to agree on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct What {
    transport: String,
    bytes: u64,
    /// Who served faults, and the drain's policy or `off`. Absent of reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    faults_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drain: Option<String>,
}

/// A report as it is compared.
struct Comparable {
    at: Circumstances,
    /// What else it matters how it was measured: a name, and how.
    settings: Vec<(&'static str, String)>,
    rows: Vec<Row>,
}

struct Row {
    what: What,
    latency: Latency,
    median_ci: Confidence,
    /// MB/s.
    rate: f64,
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

fn load(path: &Path) -> anyhow::Result<Comparable> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parsed = match FaultReport::parse(&text) {
        Some(faults) => faults.map(Comparable::from),
        None => Report::parse(&text).map(Comparable::from),
    };
    parsed.with_context(|| format!("{} is no report of `pcbench --json`", path.display()))
}

impl From<Report> for Comparable {
    fn from(Report { at, settings: s, measurements, .. }: Report) -> Self {
        let settings = vec![
            ("the depth", s.depth.to_string()),
            ("the number of lanes", s.lanes.to_string()),
            ("the span", format!("{:?}", s.span)),
            ("the rate", format!("{:?}", s.rate)),
            ("completion", format!("{:?}", s.completion)),
            ("direction", s.bidirectional.to_string()),
            ("TLS", s.tls.to_string()),
        ];
        let row = |m: Measurement| Row {
            what: What { transport: m.transport, bytes: m.bytes.into(), faults_by: None, drain: None },
            latency: m.times.latency,
            median_ci: m.times.median_ci,
            rate: m.mb_per_s,
        };
        Self { at, settings, rows: measurements.into_iter().map(row).collect() }
    }
}

impl From<FaultReport> for Comparable {
    fn from(report: FaultReport) -> Self {
        let settings = vec![
            ("the pattern", format!("{:?}", report.pattern)),
            ("the access", format!("{:?}", report.access)),
            ("the number of threads", report.threads.to_string()),
            ("the number of shards", report.shards.to_string()),
            ("the landing", report.landing.to_string()),
            ("TLS", report.tls.to_string()),
        ];
        let row = |case: Faulted| {
            let [by, drain] = case.case.words();
            let transport = report.transport.clone();
            Row {
                what: What { transport, bytes: report.memory_bytes, faults_by: Some(by), drain: Some(drain) },
                latency: case.times.latency,
                median_ci: case.times.median_ci,
                rate: report.memory_bytes as f64 / case.resident_ms.max(1e-3) / 1e3,
            }
        };
        Self { rows: report.cases.into_iter().map(row).collect(), at: report.at, settings }
    }
}

impl What {
    fn words(&self) -> String {
        let mut out = format!("{:<9} {:>5}", printable(&self.transport, 9), size::short(self.bytes));
        if let (Some(by), Some(drain)) = (&self.faults_by, &self.drain) {
            let _ = write!(out, " {:<7} {:<16}", printable(by, 7), printable(drain, 24));
        }
        out
    }
}

impl Comparison {
    fn new(before: &Comparable, after: &Comparable, fail_above: Option<f64>) -> anyhow::Result<Self> {
        let same = |row: &Row, other: &Comparable| other.rows.iter().position(|of| of.what == row.what);
        let pairs = before.rows.iter().filter_map(|row| Some((row, &after.rows[same(row, after)?])));
        let differences: Vec<Difference> = pairs.map(|(a, b)| Difference::new(a, b, fail_above)).collect();
        ensure!(!differences.is_empty(), "the two reports have nothing in common that was measured alike");
        let only = |one: &Comparable, other: &Comparable, which: &str| -> Vec<String> {
            let alone = one.rows.iter().filter(|row| same(row, other).is_none());
            let words = |row: &Row| row.what.words().split_whitespace().collect::<Vec<_>>().join(" ");
            alone.map(|row| format!("{} only in the {which} report", words(row))).collect()
        };
        let mut unmatched = only(before, after, "first");
        unmatched.extend(only(after, before, "second"));
        let worse = differences.iter().any(|difference| difference.verdict == Verdict::Worse);
        let warnings = warnings(before, after);
        Ok(Self { version: VERSION, fail_above, worse, differences, unmatched, warnings })
    }

    fn table(&self) -> String {
        let of_faults = self.differences.iter().any(|difference| difference.what.drain.is_some());
        let (what, rate) = match of_faults {
            true => (" by      drain           ", "resident sooner"),
            false => ("", "bandwidth"),
        };
        let mut out = format!(
            "transport  size{what}      p50 µs  →     p50 µs     change  (95% bounds)            p99     p99.9  {rate}\n"
        );
        for d in &self.differences {
            let bounds = format!("({:+.1}% to {:+.1}%)", d.low_percent, d.high_percent);
            let _ = writeln!(
                out,
                "{} {:>11.2}  → {:>10.2} {:>+9.1}%  {bounds:<20} {:>+8.1}% {:>+8.1}% {:>+9.1}%  {}",
                d.what.words(),
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

/// What makes two reports hard to compare.
fn warnings(before: &Comparable, after: &Comparable) -> Vec<String> {
    let mut out = Vec::new();
    let mut differs = |what: &str, a: &str, b: &str| {
        if a != b {
            out.push(format!("{what} differs: {} and {}", printable(a, 120), printable(b, 120)));
        }
    };
    differs("the machine", &before.at.environment.line(), &after.at.environment.line());
    differs("the build", &before.at.build.profile, &after.at.build.profile);
    for ((what, a), (_, b)) in before.settings.iter().zip(&after.settings) {
        differs(what, a, b);
    }
    out
}

/// Change from `before` to `after`, in percent.
fn change(before: f64, after: f64) -> f64 {
    if before > 0.0 { 100.0 * (after / before - 1.0) } else { 0.0 }
}

impl Difference {
    fn new(before: &Row, after: &Row, fail_above: Option<f64>) -> Self {
        let (a, b) = (&before.latency, &after.latency);
        // The bounds that both intervals allow: at best, at worst.
        let low_percent = change(before.median_ci.high_us, after.median_ci.low_us);
        let high_percent = change(before.median_ci.low_us, after.median_ci.high_us);
        let p50_percent = change(a.p50_us, b.p50_us);
        let verdict = match (low_percent > 0.0, high_percent < 0.0) {
            (true, _) if fail_above.is_some_and(|allowed| p50_percent > allowed) => Verdict::Worse,
            (true, _) => Verdict::Slower,
            (_, true) => Verdict::Faster,
            _ => Verdict::Same,
        };
        Self {
            what: before.what.clone(),
            before_p50_us: a.p50_us,
            after_p50_us: b.p50_us,
            p50_percent,
            low_percent,
            high_percent,
            p99_percent: change(a.p99_us, b.p99_us),
            p999_percent: change(a.p999_us, b.p999_us),
            bandwidth_percent: change(before.rate, after.rate),
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
