//! The paper's counters.

use serde::{Deserialize, Serialize};

use super::Why;

/// Counts of pages, by how they came and what faults found.
///
/// userfaultfd tells of a touch only while the page is not published. So the engine sees a minor
/// fault, and a prepage hit, where the touch came before the publication: those are the hits that
/// the prepaging nearly missed. Touches of published pages are seen by nobody; the simulation,
/// which has the guest's trace, counts them too (`bench/README.md`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Faults that went to the wire.
    pub network_faults: u64,
    /// Faults on a page in flight, or resident by the time they were seen, or here since the round of
    /// pre-copy.
    pub minor_faults: u64,
    /// Faults on a page known to be zero: answered without the wire.
    pub zero_faults: u64,
    /// Pages brought by the background drain.
    pub drain_pages: u64,
    /// Pages brought ahead of a fault by prepaging.
    pub prepage_pages: u64,
    /// Pages brought because the guest had touched them just before it was stopped.
    #[serde(default)]
    pub recent_pages: u64,
    /// Minor faults on a page that was in flight as a prepage.
    #[serde(default)]
    pub prepage_hits: u64,
    /// Pages brought by faults.
    pub fault_pages: u64,
    /// Pages that never crossed, being zero.
    pub zero_pages: u64,
    /// Pages that had crossed before the guest was stopped, in the round of pre-copy, and were not written
    /// since.
    #[serde(default)]
    pub kept_pages: u64,
    /// Pages that never crossed, because the guest gave them back before.
    #[serde(default)]
    pub discarded_pages: u64,
}

impl PageCounts {
    /// Adds what another planner counted.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self {
            network_faults,
            minor_faults,
            zero_faults,
            drain_pages,
            prepage_pages,
            recent_pages,
            prepage_hits,
            fault_pages,
            zero_pages,
            kept_pages,
            discarded_pages,
        } = other;
        self.network_faults += network_faults;
        self.minor_faults += minor_faults;
        self.zero_faults += zero_faults;
        self.drain_pages += drain_pages;
        self.prepage_pages += prepage_pages;
        self.recent_pages += recent_pages;
        self.prepage_hits += prepage_hits;
        self.fault_pages += fault_pages;
        self.zero_pages += zero_pages;
        self.kept_pages += kept_pages;
        self.discarded_pages += discarded_pages;
    }

    /// The counter of pages brought for this reason.
    pub(super) fn pages_brought(&mut self, why: Why) -> &mut u64 {
        match why {
            Why::Fault => &mut self.fault_pages,
            Why::Prepage => &mut self.prepage_pages,
            Why::Recent => &mut self.recent_pages,
            Why::Drain => &mut self.drain_pages,
        }
    }
}
