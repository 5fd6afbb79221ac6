//! A guest that replays its trace, and the planner that brings its memory over a simulated link.

use postcopy_engine::memory::{PAGE_SIZE, PageIndex};
use postcopy_engine::pager::MAP_STRETCH;
use postcopy_engine::planner::{
    Action, LaneId, Nanos, News, PageCounts, Planner, PlannerConfig, Ranks, Run, Why,
};
use postcopy_transport::sim::{SimLane, SimLink, SimOptions};
use postcopy_transport::{Completion, Lane, LocalRegion, Read, RemoteRegion, Token};
use serde::Serialize;

use super::trace::{PageOrder, Trace};

/// What a guest met on its way through its trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Pages that the guest touched: the sum of the next three.
    pub touched: u64,
    /// Touches that sent a read over the network.
    pub network_faults: u64,
    /// Touches of a page in flight, which waited for it.
    pub late: u64,
    /// Touches of a page that was there.
    pub resident: u64,
    /// What the guest waited in all.
    pub stall_ns: u64,
    /// The longest of its waits.
    pub longest_stall_ns: u64,
    /// From the resume to the last page.
    pub resident_ns: u64,
    /// Pages prepaged.
    pub prepaged: u64,
    /// Prepaged pages that the guest touched after they were asked for, in flight or there.
    pub prepage_hits: u64,
    /// What the planner counted itself.
    #[serde(skip)]
    pub counts: PageCounts,
}

impl Outcome {
    /// Network faults among all first touches, in per cent: the paper's figure.
    pub fn share(&self) -> f64 {
        100.0 * self.network_faults as f64 / self.touched.max(1) as f64
    }

    /// Prepaged pages that nobody has touched, in per cent of those prepaged.
    pub fn waste(&self) -> f64 {
        100.0 * (self.prepaged - self.prepage_hits) as f64 / self.prepaged.max(1) as f64
    }
}

/// Runs a guest to the end of its trace and its memory to the last page. Pages lie by address.
pub fn run(trace: &Trace, link: SimOptions, config: PlannerConfig) -> Outcome {
    run_in_order(trace, PageOrder::Address, link, config)
}

/// As [`run`], with pages in another order.
pub fn run_in_order(trace: &Trace, order: PageOrder, link: SimOptions, config: PlannerConfig) -> Outcome {
    let mut machine = Machine::new(trace.pages, &trace.order(order), link, config);
    let mut ready = 0;
    for touch in &trace.touches {
        ready = machine.touch(PageIndex(touch.page), ready + touch.think_ns);
    }
    machine.drain_out()
}

struct Machine {
    planner: Planner,
    pages: u64,
    /// When the next stretch of the page map is here; a read of it takes a round trip. `None`: it is known.
    map_due: Option<u64>,
    round_trip: u64,
    link: SimLink,
    lanes: [SimLane; 2],
    waiting: [Vec<Read>; 2],
    regions: (RemoteRegion, LocalRegion),
    actions: Vec<Action>,
    completions: Vec<Completion>,
    /// By page, whether it was prepaged.
    prepaged: Vec<bool>,
    published: Vec<bool>,
    done: bool,
    outcome: Outcome,
}

impl Machine {
    fn new(pages: u64, order: &[Run], options: SimOptions, config: PlannerConfig) -> Self {
        let link = SimLink::new(options);
        let mut machine = Self {
            planner: Planner::new(pages, config),
            pages,
            map_due: Some(2 * options.one_way_ns),
            round_trip: 2 * options.one_way_ns,
            lanes: [link.lane(), link.lane()],
            link,
            waiting: [Vec::new(), Vec::new()],
            regions: SimLink::regions(0, pages * PAGE_SIZE),
            actions: Vec::new(),
            completions: Vec::new(),
            prepaged: vec![false; pages as usize],
            published: vec![false; pages as usize],
            done: false,
            outcome: Outcome::default(),
        };
        let ranks = Ranks::listed(pages, order).expect("the trace's order stays inside memory");
        assert!(machine.planner.order(ranks));
        machine.settle();
        machine
    }

    /// The guest touches a page at `at`. Returns when it goes on.
    fn touch(&mut self, page: PageIndex, at: u64) -> u64 {
        self.pass_until(at);
        let prepaged = self.prepaged[page.0 as usize];
        self.outcome.touched += 1;
        self.outcome.prepage_hits += u64::from(prepaged);
        if self.published[page.0 as usize] {
            self.outcome.resident += 1;
            return at;
        }
        assert!(self.planner.fault(page, Nanos(at), &mut self.actions), "the trace stays inside memory");
        self.settle();
        while !self.published[page.0 as usize] {
            self.step();
        }
        let stall = self.link.now() - at;
        self.outcome.stall_ns += stall;
        self.outcome.longest_stall_ns = self.outcome.longest_stall_ns.max(stall);
        at + stall
    }

    /// Lets time pass, and reads land.
    fn pass_until(&mut self, at: u64) {
        while self.next_event().is_some_and(|next| next <= at) {
            self.step();
        }
        self.link.advance_to(at);
    }

    fn next_event(&self) -> Option<u64> {
        self.link.next_completion().into_iter().chain(self.map_due).min()
    }

    /// The next completion, or stretch of the page map.
    fn step(&mut self) {
        let next = self.next_event().expect("something is in flight until all is here");
        self.link.advance_to(next);
        if self.map_due == Some(next) {
            let known = self.pages.min(self.planner.known() + MAP_STRETCH);
            self.planner.map_extended(News { known, ..News::default() }, &mut self.actions);
            self.map_due = (known < self.pages).then_some(next + self.round_trip);
        }
        for lane in [LaneId::Urgent, LaneId::Bulk] {
            let polled = self.lanes[lane as usize].poll(&mut self.completions);
            polled.expect("this link does not break");
            for completion in self.completions.drain(..) {
                let run = run_of(completion.token);
                let known = self.planner.landed(lane, run, Nanos(next), &mut self.actions);
                assert!(known, "a read completes once");
            }
        }
        self.settle();
    }

    /// Does what the planner decided.
    fn settle(&mut self) {
        let now = Nanos(self.link.now());
        let bulk = LaneId::Bulk as usize;
        let room = self.lanes[bulk].room().saturating_sub(self.waiting[bulk].len());
        self.planner.drain(room, now, &mut self.actions);
        for action in self.actions.drain(..) {
            match action {
                Action::Read(why, run) => {
                    let (offset, len) = (run.first.offset(), run.count * PAGE_SIZE as u32);
                    let slices = (self.regions.1.slice(offset, len), self.regions.0.slice(offset, len));
                    let token = Token(u64::from(run.count) << 48 | run.first.0);
                    let read = slices.0.zip(slices.1).and_then(|(to, from)| Read::new(token, to, from));
                    self.waiting[why.lane() as usize].push(read.expect("no read leaves memory"));
                    let first = run.first.0 as usize;
                    self.prepaged[first..run.end() as usize].fill(why == Why::Prepage);
                }
                Action::Publish(run) | Action::PublishKept(run) => {
                    self.published[run.first.0 as usize..run.end() as usize].fill(true)
                }
                Action::PublishZero(page) | Action::Wake(page) => self.published[page.0 as usize] = true,
                Action::Done => self.done = true,
            }
        }
        for lane in [LaneId::Urgent as usize, bulk] {
            let posted = self.lanes[lane].post(&self.waiting[lane]).expect("this link does not break");
            self.waiting[lane].drain(..posted);
        }
    }

    fn drain_out(mut self) -> Outcome {
        while !self.done {
            self.step();
        }
        let counts = self.planner.counts();
        Outcome {
            resident_ns: self.link.now(),
            network_faults: counts.network_faults,
            late: counts.minor_faults,
            prepaged: counts.prepage_pages,
            counts,
            ..self.outcome
        }
    }
}

fn run_of(token: Token) -> Run {
    Run { first: PageIndex(token.0 & ((1 << 48) - 1)), count: (token.0 >> 48) as u32 }
}
