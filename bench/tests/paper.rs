//! What the paper found must come out of this planner too, in virtual time: the same on every
//! machine. `cargo run --release -p postcopy-bench --bin paper` runs the whole of it.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use postcopy_bench::paper::{
    Outcome, PageOrder, Trace, Wire, quicksort, run_in_order, sequential, suite_traces,
};
use postcopy_engine::planner::{PlannerConfig, Policy};

fn under(policy: &str, trace: &Trace, wire: Wire) -> Outcome {
    under_in_order(policy, trace, PageOrder::Address, wire)
}

fn under_in_order(policy: &str, trace: &Trace, order: PageOrder, wire: Wire) -> Outcome {
    let policy = policy.parse().unwrap();
    run_in_order(trace, order, wire.options(1), PlannerConfig { policy, ..PlannerConfig::default() })
}

#[test]
fn sequential_stress_has_few_network_faults_and_push_only_three_times_as_many() {
    for mib in [8, 16, 32] {
        let mean = |policy| {
            let share = |seed| under(policy, &sequential(mib, seed), Wire::GIGABIT).share();
            (1..=5).map(share).sum::<f64>() / 5.0
        };
        let push = mean("linear");
        for policy in ["bubble:forward", "bubble:dual", "bubble-multi:dual", "adaptive"] {
            let share = mean(policy);
            assert!(share <= 4.0 && 3.0 * share <= push, "{mib} MiB, {policy}: {share} % beside {push} %");
        }
    }
}

#[test]
fn quicksort_orders_the_policies_as_the_paper_does() {
    for processes in [8, 32, 128] {
        let traces: Vec<Trace> = (1..=3).map(|seed| quicksort(processes, 32, 32, 0.2, seed)).collect();
        let faults_in = |order, policy| {
            let of = |trace| under_in_order(policy, trace, order, Wire::GIGABIT).network_faults;
            traces.iter().map(of).sum::<u64>()
        };
        let faults = |policy| faults_in(PageOrder::Address, policy);
        let push = faults("linear");
        let forward = faults("bubble:forward");
        let multi = faults("bubble-multi:forward");
        let dual = faults("bubble:dual");
        let backward = faults("bubble:backward");
        let said = format!("P={processes}: push {push}, forward {forward}, multi {multi}, dual {dual}");
        assert!(3 * forward < push && multi <= forward + forward / 50 && dual < forward, "{said}");
        assert!(backward > 2 * forward, "{said}, backward {backward}");
        if processes == 128 {
            // Of 64 pages each, the arrays are too small here for an order among them to show.
            continue;
        }
        for (policy, address) in [("linear", push), ("bubble:forward", forward), ("bubble:dual", dual)] {
            let recent = faults_in(PageOrder::Lru, policy);
            assert!(recent < address, "{said}; {policy} by recency {recent}");
        }
    }
}

#[test]
fn the_default_is_within_a_tenth_of_the_fixed_policy_under_which_the_guest_waits_least() {
    // Over the fast wire a whole trace has a few faults, which four more or less do not tell apart.
    const FEW: u64 = 4;
    let fault_ns = 60_000;
    for (wire, mib) in [(Wire::GIGABIT, 8), (Wire::RDMA, 32)] {
        for trace in suite_traces(mib, 1) {
            let fixed = Policy::FIXED.map(|policy| under(&policy.to_string(), &trace, wire));
            let best = fixed.iter().min_by_key(|outcome| outcome.stall_ns).unwrap();
            let adaptive = under("adaptive", &trace, wire);
            let within = |ours: u64, best: u64, part: u64, few: u64| ours <= best + best / part + few;
            assert!(
                within(adaptive.stall_ns, best.stall_ns, 10, FEW * fault_ns)
                    && within(adaptive.network_faults, best.network_faults, 5, FEW),
                "{} over {}: {adaptive:?} beside {best:?}",
                trace.name,
                wire.name
            );
        }
    }
}

#[test]
fn every_touch_is_counted_once_and_a_seed_gives_the_same_run() {
    for trace in suite_traces(4, 7) {
        let outcome = under("adaptive", &trace, Wire::GIGABIT);
        assert_eq!(outcome.touched, trace.touches.len() as u64);
        assert_eq!(outcome.network_faults + outcome.late + outcome.resident, outcome.touched, "{outcome:?}");
        let brought = outcome.counts.fault_pages + outcome.counts.prepage_pages + outcome.counts.drain_pages;
        assert_eq!(brought, trace.pages, "each page crosses once");
        assert_eq!(outcome, under("adaptive", &trace, Wire::GIGABIT), "{}", trace.name);
    }
}

#[test]
fn a_fault_waits_behind_no_more_bulk_than_was_allowed() {
    // A round trip, its own page, and the bulk before it: the window is a round trip and 50 µs of
    // wire, or 64 KiB if that is more, and all of it may have been posted at once. Two reads' worth
    // more while the first rates are known no better.
    for (wire, page_ns) in [(Wire::GIGABIT, 32_768), (Wire::RDMA, 328)] {
        for trace in suite_traces(8, 2) {
            let outcome = under("adaptive", &trace, wire);
            let window = (wire.rtt_ns + 50_000).max(16 * page_ns);
            let bound = wire.rtt_ns + window + (8 + 2 * 16) * page_ns;
            assert!(outcome.longest_stall_ns <= bound, "{} over {}: {outcome:?}", trace.name, wire.name);
        }
    }
}
