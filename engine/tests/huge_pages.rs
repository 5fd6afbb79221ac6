//! Memory that arrived in small pages is in huge ones afterwards, where that was asked for.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::time::{Duration, Instant};

use common::{check, empty, end_of, filled};
use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::pager::{
    Collapsed, FaultsTo, HugePages, Landing, Pager, PagerConfig, PagerState, Round, Shards, Trap,
};
use postcopy_transport::{EndpointOptions, HUGE_PAGE, HostMemory, Transport};

/// Pages of a huge page.
const HUGE: u64 = HUGE_PAGE as u64 / PAGE_SIZE;

/// A page that is a hole, in the second huge page.
const HOLE: u64 = HUGE + 7;

/// KiB of a mapping in huge pages, as the kernel says.
fn huge_kib(memory: &HostMemory) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:08x}-", memory.base().addr());
    let of_ours = smaps.split_once(&start).unwrap().1;
    let line = of_ours.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

/// A guest's memory that has all arrived, and its pager.
fn arrived(source: &GuestMemory, pages: u64, huge_pages: HugePages) -> (GuestMemory, Pager) {
    let options = EndpointOptions::default();
    let mut export = Export::new(Transport::Tcp, source, &options).unwrap();
    export.describe_pages(None).unwrap();
    let memory = empty(pages);
    let import = Import::new(Transport::Tcp, &memory, (Landing::InPlace, 1), &options).unwrap();
    let trap = Trap::register(&memory, FaultsTo::Pager, Shards::ONE).unwrap();
    let lanes = import.connect_local(&mut export, 1).unwrap();
    let config = PagerConfig { huge_pages, ..PagerConfig::default() };
    let pager = import.start(trap, lanes, export.regions(), Round::none(), config).unwrap();
    assert!(matches!(end_of(&pager).state, PagerState::Resident));
    (memory, pager)
}

/// Memory whose second huge page has a hole, and whose end is half of one.
fn with_a_hole() -> (GuestMemory, u64) {
    let pages = 4 * HUGE + HUGE / 2;
    let memory = empty(pages);
    for page in (0..pages).filter(|page| *page != HOLE) {
        let word = (page + 1).to_le_bytes();
        assert!(memory.guest().write(page * PAGE_SIZE, &word));
        assert!(memory.guest().write((page + 1) * PAGE_SIZE - 8, &word));
    }
    (memory, pages)
}

/// Waits until the work stands at so much.
fn collapsed(pager: &Pager, bytes: u64) -> Option<Collapsed> {
    let (status, begun) = (pager.status(), Instant::now());
    loop {
        let now = status.borrow().report.huge_pages;
        if now.bytes == bytes {
            return Some(now);
        }
        // A machine without this in its kernel, or without huge pages to spare.
        if now.refused_bytes > 0 {
            eprintln!("skipped: the kernel refused, {now:?}");
            return None;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{now:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_arrived_whole_is_in_huge_pages_and_every_byte_is_right() {
    let (source, pages) = with_a_hole();
    let (memory, mut pager) = arrived(&source, pages, HugePages::On);
    assert_eq!(huge_kib(memory.guest()), 0, "it arrives in small pages");
    // The guest goes on meanwhile.
    let guest = memory.guest().clone();
    pager.collapse();
    let written = std::thread::spawn(move || {
        for page in (0..pages).filter(|page| *page != HOLE) {
            assert!(guest.write(page * PAGE_SIZE + 100, &page.to_le_bytes()));
        }
    });
    let done = collapsed(&pager, 3 * HUGE_PAGE as u64);
    written.join().unwrap();
    // It goes on by itself: the pager is not needed, nor is its trap.
    drop(pager);
    if let Some(done) = done {
        assert_eq!((huge_kib(memory.guest()), done.refused_bytes), (3 * HUGE_PAGE as u64 / 1024, 0));
    }
    for page in 0..pages {
        let mut words = [[0; 8]; 3];
        let places = [0, 100, PAGE_SIZE - 8];
        for (word, place) in words.iter_mut().zip(places) {
            assert!(memory.guest().read(page * PAGE_SIZE + place, word));
        }
        let expected = if page == HOLE { [0; 3] } else { [page + 1, page, page + 1] };
        assert_eq!(words.map(u64::from_le_bytes), expected, "page {page}");
    }
}

#[test]
fn memory_stays_as_it_is_unless_it_is_asked_for_and_all_here() {
    let pages = HUGE + 3;
    let source = filled(pages);
    for huge_pages in [HugePages::Off, HugePages::Auto] {
        let (memory, mut pager) = arrived(&source, pages, huge_pages);
        pager.collapse();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(
            (huge_kib(memory.guest()), pager.status().borrow().report.huge_pages),
            (0, Collapsed::default())
        );
        (0..pages).for_each(|page| check(memory.guest(), page));
    }
    assert_eq!(HugePages::Auto.resolved(true), HugePages::On);
    assert_eq!(HugePages::Auto.resolved(false), HugePages::Off);
    assert_eq!(HugePages::Off.resolved(true), HugePages::Off);
}
