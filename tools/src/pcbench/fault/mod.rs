//! `pcbench fault`: what a thread waits when it touches memory that is still at the source.
//!
//! Memory filled with a pattern is exported, by this process or by `pcbench serve` on another host,
//! and threads touch every page of its copy once, over real userfaultfd, while it is trapped. A
//! *stall* is a touch that took longer than 1 µs; a touch of a page that was there takes a tenth of
//! that.

mod floor;
mod run;
mod source;
mod table;
mod touch;

use std::io::IsTerminal;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use postcopy_engine::memory::{GuestMemory, MemoryLayout, PAGE_SIZE};
use postcopy_engine::pager::{Landing, PagerConfig, Shards};
use postcopy_engine::planner::Policy;
use postcopy_engine::stats::{PagerReport, Percentiles};
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::drain::BulkWaitArgs;
use postcopy_tools::trust::TrustArgs;
use postcopy_tools::{cli, size};
use postcopy_transport::{EndpointOptions, Transport};
use serde::Serialize;

use crate::plan::seconds;
use crate::report::Server;
use crate::{Ended, Failure, connect, serve};
use source::Source;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// Every page once, in an order without locality.
    Random,
    /// Ascending.
    Sequential,
    /// Every 16th page, then the ones after them, and so on.
    Strided,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Access {
    Read,
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    On,
    Off,
    Both,
}

impl Choice {
    fn values(self) -> &'static [bool] {
        match self {
            Self::On => &[true],
            Self::Off => &[false],
            Self::Both => &[false, true],
        }
    }
}

/// Memory that is at the source in this process.
const MEMORY: u64 = 256 << 20;

/// What to measure.
#[derive(Clone, Debug, Args)]
pub(crate) struct FaultArgs {
    /// HOST or HOST:PORT where `pcbench serve` has the memory. Default: this process itself.
    pub(crate) host: Option<String>,
    /// Transport.
    #[arg(long, default_value = "tcp", value_name = "shm|tcp|verbs")]
    pub(crate) transport: Transport,
    /// Memory that is at the source. Default: 256M; of another host, 64M, which is what `pcbench serve`
    /// offers if it is not told more.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) memory: Option<u64>,
    /// Order of the touches.
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub(crate) pattern: Pattern,
    /// What a touch does.
    #[arg(long, value_enum, default_value_t = Access::Read)]
    pub(crate) access: Access,
    /// Threads that touch, each its own part.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) threads: u8,
    /// Threads of the pager, 1 to 16, each with a part of the memory and two lanes.
    #[arg(long, default_value = "1", value_name = "N")]
    pub(crate) shards: Shards,
    /// Where pages land: in the memory itself, or in a pool from which they are copied in. `auto`: in place
    /// over verbs, else in a pool.
    #[arg(long, default_value_t, value_name = "auto|in-place|pool")]
    pub(crate) landing: Landing,
    /// Threads serve their own faults, or the pager's thread does.
    #[arg(long, value_enum, default_value_t = Choice::Both)]
    pub(crate) self_service: Choice,
    /// With the background drain, or only what is touched.
    #[arg(long, value_enum, default_value_t = Choice::Both)]
    pub(crate) drain: Choice,
    /// In which order the drain goes, one or several by commas: `adaptive`, `linear`,
    /// `bubble[:DIRECTION]` or `bubble-multi[:PIVOTS][:DIRECTION]`, with forward, dual or backward.
    #[arg(long, value_delimiter = ',', value_name = "POLICY", default_values_t = [Policy::Adaptive])]
    pub(crate) policy: Vec<Policy>,
    #[command(flatten)]
    pub(crate) bulk_wait: BulkWaitArgs,
    /// How long threads poll before they sleep. Default: by the number of cores.
    #[arg(long, value_name = "US")]
    pub(crate) spin: Option<u64>,
    /// Rounds of every case, interleaved; the figures are medians over them.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Give up when nothing has arrived for so many seconds.
    #[arg(long, default_value_t = 10.0, value_name = "S")]
    pub(crate) give_up_after: f64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten, next_help_heading = "TLS")]
    pub(crate) trust: TrustArgs,
    #[command(flatten, next_help_heading = "RDMA")]
    pub(crate) device: DeviceArgs,
}

impl FaultArgs {
    /// How lanes are made, from this address of this host.
    fn endpoint(&self, local: Option<IpAddr>) -> EndpointOptions {
        EndpointOptions { spin: self.spin.map(Duration::from_micros), ..self.device.endpoint(local) }
    }

    /// How much memory, in bytes.
    fn bytes(&self) -> u64 {
        self.memory.unwrap_or(if self.host.is_some() { serve::MEMORY } else { MEMORY })
    }

    fn check(&self) -> anyhow::Result<()> {
        let bytes = self.bytes();
        let whole = bytes.is_multiple_of(PAGE_SIZE) && (1 << 20..=1 << 40).contains(&bytes);
        ensure!(whole, "--memory takes whole pages of 4K, 1M to 1T, not {bytes} bytes");
        ensure!(
            self.transport == Transport::Verbs || !self.device.is_chosen(),
            "--device and what else tunes RDMA are for verbs; add --transport verbs"
        );
        if self.trust.tls.is_some() {
            ensure!(self.transport == Transport::Tcp, "{}", connect::TCP_ALONE);
            ensure!(self.host.is_some(), "{}", connect::ALONE);
        }
        seconds("--give-up-after", self.give_up_after).map(drop)
    }

    fn pager(&self, case: Case) -> PagerConfig {
        let planner = self.bulk_wait.planner(case.policy.unwrap_or_default());
        let spin = self.spin.map_or(PagerConfig::default().spin, Duration::from_micros);
        PagerConfig { spin, planner, ..PagerConfig::default() }
    }

    /// Every case once. Without a drain there is no order to it.
    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for &self_service in self.self_service.values() {
            for &drain in self.drain.values() {
                let case = |policy| Case { self_service, drain, policy };
                match drain {
                    true => cases.extend(self.policy.iter().map(|policy| case(Some(*policy)))),
                    false => cases.push(case(None)),
                }
            }
        }
        cases
    }
}

/// One case of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Case {
    self_service: bool,
    drain: bool,
    /// Of the drain, if there is one.
    #[serde(serialize_with = "as_text")]
    policy: Option<Policy>,
}

fn as_text<S: serde::Serializer>(policy: &Option<Policy>, serializer: S) -> Result<S::Ok, S::Error> {
    policy.map(|policy| policy.to_string()).serialize(serializer)
}

/// What one case showed: the medians over its rounds.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    #[serde(flatten)]
    case: Case,
    /// Touches that stalled, of all.
    stalled: u64,
    touched: u64,
    /// Touches until every page was here.
    touched_pages: u64,
    /// Those of them that needed no read of their own: the page had been brought unasked, or was on its way.
    hit_pages: u64,
    /// Pages that were brought unasked and had not been touched by then.
    wasted_pages: u64,
    /// How long they stalled.
    stall: Percentiles,
    /// The median stall as a multiple of the raw read's median.
    times_raw: f64,
    /// From the first touch until every page was here.
    resident_ms: f64,
    /// What the drain brought a second, while it ran.
    drain_mb_s: f64,
    pager: PagerReport,
}

/// The whole measurement.
#[derive(Debug, Serialize)]
struct FaultReport {
    version: u32,
    transport: &'static str,
    /// Whether lanes were under TLS.
    tls: bool,
    /// Where the memory was; absent if here.
    server: Option<Server>,
    memory_bytes: u64,
    pattern: Pattern,
    access: Access,
    threads: u8,
    /// Threads of the pager.
    shards: usize,
    landing: Landing,
    rounds: u32,
    /// One raw 4 KiB read at a time on a lane of the same transport.
    raw_read: Percentiles,
    /// The same memory by reads of 64 KiB, as many in flight as the lane takes.
    raw_bulk_mb_s: f64,
    cases: Vec<Outcome>,
}

/// Runs `pcbench fault`.
pub(crate) fn fault(args: &FaultArgs) -> Ended {
    args.check().map_err(Failure::Usage)?;
    let report = measure(args)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)? + "\n",
        false => table::table(&report),
    };
    cli::print(&text).map_err(anyhow::Error::from)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &FaultArgs) -> anyhow::Result<FaultReport> {
    args.transport.available()?;
    let patience = seconds("--give-up-after", args.give_up_after)?;
    let source = match &args.host {
        Some(host) => Source::There { server: connect::resolve(host)?, patience, tls: args.trust.read()? },
        None => Source::here(args.bytes())?,
    };
    let cases = args.cases();
    let mut rounds: Vec<Vec<Outcome>> = vec![Vec::new(); cases.len()];
    let (mut raw, mut bulk, mut server) = (Vec::new(), Vec::new(), None);
    let shows = std::io::stderr().is_terminal();
    for round in 0..args.rounds {
        let floor = floor::measure(args, &source, patience)?;
        bulk.push(floor.bulk_mb_s);
        for (case, outcomes) in cases.iter().zip(&mut rounds) {
            if shows {
                eprint!("\rpcbench: round {} of {}   ", round + 1, args.rounds);
            }
            outcomes.push(run::run(args, *case, &source, floor.read.p50_us, patience)?);
        }
        raw.push(floor.read);
        server = floor.server;
    }
    if shows {
        eprint!("\r                              \r");
    }
    let middle = |of: &mut Vec<Outcome>| {
        of.sort_by(|one, other| one.stall.p50_us.total_cmp(&other.stall.p50_us));
        of.swap_remove(of.len() / 2)
    };
    raw.sort_by(|one, other| one.p50_us.total_cmp(&other.p50_us));
    bulk.sort_by(f64::total_cmp);
    Ok(FaultReport {
        version: 1,
        transport: args.transport.name(),
        tls: args.trust.tls.is_some(),
        server,
        memory_bytes: args.bytes(),
        pattern: args.pattern,
        access: args.access,
        threads: args.threads,
        shards: args.shards.count(),
        landing: args.landing.resolved(args.transport, false),
        rounds: args.rounds,
        raw_read: raw[raw.len() / 2],
        raw_bulk_mb_s: bulk[bulk.len() / 2],
        cases: rounds.iter_mut().map(middle).collect(),
    })
}

fn guest_memory(bytes: u64) -> anyhow::Result<GuestMemory> {
    GuestMemory::new(MemoryLayout::pc(bytes, 3 << 30)?).context("making guest memory")
}
