//! What a migration cost, as both sides report it.

use serde::{Deserialize, Serialize};

use super::message::Mode;
use super::query_migrate::QueryMigrate;
use crate::stats::PagerReport;

/// The destination's part, measured there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ArrivalReport {
    /// From the guest's resume to its last page resident.
    pub resident_us: u64,
    /// What the pager did.
    pub pager: PagerReport,
    /// How long each vCPU waited for pages, by number. Empty where the guest's threads are not known.
    pub vcpu_blocktime_us: Vec<u64>,
    /// Pages that the guest had touched by then.
    pub touched_pages: Option<u64>,
    /// The guest ended before all pages were resident, and needs none of them any more.
    pub guest_ended: bool,
}

/// The whole migration, as the source reports it. Times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Version of this report's fields.
    pub version: u32,
    /// The transport that was used.
    pub transport: String,
    /// Whether all pages crossed encrypted: over tcp, where both sides are set up for TLS.
    #[serde(default)]
    pub pages_encrypted: bool,
    /// When memory moved.
    #[serde(default)]
    pub mode: Mode,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Device state in bytes.
    pub state_bytes: u64,
    /// From the first connection to the freeze, the guest running.
    pub setup_us: u64,
    /// Of the setup: the round of pre-copy of a hybrid migration.
    #[serde(default)]
    pub precopy_us: u64,
    /// Pages whose place in an order by recency was told, where the destination asked for it. The others follow by
    /// address.
    #[serde(default)]
    pub ordered_pages: u64,
    /// From the freeze to the news that the guest runs at the destination. The guest's own
    /// downtime is shorter by the way of that message.
    pub downtime_us: u64,
    /// Of the downtime: stopping the guest and saving its state.
    pub freeze_us: u64,
    /// Of the downtime: loading the state at the destination.
    pub load_us: u64,
    /// From the guest's resume to its last page resident, measured at the destination.
    pub resident_us: u64,
    /// All of it: from the first connection to the last page.
    pub total_us: u64,
    /// Processor time, in all its threads, that the source's process has used from the news that the
    /// guest runs at the destination to the last page. What the kernel does for a device that is made of
    /// software is in nobody's account.
    #[serde(default)]
    pub source_cpu_us: u64,
    /// What the destination's pager did.
    pub pager: PagerReport,
    /// How long each vCPU waited for pages at the destination, by number: from when its faults were seen
    /// until they were served. Where KVM had a worker wait in the vCPU's stead, or the wait began while the
    /// source was lost, that is not in it. Empty
    /// where the vCPUs' threads are not known.
    #[serde(default)]
    pub vcpu_blocktime_us: Vec<u64>,
    /// Pages that the guest had touched at the destination when all were there: the paper's network faults and minor faults
    /// together. Those that are not in the pager's counts of faults were there in time. `None` where the virtual machine
    /// monitor does not tell.
    #[serde(default)]
    pub touched_pages: Option<u64>,
    /// The guest has ended at the destination, in order, before all of its memory had come there.
    #[serde(default)]
    pub guest_ended: bool,
    /// What of it QEMU has too, by QEMU's names.
    #[serde(default)]
    pub query_migrate: QueryMigrate,
}

/// Version of [`MigrationReport`].
pub const REPORT_VERSION: u32 = 1;

/// Where a migration stands, as seen from the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Connecting and preparing; the guest runs at the source.
    #[default]
    Setup,
    /// Its memory is read once; the guest runs at the source. In a hybrid migration.
    PreCopy,
    /// Its state is on the way; it is stopped for the last of it.
    Frozen,
    /// The destination was told to resume and has not confirmed: the guest is at neither side for
    /// certain.
    InDoubt,
    /// The guest runs at the destination; its memory follows.
    Draining,
    /// The guest runs at the destination, which cannot be heard, and is being reached again.
    Recovering,
    /// All of it is there.
    Resident,
}

impl Phase {
    /// Whether the guest runs at the source as ever: a migration that is dropped now has changed nothing.
    pub fn is_before_stop(self) -> bool {
        matches!(self, Self::Setup | Self::PreCopy)
    }
}

/// Progress for whoever watches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it stands.
    pub phase: Phase,
    /// What has arrived.
    pub pager: PagerReport,
    /// Microseconds from the first connection to the freeze, once it is frozen.
    #[serde(default)]
    pub setup_us: u64,
    /// Microseconds that the guest stood still, once it is resumed.
    #[serde(default)]
    pub downtime_us: u64,
    /// Microseconds from the first connection until this was said.
    #[serde(default)]
    pub total_us: u64,
}
