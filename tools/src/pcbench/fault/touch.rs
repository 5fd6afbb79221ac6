//! The threads that touch what is trapped, and what they wait.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::pager::{FaultServer, Pager, PagerState, PagerStatus, SelfService};
use postcopy_transport::HostMemory;
use tokio::sync::watch;

use super::{Access, FaultArgs, Pattern};
use crate::run::recorder::{Interval, Recorder};

/// A touch that took this long or longer was a stall.
const STALL: Duration = Duration::from_micros(1);
/// How often it is looked whether pages still come.
const LOOK: Duration = Duration::from_millis(100);

/// The page that is touched in this step of so many.
pub(super) fn order(pattern: Pattern, step: u64, pages: u64) -> u64 {
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

/// Looks whether pages still come. A thread that waits for one that does not waits for ever, so
/// somebody else must say so.
pub(super) struct Watch {
    status: watch::Receiver<PagerStatus>,
    patience: Duration,
    seen: (u64, u64),
    since: Instant,
}

impl Watch {
    pub(super) fn new(pager: &Pager, patience: Duration) -> Self {
        Self { status: pager.status(), patience, seen: (0, 0), since: Instant::now() }
    }

    /// Errors: the pager has failed, or nothing has arrived for as long as patience lasts.
    fn look(&mut self) -> anyhow::Result<()> {
        let status = self.status.borrow();
        let now = (status.report.outstanding_pages, status.report.pages.network_faults);
        match &status.state {
            PagerState::Failed(error) => bail!("the pager failed: {error}"),
            PagerState::Running if now == self.seen => {
                ensure!(self.since.elapsed() < self.patience, "nothing has arrived for {:?}", self.patience);
            }
            _ => (self.seen, self.since) = (now, Instant::now()),
        }
        Ok(())
    }

    /// Waits until every page is here, and what the pager did.
    ///
    /// Errors: as [`Watch::look`].
    pub(super) fn resident(&mut self) -> anyhow::Result<PagerStatus> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let mut status = self.status.clone();
        loop {
            let ended = status.wait_for(|status| !matches!(status.state, PagerState::Running));
            if let Ok(ended) = runtime.block_on(async { tokio::time::timeout(LOOK, ended).await }) {
                let ended = ended?.clone();
                self.look()?;
                return Ok(ended);
            }
            self.look()?;
        }
    }
}

/// What a thread that touches has seen.
pub(super) struct Touched {
    pub(super) stalls: Vec<Interval>,
    /// When each of its touches was over.
    pub(super) at: Vec<Instant>,
}

/// Touches every page once, by a thread for each of `servers`; `epoch` is the beginning of the run.
///
/// Errors: as [`Watch::look`]; threads may be waiting for pages then.
pub(super) fn touch_all(
    args: &FaultArgs,
    guest: &HostMemory,
    servers: Vec<Option<FaultServer>>,
    watch: &mut Watch,
    epoch: Instant,
) -> anyhow::Result<Vec<Touched>> {
    let threads = servers.len();
    let start = Arc::new(Barrier::new(threads));
    let (ended, heard) = channel();
    for (thread, server) in servers.into_iter().enumerate() {
        let part = Part { args: args.clone(), guest: guest.clone(), thread, threads };
        let (start, ended) = (start.clone(), ended.clone());
        let touching = move || {
            drop(ended.send(part.touch(server, &start, epoch)));
        };
        std::thread::Builder::new().name("touch".into()).spawn(touching)?;
    }
    drop(ended);
    let mut all = Vec::with_capacity(threads);
    while all.len() < threads {
        match heard.recv_timeout(LOOK) {
            Ok(one) => all.push(one?),
            Err(RecvTimeoutError::Timeout) => watch.look()?,
            Err(RecvTimeoutError::Disconnected) => bail!("a touching thread panicked"),
        }
    }
    Ok(all)
}

/// What one thread touches: every so many-th step.
struct Part {
    args: FaultArgs,
    guest: HostMemory,
    thread: usize,
    threads: usize,
}

impl Part {
    fn touch(&self, server: Option<FaultServer>, start: &Barrier, epoch: Instant) -> anyhow::Result<Touched> {
        let pages = self.args.bytes() / PAGE_SIZE;
        let _service = server.map(SelfService::of_this_thread);
        let (mut stalls, mut at) =
            (Recorder::new(epoch)?, Vec::with_capacity((pages as usize).div_ceil(self.threads)));
        start.wait();
        for step in (self.thread as u64..pages).step_by(self.threads) {
            let offset = order(self.args.pattern, step, pages) * PAGE_SIZE;
            let begun = Instant::now();
            touch(&self.guest, offset, self.args.access);
            let over = Instant::now();
            let took = over.duration_since(begun);
            if took >= STALL {
                stalls.record(over, took.as_nanos() as u64)?;
            }
            at.push(over);
        }
        stalls.end(Instant::now());
        Ok(Touched { stalls: stalls.into_intervals(), at })
    }
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
