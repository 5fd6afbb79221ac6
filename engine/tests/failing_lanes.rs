//! The pager itself, over real userfaultfd, with lanes of which the Nth call fails: it ends with a
//! clean error, and whatever it has published by then is whole.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::os::unix::fs::FileExt;
use std::time::Duration;

use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::{GuestMemory, MemoryLayout, PAGE_SIZE};
use postcopy_engine::pager::{Pager, PagerConfig, PagerError, PagerState, Trap};
use postcopy_transport::sim::Countdown;
use postcopy_transport::{EndpointOptions, Transport};

const PAGES: u64 = 256;

fn guest() -> GuestMemory {
    GuestMemory::new(MemoryLayout::pc(PAGES * PAGE_SIZE, 3 << 30).unwrap()).unwrap()
}

fn content(page: u64) -> Vec<u8> {
    (0..PAGE_SIZE / 8).flat_map(|word| (page << 32 | word | 1 << 63).to_le_bytes()).collect()
}

/// A pager over shared memory whose lanes fail at their `nth` call, and its guest.
fn start(export: &mut Export, nth: u64) -> (GuestMemory, Pager) {
    let (memory, options) = (guest(), EndpointOptions::default());
    let trap = Trap::register(&memory).unwrap();
    let import = Import::new(Transport::Shm, &memory, &options).unwrap();
    let (requests, blobs) = import.request().unwrap();
    let grants = blobs.map(|blob| export.grant(&blob).unwrap());
    let lanes = import.connect(requests, &grants, [None, None]).unwrap();
    let lanes = lanes.map(|lane| Countdown::new(lane, nth));
    let pager = import.start(trap, lanes, export.regions(), PagerConfig::default()).unwrap();
    (memory, pager)
}

fn end_of(pager: &Pager) -> PagerState {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut status = pager.status();
    let ended = status.wait_for(|status| !matches!(status.state, PagerState::Running));
    let ended = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), ended).await });
    ended.expect("the pager ends").unwrap().state.clone()
}

/// The pages that the guest would see now, by /proc/self/pagemap: looking at others would wait.
fn published(memory: &GuestMemory) -> Vec<u64> {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; PAGES as usize * 8];
    pagemap.read_exact_at(&mut entries, memory.guest().base() as u64 / PAGE_SIZE * 8).unwrap();
    let present = |entry: &[u8]| u64::from_le_bytes(entry.try_into().unwrap()) >> 63 == 1;
    (0..PAGES).filter(|page| present(&entries[*page as usize * 8..][..8])).collect()
}

#[test]
fn whichever_call_fails_the_pager_says_so_and_what_it_published_is_whole() {
    let source = guest();
    assert!((0..PAGES).all(|page| source.guest().write(page * PAGE_SIZE, &content(page))));
    let mut export = Export::new(Transport::Shm, &source, &EndpointOptions::default()).unwrap();
    export.describe_pages().unwrap();
    let mut seen = 0;
    for nth in (1..40).chain((40..400).step_by(9)) {
        let (memory, pager) = start(&mut export, nth);
        let end = end_of(&pager);
        let pages = published(&memory);
        match end {
            PagerState::Failed(error) => {
                assert!(matches!(*error, PagerError::Lane { .. }), "call {nth}: {error}");
                assert!(error.to_string().contains("countdown"), "{error}");
            }
            PagerState::Resident => assert_eq!(pager.status().borrow().report.outstanding_pages, 0),
            other => panic!("call {nth}: {other:?}"),
        }
        for page in &pages {
            let mut bytes = vec![0; PAGE_SIZE as usize];
            assert!(memory.guest().read(page * PAGE_SIZE, &mut bytes));
            assert!(bytes == content(*page), "call {nth}: page {page} was published before it was whole");
        }
        seen += pages.len();
        drop(pager);
    }
    assert!(seen > 0, "nothing was ever published");
}
