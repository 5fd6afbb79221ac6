//! `pcbench fault`: what a thread waits when it touches memory that is still at the source.
//!
//! Memory filled with a pattern is exported, by this process or by `pcbench serve` on another host,
//! and threads touch every page of its copy once, over real userfaultfd, while it is trapped. A
//! *stall* is a touch that took longer than 1 µs; a touch of a page that was there takes a tenth of
//! that.

mod floor;
mod forms;
mod report;
mod run;
mod source;
mod table;
mod touch;
mod verdict;

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use postcopy_engine::memory::{GuestMemory, MemoryLayout, PAGE_SIZE};
use postcopy_engine::pager::{Landing, PagerConfig, Shards};
use postcopy_engine::planner::Policy;
use postcopy_engine::session::SourceTls;
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::drain::DrainArgs;
use postcopy_tools::machine::Machine;
use postcopy_tools::trust::TrustArgs;
use postcopy_tools::{cli, size};
use postcopy_transport::{EndpointOptions, Transport};
use report::{Case, Rounds, raw_tag};
use serde::{Deserialize, Serialize};
use source::Source;

pub(crate) use self::report::{FaultReport, Faulted};
use crate::args::OutputArgs;
use crate::plan::seconds;
use crate::report::Outputs;
use crate::run::progress::Progress;
use crate::{Ended, Failure, connect, serve};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// Every page once, in an order without locality.
    Random,
    /// Ascending.
    Sequential,
    /// Every 16th page, then the ones after them, and so on.
    Strided,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
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
    pub(crate) background: DrainArgs,
    /// How long threads poll before they sleep. Default: 100.
    #[arg(long, value_name = "US")]
    pub(crate) spin: Option<u64>,
    /// Rounds of every case, interleaved; the figures are medians over them.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Give up when nothing has arrived for so many seconds.
    #[arg(long, default_value_t = 10.0, value_name = "S")]
    pub(crate) give_up_after: f64,
    #[command(flatten, next_help_heading = "TLS")]
    pub(crate) trust: TrustArgs,
    #[command(flatten, next_help_heading = "RDMA")]
    pub(crate) device: DeviceArgs,
    #[command(flatten, next_help_heading = "Report")]
    pub(crate) output: OutputArgs,
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

    /// Checks what was asked for; says how long to wait for anything to arrive.
    fn check(&self) -> anyhow::Result<Duration> {
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
        seconds("--give-up-after", self.give_up_after)
    }

    /// Where the memory is.
    ///
    /// Errors: the host is not known, or there is no room for memory here.
    fn source(&self, tls: Option<SourceTls>, patience: Duration) -> anyhow::Result<Source> {
        let Some(host) = &self.host else { return Source::here(self.bytes()) };
        Ok(Source::There { server: connect::resolve(host)?, patience, tls })
    }

    /// The names of all that is measured, in files and logs.
    fn tags(&self) -> Vec<String> {
        let transport = self.transport.name();
        let cases = self.cases();
        std::iter::once(raw_tag(transport)).chain(cases.iter().map(|case| case.tag(transport))).collect()
    }

    fn pager(&self, case: Case) -> PagerConfig {
        let planner = self.background.planner(case.policy.unwrap_or_default());
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

/// Runs `pcbench fault`.
pub(crate) fn fault(args: &FaultArgs) -> Ended {
    let patience = args.check().map_err(Failure::Usage)?;
    let tls = args.trust.read().map_err(|error| Failure::Usage(error.into()))?;
    let outputs = Outputs::open(&args.output, args.tags()).map_err(Failure::Usage)?;
    args.transport.available().map_err(anyhow::Error::from)?;
    let source = args.source(tls, patience)?;
    let report = FaultReport::new(args, measure(args, &source, patience)?)?;
    outputs.write(&report)?;
    cli::print(&report.text(args.output.format())?).map_err(anyhow::Error::from)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &FaultArgs, source: &Source, patience: Duration) -> anyhow::Result<Rounds> {
    let (environment, begun, epoch) = (Machine::here(), SystemTime::now(), Instant::now());
    let (mut raw, mut bulk_mb_s, mut server) = (Vec::new(), Vec::new(), None);
    let mut cases: Vec<_> = args.cases().into_iter().map(|case| (case, Vec::new())).collect();
    let mut progress = Progress::new(args.output.quiet, (cases.len() + 1) * args.rounds as usize);
    for round in 0..args.rounds {
        progress.next(round, "raw reads");
        let floor = floor::measure(args, source, patience, epoch)?;
        raw.push(floor.reads);
        bulk_mb_s.push(floor.bulk_mb_s);
        server = floor.server;
        for (case, turns) in &mut cases {
            progress.next(round, format_args!("faults by {}", case.words().join(", drain ")));
            turns.push(run::run(args, *case, source, patience, epoch)?);
        }
    }
    progress.end();
    Ok(Rounds { begun, epoch, environment, server, raw, bulk_mb_s, cases })
}

fn guest_memory(bytes: u64) -> anyhow::Result<GuestMemory> {
    GuestMemory::new(MemoryLayout::pc(bytes, 3 << 30)?).context("making guest memory")
}
