//! One-sided reads of a peer's memory, over shared memory, TCP or RDMA verbs.
//!
//! What it is: the seam between the paging engine and a wire. An [`Exporter`] registers memory
//! read-only and stays passive; an [`Importer`] registers the memory that reads land in and opens
//! *lanes*. A [`Lane`] is a queue of one-sided reads: post a batch, poll completions, wait on a
//! descriptor.
//!
//! What it is not: it knows no pages, no guests and no session. How the set-up blobs travel
//! between the two sides is the caller's business.
//!
//! ```text
//!   Importer ── request blob ──▶ Exporter          (carried by the caller's control channel)
//!   Importer ◀── grant blob ──── Exporter
//!      │                            │
//!    Lane ═════ one-sided reads ═════╛             (no control channel on this path)
//! ```

mod endpoint;
mod error;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
mod lane;
mod memory;
mod region;
mod sched;
pub mod shm;
#[cfg(feature = "sim")]
pub mod sim;
mod striped;
pub mod tcp;
#[cfg(feature = "rdma")]
pub mod verbs;

pub use endpoint::{
    AnyLane, DEFAULT_SPIN, EndpointOptions, Exporter, Importer, LaneRequest, MAX_PATHS, Transport,
};
pub use error::{LaneError, ReadError, SetupError};
pub use lane::{Completion, Lane, LaneClass, Read, Token};
pub use memory::{HUGE_PAGE, HostMemory, hugetlbfs_page};
pub use region::{LocalRegion, LocalSlice, MAX_READ, RemoteRegion, RemoteSlice};
pub use sched::{go_first, is_crowded};
pub use striped::Striped;
