//! Huge pages again, for memory that has arrived in small ones.
//!
//! Pages arrive and are published one by one, so whatever backed the guest's memory at the source,
//! here it is small pages. Once all are here, a thread that rests half of the time asks the kernel to put
//! those of each huge page together (MADV_COLLAPSE): the guest then misses the TLB less, at the price of
//! copying its memory once. A huge page with a hole is left alone, as it would take memory that the
//! guest never had.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use postcopy_transport::{HUGE_PAGE, HostMemory, hugetlbfs_page};
use serde::{Deserialize, Serialize};

use super::board::Board;
use crate::proc_pages::each_field;

/// Refusals in a row after which no more are asked for.
const MAX_REFUSED: u32 = 16;

/// Whether memory that has arrived is put together to huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// If it was on huge pages at the source.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl HugePages {
    /// The choice, knowing how it was at the source.
    pub fn resolved(self, at_source: bool) -> Self {
        match self {
            Self::Auto if at_source => Self::On,
            Self::Auto => Self::Off,
            chosen => chosen,
        }
    }
}

/// How much was put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collapsed {
    /// Bytes that are in huge pages now.
    pub bytes: u64,
    /// Bytes of whole huge pages that the kernel refused to put together.
    pub refused_bytes: u64,
}

/// Whether the memory is hugetlbfs, or most of what is mapped of it here is in huge pages.
///
/// Errors: /proc does not say.
pub(crate) fn is_huge(memory: &HostMemory) -> io::Result<bool> {
    for (file, _) in memory.files() {
        if hugetlbfs_page(file)?.is_some() {
            return Ok(true);
        }
    }
    let (mut resident, mut huge) = (0, 0);
    each_field(std::process::id() as i32, memory.addresses(), |name, mut values| {
        let mut kib = || values.next().and_then(|value| value.parse::<u64>().ok()).unwrap_or_default();
        match name {
            "Rss:" => resident += kib(),
            "ShmemPmdMapped:" | "FilePmdMapped:" => huge += kib(),
            _ => {}
        }
    })?;
    Ok(huge > 0 && 2 * huge >= resident)
}

/// Starts to put `memory` together, which is no longer trapped, and tells on `board` how far it is.
/// Ends when nobody else holds the memory any more.
///
/// Errors: the system refuses a thread.
pub(super) fn begin(memory: HostMemory, board: Arc<Board>) -> io::Result<()> {
    let work = move || {
        let (collapsed, last) = collapse(&memory, |collapsed| board.collapsed(collapsed));
        let (mib, refused_mib) = (collapsed.bytes >> 20, collapsed.refused_bytes >> 20);
        match last {
            None => tracing::info!(mib, refused_mib, "memory is in huge pages again"),
            Some(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!("memory stays in small pages: this kernel cannot collapse it (Linux 6.1 can)");
            }
            Some(error) => tracing::warn!(mib, refused_mib, %error, "not all memory is in huge pages again"),
        }
    };
    std::thread::Builder::new().name("huge-pages".into()).spawn(work).map(drop)
}

/// Puts every whole huge page of `memory` together: how much, and the last refusal.
fn collapse(memory: &HostMemory, tell: impl Fn(Collapsed)) -> (Collapsed, Option<io::Error>) {
    let (mut done, mut last, mut in_a_row) = (Collapsed::default(), None, 0);
    let mut at = 0;
    loop {
        let content = match memory.next_content(at) {
            Ok(Some(content)) => content,
            Ok(None) => return (done, last),
            Err(error) => return (done, Some(error)),
        };
        let huge = HUGE_PAGE as u64;
        let end = content.end.min(memory.len() as u64);
        for page in (content.start.next_multiple_of(huge)..end).step_by(HUGE_PAGE) {
            if memory.is_last() || page + huge > end {
                break;
            }
            let begun = Instant::now();
            let put_together = memory.collapse(page);
            let took = begun.elapsed();
            match put_together {
                Ok(()) => {
                    done.bytes += huge;
                    in_a_row = 0;
                }
                Err(error) => {
                    done.refused_bytes += huge;
                    in_a_row += 1;
                    let hopeless = error.raw_os_error() == Some(libc::EINVAL) || in_a_row == MAX_REFUSED;
                    last = Some(error);
                    if hopeless {
                        tell(done);
                        return (done, last);
                    }
                }
            }
            tell(done);
            // Half of a processor, at the usual priority: a thread of a lower one would be kept from running
            // while it holds the lock of the address space, which the guest's faults need.
            std::thread::sleep(took);
        }
        if memory.is_last() {
            return (done, last);
        }
        at = content.end;
    }
}
