//! When what happened to the faults that went to the wire, where their time went, and who waited.

use std::time::Instant;

use hdrhistogram::Histogram;

use super::server::Stamps;
use super::waits::Waits;
use crate::memory::PageIndex;
use crate::stats::{Distribution, Latencies, Stages};

/// A fault that went to the wire, and when.
struct Fault {
    page: PageIndex,
    seen: Instant,
    posted: Option<Instant>,
}

/// The faults under way that the shard serves, and the stages of all that have been served.
#[derive(Default)]
pub(super) struct Timing {
    faults: Vec<Fault>,
    pub(super) stages: Stages,
    pub(super) latencies: Latencies,
    pub(super) waits: Waits,
    /// When the last page was published, once it was.
    pub(super) last_page: Option<Instant>,
}

impl Timing {
    /// A fault goes to the wire.
    pub(super) fn seen(&mut self, page: PageIndex, seen: Instant) {
        self.faults.push(Fault { page, seen, posted: None });
    }

    /// Reads of faults were posted, all but the last so many.
    pub(super) fn posted(&mut self, waiting: usize) {
        let now = Instant::now();
        let of_wire = self.faults.len().saturating_sub(waiting);
        for fault in self.faults[..of_wire].iter_mut().filter(|fault| fault.posted.is_none()) {
            fault.posted = Some(now);
        }
    }

    /// Pages that had completed are published.
    pub(super) fn published(&mut self, completed: Instant, resident: impl Fn(PageIndex) -> bool) {
        let published = Instant::now();
        let Self { faults, stages, latencies, .. } = self;
        faults.retain(|fault| {
            let resident = resident(fault.page);
            if let (true, Some(posted)) = (resident, fault.posted) {
                record(stages, latencies, Stamps { seen: fault.seen, posted, completed, published });
            }
            !resident
        });
    }

    /// A thread has served a fault of its own.
    pub(super) fn served(&mut self, stamps: Stamps) {
        record(&mut self.stages, &mut self.latencies, stamps);
    }
}

/// Neither locks nor allocates: faults wait behind it.
fn record(stages: &mut Stages, latencies: &mut Latencies, stamps: Stamps) {
    let Stamps { seen, posted, completed, published } = stamps;
    let add = |stage: &mut Histogram<u64>, latency: &mut Distribution, from: Instant, to: Instant| {
        let ns = to.saturating_duration_since(from).as_nanos() as u64;
        stage.saturating_record(ns);
        latency.record(ns);
    };
    add(&mut stages.post, &mut latencies.post, seen, posted);
    add(&mut stages.read, &mut latencies.read, posted, completed);
    add(&mut stages.install, &mut latencies.install, completed, published);
    add(&mut stages.total, &mut latencies.total, seen, published);
}
