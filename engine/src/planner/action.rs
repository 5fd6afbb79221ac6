//! What a planner has its pager do, and why.

use serde::{Deserialize, Serialize};

use super::pages::Run;
use crate::memory::PageIndex;

/// Which of a shard's two lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LaneId {
    /// Faults.
    Urgent,
    /// Everything else.
    Bulk,
}

/// Why a run is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The guest waits for it.
    Fault,
    /// It lies where the guest is expected to go.
    Prepage,
    /// The guest touched it just before it was frozen.
    Recent,
    /// It is next in the order of the pages.
    Drain,
}

impl Why {
    /// The lane that it is read over.
    pub fn lane(self) -> LaneId {
        if self == Why::Fault { LaneId::Urgent } else { LaneId::Bulk }
    }
}

/// What the pager has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read a run into the landing mapping.
    Read(Why, Run),
    /// Publish a run that has landed, and wake who waits for it.
    Publish(Run),
    /// Publish a page of zeros, and wake who waits for it.
    PublishZero(PageIndex),
    /// Publish a run that landed in the round of pre-copy, and wake who waits for it.
    PublishKept(Run),
    /// Wake who waits for a page that is there.
    Wake(PageIndex),
    /// Every page is here, published or not, or known to be zero: let go of the memory.
    Done,
}
