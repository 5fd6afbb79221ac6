//! What `pcbench fault` found: one type, from which every form is made, as [`crate::report`] has one of reads.

use std::time::{Duration, Instant, SystemTime};

use anyhow::anyhow;
use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::pager::Landing;
use postcopy_engine::planner::{Bandwidth, Policy};
use postcopy_engine::stats::PagerReport;
use postcopy_tools::machine::Machine;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::run::Turn;
use super::{Access, FaultArgs, Pattern, forms, table, verdict};
use crate::args::Format;
use crate::report::plot::Panel;
use crate::report::{Circumstances, Server, Times, Written, median};
use crate::run::recorder::{Interval, Latency, latency_of};

/// Version of the JSON.
pub(crate) const VERSION: u32 = 2;

/// The whole measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FaultReport {
    pub(crate) version: u32,
    #[serde(flatten)]
    pub(crate) at: Circumstances,
    pub(crate) transport: String,
    /// Whether lanes were under TLS.
    pub(crate) tls: bool,
    pub(crate) memory_bytes: u64,
    pub(crate) pattern: Pattern,
    pub(crate) access: Access,
    pub(crate) threads: u8,
    /// Threads of the pager.
    pub(crate) shards: usize,
    pub(crate) landing: Landing,
    /// Bytes a second that the drain may have.
    #[serde(default)]
    pub(crate) max_bandwidth: Option<Bandwidth>,
    pub(crate) rounds: u32,
    /// One raw 4 KiB read at a time on a lane of the same transport.
    pub(crate) raw_read: Times,
    /// The same memory by reads of 64 KiB, as many in flight as the lane takes; median over the rounds.
    pub(crate) raw_bulk_mb_s: f64,
    pub(crate) cases: Vec<Faulted>,
    /// What it means, in words.
    pub(crate) verdict: Vec<String>,
}

/// One case of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    pub(crate) self_service: bool,
    pub(crate) drain: bool,
    /// Of the drain, if there is one.
    #[serde(serialize_with = "as_text", deserialize_with = "from_text")]
    pub(crate) policy: Option<Policy>,
}

fn as_text<S: Serializer>(policy: &Option<Policy>, serializer: S) -> Result<S::Ok, S::Error> {
    policy.map(|policy| policy.to_string()).serialize(serializer)
}

fn from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Policy>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

impl Case {
    /// Who serves its faults, and in which order its drain goes.
    pub(crate) fn words(&self) -> [String; 2] {
        let by = if self.self_service { "itself" } else { "handler" };
        [by.into(), self.policy.map_or("off".into(), |policy| policy.to_string())]
    }

    /// Its name in files and logs: `tcp-itself-adaptive`.
    pub(crate) fn tag(&self, transport: &str) -> String {
        let [by, drain] = self.words();
        format!("{transport}-{by}-{}", drain.replace(':', "-"))
    }
}

/// What one case showed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Faulted {
    #[serde(flatten)]
    pub(crate) case: Case,
    /// Touches in a round: one of each page.
    pub(crate) touched: u64,
    /// Those that stalled, the median over the rounds.
    pub(crate) stalled: u64,
    /// How long they stalled.
    #[serde(flatten)]
    pub(crate) times: Times,
    /// The median stall as a multiple of the raw read's median of the same round; the median over the rounds.
    pub(crate) times_raw: f64,
    /// From the first touch until every page was here; the median over the rounds.
    pub(crate) resident_ms: f64,
    /// What the drain brought a second, while it ran; the median over the rounds.
    pub(crate) drain_mb_s: f64,
    /// Touches until every page was here. This and what follows is of the round that has the median in the middle.
    pub(crate) touched_pages: u64,
    /// Those of them that needed no read of their own: the page had been brought unasked, or was on its way.
    pub(crate) hit_pages: u64,
    /// Pages that were brought unasked and had not been touched by then.
    pub(crate) wasted_pages: u64,
    pub(crate) pager: PagerReport,
    pub(crate) rounds: Vec<RoundFigures>,
}

/// One round.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct RoundFigures {
    /// Since the run began, in seconds.
    pub(crate) start_s: f64,
    pub(crate) latency: Latency,
    pub(crate) resident_ms: f64,
    pub(crate) drain_mb_s: f64,
}

/// All that was measured, before it is a report.
pub(super) struct Rounds {
    pub(super) begun: SystemTime,
    pub(super) epoch: Instant,
    pub(super) environment: Machine,
    pub(super) server: Option<Server>,
    /// Times of raw reads, by round.
    pub(super) raw: Vec<Vec<Interval>>,
    /// By round.
    pub(super) bulk_mb_s: Vec<f64>,
    /// By case, and round.
    pub(super) cases: Vec<(Case, Vec<Turn>)>,
}

impl FaultReport {
    /// The report of what was measured.
    ///
    /// Errors: a histogram that cannot be written down.
    pub(super) fn new(args: &FaultArgs, all: Rounds) -> anyhow::Result<Self> {
        let raw_p50_us: Vec<f64> = all.raw.iter().map(|reads| latency_of(reads).p50_us).collect();
        let reads: Vec<&[Interval]> = all.raw.iter().map(|reads| &reads[..]).collect();
        let touched = args.bytes() / PAGE_SIZE;
        let cases = all.cases.iter().map(|(case, turns)| Faulted::new(*case, touched, turns, &raw_p50_us));
        let mut report = Self {
            version: VERSION,
            transport: args.transport.name().into(),
            tls: args.trust.tls.is_some(),
            memory_bytes: args.bytes(),
            pattern: args.pattern,
            access: args.access,
            threads: args.threads,
            shards: args.shards.count(),
            landing: args.landing.resolved(args.transport, false),
            max_bandwidth: args.background.limit.max_bandwidth,
            rounds: args.rounds,
            raw_read: Times::new(&reads)?,
            raw_bulk_mb_s: median(all.bulk_mb_s.iter().copied()),
            cases: cases.collect::<anyhow::Result<_>>()?,
            verdict: Vec::new(),
            at: Circumstances::new(all.begun, all.epoch.elapsed(), all.environment, all.server),
        };
        report.verdict = verdict::verdict(&report);
        Ok(report)
    }

    /// A report of faults from what `--json` printed; `None`, if it is none of faults.
    ///
    /// Errors: it is of another version, or damaged.
    pub(crate) fn parse(text: &str) -> Option<anyhow::Result<Self>> {
        let value: Value = serde_json::from_str(text).ok()?;
        value.get("cases")?;
        let version = value.get("version").and_then(Value::as_u64);
        Some(match version {
            Some(version) if version == u64::from(VERSION) => {
                serde_json::from_value(value).map_err(Into::into)
            }
            _ => Err(anyhow!("it is of another version; this pcbench reads {VERSION}")),
        })
    }

    /// The report as it is printed.
    pub(super) fn text(&self, format: Format) -> anyhow::Result<String> {
        Ok(match format {
            Format::Table => table::table(self),
            Format::Json => format!("{}\n", serde_json::to_string_pretty(self)?),
            Format::Csv => forms::csv(self),
            Format::Perftest => forms::perftest(self),
            Format::Osu => forms::osu(self),
        })
    }
}

impl Written for FaultReport {
    fn circumstances(&self) -> &Circumstances {
        &self.at
    }

    fn distributions(&self) -> Vec<(String, &Times)> {
        let cases = self.cases.iter().map(|faulted| (faulted.case.tag(&self.transport), &faulted.times));
        std::iter::once((raw_tag(&self.transport), &self.raw_read)).chain(cases).collect()
    }

    fn panels(&self) -> Vec<Panel<'_>> {
        forms::panels(self)
    }

    fn label(&self) -> &'static str {
        "pcbench: stalls of threads that touch memory at the source"
    }

    fn page(&self) -> anyhow::Result<String> {
        forms::page(self)
    }
}

/// The name of raw reads in files and logs.
pub(super) fn raw_tag(transport: &str) -> String {
    format!("{transport}-raw-read")
}

impl Faulted {
    fn new(case: Case, touched: u64, turns: &[Turn], raw_p50_us: &[f64]) -> anyhow::Result<Self> {
        let stalls: Vec<&[Interval]> = turns.iter().map(|turn| &turn.stalls[..]).collect();
        let rounds: Vec<RoundFigures> = turns.iter().map(RoundFigures::new).collect();
        let mut by_median: Vec<usize> = (0..turns.len()).collect();
        by_median.sort_by(|a, b| rounds[*a].latency.p50_us.total_cmp(&rounds[*b].latency.p50_us));
        let Turn { touched_pages, pager, .. } = turns[by_median[turns.len() / 2]];
        let unasked = pager.pages.prepage_pages + pager.pages.drain_pages;
        let hit_pages = touched_pages.saturating_sub(pager.pages.network_faults);
        let times_raw = rounds.iter().zip(raw_p50_us).map(|(round, raw)| round.latency.p50_us / raw);
        Ok(Self {
            case,
            touched,
            stalled: median(rounds.iter().map(|round| round.latency.count as f64)) as u64,
            times: Times::new(&stalls)?,
            times_raw: median(times_raw),
            resident_ms: median(rounds.iter().map(|round| round.resident_ms)),
            drain_mb_s: median(rounds.iter().map(|round| round.drain_mb_s)),
            touched_pages,
            hit_pages,
            wasted_pages: unasked.saturating_sub(hit_pages),
            pager,
            rounds,
        })
    }
}

impl RoundFigures {
    fn new(turn: &Turn) -> Self {
        let resident = turn.resident.max(Duration::from_nanos(1)).as_secs_f64();
        Self {
            start_s: turn.begun.as_secs_f64(),
            latency: latency_of(&turn.stalls),
            resident_ms: resident * 1e3,
            drain_mb_s: turn.pager.bulk_bytes as f64 / resident / 1e6,
        }
    }
}
