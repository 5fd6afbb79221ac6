//! The planner against a model, under any order of events.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn page(index: u64) -> PageIndex {
    PageIndex(index)
}

#[test]
fn a_fault_on_a_missing_page_goes_to_the_urgent_lane() {
    let mut planner = Planner::new(10);
    let mut actions = vec![];
    assert!(planner.fault(page(4), &mut actions));
    assert_eq!(actions, [Action::Read(LaneId::Urgent, Run::one(page(4)))]);
    assert!(!planner.fault(page(10), &mut actions), "past the end");
}

#[test]
fn a_fault_on_a_page_in_flight_is_not_read_twice() {
    let mut planner = Planner::new(10);
    let mut actions = vec![];
    planner.map_extended(10, std::iter::empty(), &mut actions);
    planner.drain(1, &mut actions);
    assert_eq!(actions.pop(), Some(Action::Read(LaneId::Bulk, Run { first: page(0), count: 10 })));
    assert!(planner.fault(page(4), &mut actions));
    assert_eq!(actions, []);
    assert_eq!(planner.counts().minor_faults, 1);
}

#[test]
fn the_drain_goes_only_where_the_map_is_known_and_skips_zero_pages() {
    let mut planner = Planner::new(100);
    let mut actions = vec![];
    planner.drain(8, &mut actions);
    assert_eq!(actions, [], "nothing is known yet");
    planner.map_extended(10, [page(0), page(5)].into_iter(), &mut actions);
    planner.drain(8, &mut actions);
    let read = |first, count| Action::Read(LaneId::Bulk, Run { first: page(first), count });
    assert_eq!(actions, [read(1, 4), read(6, 4)]);
}

#[test]
fn a_fault_on_a_zero_page_never_crosses() {
    let mut planner = Planner::new(2);
    let mut actions = vec![];
    planner.map_extended(2, [page(1)].into_iter(), &mut actions);
    assert!(planner.fault(page(1), &mut actions));
    assert_eq!(actions, [Action::PublishZero(page(1))]);
    assert_eq!(planner.counts().zero_pages, 1);
}

#[test]
fn a_fault_shrinks_the_window_and_landed_reads_grow_it_again() {
    let mut planner = Planner::new(10_000);
    let mut actions = vec![];
    planner.map_extended(10_000, std::iter::empty(), &mut actions);
    assert!(planner.fault(page(9_999), &mut actions));
    actions.clear();
    planner.drain(64, &mut actions);
    let pages = |actions: &[Action]| -> u32 {
        let count = |action: &Action| if let Action::Read(_, run) = action { run.count } else { 0 };
        actions.iter().map(count).sum()
    };
    assert_eq!(pages(&actions), BULK_WINDOW_MIN);
    while let Some(Action::Read(lane, run)) = actions.pop() {
        let mut more = vec![];
        planner.landed(lane, run, &mut more);
    }
    planner.drain(64, &mut actions);
    assert_eq!(pages(&actions), BULK_WINDOW_MIN * 2);
}

/// What may happen next, as numbers that the test maps to what is possible.
#[derive(Clone, Debug)]
enum Step {
    Fault(u64),
    Land(usize),
    Extend(u64, u64),
    Drain(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u64..200).prop_map(Step::Fault),
        8 => any::<usize>().prop_map(Step::Land),
        2 => (1u64..60, any::<u64>()).prop_map(|(by, zeros)| Step::Extend(by, zeros)),
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
    fn follow(&mut self, actions: &mut Vec<Action>) {
        for action in actions.drain(..) {
            assert!(
                !self.done || matches!(action, Action::Wake(_) | Action::PublishZero(_)),
                "{action:?} after Done"
            );
            match action {
                Action::Read(lane, run) => {
                    for at in run.pages() {
                        let before = self.pages.insert(at.0, PageState::InFlight);
                        assert!(matches!(before, None | Some(PageState::Missing)), "{at:?} was {before:?}");
                    }
                    self.flying.push((lane, run));
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
                Action::Wake(at) => assert_eq!(self.pages.get(&at.0), Some(&PageState::Resident)),
                Action::Done => self.done = true,
            }
        }
    }
}

proptest! {
    #[test]
    fn every_page_is_published_once_whatever_happens(steps in steps(), total in 1u64..200) {
        let mut planner = Planner::new(total);
        let mut model = Model::default();
        let mut actions = vec![];
        for step in steps {
            match step {
                Step::Fault(at) => {
                    prop_assert_eq!(planner.fault(page(at), &mut actions), at < total);
                }
                Step::Land(_) if model.flying.is_empty() => {}
                Step::Land(which) => {
                    let (lane, run) = model.flying.swap_remove(which % model.flying.len());
                    planner.landed(lane, run, &mut actions);
                }
                Step::Extend(by, zeros) => {
                    let from = planner.known();
                    let known = (from + by).min(total);
                    let zeros: Vec<_> = (from..known).filter(|at| zeros >> (at % 64) & 1 == 1).map(page).collect();
                    for zero in &zeros {
                        model.pages.entry(zero.0).and_modify(|state| {
                            if *state == PageState::Missing { *state = PageState::Zero }
                        }).or_insert(PageState::Zero);
                    }
                    planner.map_extended(known, zeros.into_iter(), &mut actions);
                }
                Step::Drain(reads) => planner.drain(reads, &mut actions),
            }
            model.follow(&mut actions);
        }
        // Whatever happened before, the drain now ends, with every page here exactly once.
        planner.map_extended(total, std::iter::empty(), &mut actions);
        for _ in 0..10_000 {
            planner.drain(8, &mut actions);
            model.follow(&mut actions);
            let Some((lane, run)) = model.flying.pop() else { break };
            planner.landed(lane, run, &mut actions);
            model.follow(&mut actions);
        }
        prop_assert!(model.done);
        prop_assert_eq!(planner.outstanding(), 0);
        for at in 0..total {
            prop_assert!(matches!(model.pages.get(&at), Some(PageState::Resident | PageState::Zero)), "page {}", at);
        }
    }
}
