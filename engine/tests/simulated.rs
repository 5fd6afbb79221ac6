//! The planner over simulated lanes, in virtual time: links that reorder, lose, take half a batch,
//! complete twice or break, and lanes whose Nth call fails.
//!
//! Each case has a seed; a failure prints the command that runs that one again.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use postcopy_engine::memory::{PAGE_SIZE, PageIndex};
use postcopy_engine::planner::{Action, Bandwidth, LaneId, Nanos, News, Planner, PlannerConfig, Policy, Run};
use postcopy_transport::sim::{Countdown, Random, SimLane, SimLink, SimOptions};
use postcopy_transport::{Completion, HostMemory, Lane, LocalRegion, Read, RemoteRegion, Token};

const PAGES: u64 = 300;

/// Why a run ended.
#[derive(Debug, PartialEq)]
enum End {
    /// Every page is here.
    Resident,
    /// A lane said that it is dead.
    LaneFailed,
    /// A lane completed what was not in flight.
    Contract,
}

/// The pager's loop in small: one guest, two lanes, no threads and no clock.
struct Engine<L> {
    planner: Planner,
    link: SimLink,
    lanes: [L; 2],
    waiting: [Vec<Read>; 2],
    regions: (RemoteRegion, LocalRegion),
    landing: HostMemory,
    published: Vec<u32>,
    random: Random,
    done: bool,
}

fn content(page: u64) -> [u8; 8] {
    (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
}

impl<L: Lane> Engine<L> {
    fn new(options: SimOptions, config: PlannerConfig, wrap: impl Fn(SimLane) -> L) -> Self {
        let len = (PAGES * PAGE_SIZE) as usize;
        let [source, landing] = ["source", "landing"].map(|name| HostMemory::anonymous(name, len).unwrap());
        assert!((0..PAGES).all(|page| source.write(page * PAGE_SIZE + 4088, &content(page))));
        let link = SimLink::new(options);
        let lanes = [(); 2].map(|()| wrap(link.lane_between(vec![source.clone()], vec![landing.clone()])));
        let planner = Planner::new(PAGES, config);
        Self {
            planner,
            link,
            lanes,
            waiting: [vec![], vec![]],
            regions: SimLink::regions(0, PAGES * PAGE_SIZE),
            landing,
            published: vec![0; PAGES as usize],
            random: Random::new(options.seed ^ 0xfa),
            done: false,
        }
    }

    fn run(&mut self) -> End {
        let mut actions = vec![];
        let mut completions: Vec<Completion> = vec![];
        while !self.done {
            let now = Nanos(self.link.now());
            // The map grows, and the guest touches something, at times of their own.
            let known = (self.planner.known() + self.random.below(40)).min(PAGES);
            self.planner.map_extended(News { known, ..News::default() }, &mut actions);
            if self.random.chance(0.3) {
                let page = PageIndex(self.random.below(PAGES));
                if self.published[page.0 as usize] == 0 {
                    assert!(self.planner.fault(page, now, &mut actions));
                }
            }
            for lane in [LaneId::Urgent, LaneId::Bulk] {
                if self.lanes[lane as usize].poll(&mut completions).is_err() {
                    return End::LaneFailed;
                }
                for completion in completions.drain(..) {
                    let run = run_of(completion.token);
                    if !self.planner.landed(lane, run, now, &mut actions) {
                        return End::Contract;
                    }
                }
            }
            let room = self.lanes[1].room().saturating_sub(self.waiting[1].len());
            self.planner.drain(room, now, &mut actions);
            if self.carry_out(&mut actions).is_err() {
                return End::LaneFailed;
            }
            match self.link.next_completion() {
                Some(next) => self.link.advance_to(next),
                None => self.link.advance_to(now.0 + 1000),
            }
        }
        End::Resident
    }

    fn carry_out(&mut self, actions: &mut Vec<Action>) -> Result<(), postcopy_transport::LaneError> {
        for action in actions.drain(..) {
            match action {
                Action::Read(why, run) => {
                    let (offset, len) = (run.first.offset(), run.count * PAGE_SIZE as u32);
                    let token = Token(u64::from(run.count) << 48 | run.first.0);
                    let local = self.regions.1.slice(offset, len).expect("no read beyond the region");
                    let remote = self.regions.0.slice(offset, len).expect("no read beyond the region");
                    self.waiting[why.lane() as usize].push(Read::new(token, local, remote).unwrap());
                }
                Action::Publish(run) => run.pages().for_each(|page| self.publish(page)),
                Action::PublishZero(page) => panic!("{page:?} is not zero"),
                Action::PublishKept(run) => panic!("{run:?} was not here before"),
                Action::Wake(_) => {}
                Action::Done => self.done = true,
            }
        }
        for lane in 0..2 {
            let posted = self.lanes[lane].post(&self.waiting[lane])?;
            self.waiting[lane].drain(..posted);
        }
        Ok(())
    }

    /// A page is published once, and only when its last byte is here.
    fn publish(&mut self, page: PageIndex) {
        let mut bytes = [0; 8];
        assert!(self.landing.read(page.offset() + 4088, &mut bytes));
        assert_eq!(bytes, content(page.0), "{page:?} was published before it landed");
        self.published[page.0 as usize] += 1;
        assert_eq!(self.published[page.0 as usize], 1, "{page:?}");
    }
}

fn run_of(token: Token) -> Run {
    Run { first: PageIndex(token.0 & ((1 << 48) - 1)), count: (token.0 >> 48) as u32 }
}

fn config(seed: u64) -> PlannerConfig {
    let all: Vec<Policy> = Policy::FIXED.into_iter().chain([Policy::Adaptive]).collect();
    PlannerConfig { policy: all[(seed % all.len() as u64) as usize], ..PlannerConfig::default() }
}

/// Runs a case for every seed, or for the one in `POSTCOPY_SEED`.
fn for_seeds(test: &str, count: u64, case: impl Fn(u64) + std::panic::RefUnwindSafe) {
    let asked =
        std::env::var("POSTCOPY_SEED").ok().map(|seed| seed.parse().expect("POSTCOPY_SEED is a number"));
    let seeds = asked.map_or(1..count + 1, |seed: u64| seed..seed + 1);
    for seed in seeds {
        if let Err(panic) = std::panic::catch_unwind(|| case(seed)) {
            eprintln!("replay: POSTCOPY_SEED={seed} cargo test -p postcopy-engine --test simulated {test}");
            std::panic::resume_unwind(panic);
        }
    }
}

fn rough(seed: u64) -> SimOptions {
    let mut random = Random::new(seed);
    SimOptions {
        seed,
        bytes_per_s: 50_000_000 << random.below(9),
        one_way_ns: random.below(100_000),
        jitter_ns: random.below(200_000),
        loss: random.unit() * 0.2,
        retransmit_ns: 200_000 + random.below(5_000_000),
        partial: random.chance(0.5),
        depth: 1 + random.below(64) as usize,
        ..SimOptions::default()
    }
}

#[test]
fn over_rough_links_every_page_is_published_once() {
    for_seeds("over_rough_links", 200, |seed| {
        let mut engine = Engine::new(rough(seed), config(seed), |lane| lane);
        assert_eq!(engine.run(), End::Resident);
        assert!(engine.published.iter().all(|times| *times == 1));
        let counts = engine.planner.counts();
        assert_eq!(counts.fault_pages + counts.prepage_pages + counts.drain_pages, PAGES);
    });
}

#[test]
fn with_a_limited_bandwidth_every_page_comes_and_in_no_less_time() {
    for_seeds("with_a_limited_bandwidth", 100, |seed| {
        let limit = 1_000_000 << (seed % 6);
        let config = PlannerConfig { max_bandwidth: Bandwidth::new(limit), ..config(seed) };
        let mut engine = Engine::new(rough(seed), config, |lane| lane);
        assert_eq!(engine.run(), End::Resident);
        assert!(engine.published.iter().all(|times| *times == 1));
        let unasked = PAGES - engine.planner.counts().fault_pages;
        // The last read is on its way when its time begins; 10 ms are made up for at the start.
        let share = (unasked.saturating_sub(32) * PAGE_SIZE) as f64 / limit as f64 * 1e9;
        assert!(engine.link.now() as f64 >= share - 10e6, "{unasked} pages in {} ns", engine.link.now());
    });
}

#[test]
fn a_lane_that_completes_twice_is_found_out() {
    for_seeds("a_lane_that_completes_twice", 50, |seed| {
        let options = SimOptions { duplicates: 0.2, ..rough(seed) };
        let mut engine = Engine::new(options, config(seed), |lane| lane);
        // Found out at once, unless all was here before the second completion came.
        let end = engine.run();
        assert!(end == End::Contract || end == End::Resident && engine.planner.outstanding() == 0, "{end:?}");
    });
}

#[test]
fn when_the_link_breaks_the_engine_ends_and_what_was_published_is_whole() {
    for_seeds("when_the_link_breaks", 50, |seed| {
        let options =
            SimOptions { breaks_at_ns: Some(1 + seed * 20_000), bytes_per_s: 125_000_000, ..rough(seed) };
        let mut engine = Engine::new(options, config(seed), |lane| lane);
        assert_eq!(engine.run(), End::LaneFailed);
        let published = engine.published.iter().filter(|times| **times == 1).count() as u64;
        assert_eq!(published + engine.planner.outstanding(), PAGES);
    });
}

#[test]
fn whichever_call_of_a_lane_fails_the_engine_ends_and_what_was_published_is_whole() {
    let mut survived = false;
    for nth in 1..5000 {
        let mut engine =
            Engine::new(SimOptions::default(), PlannerConfig::default(), |lane| Countdown::new(lane, nth));
        let end = engine.run();
        let published = engine.published.iter().filter(|times| **times == 1).count() as u64;
        assert_eq!(published + engine.planner.outstanding(), PAGES, "call {nth}");
        survived = end == End::Resident;
        if survived {
            break;
        }
        assert_eq!(end, End::LaneFailed, "call {nth}");
    }
    assert!(survived, "past the last call nothing fails");
}
