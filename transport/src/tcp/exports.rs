//! What the responders of one exporter share: the memory that they serve, and whether bulk is under way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::wire::Request;
use crate::memory::HostMemory;

/// Bulk reads are under way for so long after the last was asked for.
const BULK_LASTS: Duration = Duration::from_millis(2);

/// Memory that responders may serve, each with the key that opens it.
pub(crate) struct Exports {
    regions: Vec<(u64, HostMemory)>,
    begun: Instant,
    /// When a bulk read was asked for last, in µs after `begun`. Never: 0.
    bulk_at: AtomicU64,
}

impl Exports {
    pub(crate) fn new(regions: Vec<(u64, HostMemory)>) -> Self {
        Self { regions, begun: Instant::now(), bulk_at: AtomicU64::new(0) }
    }

    /// Each memory with its key, in the order in which they were given.
    pub(crate) fn regions(&self) -> &[(u64, HostMemory)] {
        &self.regions
    }

    /// The memory that a request may read, if key and bounds are right.
    pub(super) fn find(&self, request: &Request) -> Option<&HostMemory> {
        let (_, memory) = self.regions.iter().find(|(key, _)| *key == request.key.get())?;
        memory.at(request.addr.get(), request.len.get() as usize)?;
        Some(memory)
    }

    /// A bulk read was asked for now.
    pub(super) fn note_bulk(&self) {
        self.bulk_at.store(self.now_us().max(1), Ordering::Relaxed);
    }

    /// True while bulk reads are under way, on any lane.
    pub(super) fn is_drained(&self) -> bool {
        match self.bulk_at.load(Ordering::Relaxed) {
            0 => false,
            // Another thread may have noted it after this one looked at the clock.
            at => self.now_us().saturating_sub(at) < BULK_LASTS.as_micros() as u64,
        }
    }

    fn now_us(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_is_under_way_from_its_first_read_until_some_time_after_its_last() {
        let exports = Exports::new(Vec::new());
        assert!(!exports.is_drained());
        let noted = Instant::now();
        exports.note_bulk();
        let seen = exports.is_drained();
        assert!(seen || noted.elapsed() >= BULK_LASTS, "bulk that was asked for just now");
        std::thread::sleep(BULK_LASTS * 2);
        assert!(!exports.is_drained());
    }
}
