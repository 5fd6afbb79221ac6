//! `pcbench fault`: what a thread waits when it touches memory that is still at the source.
//!
//! Both ends are in this process: memory filled with a pattern is exported, and threads touch every
//! page of its copy once, over real userfaultfd, while it is trapped. A *stall* is a touch that took
//! longer than [`STALL`]; a touch of a page that was there takes a tenth of that.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::{GuestMemory, MemoryLayout, PAGE_SIZE};
use postcopy_engine::pager::{FaultServer, Pager, PagerConfig, PagerState, PagerStatus, SelfService, Trap};
use postcopy_engine::stats::{PagerReport, Percentiles};
use postcopy_tools::{cli, size};
use postcopy_transport::{
    AnyLane, EndpointOptions, HostMemory, Importer, Lane, LaneClass, Read, Token, Transport,
};
use serde::Serialize;

use crate::{Ended, Failure};

/// A touch that took this long or longer was a stall.
const STALL: Duration = Duration::from_micros(1);
/// Raw reads measured before, as the floor.
const RAW_READS: u64 = 20_000;
/// How long the rest of memory may take after the last touch.
const PATIENCE: Duration = Duration::from_secs(600);

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

/// What to measure.
#[derive(Clone, Debug, Args)]
pub(crate) struct FaultArgs {
    /// Transport.
    #[arg(long, default_value = "tcp", value_name = "shm|tcp|verbs")]
    pub(crate) transport: Transport,
    /// Memory that is at the source.
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = size::parse)]
    pub(crate) memory: u64,
    /// Order of the touches.
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub(crate) pattern: Pattern,
    /// What a touch does.
    #[arg(long, value_enum, default_value_t = Access::Read)]
    pub(crate) access: Access,
    /// Threads that touch, each its own part.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) threads: u8,
    /// Threads serve their own faults, or the pager's thread does.
    #[arg(long, value_enum, default_value_t = Choice::Both)]
    pub(crate) self_service: Choice,
    /// With the background drain, or only what is touched.
    #[arg(long, value_enum, default_value_t = Choice::Both)]
    pub(crate) drain: Choice,
    /// How long threads poll before they sleep. Default: by the number of cores.
    #[arg(long, value_name = "US")]
    pub(crate) spin: Option<u64>,
    /// Rounds of every case, interleaved; the figures are medians over them.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl FaultArgs {
    fn endpoint(&self) -> EndpointOptions {
        EndpointOptions { spin: self.spin.map(Duration::from_micros), ..EndpointOptions::default() }
    }

    fn pager(&self) -> PagerConfig {
        match self.spin {
            Some(spin) => PagerConfig { spin: Duration::from_micros(spin) },
            None => PagerConfig::default(),
        }
    }
}

/// One case of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Case {
    self_service: bool,
    drain: bool,
}

/// What one case showed: the medians over its rounds.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    #[serde(flatten)]
    case: Case,
    /// Touches that stalled, of all.
    stalled: u64,
    touched: u64,
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
    memory_bytes: u64,
    pattern: Pattern,
    access: Access,
    threads: u8,
    rounds: u32,
    /// One raw 4 KiB read at a time on a lane of the same transport.
    raw_read: Percentiles,
    /// The same memory by reads of 64 KiB, as many in flight as the lane takes.
    raw_bulk_mb_s: f64,
    cases: Vec<Outcome>,
}

/// Runs `pcbench fault`.
pub(crate) fn fault(args: &FaultArgs) -> Ended {
    let whole = args.memory.is_multiple_of(PAGE_SIZE) && (1 << 20..=1 << 40).contains(&args.memory);
    if !whole {
        let wrong = anyhow::anyhow!("--memory takes whole pages of 4K, 1M to 1T, not {} bytes", args.memory);
        return Err(Failure::Usage(wrong));
    }
    let report = measure(args)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)? + "\n",
        false => table(&report),
    };
    cli::print(&text).map_err(anyhow::Error::from)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &FaultArgs) -> anyhow::Result<FaultReport> {
    args.transport.available()?;
    let source = guest_memory(args.memory)?;
    crate::pattern::fill(source.guest());
    let cases: Vec<Case> = (args.self_service.values().iter())
        .flat_map(|self_service| {
            let case = |drain: &bool| Case { self_service: *self_service, drain: *drain };
            args.drain.values().iter().map(case)
        })
        .collect();
    let mut rounds: Vec<Vec<Outcome>> = vec![Vec::new(); cases.len()];
    let (mut raw, mut bulk) = (Vec::new(), Vec::new());
    let shows = std::io::stderr().is_terminal();
    for round in 0..args.rounds {
        let (read, mb_s) = raw_reads(args.transport, &source)?;
        bulk.push(mb_s);
        for (case, outcomes) in cases.iter().zip(&mut rounds) {
            if shows {
                eprint!("\rpcbench: round {} of {}   ", round + 1, args.rounds);
            }
            outcomes.push(run(args, *case, &source, read.p50_us)?);
        }
        raw.push(read);
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
        memory_bytes: args.memory,
        pattern: args.pattern,
        access: args.access,
        threads: args.threads,
        rounds: args.rounds,
        raw_read: raw[raw.len() / 2],
        raw_bulk_mb_s: bulk[bulk.len() / 2],
        cases: rounds.iter_mut().map(middle).collect(),
    })
}

fn guest_memory(bytes: u64) -> anyhow::Result<GuestMemory> {
    GuestMemory::new(MemoryLayout::pc(bytes, 3 << 30)?).context("making guest memory")
}

/// The floor, on the same machine and wire: reads of 4 KiB one at a time, and all of memory in bulk.
fn raw_reads(transport: Transport, source: &GuestMemory) -> anyhow::Result<(Percentiles, f64)> {
    let memory = source.landing().clone();
    let options = EndpointOptions::default();
    let mut exporter = postcopy_transport::Exporter::new(transport, std::slice::from_ref(&memory), &options)?;
    let landing = HostMemory::anonymous("raw", memory.len())?;
    let importer = Importer::new(transport, std::slice::from_ref(&landing), &options)?;
    let (remote, local) = (exporter.regions()[0], importer.regions()[0]);
    let read = |at: u64, len: u32| {
        let slices = local.slice(at, len).zip(remote.slice(at, len));
        slices.and_then(|(local, remote)| Read::new(Token(at), local, remote)).context("a read past the end")
    };
    let mut bulk = importer.connect_local(&mut exporter, LaneClass::Bulk)?;
    // The first time populates the landing place.
    let mut rate = 0.0;
    for _ in 0..2 {
        let begun = Instant::now();
        move_all(&mut bulk, memory.len() as u64, &read)?;
        rate = memory.len() as f64 / begun.elapsed().as_secs_f64() / 1e6;
    }
    drop(bulk);
    let mut lane = importer.connect_local(&mut exporter, LaneClass::Urgent)?;
    let pages = memory.len() as u64 / PAGE_SIZE;
    let (mut histogram, mut done) = (histogram()?, Vec::new());
    for step in 0..RAW_READS {
        let at = order(Pattern::Random, step % pages, pages) * PAGE_SIZE;
        let begun = Instant::now();
        lane.post(&[read(at, PAGE_SIZE as u32)?])?;
        while done.is_empty() {
            lane.poll(&mut done)?;
        }
        histogram.saturating_record(begun.elapsed().as_nanos() as u64);
        done.clear();
    }
    Ok(((&histogram).into(), rate))
}

fn move_all(
    lane: &mut AnyLane,
    bytes: u64,
    read: &impl Fn(u64, u32) -> anyhow::Result<Read>,
) -> anyhow::Result<()> {
    const PIECE: u64 = 64 << 10;
    let (mut next, mut landed, mut done) = (0, 0, Vec::new());
    while landed < bytes {
        let mut reads = Vec::new();
        while next < bytes && reads.len() < lane.room() {
            let len = PIECE.min(bytes - next);
            reads.push(read(next, len as u32)?);
            next += len;
        }
        lane.post(&reads)?;
        lane.poll(&mut done)?;
        for completion in done.drain(..) {
            completion.result?;
            landed += PIECE.min(bytes - completion.token.0);
        }
    }
    Ok(())
}

fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_max(60_000_000_000, 3)?)
}

/// The page that is touched in this step of so many.
fn order(pattern: Pattern, step: u64, pages: u64) -> u64 {
    match pattern {
        Pattern::Sequential => step,
        // A step that has no factor in common with the number of pages meets each once.
        Pattern::Random => {
            let stride = (0x9e37_79b9..).find(|stride| gcd(*stride, pages) == 1);
            (step * stride.unwrap_or(1) + 0x5bd1) % pages
        }
        Pattern::Strided => {
            let (stride, whole) = (16, pages / 16);
            if step < whole * stride { step % whole * stride + step / whole } else { step }
        }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn run(args: &FaultArgs, case: Case, source: &GuestMemory, raw_p50_us: f64) -> anyhow::Result<Outcome> {
    let options = args.endpoint();
    let mut export = Export::new(args.transport, source, &options)?;
    let memory = guest_memory(args.memory)?;
    let trap = match case.self_service {
        true => Trap::register_for_self_service(&memory)?,
        false => Trap::register(&memory)?,
    };
    let import = Import::new(args.transport, &memory, &options)?;
    let lanes = import.connect_local(&mut export)?;
    let pager = import.start(trap, lanes, export.regions(), args.pager())?;
    let mut servers = Vec::new();
    for _ in 0..args.threads {
        servers.push(match case.self_service {
            true => Some(pager.server(import.connect_one_local(&mut export)?)),
            false => None,
        });
    }
    let begun = Instant::now();
    if case.drain {
        // Without a page map nothing is drained: only what is touched is read.
        export.describe_pages()?;
    }
    let stalls = touch_all(args, &memory, servers)?;
    let touched = begun.elapsed();
    let status = if case.drain { end_of(&pager)? } else { pager.status().borrow().clone() };
    let resident = if case.drain { begun.elapsed() } else { touched };
    if let PagerState::Failed(error) = &status.state {
        bail!("the pager failed: {error}");
    }
    verify(&memory, source)?;
    let stall = Percentiles::from(&stalls);
    Ok(Outcome {
        case,
        stalled: stalls.len(),
        touched: args.memory / PAGE_SIZE,
        stall,
        times_raw: stall.p50_us / raw_p50_us,
        resident_ms: resident.as_secs_f64() * 1e3,
        drain_mb_s: status.report.bulk_bytes as f64 / resident.as_secs_f64() / 1e6,
        pager: status.report,
    })
}

/// Touches every page once, by as many threads as asked for; the stalls of all.
fn touch_all(
    args: &FaultArgs,
    memory: &GuestMemory,
    servers: Vec<Option<FaultServer>>,
) -> anyhow::Result<Histogram<u64>> {
    let pages = args.memory / PAGE_SIZE;
    let threads = servers.len() as u64;
    let start = Barrier::new(servers.len());
    let all = std::thread::scope(|scope| {
        let spawn = |(thread, server): (usize, Option<FaultServer>)| {
            let (guest, start) = (memory.guest().clone(), &start);
            scope.spawn(move || {
                let _service = server.map(SelfService::of_this_thread);
                let mut stalls = histogram()?;
                start.wait();
                for step in (thread as u64..pages).step_by(threads as usize) {
                    let at = order(args.pattern, step, pages) * PAGE_SIZE;
                    let begun = Instant::now();
                    touch(&guest, at, args.access);
                    let took = begun.elapsed();
                    if took >= STALL {
                        stalls.saturating_record(took.as_nanos() as u64);
                    }
                }
                anyhow::Ok(stalls)
            })
        };
        let threads: Vec<_> = servers.into_iter().enumerate().map(spawn).collect();
        threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    let mut stalls = histogram()?;
    for one in all {
        stalls.add(one.map_err(|_| anyhow::anyhow!("a touching thread panicked"))??)?;
    }
    Ok(stalls)
}

/// A read of 8 bytes, or a write of the same 8 bytes.
fn touch(guest: &HostMemory, at: u64, access: Access) {
    let mut word = [0; 8];
    assert!(guest.read(at, &mut word), "the order stays inside memory");
    std::hint::black_box(&word);
    if access == Access::Write {
        assert!(guest.write(at, &word));
    }
}

fn end_of(pager: &Pager) -> anyhow::Result<PagerStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let mut status = pager.status();
    let ended = status.wait_for(|status| !matches!(status.state, PagerState::Running));
    let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, ended).await });
    Ok(ended.context("the drain does not end")??.clone())
}

/// Every byte of every page.
fn verify(memory: &GuestMemory, source: &GuestMemory) -> anyhow::Result<()> {
    let (mut here, mut there) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let len = memory.guest().len() as u64;
    for at in (0..len).step_by(1 << 20) {
        let piece = (len - at).min(1 << 20) as usize;
        let read =
            memory.guest().read(at, &mut here[..piece]) && source.guest().read(at, &mut there[..piece]);
        if !read || here[..piece] != there[..piece] {
            bail!("memory differs from the source's in the MiB at {at:#x}: a defect, please report it");
        }
    }
    Ok(())
}

fn table(report: &FaultReport) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let raw = &report.raw_read;
    let _ = writeln!(
        out,
        "{} of {} MiB, {:?} {:?}, {} thread(s), medians of {} rounds\n\
         raw 4 KiB read: p50 {:.1} µs, p99 {:.1} µs; raw bulk: {:.0} MB/s\n\n\
         {:<9} {:<5} {:>8} {:>8} {:>6} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8}",
        report.transport,
        report.memory_bytes >> 20,
        report.pattern,
        report.access,
        report.threads,
        report.rounds,
        raw.p50_us,
        raw.p99_us,
        report.raw_bulk_mb_s,
        "faults by",
        "drain",
        "stalls",
        "p50 µs",
        "× raw",
        "p90",
        "p99",
        "p99.9",
        "max",
        "resident",
        "MB/s",
    );
    for case in &report.cases {
        let stall = &case.stall;
        let _ = writeln!(
            out,
            "{:<9} {:<5} {:>8} {:>8.1} {:>6.2} {:>8.1} {:>8.1} {:>8.1} {:>9.1} {:>6.0} ms {:>8.0}",
            if case.case.self_service { "itself" } else { "handler" },
            if case.case.drain { "on" } else { "off" },
            case.stalled,
            stall.p50_us,
            case.times_raw,
            stall.p90_us,
            stall.p99_us,
            stall.p999_us,
            stall.max_us,
            case.resident_ms,
            case.drain_mb_s,
        );
    }
    out
}
