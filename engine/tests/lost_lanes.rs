//! Lanes that break at some call of theirs, or panic as a defect of the engine would, and others that the pager goes on over.
//! Memory, userfaultfd, threads and the wire are real, over every transport that this machine has.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Setup, assert_marked, available_setups, check, content, empty, end_of, filled, touch};
use postcopy_engine::export::Export;
use postcopy_engine::import::{Import, Lanes};
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE, PageIndex};
use postcopy_engine::pager::{
    FaultsTo, Landing, PagerConfig, PagerError, PagerState, PagerStatus, Round, SelfService, Trap,
};
use postcopy_engine::planner::Run;
use postcopy_transport::sim::Countdown;
use postcopy_transport::{AnyLane, EndpointOptions, Transport};

/// 8 MiB: four huge pages, so that there can be three shards.
const PAGES: u64 = 2048;

fn export(transport: Transport, memory: &GuestMemory) -> Export {
    let mut export = Export::new(transport, memory, &EndpointOptions::default()).unwrap();
    export.describe_pages(None).unwrap();
    export
}

fn import(transport: Transport, memory: &GuestMemory, setup: Setup) -> Import {
    let landing = (setup.landing, setup.shards.count());
    Import::new(transport, memory, landing, &EndpointOptions::default()).unwrap()
}

fn lanes(import: &Import, export: &mut Export, setup: Setup, servers: usize) -> Lanes {
    let shards = import.connect_local(export, setup.shards.count()).unwrap();
    Lanes { shards, servers: (0..servers).map(|_| import.connect_one_local(export).unwrap()).collect() }
}

/// How a lane breaks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Fails,
    Panics,
}

/// Breaks the `which`-th of all lanes at its `nth` call.
fn broken(Lanes { shards, servers }: Lanes, which: usize, nth: u64, how: How) -> Lanes {
    let mut at = 0;
    let mut each = |lane: AnyLane| {
        at += 1;
        match how {
            _ if at != which + 1 => lane,
            How::Fails => AnyLane::Other(Box::new(Countdown::new(lane, nth))),
            How::Panics => AnyLane::Other(Box::new(Countdown::panicking(lane, nth))),
        }
    };
    let shards = shards.into_iter().map(|pair| pair.map(&mut each)).collect();
    Lanes { shards, servers: servers.into_iter().map(each).collect() }
}

/// Lets lanes break until every page is here; how often they did.
fn outlive(transport: Transport, setup: Setup, told: FaultsTo, how: How, seed: u64) -> u64 {
    let source = filled(PAGES);
    let memory = empty(PAGES);
    let threads = if told == FaultsTo::Threads { 2 } else { 0 };
    let trap = Trap::register(&memory, told, setup.shards).unwrap();
    // A thread that panics while it serves itself ends: the guest's own does, with the guest.
    let all = 2 * setup.shards.count() + if how == How::Fails { threads } else { 0 };
    let mut offered = export(transport, &source);
    let way = import(transport, &memory, setup);
    let Lanes { shards, servers } =
        broken(lanes(&way, &mut offered, setup, threads), seed as usize % all, 20 + seed * 13 % 120, how);
    let config = PagerConfig::default();
    let mut pager = way.start(trap, shards, offered.regions(), Round::none(), config).unwrap();
    let servers: Vec<_> = servers.into_iter().map(|lane| pager.server(lane).unwrap()).collect();
    let lost = AtomicU64::new(0);
    let mut end = PagerStatus::default();
    std::thread::scope(|scope| {
        let servers = servers.into_iter().map(Some).chain([None]);
        for (thread, server) in servers.enumerate() {
            let memory = &memory;
            scope.spawn(move || {
                let _service = server.map(SelfService::of_this_thread);
                touch(memory, content, thread as u64);
            });
        }
        loop {
            end = end_of(&pager);
            let PagerState::Failed(error) = &end.state else { return };
            let panicked = matches!(**error, PagerError::Panicked(_));
            assert_eq!(panicked, how == How::Panics, "{error}");
            let turn = lost.fetch_add(1, Ordering::Relaxed) + 1;
            pager.part();
            // New keys, and the next time around another lane breaks, until enough of them have.
            offered = export(transport, &source);
            let landing = if pager.lands_in_place() { Landing::InPlace } else { setup.landing };
            let way = import(transport, &memory, Setup { landing, ..setup });
            let mut next = lanes(&way, &mut offered, setup, pager.servers());
            if turn < 4 {
                next = broken(next, (seed + turn) as usize % all, 20 + (seed + turn * 31) * 17 % 200, how);
            }
            way.go_on(&mut pager, next, offered.regions(), config).unwrap();
        }
    });
    assert!(matches!(end.state, PagerState::Resident), "{transport} {setup:?}: {:?}", end.state);
    assert_eq!(end.report.outstanding_pages, 0);
    assert_eq!(end.report.total_pages, PAGES);
    let counts = end.report.pages;
    let counted = counts.fault_pages + counts.prepage_pages + counts.drain_pages + counts.zero_pages;
    if how == How::Fails {
        assert_eq!(counted, PAGES, "{transport} {setup:?}: each comes once: {counts:?}");
    }
    assert_marked(&memory, content);
    drop(offered);
    lost.into_inner()
}

/// How often lanes broke, over all there is.
fn outlive_all(how: How, seeds: u64) -> u64 {
    let mut lost = 0;
    for (transport, setup) in available_setups() {
        for told in [FaultsTo::Pager, FaultsTo::Threads] {
            lost += (0..seeds).map(|seed| outlive(transport, setup, told, how, seed)).sum::<u64>();
        }
    }
    lost
}

#[test]
fn over_new_lanes_every_page_comes_and_none_that_was_written_is_read_again() {
    let lost = outlive_all(How::Fails, 6);
    assert!(lost > 40, "only {lost} lanes were lost");
}

#[test]
fn other_threads_go_on_where_some_have_panicked() {
    let lost = outlive_all(How::Panics, 2);
    assert!(lost > 12, "only {lost} threads panicked");
}

#[test]
fn it_goes_on_over_another_transport() {
    for landing in [Landing::InPlace, Landing::Pool] {
        let setup = Setup { landing, ..Setup::default() };
        let (source, memory) = (filled(PAGES), empty(PAGES));
        let trap = Trap::register(&memory, FaultsTo::Pager, setup.shards).unwrap();
        let mut offered = export(Transport::Tcp, &source);
        let way = import(Transport::Tcp, &memory, setup);
        let Lanes { shards, .. } = broken(lanes(&way, &mut offered, setup, 0), 1, 30, How::Fails);
        let config = PagerConfig::default();
        let mut pager = way.start(trap, shards, offered.regions(), Round::none(), config).unwrap();
        let PagerState::Failed(_) = end_of(&pager).state else { panic!("its lane breaks") };
        pager.part();
        let mut offered = export(Transport::Shm, &source);
        // Pages land where they did.
        let elsewhere = if landing == Landing::Pool { Landing::InPlace } else { Landing::Pool };
        let other = Setup { landing: elsewhere, ..setup };
        let way = import(Transport::Shm, &memory, other);
        let ways = lanes(&way, &mut offered, other, 0);
        let refused = way.go_on(&mut pager, ways, offered.regions(), config).unwrap_err();
        assert!(refused.to_string().contains("landed elsewhere"), "{refused}");
        let way = import(Transport::Shm, &memory, setup);
        let ways = lanes(&way, &mut offered, setup, 0);
        way.go_on(&mut pager, ways, offered.regions(), config).unwrap();
        assert!(matches!(end_of(&pager).state, PagerState::Resident));
        (0..PAGES).for_each(|page| check(memory.guest(), page));
    }
}

#[test]
fn over_new_lanes_pages_lie_as_they_did() {
    let setup = Setup { landing: Landing::InPlace, ..Setup::default() };
    let (source, memory) = (filled(PAGES), empty(PAGES));
    let trap = Trap::register(&memory, FaultsTo::Pager, setup.shards).unwrap();
    let mut exports = vec![export(Transport::Tcp, &source)];
    let way = import(Transport::Tcp, &memory, setup);
    let Lanes { shards, .. } = broken(lanes(&way, &mut exports[0], setup, 0), 1, 8, How::Fails);
    let config = PagerConfig::default();
    let mut pager = way.start(trap, shards, exports[0].regions(), Round::none(), config).unwrap();
    // The upper half comes first.
    let upper = Run { first: PageIndex(PAGES / 2), count: PAGES as u32 / 2 };
    pager.source_stands_still(&[], Some(pager.lay_out(&[upper]).unwrap()));
    let is_here = |page: u64| {
        let mut seen = vec![0; PAGE_SIZE as usize];
        assert!(memory.landing().read(page * PAGE_SIZE, &mut seen));
        seen == content(page) && seen.iter().any(|byte| *byte != 0)
    };
    let here = |pages: Range<u64>| pages.filter(|page| is_here(*page)).count();
    let (mut before, mut calls, mut looks) = (None, 8, 0);
    while let PagerState::Failed(_) = end_of(&pager).state {
        pager.part();
        // Of three pages one has no content. What the first lanes brought may have been read before the order was heard.
        let [lower, upper] = [here(0..PAGES / 2), here(PAGES / 2..PAGES)];
        let first = *before.get_or_insert(lower);
        assert!(lower == first || upper == 683, "the lower half came first: {lower}, {upper}");
        looks += u32::from((1..683).contains(&upper));
        calls += calls / 8 + 1;
        let mut offered = export(Transport::Tcp, &source);
        let next = broken(lanes(&way, &mut offered, setup, 0), 1, calls, How::Fails);
        way.go_on(&mut pager, next, offered.regions(), config).unwrap();
        exports.push(offered);
    }
    assert!(looks > 0, "the upper half came at once");
    (0..PAGES).for_each(|page| check(memory.guest(), page));
}
