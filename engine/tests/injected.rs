//! The pager over a simulated link: rough weather, and lanes of which the Nth call fails. The
//! memory, the userfaultfd and the threads are real; the wire, and what goes wrong on it, are not.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{check, empty, end_of, filled};
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::pagemap::{Of, PageMap};
use postcopy_engine::pager::{
    FaultsTo, LandingMemory, Pager, PagerConfig, PagerState, Round, Shards, SourceMemory, Trap,
};
use postcopy_transport::sim::{Countdown, SimLane, SimLink, SimOptions};
use postcopy_transport::{AnyLane, HostMemory};

const PAGES: u64 = 256;
const BYTES: u64 = PAGES * PAGE_SIZE;

/// Both ends, and a thread that lets virtual time pass from one completion to the next.
struct World {
    memory: GuestMemory,
    pager: Pager,
    over: Arc<AtomicBool>,
    _map: PageMap,
}

/// How each lane is wrapped: urgent, then bulk.
type Wrap = fn(SimLane, u64) -> AnyLane;

fn world(options: SimOptions, urgent: (Wrap, u64), bulk: (Wrap, u64)) -> World {
    let (source, memory) = (filled(PAGES), empty(PAGES));
    let mut map = PageMap::new(PAGES).unwrap();
    map.fill(source.guest(), Of::Frozen(None)).unwrap();
    let map_landing = HostMemory::anonymous("map", map.memory().len()).unwrap();
    let link = SimLink::new(options);
    let lane = |(wrap, nth): (Wrap, u64)| {
        let sources = vec![source.guest().clone(), map.memory().clone()];
        wrap(link.lane_between(sources, vec![memory.landing().clone(), map_landing.clone()]), nth)
    };
    let (urgent, bulk) = (lane(urgent), lane(bulk));
    let (remote, landing) = SimLink::regions(0, BYTES);
    let (map_remote, map_local) = SimLink::regions(1, map.memory().len() as u64);
    let source = SourceMemory {
        memory: remote,
        map: map_remote,
        landing: LandingMemory::InPlace { region: landing, populated: false },
        map_landing: map_local,
        map_memory: map_landing,
        round: Round::none(),
    };
    let trap = Trap::register(&memory, FaultsTo::Pager, Shards::ONE).unwrap();
    // Virtual time wakes nobody, so the pager must not sleep.
    let config = PagerConfig { spin: Duration::from_secs(3600), ..Default::default() };
    let pager = Pager::start(trap, Some(&memory), &source, vec![[urgent, bulk]], config).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let stop = over.clone();
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            match link.next_completion() {
                Some(next) => link.advance_to(next),
                None => std::thread::yield_now(),
            }
        }
    });
    World { memory, pager, over, _map: map }
}

fn plain(lane: SimLane, _: u64) -> AnyLane {
    AnyLane::Other(Box::new(lane))
}

fn counted(lane: SimLane, nth: u64) -> AnyLane {
    AnyLane::Other(Box::new(Countdown::new(lane, nth)))
}

impl World {
    /// Touches every page, from a thread that may have to wait for ever; how far it came.
    fn touch(&self) -> std::sync::mpsc::Receiver<u64> {
        let (said, heard) = std::sync::mpsc::channel();
        let guest = self.memory.guest().clone();
        std::thread::spawn(move || {
            for step in 0..PAGES {
                let page = step * 101 % PAGES;
                // What is seen is right, however the world ends.
                check(&guest, page);
                let _ = said.send(page);
            }
        });
        heard
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

#[test]
fn rough_weather_loses_no_page() {
    for seed in 0..8 {
        let rough = SimOptions {
            seed,
            jitter_ns: 200_000,
            loss: 0.05,
            partial: true,
            depth: 8,
            ..SimOptions::default()
        };
        let world = world(rough, (plain, 0), (plain, 0));
        let touched = world.touch().iter().count();
        assert_eq!(touched as u64, PAGES, "seed {seed}");
        assert!(
            matches!(end_of(&world.pager).state, PagerState::Resident),
            "seed {seed}: {:?}",
            end_of(&world.pager).state
        );
    }
}

#[test]
fn whichever_call_of_a_lane_fails_the_pager_says_so_and_shows_no_page_that_has_not_landed() {
    let mut failed = 0;
    for nth in (1..40).chain((40..2000).step_by(97)) {
        for lanes in [[counted as Wrap, plain], [plain, counted]] {
            let world = world(SimOptions::default(), (lanes[0], nth), (lanes[1], nth));
            let touched = world.touch();
            match end_of(&world.pager).state {
                PagerState::Resident => assert_eq!(touched.iter().count() as u64, PAGES),
                PagerState::Failed(error) => {
                    failed += 1;
                    let said = error.to_string();
                    assert!(
                        said.contains("the countdown has run out") && said.contains("the guest waits"),
                        "{said}"
                    );
                    // The touching thread checked all that it saw, and waits or has ended.
                    while touched.recv_timeout(Duration::from_millis(2)).is_ok() {}
                    // Its memory must stay trapped as long as it waits.
                    world.over.store(true, Ordering::Relaxed);
                    std::mem::forget(world);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(failed > 40, "only {failed} of the failures were met");
}
