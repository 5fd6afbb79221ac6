//! One round of one case: memory is trapped, touched, and compared with the pattern.

use std::time::{Duration, Instant};

use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::pager::{FaultServer, FaultsTo, Pager, PagerStatus, Round, Trap};
use postcopy_engine::stats::Percentiles;

use super::source::{Hold, Opened, Source};
use super::touch::{Watch, histogram, touch_all};
use super::{Case, FaultArgs, Outcome, guest_memory};
use crate::pattern;

/// Measures one case once.
///
/// Errors: it cannot be set up, the pager failed, nothing arrives in time, or the wrong bytes.
pub(super) fn run(
    args: &FaultArgs,
    case: Case,
    source: &Source,
    raw_p50_us: f64,
    patience: Duration,
) -> anyhow::Result<Outcome> {
    let memory = guest_memory(args.bytes())?;
    let told = if case.self_service { FaultsTo::Threads } else { FaultsTo::Pager };
    let trap = Trap::register(&memory, told, args.shards)?;
    let threads = usize::from(args.threads);
    let Opened { import, lanes, regions, mut hold } =
        source.open(args, &memory, trap.shards(), if case.self_service { threads } else { 0 })?;
    let pager = import.start(trap, lanes.shards, regions, Round::none(), args.pager(case))?;
    let mut servers: Vec<_> =
        lanes.servers.into_iter().map(|lane| pager.server(lane).map(Some)).collect::<Result<_, _>>()?;
    servers.resize_with(threads, || None);
    let watch = Watch::new(&pager, patience);
    let timed = match time(args, case, &memory, servers, &mut hold, watch) {
        Ok(timed) => timed,
        Err(error) => {
            // Threads may be waiting for pages, and must not see zeros; they end with this process.
            std::mem::forget(pager);
            return Err(error);
        }
    };
    let (status, _trap) = ended(pager, case, timed.resident);
    pattern::check_all(memory.guest())?;
    let (stall, resident) = (timed.stall, timed.took.as_secs_f64());
    let pages = &status.report.pages;
    let unasked = pages.prepage_pages + pages.drain_pages;
    let hits = timed.touched.saturating_sub(pages.network_faults);
    Ok(Outcome {
        case,
        stalled: stall.count,
        touched: args.bytes() / PAGE_SIZE,
        touched_pages: timed.touched,
        hit_pages: hits,
        wasted_pages: unasked.saturating_sub(hits),
        stall,
        times_raw: stall.p50_us / raw_p50_us,
        resident_ms: resident * 1e3,
        drain_mb_s: status.report.bulk_bytes as f64 / resident / 1e6,
        pager: status.report,
    })
}

/// What the touching threads saw.
struct Timed {
    stall: Percentiles,
    /// Until every page was here; without a drain, until every page was touched.
    took: Duration,
    /// Pages that had been touched by then.
    touched: u64,
    /// The pager's end, if there was a drain.
    resident: Option<PagerStatus>,
}

fn time(
    args: &FaultArgs,
    case: Case,
    memory: &GuestMemory,
    servers: Vec<Option<FaultServer>>,
    hold: &mut Hold,
    mut watch: Watch,
) -> anyhow::Result<Timed> {
    let begun = Instant::now();
    if case.drain {
        // Without a page map nothing is drained: only what is touched is read.
        hold.describe_pages()?;
    }
    let threads = touch_all(args, memory.guest(), servers, &mut watch)?;
    let all_touched = Instant::now();
    let mut stalls = histogram()?;
    threads.iter().try_for_each(|thread| stalls.add(&thread.stalls))?;
    let resident = case.drain.then(|| watch.resident()).transpose()?;
    let over = resident.as_ref().and_then(|status| status.last_page).unwrap_or(all_touched);
    let touched = threads.iter().map(|thread| thread.at.partition_point(|at| *at <= over) as u64).sum();
    Ok(Timed { stall: Percentiles::from(&stalls), took: over.duration_since(begun), touched, resident })
}

/// The pager's last status, which has all counts, and what keeps memory trapped that is not drained.
fn ended(pager: Pager, case: Case, resident: Option<PagerStatus>) -> (PagerStatus, Option<Trap>) {
    let status = pager.status();
    let trap = pager.stop();
    let status = resident.unwrap_or_else(|| status.borrow().clone());
    (status, (!case.drain).then_some(trap))
}
