//! The fault path over real userfaultfd and every transport that this machine has: threads touch
//! guest memory while it is drained, and every byte of every page must be right.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::time::Duration;

use common::{Setup, available_setups, check, content, empty, end_of, filled};
use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE, PageIndex};
use postcopy_engine::pager::{
    FaultsTo, Landing, Pager, PagerConfig, PagerError, PagerState, PagerStatus, Round, Shards, Trap,
};
use postcopy_engine::planner::{Bandwidth, PlannerConfig, Run};
use postcopy_transport::{EndpointOptions, Transport};

/// 16 MiB.
const PAGES: u64 = 4096;

fn source(transport: Transport) -> (Export, GuestMemory) {
    let memory = filled(PAGES);
    (Export::new(transport, &memory, &EndpointOptions::default()).unwrap(), memory)
}

fn destination(transport: Transport, export: &mut Export, setup: Setup) -> (GuestMemory, Pager) {
    destination_whose(|_| {}, transport, export, setup, PagerConfig::default())
}

/// That with a trap that something is done to first.
fn destination_whose(
    trap_is: impl FnOnce(&Trap),
    transport: Transport,
    export: &mut Export,
    setup: Setup,
    config: PagerConfig,
) -> (GuestMemory, Pager) {
    let memory = empty(PAGES);
    let trap = Trap::register(&memory, FaultsTo::Pager, setup.shards).unwrap();
    trap_is(&trap);
    let import =
        Import::new(transport, &memory, (setup.landing, setup.shards.count()), &EndpointOptions::default())
            .unwrap();
    let lanes = import.connect_local(export, setup.shards.count()).unwrap();
    let pager = import.start(trap, lanes, export.regions(), Round::none(), config).unwrap();
    (memory, pager)
}

#[test]
fn threads_that_touch_while_it_drains_see_every_byte_right_and_zero_pages_never_cross() {
    let mut met = [0, 0];
    for (transport, setup) in available_setups() {
        let (mut export, _memory) = source(transport);
        export.describe_pages(None).unwrap();
        let (memory, pager) = destination(transport, &mut export, setup);
        std::thread::scope(|scope| {
            for thread in 0..3u64 {
                let guest = memory.guest().clone();
                scope.spawn(move || {
                    for step in 0..PAGES {
                        // Coprime steps: every page once, far from in order.
                        check(&guest, (step * 1_009 + thread * 777) % PAGES);
                    }
                });
            }
        });
        let end = end_of(&pager);
        assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
        let counts = end.report.pages;
        let zero = PAGES.div_ceil(3);
        let brought = counts.fault_pages + counts.prepage_pages + counts.drain_pages;
        assert_eq!(brought + counts.zero_pages, PAGES, "{transport}: {counts:?}");
        assert_eq!(end.report.fault_bytes + end.report.bulk_bytes, brought * PAGE_SIZE);
        // A fault may meet a zero page before the map has reached it; the drain never does.
        assert!(counts.drain_pages + counts.prepage_pages <= PAGES - zero, "{transport}: {counts:?}");
        met = [met[0] + counts.zero_pages, met[1] + counts.network_faults];
        for page in 0..PAGES {
            check(memory.guest(), page);
        }
    }
    // Over one of them the threads may be done before the map is, or the drain before the threads.
    assert!(met.iter().all(|count| *count > 0), "{met:?} zero pages and network faults");
}

#[test]
fn what_may_cross_is_changed_while_memory_arrives() {
    let limit = |bytes| Bandwidth::new(bytes);
    for (transport, setup) in available_setups() {
        let (mut export, _memory) = source(transport);
        export.describe_pages(None).unwrap();
        // All of it would take days.
        let planner = PlannerConfig { max_bandwidth: limit(100), ..PlannerConfig::default() };
        let config = PagerConfig { planner, ..PagerConfig::default() };
        let (memory, pager) = destination_whose(|_| {}, transport, &mut export, setup, config);
        // Nobody is held back who waits.
        (0..PAGES / 2).for_each(|page| check(memory.guest(), page));
        let told = || pager.status().borrow().report;
        assert_eq!(told().max_bandwidth, 100, "{transport}");
        pager.limit(limit(200));
        assert_eq!(told().max_bandwidth, 200, "{transport}");
        assert!(matches!(pager.status().borrow().state, PagerState::Running), "{transport}");
        pager.limit(None);
        let end = end_of(&pager);
        assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
        assert_eq!(end.report.max_bandwidth, 0, "{transport}");
        (0..PAGES).for_each(|page| check(memory.guest(), page));
    }
}

#[test]
fn without_a_page_map_faults_are_still_served() {
    for (transport, setup) in available_setups() {
        let (mut export, _memory) = source(transport);
        let (memory, pager) = destination(transport, &mut export, setup);
        for page in [5, 1, 3, 4000, PAGES - 1] {
            check(memory.guest(), page);
        }
        let report = pager.status().borrow().report;
        drop(pager.stop());
        assert_eq!(report.pages.drain_pages + report.pages.prepage_pages, 0, "{transport}");
    }
}

#[test]
fn what_is_touched_while_the_sources_guest_runs_comes_when_it_stands_still() {
    for (transport, setup) in available_setups() {
        let (mut export, source) = source(transport);
        let (memory, pager) =
            destination_whose(Trap::hold, transport, &mut export, setup, PagerConfig::default());
        let touched = [5, 1, 3, 4000, PAGES - 1];
        std::thread::scope(|scope| {
            let guest = memory.guest().clone();
            let toucher = scope.spawn(move || touched.map(|page| check(&guest, page)));
            // What the source's guest still has to write.
            assert!(source.guest().write(touched[0] * PAGE_SIZE, &[0xee; PAGE_SIZE as usize]));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!toucher.is_finished(), "{transport}: a page came before its guest stood still");
            assert!(source.guest().write(touched[0] * PAGE_SIZE, &content(touched[0])));
            export.describe_pages(None).unwrap();
            pager.source_stands_still(&[], None);
        });
        let end = end_of(&pager);
        assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
    }
}

#[test]
fn memory_in_another_order_is_read_when_the_sources_guest_stands_still_and_not_before() {
    for (transport, setup) in available_setups() {
        let (mut export, source) = source(transport);
        let (memory, pager) =
            destination_whose(Trap::hold, transport, &mut export, setup, PagerConfig::default());
        // Every other piece of 7 pages, the last first; all of them have still to be written.
        let run = |first| Run { first: PageIndex(first), count: 7 };
        let runs: Vec<Run> = (0..PAGES / 14).rev().map(|piece| run(14 * piece)).collect();
        for page in 0..PAGES {
            assert!(source.guest().write(page * PAGE_SIZE, &[0xee; PAGE_SIZE as usize]));
        }
        let order = pager.lay_out(&runs).unwrap();
        assert!(pager.lay_out(&[Run { first: PageIndex(PAGES - 1), count: 2 }]).is_err());
        std::thread::sleep(Duration::from_millis(50));
        for page in 0..PAGES {
            assert!(source.guest().write(page * PAGE_SIZE, &content(page)));
        }
        export.describe_pages(None).unwrap();
        pager.source_stands_still(&[], Some(order));
        let end = end_of(&pager);
        assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
        drop(pager.stop());
        (0..PAGES).for_each(|page| check(memory.guest(), page));
    }
}

#[test]
fn latencies_are_told_while_the_guest_still_faults() {
    let (mut export, _memory) = source(Transport::Shm);
    let (memory, pager) = destination(Transport::Shm, &mut export, Setup::default());
    let status = pager.status();
    for turn in 1..=3 {
        for page in [turn, 100 * turn, 1000 * turn] {
            check(memory.guest(), page);
        }
        // The pager sleeps now, as nothing happens any more; what happened is told all the same.
        let begun = std::time::Instant::now();
        while status.borrow().report.latencies.total.count() < 3 * turn {
            assert!(begun.elapsed() < Duration::from_secs(10), "turn {turn}: {:?}", status.borrow());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let PagerStatus { state, report, .. } = status.borrow().clone();
    assert!(matches!(state, PagerState::Running));
    let latencies = report.latencies;
    for stage in [latencies.post, latencies.read, latencies.install, latencies.total] {
        assert_eq!((stage.count(), report.pages.network_faults), (9, 9), "{stage:?}");
    }
    assert!(latencies.total.sum_ns >= latencies.read.sum_ns && latencies.total.mean_ns() > 0);
    drop(pager.stop());
}

#[test]
fn who_waited_for_pages_is_told_and_how_long() {
    for (transport, setup) in available_setups() {
        let (mut export, _memory) = source(transport);
        let (memory, pager) = destination(transport, &mut export, setup);
        let (guest, begun) = (memory.guest().clone(), std::time::Instant::now());
        let touched = std::thread::spawn(move || {
            [5, 2000, 4000].into_iter().for_each(|page| check(&guest, page));
            rustix::thread::gettid().as_raw_nonzero().get()
        });
        let thread = touched.join().unwrap();
        export.describe_pages(None).unwrap();
        let waited = end_of(&pager).waited;
        // A wait is over when the pager has seen that it is, which may be a moment after the thread went on.
        let most = 3 * begun.elapsed();
        assert_eq!(
            waited.iter().map(|waited| (waited.thread, waited.times)).collect::<Vec<_>>(),
            [(thread, 3)]
        );
        assert!(!waited[0].total.is_zero() && waited[0].total <= most, "{waited:?} of {most:?}");
    }
}

#[test]
fn what_the_guest_wrote_is_never_overwritten() {
    for (transport, setup) in available_setups() {
        let (mut export, _memory) = source(transport);
        let (memory, pager) = destination(transport, &mut export, setup);
        for page in (0..PAGES).step_by(7) {
            assert!(memory.guest().write(page * PAGE_SIZE + 100, b"written at the destination"));
        }
        export.describe_pages(None).unwrap();
        assert!(matches!(end_of(&pager).state, PagerState::Resident));
        for page in 0..PAGES {
            let mut expected = content(page);
            if page % 7 == 0 {
                expected[100..126].copy_from_slice(b"written at the destination");
            }
            let mut bytes = vec![0u8; PAGE_SIZE as usize];
            assert!(memory.guest().read(page * PAGE_SIZE, &mut bytes));
            assert!(bytes == expected, "{transport}: page {page}");
        }
    }
}

#[test]
fn a_lost_source_fails_the_pager_and_the_guest_waits_instead_of_reading_zeros() {
    let (mut export, _memory) = source(Transport::Tcp);
    let (memory, pager) = destination(Transport::Tcp, &mut export, Setup::default());
    check(memory.guest(), 1);
    drop(export);
    let end = end_of(&pager);
    let PagerState::Failed(error) = end.state else { panic!("{:?}", end.state) };
    assert!(matches!(*error, PagerError::Lane { .. }), "{error}");
    assert!(error.to_string().contains("the guest waits"), "{error}");

    // A touch now blocks for as long as the trap lives: give it time to be wrong.
    let guest = memory.guest().clone();
    let (said, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0u8];
        let touched = guest.read(PAGE_SIZE, &mut byte) && guest.read(2 * PAGE_SIZE, &mut byte);
        let _ = said.send((touched, byte));
    });
    let seen = heard.recv_timeout(Duration::from_millis(300));
    assert!(seen.is_err(), "the guest read {seen:?} in place of its memory");
    // Ending the process ends the waiting thread; the pager, and its trap, live until then.
    std::mem::forget(pager);
}

#[test]
fn more_threads_than_a_pool_has_places_wait_at_once_and_all_are_served() {
    for shards in [1, 3] {
        let (mut export, _memory) = source(Transport::Tcp);
        let setup = Setup { landing: Landing::Pool, shards: Shards::new(shards).unwrap() };
        let (memory, pager) = destination(Transport::Tcp, &mut export, setup);
        std::thread::scope(|scope| {
            for thread in 0..200 {
                let guest = memory.guest().clone();
                scope.spawn(move || check(&guest, thread * 20));
            }
        });
        drop(pager.stop());
    }
}

#[test]
fn a_page_that_the_kernel_takes_out_of_the_mapping_is_shown_again_as_the_guest_left_it() {
    for (transport, setup) in available_setups() {
        let (mut export, _memory) = source(transport);
        let (memory, pager) = destination(transport, &mut export, setup);
        let guest = memory.guest().clone();
        let pages = [4, 7, 2000, PAGES - 3];
        pages.iter().for_each(|page| check(&guest, *page));
        assert!(guest.write(7 * PAGE_SIZE, b"written here"));
        // As reclaim does to pages of a file that are mapped and not locked.
        guest.unmap_pages().unwrap();
        let (said, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut seen = [0; 12];
            assert!(guest.read(7 * PAGE_SIZE, &mut seen));
            [4, 2000, PAGES - 3].iter().for_each(|page| check(&guest, *page));
            said.send(seen).unwrap();
        });
        let seen = heard.recv_timeout(Duration::from_secs(10)).expect("it is here: nobody need wait for it");
        assert_eq!(&seen, b"written here");
        drop(pager.stop());
    }
}
