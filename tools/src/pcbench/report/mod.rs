//! What was measured: one type, from which every form is made.
//!
//! ```text
//!  Plan + Run ─▶ Report ─┬─ serde ─▶ JSON (docs/pcbench.md has the schema) ─▶ `pcbench compare`
//!                        ├─ table, verdict ─▶ for people
//!                        ├─ formats ─▶ CSV, and the columns of perftest and OMB
//!                        ├─ hdr ─▶ .hgrm, .hlog
//!                        └─ reads (its plots), plot, page ─▶ SVG, HTML
//! ```
//!
//! The report of `pcbench fault` is another ([`crate::fault`]), and made of the same: [`Times`], [`Circumstances`], and
//! what turns them into plots, pages and files.
//!
//! Times are in microseconds, sizes in bytes, bandwidth in MB/s of 10^6 bytes, unless a name says
//! otherwise.

pub(crate) mod formats;
mod hdr;
mod measurement;
mod output;
pub(crate) mod page;
pub(crate) mod plot;
mod reads;
pub(crate) mod table;
#[cfg(test)]
mod tests;
mod times;
pub(crate) mod verdict;

use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use plot::Panel;
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::machine::Machine;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::{Completion, Format};
use crate::plan::Plan;
use crate::run::Run;
pub(crate) use crate::run::recorder::Latency;
pub(crate) use measurement::Measurement;
pub(crate) use output::{Outputs, Written};
pub(crate) use times::{Confidence, Times, median};

/// Version of the JSON.
pub(crate) const VERSION: u32 = 2;

/// Everything that a reader of the figures needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) version: u32,
    #[serde(flatten)]
    pub(crate) at: Circumstances,
    pub(crate) settings: Settings,
    pub(crate) measurements: Vec<Measurement>,
    /// What it means, in words.
    pub(crate) verdict: Vec<String>,
}

/// By whom it was measured, where and when.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Circumstances {
    pub(crate) build: Build,
    /// Seconds since 1970 when the first round began.
    pub(crate) started_unix_s: f64,
    /// How long all rounds took, in seconds.
    pub(crate) took_s: f64,
    /// The machine that measured, before it did.
    pub(crate) environment: Machine,
    /// The server; absent over the loopback.
    pub(crate) server: Option<Server>,
}

/// The program that measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Build {
    pub(crate) version: String,
    /// `release` or `debug`.
    pub(crate) profile: String,
    pub(crate) architecture: String,
    /// Whether it was built with RDMA.
    pub(crate) rdma: bool,
}

/// Who was read from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Server {
    pub(crate) address: String,
    /// What the server says of its machine.
    pub(crate) machine: Machine,
}

/// How it was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Reads in flight on each lane.
    pub(crate) depth: u32,
    pub(crate) lanes: u32,
    /// Reads landed in huge pages.
    pub(crate) huge_pages: bool,
    /// Bytes of the server's memory that were read from; absent for all.
    pub(crate) span: Option<u64>,
    pub(crate) completion: Completion,
    /// Reads a second, if they were due at fixed moments.
    pub(crate) rate: Option<f64>,
    /// Most reads of a round.
    pub(crate) iterations: Option<u64>,
    /// Longest time of a round, in seconds.
    pub(crate) duration_s: Option<f64>,
    pub(crate) rounds: u32,
    /// Reads before the measured ones of each round.
    pub(crate) warm_up: u64,
    pub(crate) bidirectional: bool,
    /// Whether every read was checked, or only the last of each round.
    pub(crate) verify: bool,
    /// Processors that the reading thread was pinned to.
    pub(crate) cpus: Option<Vec<usize>>,
    /// Whether lanes were under TLS.
    #[serde(default)]
    pub(crate) tls: bool,
    /// What the flags of the lanes said: device, queue pairs, MTU and so on.
    pub(crate) device: DeviceArgs,
    /// Transports left out because a side does not have them, and why.
    pub(crate) missing: Vec<String>,
}

impl Report {
    /// The report of a run.
    pub(crate) fn new(plan: &Plan, run: Run) -> anyhow::Result<Self> {
        let measurements = run.measured.iter().map(Measurement::new).collect::<anyhow::Result<_>>()?;
        let server = run.server.map(|(address, machine)| Server { address: address.to_string(), machine });
        let settings = Settings {
            depth: plan.depth,
            lanes: plan.lanes,
            huge_pages: plan.huge_pages,
            span: plan.span,
            completion: plan.completion,
            rate: plan.rate,
            iterations: plan.limit.reads,
            duration_s: plan.limit.time.map(|time| time.as_secs_f64()),
            rounds: plan.rounds,
            warm_up: plan.warm_up,
            bidirectional: plan.bidirectional,
            verify: plan.verify,
            cpus: run.cpus,
            tls: plan.tls.is_some(),
            device: plan.device.clone(),
            missing: plan.missing.iter().chain(&run.left_out).cloned().collect(),
        };
        let at = Circumstances::new(run.begun, run.took, run.environment, server);
        let mut report = Self { version: VERSION, at, settings, measurements, verdict: Vec::new() };
        report.verdict = verdict::verdict(&report);
        Ok(report)
    }

    /// A report from what `--json` printed.
    ///
    /// Errors: it is none, or of another version.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let value: Value = serde_json::from_str(text).ok().context("it is no JSON")?;
        let version = value.get("version").and_then(Value::as_u64).context("it has no version")?;
        ensure!(version == u64::from(VERSION), "its version is {version}, this pcbench reads {VERSION}");
        Ok(serde_json::from_value(value)?)
    }

    /// The report as it is printed.
    pub(crate) fn text(&self, format: Format) -> anyhow::Result<String> {
        Ok(match format {
            Format::Table => table::table(self),
            Format::Json => format!("{}\n", serde_json::to_string_pretty(self)?),
            Format::Csv => formats::csv(self),
            Format::Perftest => formats::perftest(self),
            Format::Osu => formats::osu(self),
        })
    }

    /// Whether more than one read is in flight: bandwidth is then what matters.
    fn is_streaming(&self) -> bool {
        self.settings.depth * self.settings.lanes > 1 && self.settings.rate.is_none()
    }
}

impl Written for Report {
    fn circumstances(&self) -> &Circumstances {
        &self.at
    }

    fn distributions(&self) -> Vec<(String, &Times)> {
        self.measurements.iter().map(|m| (m.tag(), &m.times)).collect()
    }

    fn panels(&self) -> Vec<Panel<'_>> {
        reads::panels(self)
    }

    fn label(&self) -> &'static str {
        "pcbench: latency of one-sided reads"
    }

    fn page(&self) -> anyhow::Result<String> {
        page::page(self)
    }
}

impl Circumstances {
    /// Of this program, which has begun then, taken so long, and run here.
    pub(crate) fn new(
        begun: SystemTime,
        took: Duration,
        environment: Machine,
        server: Option<Server>,
    ) -> Self {
        let started_unix_s = begun.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Self { build: Build::this(), started_unix_s, took_s: took.as_secs_f64(), environment, server }
    }
}

impl Build {
    fn this() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            profile: if cfg!(debug_assertions) { "debug" } else { "release" }.into(),
            architecture: std::env::consts::ARCH.into(),
            rdma: cfg!(feature = "rdma"),
        }
    }
}
