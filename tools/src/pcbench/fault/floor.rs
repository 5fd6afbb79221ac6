//! The floor of `pcbench fault`, on the same machine and wire: reads of 4 KiB one at a time, and all
//! of memory in bulk.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use postcopy_engine::memory::PAGE_SIZE;
use postcopy_transport::{AnyLane, Completion, HostMemory, Lane, Read, Token};

use super::source::{Bare, Source};
use super::touch::order;
use super::{FaultArgs, Pattern};
use crate::pattern;
use crate::report::Server;
use crate::run::recorder::{Interval, Recorder};

/// Raw reads measured.
const RAW_READS: u64 = 20_000;
/// Bytes of a read in bulk.
const PIECE: u64 = 64 << 10;

/// What reads cost without a pager.
pub(super) struct Floor {
    /// Times of reads of 4 KiB.
    pub(super) reads: Vec<Interval>,
    pub(super) bulk_mb_s: f64,
    pub(super) server: Option<Server>,
}

/// Measures the floor; `epoch` is the beginning of the run.
///
/// Errors: lanes cannot be set up or fail, nothing arrives in time, or the wrong bytes.
pub(super) fn measure(
    args: &FaultArgs,
    source: &Source,
    patience: Duration,
    epoch: Instant,
) -> anyhow::Result<Floor> {
    let bytes = args.bytes();
    let landing = HostMemory::anonymous("raw", usize::try_from(bytes)?)?;
    let mut bare = source.open_bare(args, &landing)?;
    let Bare { bulk, urgent, remote, local, server, .. } = &mut bare;
    let read = |at: u64, len: u32| {
        let slices = local.slice(at, len).zip(remote.slice(at, len));
        slices.and_then(|(local, remote)| Read::new(Token(at), local, remote)).context("a read past the end")
    };
    // The first time populates the landing place.
    let mut bulk_mb_s = 0.0;
    for _ in 0..2 {
        let begun = Instant::now();
        move_all(bulk, bytes, patience, &read)?;
        bulk_mb_s = bytes as f64 / begun.elapsed().as_secs_f64() / 1e6;
    }
    pattern::check_all(&landing)?;
    let pages = bytes / PAGE_SIZE;
    let (mut recorder, mut done) = (Recorder::new(epoch)?, Vec::new());
    for step in 0..RAW_READS {
        let at = order(Pattern::Random, step % pages, pages) * PAGE_SIZE;
        let begun = Instant::now();
        urgent.post(&[read(at, PAGE_SIZE as u32)?])?;
        await_some(urgent, &mut done, patience)?;
        let now = Instant::now();
        recorder.record(now, now.duration_since(begun).as_nanos() as u64)?;
        done.drain(..).try_for_each(|completion| completion.result)?;
    }
    recorder.end(Instant::now());
    Ok(Floor { reads: recorder.into_intervals(), bulk_mb_s, server: server.take() })
}

/// Polls until something has completed.
fn await_some(lane: &mut AnyLane, done: &mut Vec<Completion>, patience: Duration) -> anyhow::Result<()> {
    let begun = Instant::now();
    for polls in 1u64.. {
        lane.poll(done)?;
        if !done.is_empty() {
            break;
        }
        // The clock costs as much as a poll: seldom.
        let late = polls.is_multiple_of(256) && begun.elapsed() > patience;
        ensure!(!late, "nothing has arrived for {patience:?}");
    }
    Ok(())
}

fn move_all(
    lane: &mut AnyLane,
    bytes: u64,
    patience: Duration,
    read: &impl Fn(u64, u32) -> anyhow::Result<Read>,
) -> anyhow::Result<()> {
    let (mut next, mut landed, mut done) = (0, 0, Vec::new());
    while landed < bytes {
        let mut reads = Vec::new();
        while next < bytes && reads.len() < lane.room() {
            let len = PIECE.min(bytes - next);
            reads.push(read(next, len as u32)?);
            next += len;
        }
        lane.post(&reads)?;
        await_some(lane, &mut done, patience)?;
        for completion in done.drain(..) {
            completion.result?;
            landed += PIECE.min(bytes - completion.token.0);
        }
    }
    Ok(())
}
