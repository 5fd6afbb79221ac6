//! One round of `pcbench fault`: the floor, and threads that touch what is trapped.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::pager::{FaultServer, Pager, PagerState, PagerStatus, SelfService, Trap};
use postcopy_engine::stats::Percentiles;
use postcopy_transport::{
    AnyLane, EndpointOptions, Exporter, HostMemory, Importer, Lane, LaneClass, Read, Token, Transport,
};

use super::{Access, Case, FaultArgs, Outcome, Pattern, guest_memory};

/// A touch that took this long or longer was a stall.
const STALL: Duration = Duration::from_micros(1);
/// Raw reads measured before, as the floor.
const RAW_READS: u64 = 20_000;
/// How long the rest of memory may take after the last touch.
const PATIENCE: Duration = Duration::from_secs(600);

/// The floor, on the same machine and wire: reads of 4 KiB one at a time, and all of memory in bulk.
pub(super) fn raw_reads(transport: Transport, source: &GuestMemory) -> anyhow::Result<(Percentiles, f64)> {
    let memory = source.landing().clone();
    let options = EndpointOptions::default();
    let mut exporter = Exporter::new(transport, std::slice::from_ref(&memory), &options)?;
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

pub(super) fn run(
    args: &FaultArgs,
    case: Case,
    source: &GuestMemory,
    raw_p50_us: f64,
) -> anyhow::Result<Outcome> {
    let options = args.endpoint();
    let mut export = Export::new(args.transport, source, &options)?;
    let memory = guest_memory(args.memory)?;
    let trap = match case.self_service {
        true => Trap::register_for_self_service(&memory)?,
        false => Trap::register(&memory)?,
    };
    let import = Import::new(args.transport, &memory, &options)?;
    let lanes = import.connect_local(&mut export)?;
    let pager = import.start(trap, lanes, export.regions(), args.pager(case))?;
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
    let (status, resident, _trap) = if case.drain {
        (end_of(&pager)?, begun.elapsed(), None)
    } else {
        let status = pager.status();
        // Its last status has all counts.
        let trap = pager.stop();
        (status.borrow().clone(), touched, Some(trap))
    };
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
