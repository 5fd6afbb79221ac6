//! What the tests of the fault path share: memory whose every page can be told from every other,
//! and waiting for a pager's end.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report
#![allow(dead_code)] // each test program uses a part

use std::time::Duration;

use postcopy_engine::memory::{GuestMemory, MemoryLayout, PAGE_SIZE};
use postcopy_engine::pager::{Landing, Pager, PagerState, PagerStatus, Shards};
use postcopy_transport::{HostMemory, Transport};

/// Content of a page: zero for every third, else different in every word.
pub(crate) fn content(page: u64) -> Vec<u8> {
    let mut bytes = vec![0u8; PAGE_SIZE as usize];
    if !page.is_multiple_of(3) {
        for (at, word) in bytes.chunks_mut(8).enumerate() {
            let value = (page << 32 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// Guest memory of so many pages, all holes.
pub(crate) fn empty(pages: u64) -> GuestMemory {
    GuestMemory::new(MemoryLayout::pc(pages * PAGE_SIZE, 3 << 30).unwrap()).unwrap()
}

/// Guest memory of so many pages with their [`content`].
pub(crate) fn filled(pages: u64) -> GuestMemory {
    let memory = empty(pages);
    for page in 0..pages {
        // A hole stays a hole, so that both kinds of zero page are met.
        if page % 3 != 0 || page % 2 == 0 {
            assert!(memory.guest().write(page * PAGE_SIZE, &content(page)));
        }
    }
    memory
}

/// Checks every byte of a page.
pub(crate) fn check(memory: &HostMemory, page: u64) {
    let mut bytes = vec![0u8; PAGE_SIZE as usize];
    assert!(memory.read(page * PAGE_SIZE, &mut bytes));
    assert!(bytes == content(page), "page {page}");
}

/// The transports that this machine has.
pub(crate) fn available() -> impl Iterator<Item = Transport> {
    Transport::ALL.into_iter().filter(|transport| transport.available().is_ok())
}

/// How a destination is set up.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Setup {
    pub(crate) shards: Shards,
    pub(crate) landing: Landing,
}

/// The same, each with one shard and with several, and with pages landing in place and in a pool.
pub(crate) fn available_setups() -> impl Iterator<Item = (Transport, Setup)> {
    let setups = [(1, Landing::InPlace), (3, Landing::InPlace), (1, Landing::Pool), (3, Landing::Pool)];
    let setup = |(count, landing)| Setup { shards: Shards::new(count).unwrap(), landing };
    available().flat_map(move |transport| setups.map(setup).map(|setup| (transport, setup)))
}

/// Waits until the pager has ended, however.
pub(crate) fn end_of(pager: &Pager) -> PagerStatus {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut status = pager.status();
    let ended = status.wait_for(|status| !matches!(status.state, PagerState::Running));
    let ended = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), ended).await });
    ended.expect("the pager ends").unwrap().clone()
}

/// What [`touch`] writes at the start of every seventh page.
const MARK: &[u8] = b"written at the destination";

/// Touches all pages in an order of its own, where others may be at it: checks each for what is `expected` there, and marks
/// every seventh.
pub(crate) fn touch(memory: &GuestMemory, expected: impl Fn(u64) -> Vec<u8>, thread: u64) {
    let (guest, pages) = (memory.guest(), memory.layout().total_pages());
    for step in 0..pages {
        let page = (step * 1_009 + thread * 777) % pages;
        let mut seen = vec![0; PAGE_SIZE as usize];
        assert!(guest.read(page * PAGE_SIZE, &mut seen));
        let from = if page.is_multiple_of(7) { MARK.len() } else { 0 };
        assert!(seen[from..] == expected(page)[from..], "page {page}");
        if page.is_multiple_of(7) {
            assert!(guest.write(page * PAGE_SIZE, MARK));
        }
    }
}

/// Every page is what is `expected` there, but for what [`touch`] has written.
pub(crate) fn assert_marked(memory: &GuestMemory, expected: impl Fn(u64) -> Vec<u8>) {
    for page in 0..memory.layout().total_pages() {
        let mut seen = vec![0; PAGE_SIZE as usize];
        assert!(memory.guest().read(page * PAGE_SIZE, &mut seen));
        let mut expected = expected(page);
        if page.is_multiple_of(7) {
            expected[..MARK.len()].copy_from_slice(MARK);
        }
        assert!(seen == expected, "page {page} at the end");
    }
}
