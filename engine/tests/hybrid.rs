//! A round of pre-copy and what follows, over real userfaultfd and every transport that this machine
//! has: what was written since the round began crosses again, what was not does not, and every byte of
//! every page is right.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{available_setups, check, content, empty, end_of, filled};
use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::page_set::PageSet;
use postcopy_engine::pagemap::Dirty;
use postcopy_engine::pager::{
    FaultsTo, Landing, Pager, PagerConfig, PagerError, PagerState, RoundWatch, SelfService, Shards, Trap,
};
use postcopy_transport::{EndpointOptions, HostMemory, Transport};

/// 16 MiB.
const PAGES: u64 = 4096;

/// What the guest does while the round goes on: every fifth page is written; of those some that had
/// content are zero afterwards, and some that were zero have some.
fn rewritten(page: u64) -> Option<Vec<u8>> {
    match page % 15 {
        0 => Some(content(page + 1)),
        5 => Some(vec![0; PAGE_SIZE as usize]),
        10 => Some(content(page * 2 + 3)),
        _ => None,
    }
}

fn check_moved(memory: &HostMemory, page: u64) {
    let Some(expected) = rewritten(page) else { return check(memory, page) };
    let mut bytes = vec![0; PAGE_SIZE as usize];
    assert!(memory.read(page * PAGE_SIZE, &mut bytes));
    assert!(bytes == expected, "page {page}, which was written during the round");
}

/// Writes to the source all the time until told to stop, and then what [`rewritten`] says.
fn guest_of(source: &GuestMemory, stop: &AtomicBool) {
    let mut turn = 0u64;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        for page in (0..PAGES).step_by(5) {
            assert!(source.guest().write(page * PAGE_SIZE + turn % 4000, &turn.to_le_bytes()));
        }
    }
    for (page, bytes) in (0..PAGES).filter_map(|page| Some((page, rewritten(page)?))) {
        assert!(source.guest().write(page * PAGE_SIZE, &bytes));
    }
}

fn written() -> PageSet {
    let mut dirty = PageSet::new(PAGES, false);
    (0..PAGES).step_by(5).for_each(|page| dirty.put(page, page + 1, true));
    dirty
}

fn dirty_log(dirty: Option<PageSet>) -> Dirty {
    Dirty { tell: Box::new(|| dirty), discards: false }
}

/// Moves memory in a round while a guest writes it, and freezes it. `told` is the trap's kind.
fn moved(
    transport: Transport,
    export: &mut Export,
    source: &GuestMemory,
    told: FaultsTo,
    shards: Shards,
) -> (GuestMemory, Pager, Import) {
    let memory = empty(PAGES);
    let trap = Trap::register(&memory, told, shards);
    let import = Import::new(transport, &memory, (Landing::InPlace, 1), &EndpointOptions::default()).unwrap();
    let mut lanes = import.connect_local(export, shards.count()).unwrap();
    let stop = AtomicBool::new(false);
    let round = std::thread::scope(|scope| {
        scope.spawn(|| guest_of(source, &stop));
        export.describe_running().unwrap();
        let watch = RoundWatch::default();
        let round = import.pre_copy(&mut lanes[0], export.regions(), None, &watch);
        stop.store(true, Ordering::Relaxed);
        assert_eq!(watch.pages_done(), PAGES, "{transport}");
        round.unwrap()
    });
    assert!(round.pages() > PAGES / 2 && round.pages() < PAGES, "{transport}: {round:?}");
    // The guest's freeze; the pager is there before, as in a session.
    let pager = import.start(trap.unwrap(), lanes, export.regions(), round, PagerConfig::default()).unwrap();
    export.describe_pages(Some(dirty_log(Some(written())))).unwrap();
    (memory, pager, import)
}

#[test]
fn what_was_written_during_the_round_crosses_again_and_nothing_else_does() {
    for (transport, setup) in available_setups().filter(|(_, setup)| setup.landing == Landing::InPlace) {
        let shards = setup.shards;
        let source = filled(PAGES);
        let mut export = Export::new(transport, &source, &EndpointOptions::default()).unwrap();
        let (memory, pager, _import) = moved(transport, &mut export, &source, FaultsTo::Pager, shards);
        std::thread::scope(|scope| {
            for thread in 0..2u64 {
                let guest = memory.guest().clone();
                scope.spawn(move || {
                    for step in 0..PAGES {
                        check_moved(&guest, (step * 1_009 + thread * 777) % PAGES);
                    }
                });
            }
        });
        let end = end_of(&pager);
        assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
        let counts = end.report.pages;
        let brought = counts.fault_pages + counts.prepage_pages + counts.drain_pages;
        assert_eq!(brought + counts.zero_pages + counts.kept_pages, PAGES, "{transport}: {counts:?}");
        // Faults that come before the map is here go to the wire whatever they touch.
        assert!(counts.kept_pages > PAGES / 4, "{transport}: {counts:?}");
        assert!(counts.drain_pages + counts.prepage_pages <= PAGES.div_ceil(5), "{transport}: {counts:?}");
        assert!(end.report.precopy_bytes >= end.report.precopy_pages * PAGE_SIZE);
        for page in 0..PAGES {
            check_moved(memory.guest(), page);
        }
    }
}

#[test]
fn threads_that_serve_themselves_take_kept_pages_without_the_wire() {
    for (transport, setup) in available_setups().filter(|(_, setup)| setup.landing == Landing::InPlace) {
        let shards = setup.shards;
        let source = filled(PAGES);
        let mut export = Export::new(transport, &source, &EndpointOptions::default()).unwrap();
        let (memory, pager, import) = moved(transport, &mut export, &source, FaultsTo::Threads, shards);
        // In a session the guest is resumed some time after it was frozen.
        let mut status = pager.status();
        let begun = std::time::Instant::now();
        while status.borrow_and_update().report.pages.kept_pages == 0 {
            assert!(
                begun.elapsed() < std::time::Duration::from_secs(10),
                "{transport}: {:?}",
                status.borrow()
            );
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let lanes: Vec<_> = (0..2).map(|_| import.connect_one_local(&mut export).unwrap()).collect();
        std::thread::scope(|scope| {
            for (thread, lane) in (0u64..).zip(lanes) {
                let (guest, pager) = (memory.guest().clone(), &pager);
                scope.spawn(move || {
                    let _service = SelfService::of_this_thread(pager.server(lane).unwrap());
                    for step in 0..PAGES {
                        check_moved(&guest, (step * 1_009 + thread * 777) % PAGES);
                    }
                });
            }
        });
        let end = end_of(&pager);
        assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
        assert!(end.report.pages.kept_pages > PAGES / 4, "{transport}: {:?}", end.report.pages);
        for page in 0..PAGES {
            check_moved(memory.guest(), page);
        }
    }
}

#[test]
fn a_source_that_cannot_tell_what_was_written_moves_it_all_again() {
    let source = filled(PAGES);
    let mut export = Export::new(Transport::Shm, &source, &EndpointOptions::default()).unwrap();
    let memory = empty(PAGES);
    let trap = Trap::register(&memory, FaultsTo::Pager, Shards::ONE).unwrap();
    let import =
        Import::new(Transport::Shm, &memory, (Landing::InPlace, 1), &EndpointOptions::default()).unwrap();
    let mut lanes = import.connect_local(&mut export, 1).unwrap();
    export.describe_running().unwrap();
    let round = import.pre_copy(&mut lanes[0], export.regions(), None, &RoundWatch::default()).unwrap();
    (0..PAGES).filter_map(|page| Some((page, rewritten(page)?))).for_each(|(page, bytes)| {
        assert!(source.guest().write(page * PAGE_SIZE, &bytes));
    });
    let pager = import.start(trap, lanes, export.regions(), round, PagerConfig::default()).unwrap();
    export.describe_pages(Some(dirty_log(None))).unwrap();
    let end = end_of(&pager);
    assert!(matches!(end.state, PagerState::Resident), "{:?}", end.state);
    assert_eq!(end.report.pages.kept_pages, 0);
    (0..PAGES).for_each(|page| check_moved(memory.guest(), page));
}

#[test]
fn a_round_that_nobody_waits_for_ends() {
    let source = filled(PAGES);
    let mut export = Export::new(Transport::Shm, &source, &EndpointOptions::default()).unwrap();
    let memory = empty(PAGES);
    let import =
        Import::new(Transport::Shm, &memory, (Landing::InPlace, 1), &EndpointOptions::default()).unwrap();
    let mut lanes = import.connect_local(&mut export, 1).unwrap();
    let watch = RoundWatch::default();
    // Nothing describes the source's pages: the round waits for that, until it is told to stop.
    std::thread::scope(|scope| {
        let round = scope.spawn(|| import.pre_copy(&mut lanes[0], export.regions(), None, &watch));
        watch.stop();
        assert!(matches!(round.join().unwrap(), Err(PagerError::RoundEnded)));
    });
}

#[test]
fn a_round_is_refused_where_pages_land_in_a_pool() {
    let source = filled(PAGES);
    let mut export = Export::new(Transport::Shm, &source, &EndpointOptions::default()).unwrap();
    let memory = empty(PAGES);
    let import =
        Import::new(Transport::Shm, &memory, (Landing::Pool, 1), &EndpointOptions::default()).unwrap();
    let mut lanes = import.connect_local(&mut export, 1).unwrap();
    export.describe_running().unwrap();
    let refused = import.pre_copy(&mut lanes[0], export.regions(), None, &RoundWatch::default());
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("--landing in-place"), "{said}");
}
