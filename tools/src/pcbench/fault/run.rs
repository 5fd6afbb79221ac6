//! One round of one case: memory is trapped, touched, and compared with the pattern.

use std::time::{Duration, Instant};

use postcopy_engine::memory::GuestMemory;
use postcopy_engine::pager::{FaultServer, FaultsTo, Pager, PagerStatus, Round, Trap};
use postcopy_engine::stats::PagerReport;

use super::source::{Hold, Opened, Source};
use super::touch::{Watch, touch_all};
use super::{Case, FaultArgs, guest_memory};
use crate::pattern;
use crate::run::recorder::Interval;

/// What one round of one case showed.
pub(super) struct Turn {
    /// Times of touches that stalled.
    pub(super) stalls: Vec<Interval>,
    /// When it began, since the run did.
    pub(super) begun: Duration,
    /// From then until every page was here; without a drain, until every page was touched.
    pub(super) resident: Duration,
    /// Pages that had been touched by then.
    pub(super) touched_pages: u64,
    pub(super) pager: PagerReport,
}

/// Measures one case once; `epoch` is the beginning of the run.
///
/// Errors: it cannot be set up, the pager failed, nothing arrives in time, or the wrong bytes.
pub(super) fn run(
    args: &FaultArgs,
    case: Case,
    source: &Source,
    patience: Duration,
    epoch: Instant,
) -> anyhow::Result<Turn> {
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
    let timed = match time(args, case, &memory, servers, (&mut hold, watch), epoch) {
        Ok(timed) => timed,
        Err(error) => {
            // Threads may be waiting for pages, and must not see zeros; they end with this process.
            std::mem::forget(pager);
            return Err(error);
        }
    };
    let (status, _trap) = ended(pager, case, timed.status);
    pattern::check_all(memory.guest())?;
    Ok(Turn { pager: status.report, ..timed.turn })
}

/// What the touching threads saw.
struct Timed {
    /// Of the pager it knows nothing yet.
    turn: Turn,
    /// The pager's end, if there was a drain.
    status: Option<PagerStatus>,
}

fn time(
    args: &FaultArgs,
    case: Case,
    memory: &GuestMemory,
    servers: Vec<Option<FaultServer>>,
    (hold, mut watch): (&mut Hold, Watch),
    epoch: Instant,
) -> anyhow::Result<Timed> {
    let begun = Instant::now();
    if case.drain {
        // Without a page map nothing is drained: only what is touched is read.
        hold.describe_pages()?;
    }
    let threads = touch_all(args, memory.guest(), servers, &mut watch, epoch)?;
    let all_touched = Instant::now();
    let status = case.drain.then(|| watch.resident()).transpose()?;
    let over = status.as_ref().and_then(|status| status.last_page).unwrap_or(all_touched);
    let turn = Turn {
        begun: begun.duration_since(epoch),
        resident: over.duration_since(begun),
        touched_pages: threads.iter().map(|thread| thread.at.partition_point(|at| *at <= over) as u64).sum(),
        stalls: threads.into_iter().flat_map(|thread| thread.stalls).collect(),
        pager: PagerReport::default(),
    };
    Ok(Timed { turn, status })
}

/// The pager's last status, which has all counts, and what keeps memory trapped that is not drained.
fn ended(pager: Pager, case: Case, resident: Option<PagerStatus>) -> (PagerStatus, Option<Trap>) {
    let status = pager.status();
    let trap = pager.stop();
    let status = resident.unwrap_or_else(|| status.borrow().clone());
    (status, (!case.drain).then_some(trap))
}
