//! The reads under way: how they end, and what is known of them meanwhile.

use super::link::Posted;
use super::{Action, LaneId, Nanos, Order, Planner, Run, Why};
use crate::memory::PageIndex;

/// A read under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    pub(super) run: Run,
    pub(super) why: Why,
    pub(super) posted: Posted,
    /// The guest waits for one of its pages.
    pub(super) awaited: bool,
}

impl Planner {
    /// Whether the guest waits for a page of this run, which is in flight: of several runs that
    /// have landed, such a one is to be published first.
    pub fn awaited(&self, run: Run) -> bool {
        self.flights.iter().any(|flight| flight.run == run && flight.awaited)
    }

    pub(super) fn promote(&mut self, page: PageIndex) {
        let flight = self.flights.iter_mut().find(|flight| flight.run.contains(page));
        let flight = flight.expect("a page in flight is part of a flight");
        flight.awaited = true;
        self.counts.prepage_hits += u64::from(flight.why == Why::Prepage);
        if let Order::Streams(streams) = &mut self.order {
            streams.hit(self.ranks.rank(page));
        }
    }

    /// A read has landed.
    ///
    /// Returns false, and does nothing, if no such read is in flight: the lane broke its contract.
    #[must_use]
    pub fn landed(&mut self, lane: LaneId, run: Run, now: Nanos, actions: &mut Vec<Action>) -> bool {
        let Some(flight) = self.take_flight(lane, run) else { return false };
        self.link.landed(flight.posted, run.count, now);
        self.arrived(flight, actions);
        true
    }

    /// A page has landed that another than the caller has read: when that was posted and when it landed is not
    /// known here, so it says nothing of the link.
    ///
    /// Returns false, and does nothing, if no read of that page alone is in flight.
    #[must_use]
    pub fn landed_elsewhere(&mut self, lane: LaneId, page: PageIndex, actions: &mut Vec<Action>) -> bool {
        let Some(flight) = self.take_flight(lane, Run::one(page)) else { return false };
        self.arrived(flight, actions);
        true
    }

    /// A read under way is carried out in parts that land one by one: `parts` make up `run`.
    pub fn split(&mut self, lane: LaneId, run: Run, parts: impl Iterator<Item = Run>) {
        let Some(whole) = self.take_flight(lane, run) else { return };
        self.flights.extend(parts.map(|run| Flight { run, ..whole }));
    }

    fn take_flight(&mut self, lane: LaneId, run: Run) -> Option<Flight> {
        let this = |flight: &Flight| flight.run == run && flight.why.lane() == lane;
        self.flights.iter().position(this).map(|at| self.flights.remove(at))
    }

    fn arrived(&mut self, Flight { run, why, .. }: Flight, actions: &mut Vec<Action>) {
        if why.lane() == LaneId::Bulk {
            self.bulk_in_flight -= run.count;
        }
        *self.counts.pages_brought(why) += u64::from(run.count);
        self.pages.arrive(run);
        actions.push(Action::Publish(run));
        self.finish(actions);
    }
}
