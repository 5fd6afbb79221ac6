//! What the planner does in one situation or another.

mod schedules;

use super::*;

fn page(index: u64) -> PageIndex {
    PageIndex(index)
}

const NOW: Nanos = Nanos(0);

fn run(first: u64, count: u32) -> Run {
    Run { first: page(first), count }
}

/// A planner that knows the whole of its memory, none of it zero.
fn planner(total: u64, policy: &str) -> Planner {
    let policy = policy.parse().unwrap();
    let mut planner = Planner::new(total, PlannerConfig { policy, ..PlannerConfig::default() });
    planner.map_extended(News { known: total, ..News::default() }, &mut vec![]);
    planner
}

/// The next `count` pages that the drain asks for, one a read; each lands a microsecond later.
fn order(planner: &mut Planner, clock: &mut u64, count: usize) -> Vec<u64> {
    let mut seen = vec![];
    while seen.len() < count {
        // Reads of one page: a wire that carries no more while a fault may wait.
        let Some((why, run)) = planner.next(1) else { break };
        let mut actions = vec![];
        planner.read(why, run, Nanos(*clock), &mut actions);
        *clock += 1000;
        assert!(planner.landed(why.lane(), run, Nanos(*clock), &mut actions));
        seen.push(run.first.0);
    }
    seen
}

fn fault(planner: &mut Planner, clock: &mut u64, at: u64) {
    let mut actions = vec![];
    assert!(planner.fault(page(at), Nanos(*clock), &mut actions));
    if let Some(Action::Read(Why::Fault, run)) = actions.first().copied() {
        *clock += 1000;
        assert!(planner.landed(LaneId::Urgent, run, Nanos(*clock), &mut actions));
    }
}

#[test]
fn a_fault_on_a_missing_page_goes_to_the_urgent_lane() {
    let mut planner = Planner::new(10, PlannerConfig::default());
    let mut actions = vec![];
    assert!(planner.fault(page(4), NOW, &mut actions));
    assert_eq!(actions, [Action::Read(Why::Fault, Run::one(page(4)))]);
    assert!(!planner.fault(page(10), NOW, &mut actions), "past the end");
}

#[test]
fn a_fault_on_a_page_in_flight_is_not_read_twice_and_its_run_is_published_first() {
    let mut planner = planner(10, "linear");
    let mut actions = vec![];
    planner.drain(2, NOW, &mut actions);
    let reads = [Action::Read(Why::Drain, run(0, 4)), Action::Read(Why::Drain, run(4, 4))];
    assert_eq!(std::mem::take(&mut actions), reads);
    assert!(planner.fault(page(5), NOW, &mut actions));
    assert_eq!(actions, []);
    assert_eq!(planner.counts().minor_faults, 1);
    assert!(planner.awaited(run(4, 4)) && !planner.awaited(run(0, 4)));
}

#[test]
fn a_read_that_completes_twice_is_told() {
    let mut planner = planner(10, "linear");
    let mut actions = vec![];
    planner.drain(1, NOW, &mut actions);
    assert!(!planner.landed(LaneId::Urgent, run(0, 4), NOW, &mut actions), "on the other lane");
    assert!(planner.landed(LaneId::Bulk, run(0, 4), NOW, &mut actions));
    actions.clear();
    assert!(!planner.landed(LaneId::Bulk, run(0, 4), NOW, &mut actions));
    assert_eq!(actions, []);
}

#[test]
fn the_drain_goes_only_where_the_map_is_known_and_skips_zero_pages() {
    let mut planner = Planner::new(100, PlannerConfig::default());
    let mut actions = vec![];
    planner.drain(8, NOW, &mut actions);
    assert_eq!(actions, [], "nothing is known yet");
    planner.map_extended(News { known: 10, zeros: vec![page(0), page(5)], ..News::default() }, &mut actions);
    planner.drain(8, NOW, &mut actions);
    assert_eq!(actions, [Action::Read(Why::Drain, run(1, 4)), Action::Read(Why::Drain, run(6, 4))]);
}

#[test]
fn a_fault_on_a_zero_page_never_crosses() {
    let mut planner = Planner::new(2, PlannerConfig::default());
    let mut actions = vec![];
    planner.map_extended(News { known: 2, zeros: vec![page(1)], ..News::default() }, &mut actions);
    assert!(planner.fault(page(1), NOW, &mut actions));
    assert_eq!(actions, [Action::PublishZero(page(1))]);
    assert_eq!(planner.counts().zero_pages, 1);
}

#[test]
fn a_fault_on_a_kept_page_never_crosses_and_shows_what_is_kept_around_it() {
    let mut planner = Planner::new(64, PlannerConfig::default());
    let mut actions = vec![];
    let kept = (0..40).filter(|at| *at != 21).map(page).collect();
    let news = News { known: 64, zeros: vec![page(50)], kept };
    planner.map_extended(news, &mut actions);
    assert_eq!((planner.outstanding(), planner.counts().kept_pages), (24, 39));
    for (at, shown) in [(25, run(22, 10)), (17, run(16, 5)), (39, run(32, 8))] {
        actions.clear();
        assert!(planner.fault(page(at), NOW, &mut actions));
        assert_eq!(actions, [Action::PublishKept(shown)]);
    }
    assert_eq!((planner.counts().minor_faults, planner.counts().network_faults), (3, 0));
    actions.clear();
    planner.drain(1, NOW, &mut actions);
    assert_eq!(actions, [Action::Read(Why::Drain, run(21, 1))], "what was written meanwhile is read");
}

#[test]
fn what_was_touched_last_comes_first() {
    let mut planner = planner(64, "linear");
    let mut actions = vec![];
    let kept = [10, 11, 40].map(page).into();
    planner.map_extended(News { known: 30, kept, ..News::default() }, &mut actions);
    assert!(!planner.prefer(&[run(3, 1), run(63, 2)]), "there is no page 64");
    assert!(planner.prefer(&[run(50, 1), run(20, 3)]));
    assert!(planner.fault(page(21), NOW, &mut actions));
    actions.clear();
    planner.drain(4, NOW, &mut actions);
    let first = [run(50, 1), run(20, 1), run(22, 1)].map(|run| Action::Read(Why::Recent, run));
    assert_eq!(actions, [&first[..], &[Action::Read(Why::Drain, run(0, 4))]].concat());
}

#[test]
fn what_is_kept_is_shown_near_faults_first_then_as_it_was_touched_then_in_order() {
    let mut planner = planner(256, "linear");
    let mut actions = vec![];
    let kept = [2, 3, 10, 70, 130, 140, 150].map(page).into_iter().chain((200..250).map(page)).collect();
    planner.map_extended(News { known: 256, kept, ..News::default() }, &mut actions);
    assert!(planner.prefer(&[run(139, 5), run(10, 1)]));
    assert!(planner.fault(page(130), NOW, &mut actions));
    assert_eq!(actions, [Action::PublishKept(run(130, 1))]);
    let mut shown = vec![];
    for _ in 0..3 {
        actions.clear();
        planner.show_kept(&mut actions);
        let runs = actions.iter().map(|action| match action {
            Action::PublishKept(run) => *run,
            other => panic!("{other:?}"),
        });
        shown.extend(runs);
        assert!(actions.len() <= 8);
    }
    let (near, touched) = ([run(140, 1), run(150, 1)], run(10, 1));
    let rest = [run(2, 2), run(70, 1), run(200, 26), run(226, 24)];
    assert_eq!(shown, [&near[..], &[touched], &rest].concat());
    assert_eq!(planner.counts().kept_pages, 57);
}

#[test]
fn a_bubble_grows_around_the_last_fault_skips_what_was_sent_and_stops_at_the_ends() {
    for (policy, after_4, after_8) in [
        ("linear", [0, 1, 2, 3], vec![5, 6, 7, 9]),
        ("bubble:forward", [5, 6, 7, 8], vec![9, 0, 1, 2]),
        ("bubble:dual", [5, 3, 6, 2], vec![9, 7, 1, 0]),
        ("bubble:backward", [3, 2, 1, 0], vec![7, 6, 5, 9]),
    ] {
        let (mut planner, mut clock) = (planner(10, policy), 0);
        fault(&mut planner, &mut clock, 4);
        assert_eq!(order(&mut planner, &mut clock, 4), after_4, "{policy}");
        fault(&mut planner, &mut clock, 8);
        assert_eq!(order(&mut planner, &mut clock, 4), after_8, "{policy}");
    }
}

#[test]
fn several_bubbles_take_turns_stop_where_another_has_been_and_the_first_pivot_stays() {
    let (mut dual, mut clock) = (planner(100, "bubble-multi:2:dual"), 0);
    fault(&mut dual, &mut clock, 10);
    fault(&mut dual, &mut clock, 13);
    assert_eq!(order(&mut dual, &mut clock, 6), [14, 12, 11, 9, 15, 8], "between the pivots both stop");
    fault(&mut dual, &mut clock, 50);
    assert_eq!(order(&mut dual, &mut clock, 4), [51, 49, 16, 52], "10 is forgotten");

    let (mut forward, mut clock) = (planner(100, "bubble-multi:2:forward"), 0);
    fault(&mut forward, &mut clock, 10);
    assert_eq!(order(&mut forward, &mut clock, 4), [11, 0, 12, 1]);
    fault(&mut forward, &mut clock, 50);
    assert_eq!(order(&mut forward, &mut clock, 4), [51, 2, 52, 3], "the first pivot is never replaced");
}

#[test]
fn neighbours_are_sought_in_the_order_in_which_pages_were_listed() {
    // 70 to 73, 20, 21, 50, then 0 to 19 and so on; 72 is listed twice and has its first place.
    let listed = [run(70, 4), run(20, 2), run(72, 1), run(50, 1)];
    for (policy, then) in [
        ("linear", [70, 71, 72, 73, 21]),
        ("bubble:forward", [21, 50, 0, 1, 2]),
        ("bubble:dual", [21, 73, 50, 72, 0]),
        ("bubble:backward", [73, 72, 71, 70, 21]),
        ("bubble-multi:2:dual", [21, 73, 50, 72, 0]),
        ("adaptive", [21, 73, 50, 72, 0]),
    ] {
        let (mut planner, mut clock) = (planner(100, policy), 0);
        assert!(Ranks::listed(100, &[run(5, 1), run(99, 2)]).is_none(), "there is no page 100");
        assert!(!planner.order(Ranks::listed(101, &[run(99, 2)]).unwrap()), "it is another guest's");
        assert!(planner.order(Ranks::listed(100, &listed).unwrap()));
        fault(&mut planner, &mut clock, 20);
        assert_eq!(order(&mut planner, &mut clock, 5), then, "{policy}");
    }
    let (mut early, mut clock) = (Planner::new(100, PlannerConfig::default()), 0);
    early.map_extended(News { known: 2, ..News::default() }, &mut vec![]);
    assert!(early.order(Ranks::listed(100, &listed).unwrap()));
    assert_eq!(order(&mut early, &mut clock, 10), [0, 1], "as far as the map goes");
    early.map_extended(News { known: 60, ..News::default() }, &mut vec![]);
    assert_eq!(order(&mut early, &mut clock, 5), [20, 21, 50, 2, 3]);
    early.map_extended(News { known: 100, ..News::default() }, &mut vec![]);
    assert_eq!(
        order(&mut early, &mut clock, 6),
        [70, 71, 72, 73, 4, 5],
        "what was not known comes when it is"
    );
}

#[test]
fn a_stream_leans_where_its_faults_go_and_finds_a_stride() {
    let (mut down, mut clock) = (planner(1000, "adaptive"), 0);
    for at in [500, 499, 498] {
        fault(&mut down, &mut clock, at);
    }
    assert_eq!(order(&mut down, &mut clock, 4), [497, 496, 495, 494]);

    let (mut strided, mut clock) = (planner(1000, "adaptive"), 0);
    for at in [100, 130, 160] {
        fault(&mut strided, &mut clock, at);
    }
    assert_eq!(order(&mut strided, &mut clock, 3), [190, 220, 250]);
}

#[test]
fn a_stream_does_not_run_away_while_the_map_is_not_known() {
    let config = PlannerConfig { policy: "adaptive".parse().unwrap(), ..PlannerConfig::default() };
    let know =
        |planner: &mut Planner, known| planner.map_extended(News { known, ..News::default() }, &mut vec![]);
    for (touches, known, then) in [(vec![0, 1, 2, 3, 4], 0, [5, 6]), (vec![100, 130, 160], 101, [190, 220])] {
        let (mut planner, mut clock) = (Planner::new(1000, config), 0);
        know(&mut planner, known);
        // The drain is asked for work after each.
        for at in touches {
            fault(&mut planner, &mut clock, at);
            let _ = order(&mut planner, &mut clock, 200);
        }
        know(&mut planner, 1000);
        assert_eq!(order(&mut planner, &mut clock, 2), then);
    }
}

#[test]
fn the_window_is_the_rate_times_the_round_trip_and_the_time_that_a_fault_may_wait() {
    let mut planner = planner(100_000, "linear");
    let (mut now, mut flying) = (0, std::collections::VecDeque::new());
    // 4096 bytes a microsecond and 20 µs for a round trip: 20 + 50 pages.
    let mut free_at = 0;
    for _ in 0..3000 {
        let mut actions = vec![];
        planner.drain(64, Nanos(now), &mut actions);
        for action in actions.drain(..) {
            let Action::Read(_, run) = action else { continue };
            free_at = free_at.max(now + 10_000) + u64::from(run.count) * 1000;
            flying.push_back((free_at + 10_000, run));
        }
        let (due, run) = flying.pop_front().unwrap();
        now = due;
        assert!(planner.landed(LaneId::Bulk, run, Nanos(now), &mut actions));
    }
    assert!((70..=75).contains(&planner.window()), "{}", planner.window());
    assert!(planner.bulk_in_flight > 60, "and it is used: {}", planner.bulk_in_flight);
}

#[test]
fn what_another_thread_read_says_nothing_of_the_link() {
    let mut planner = planner(4096, "linear");
    let mut actions = vec![];
    for at in 0..200 {
        // The notes of a fault's beginning and end are heard at once.
        assert!(planner.fault(page(at * 4), Nanos(at), &mut actions));
        assert!(planner.landed_elsewhere(LaneId::Urgent, page(at * 4), &mut actions));
        assert_eq!(actions.pop(), Some(Action::Publish(Run::one(page(at * 4)))));
    }
    assert_eq!(planner.window(), 16, "as before anything is known");
    assert!(!planner.landed_elsewhere(LaneId::Urgent, page(0), &mut actions), "it has landed");
}

#[test]
fn a_limit_holds_back_the_drain_and_no_fault() {
    // A page a millisecond: what the slack allows at once is 10 pages, and the read that begins below that.
    let (policy, max_bandwidth) = (Policy::Linear, Bandwidth::new(4096 * 1000));
    let config = PlannerConfig { policy, max_bandwidth, ..PlannerConfig::default() };
    let mut planner = Planner::new(1000, config);
    let (mut clock, mut actions) = (100_000_000, vec![]);
    planner.map_extended(News { known: 1000, ..News::default() }, &mut actions);
    let drained = |planner: &mut Planner, clock| {
        let mut actions = vec![];
        planner.drain(64, Nanos(clock), &mut actions);
        let pages = |action: &Action| if let Action::Read(Why::Drain, run) = action { run.count } else { 0 };
        actions.iter().map(pages).sum::<u32>()
    };
    assert_eq!(drained(&mut planner, clock), 12);
    assert_eq!(planner.held_back(Nanos(clock)), Some(2_000_000));
    for at in 900..950 {
        actions.clear();
        assert!(planner.fault(page(at), Nanos(clock), &mut actions));
        assert_eq!(actions, [Action::Read(Why::Fault, Run::one(page(at)))]);
    }
    // What faults took is held against the drain, for 10 ms and the last of them at most.
    let held = planner.held_back(Nanos(clock)).unwrap();
    assert_eq!(held, 11_000_000);
    clock += held - 1;
    assert_eq!(drained(&mut planner, clock), 0);
    assert_eq!(drained(&mut planner, clock + 1), 4);
    assert_eq!(planner.held_back(Nanos(clock + 4_000_001)), None);
}
