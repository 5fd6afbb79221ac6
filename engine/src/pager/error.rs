//! What can go wrong with a pager.

use postcopy_transport::{LaneError, ReadError};

use crate::memory::PageIndex;

/// Why the pager stopped. The guest waits wherever it touched a page that is not there, until the pager
/// [goes on](super::Pager::go_on).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// This process may not use userfaultfd.
    #[error(
        "userfaultfd is refused ({source}): run as root, give this program CAP_SYS_PTRACE, or allow its \
         user to open /dev/userfaultfd (or set the sysctl vm.unprivileged_userfaultfd to 1)"
    )]
    UserfaultRefused {
        /// What the system said.
        source: std::io::Error,
    },
    /// A userfaultfd operation failed.
    #[error("{operation} failed: {source}")]
    Userfault {
        /// Which.
        operation: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A lane died.
    #[error("the {lane} lane failed{}: {source}; the guest waits for {outstanding} pages of its memory", at(*page))]
    Lane {
        /// The page whose read failed, where the device tells.
        page: Option<PageIndex>,
        /// urgent or bulk.
        lane: &'static str,
        /// Pages that had not arrived.
        outstanding: u64,
        /// Why.
        source: LaneError,
    },
    /// The lane of a thread that serves its own faults died.
    #[error("the lane of a thread that serves itself failed: {source}; the guest waits")]
    Server {
        /// Why.
        source: LaneError,
    },
    /// There was no memory for a page.
    #[error(
        "there is no memory left here for the guest's pages ({operation}: {source}); it waits: make room, and have the \
         source recover"
    )]
    NoRoom {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The source refused a read.
    #[error("the source refused to give page {page:?}: {source}")]
    Read {
        /// The first page of the read.
        page: PageIndex,
        /// Why.
        source: ReadError,
    },
    /// The source's memory is not what it said.
    #[error("the source broke the protocol: {0}")]
    Peer(&'static str),
    /// Nobody waits for the round of pre-copy any more.
    #[error("the round of pre-copy was ended early")]
    RoundEnded,
    /// The kernel reported a fault outside guest memory.
    #[error("a fault at {0:?}, outside guest memory")]
    StrayFault(PageIndex),
    /// The system refused something else.
    #[error("{operation} failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// It was in another process, which has ended.
    #[error("the process that brought the guest's memory has ended; the guest waits")]
    Left,
    /// The thread panicked: a bug in the engine.
    #[error("the pager thread panicked: {0}; the guest waits, please report this")]
    Panicked(String),
}

fn at(page: Option<PageIndex>) -> String {
    page.map(|page| format!(" at page {:#x}", page.0)).unwrap_or_default()
}

/// An error of the system's in this operation.
pub(super) fn failed(operation: &'static str) -> impl Fn(std::io::Error) -> PagerError {
    move |source| PagerError::System { operation, source }
}
