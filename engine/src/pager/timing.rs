//! When what happened to the faults that went to the wire, and where their time went.

use std::time::Instant;

use super::server::Stamps;
use crate::memory::PageIndex;
use crate::stats::Stages;

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
        let stages = &mut self.stages;
        self.faults.retain(|fault| {
            let resident = resident(fault.page);
            if let (true, Some(posted)) = (resident, fault.posted) {
                record(stages, Stamps { seen: fault.seen, posted, completed, published });
            }
            !resident
        });
    }

    /// A thread has served a fault of its own.
    pub(super) fn served(&mut self, stamps: Stamps) {
        record(&mut self.stages, stamps);
    }
}

fn record(stages: &mut Stages, stamps: Stamps) {
    let ns = |from: Instant, to: Instant| to.saturating_duration_since(from).as_nanos() as u64;
    stages.post.saturating_record(ns(stamps.seen, stamps.posted));
    stages.read.saturating_record(ns(stamps.posted, stamps.completed));
    stages.install.saturating_record(ns(stamps.completed, stamps.published));
    stages.total.saturating_record(ns(stamps.seen, stamps.published));
}
