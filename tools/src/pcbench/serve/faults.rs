//! What `pcbench fault` on another host needs beside the memory: its page map, filled when told.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{bail, ensure};
use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::pagemap::{Of, PageMap};
use postcopy_tools::size;
use postcopy_transport::HostMemory;

use crate::exchange::{self, Order, Paging, receive};

/// Longest that a reader can have the server's lanes poll: what a stranger may cost.
const MAX_SPIN: Duration = Duration::from_millis(10);

/// An empty page map of the memory that a reader asks for.
///
/// Errors: there is not as much, or it is not whole pages.
pub(super) fn page_map(paging: Paging, memory: &HostMemory) -> anyhow::Result<PageMap> {
    let (asked, offered) = (paging.memory, memory.len() as u64);
    ensure!(
        asked > 0 && asked.is_multiple_of(PAGE_SIZE),
        "{asked} bytes of memory are not whole pages of 4K"
    );
    ensure!(
        asked <= offered,
        "{} of memory is more than the {} that this server offers; ask for less with --memory, or raise it there \
         with `pcbench serve --memory`",
        size::short(asked),
        size::short(offered)
    );
    Ok(PageMap::new(asked / PAGE_SIZE)?)
}

/// How long urgent lanes poll, if the reader said so.
pub(super) fn spin(paging: Paging) -> Option<Duration> {
    paging.spin_us.map(|spin| Duration::from_micros(spin.into()).min(MAX_SPIN))
}

/// Follows the reader's orders until it closes the connection.
///
/// Errors: an order that makes no sense.
pub(super) fn obey(stream: &mut TcpStream, map: &mut PageMap, memory: &HostMemory) -> anyhow::Result<()> {
    let mut described = false;
    loop {
        // A reset is an end like another: the reader was killed.
        let Ok(Some(line)) = receive(stream, None) else { return Ok(()) };
        match exchange::parse(&line)? {
            Order::Describe if !described => map.fill(memory, Of::Frozen(None))?,
            _ => bail!("an order out of turn"),
        }
        described = true;
    }
}
