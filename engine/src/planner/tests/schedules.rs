//! The planner against a model, under any order of events.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What may happen next, as numbers that the test maps to what is possible.
#[derive(Clone, Debug)]
enum Step {
    Fault(u64),
    Land(usize),
    Extend(u64, u64, u64),
    Show,
    Prefer(u64, u32),
    Order(Vec<(u64, u32)>),
    Drain(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u64..200).prop_map(Step::Fault),
        8 => any::<usize>().prop_map(Step::Land),
        1 => Just(Step::Show),
        1 => (0u64..200, 0u32..20).prop_map(|(first, count)| Step::Prefer(first, count)),
        1 => proptest::collection::vec((0u64..200, 0u32..20), 0..4).prop_map(Step::Order),
        2 => (1u64..60, any::<u64>(), any::<u64>()).prop_map(|(by, zeros, kept)| Step::Extend(by, zeros, kept)),
        4 => (1usize..9).prop_map(Step::Drain),
    ];
    proptest::collection::vec(step, 1..400)
}

/// Follows every action as the pager would, and checks it against what has happened to each page.
#[derive(Default)]
struct Model {
    pages: BTreeMap<u64, PageState>,
    flying: Vec<(LaneId, Run)>,
    done: bool,
}

impl Model {
    fn bulk_in_flight(&self) -> u32 {
        self.flying.iter().filter(|(lane, _)| *lane == LaneId::Bulk).map(|(_, run)| run.count).sum()
    }

    fn follow(&mut self, actions: &mut Vec<Action>) {
        for action in actions.drain(..) {
            assert!(
                !self.done
                    || matches!(action, Action::Wake(_) | Action::PublishZero(_) | Action::PublishKept(_)),
                "{action:?} after Done"
            );
            match action {
                Action::Read(why, run) => {
                    for at in run.pages() {
                        let before = self.pages.insert(at.0, PageState::InFlight);
                        assert!(matches!(before, None | Some(PageState::Missing)), "{at:?} was {before:?}");
                    }
                    self.flying.push((why.lane(), run));
                }
                Action::Publish(run) => {
                    for at in run.pages() {
                        assert_eq!(self.pages.insert(at.0, PageState::Resident), Some(PageState::InFlight));
                    }
                }
                Action::PublishZero(at) => {
                    let before = self.pages.insert(at.0, PageState::Resident);
                    assert_eq!(before, Some(PageState::Zero), "only once, and only a zero page");
                }
                Action::PublishKept(run) => {
                    for at in run.pages() {
                        let before = self.pages.insert(at.0, PageState::Resident);
                        assert_eq!(before, Some(PageState::Kept), "only once, and only a kept page");
                    }
                }
                Action::Wake(at) => assert_eq!(self.pages.get(&at.0), Some(&PageState::Resident)),
                Action::Done => self.done = true,
            }
        }
    }
}

fn policies() -> impl Strategy<Value = Policy> {
    let mut all = Policy::FIXED.to_vec();
    all.extend([
        Policy::Adaptive,
        Policy::BubbleMulti(2, Direction::Dual),
        Policy::BubbleMulti(1, Direction::Forward),
    ]);
    proptest::sample::select(all)
}

/// One step of a schedule, and what must hold after it. Time goes on by as much as it says.
fn take(step: Step, planner: &mut Planner, model: &mut Model, now: Nanos) -> Result<(), TestCaseError> {
    let (total, mut actions) = (planner.pages.total(), vec![]);
    match step {
        Step::Fault(at) => {
            prop_assert_eq!(planner.fault(page(at), now, &mut actions), at < total);
            // No starvation: whatever is in flight, a fault on a missing page is read in the same
            // call, and any other is answered or waits for a read that is under way.
            let answered = !actions.is_empty() || model.flying.iter().any(|(_, run)| run.contains(page(at)));
            prop_assert!(answered || at >= total, "the fault at {} waits for nothing", at);
        }
        Step::Land(_) if model.flying.is_empty() => {}
        Step::Land(which) => {
            let (lane, run) = model.flying.swap_remove(which % model.flying.len());
            prop_assert!(planner.landed(lane, run, now, &mut actions));
        }
        Step::Extend(by, zeros, kept) => {
            let from = planner.known();
            let known = (from + by).min(total);
            let of = |mask: u64| (from..known).filter(move |at| mask >> (at % 64) & 1 == 1).map(page);
            let (zeros, kept): (Vec<_>, Vec<_>) = (of(zeros).collect(), of(kept & !zeros).collect());
            for (said, pages) in [(PageState::Zero, &zeros), (PageState::Kept, &kept)] {
                for page in pages {
                    let state = model.pages.entry(page.0).or_insert(PageState::Missing);
                    if *state == PageState::Missing {
                        *state = said;
                    }
                }
            }
            planner.map_extended(News { known, zeros, kept }, &mut actions);
        }
        Step::Show => planner.show_kept(&mut actions),
        Step::Prefer(first, count) => {
            let inside = planner.prefer(&[Run { first: page(first), count }]);
            prop_assert_eq!(inside, count > 0 && first + u64::from(count) <= total);
        }
        Step::Order(runs) => {
            let runs: Vec<Run> = runs.into_iter().map(|(first, count)| run(first, count)).collect();
            let ranks = Ranks::listed(total, &runs);
            let inside = runs.iter().all(|run| run.count > 0 && run.end() <= total);
            prop_assert_eq!(ranks.is_some(), inside);
            prop_assert!(ranks.is_none_or(|ranks| planner.order(ranks)));
        }
        Step::Drain(reads) => {
            planner.drain(reads, now, &mut actions);
            for action in &actions {
                let Action::Read(why, run) = action else { continue };
                let known = *why == Why::Recent || run.end() <= planner.known();
                prop_assert!(*why != Why::Fault && known && run.end() <= total, "{:?}", run);
            }
            prop_assert!(actions.is_empty() || planner.bulk_in_flight <= planner.window());
        }
    }
    model.follow(&mut actions);
    prop_assert_eq!(model.bulk_in_flight(), planner.bulk_in_flight);
    prop_assert_eq!(model.flying.len(), planner.flights.len(), "nothing is kept of what has landed");
    Ok(())
}

proptest! {
    // A failing case is kept in `proptest-regressions` and run first from then on:
    // `cargo test -p postcopy-engine planner` replays it.
    #[test]
    fn every_page_is_published_once_whatever_happens(
        steps in steps(),
        total in 1u64..200,
        policy in policies(),
        pace in 1u64..100_000,
    ) {
        let mut planner = Planner::new(total, PlannerConfig { policy, ..PlannerConfig::default() });
        let mut model = Model::default();
        let mut now = 0;
        for step in steps {
            now += pace;
            take(step, &mut planner, &mut model, Nanos(now))?;
        }
        // Whatever happened before, the drain now ends, with every page here exactly once.
        take(Step::Extend(total, 0, 0), &mut planner, &mut model, Nanos(now))?;
        for _ in 0..2 * total + 1 {
            now += pace;
            take(Step::Drain(8), &mut planner, &mut model, Nanos(now))?;
            take(Step::Land(0), &mut planner, &mut model, Nanos(now))?;
        }
        prop_assert!(model.done);
        prop_assert_eq!(planner.outstanding(), 0);
        for at in 0..total {
            let here = [PageState::Resident, PageState::Zero, PageState::Kept];
            prop_assert!(model.pages.get(&at).is_some_and(|state| here.contains(state)), "page {}", at);
        }
    }
}
