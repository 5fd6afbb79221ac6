//! What is run: the paper's table, the paper's figure, and every policy on every trace.

use postcopy_bench::paper::{
    Outcome, PageOrder, Trace, Wire, quicksort, run, run_in_order, sequential, suite_traces,
};
use postcopy_engine::planner::{PlannerConfig, Policy};
use serde::Serialize;

/// Working sets of the paper's table, in MiB.
pub(crate) const WORKING_SETS: [u64; 6] = [8, 16, 32, 64, 128, 256];
/// Process counts of the paper's figure.
pub(crate) const PROCESSES: [u64; 5] = [8, 16, 32, 64, 128];

/// A row of the paper's table: policy, and the paper's per cent by working set.
pub(crate) const TABLE: [(&str, &[&str], [f64; 6]); 2] = [
    (
        "prepaging",
        &["bubble:forward", "bubble:dual", "bubble-multi:dual", "adaptive"],
        [2.0, 4.0, 4.0, 3.0, 3.0, 3.0],
    ),
    ("push only", &["linear"], [15.0, 13.0, 13.0, 10.0, 9.0, 10.0]),
];

/// A line of the paper's figure: its name there, the policy, the order of the pages, and the
/// paper's counts (read from its plot, about ±30).
pub(crate) const FIGURE: [(&str, &str, PageOrder, [u64; 5]); 9] = [
    ("push only", "linear", PageOrder::Address, [2030, 3160, 5470, 4280, 3430]),
    ("push, LRU", "linear", PageOrder::Lru, [1180, 2250, 3550, 3130, 2660]),
    ("forward", "bubble:forward", PageOrder::Address, [1180, 1620, 1950, 2390, 2490]),
    ("dual", "bubble:dual", PageOrder::Address, [1120, 1260, 1870, 1970, 2200]),
    ("forward multi-pivot", "bubble-multi:forward", PageOrder::Address, [1010, 1200, 1660, 2160, 2340]),
    ("forward, LRU", "bubble:forward", PageOrder::Lru, [720, 1120, 1730, 1860, 1780]),
    ("dual, LRU", "bubble:dual", PageOrder::Lru, [810, 880, 1590, 1760, 1830]),
    ("forward multi-pivot, LRU", "bubble-multi:forward", PageOrder::Lru, [780, 820, 1410, 1600, 1770]),
    ("dual multi-pivot, LRU", "bubble-multi:dual", PageOrder::Lru, [640, 850, 1450, 1570, 1800]),
];

/// What is drawn beside it: "in laps" is the order that a source of ours tells.
const NOT_THE_PAPERS: [(&str, &str, PageOrder); 6] = [
    ("backward", "bubble:backward", PageOrder::Address),
    ("adaptive", "adaptive", PageOrder::Address),
    ("adaptive, LRU", "adaptive", PageOrder::Lru),
    ("push, in laps", "linear", PageOrder::Laps),
    ("dual, in laps", "bubble:dual", PageOrder::Laps),
    ("adaptive, in laps", "adaptive", PageOrder::Laps),
];

/// Mean share of network faults by policy and working set, in per cent.
#[derive(Debug, Serialize)]
pub(crate) struct ShareRow {
    pub(crate) policy: String,
    pub(crate) shares: Vec<f64>,
}

/// Mean network faults by order and number of processes.
#[derive(Debug, Serialize)]
pub(crate) struct SortRow {
    pub(crate) name: String,
    pub(crate) faults: Vec<f64>,
}

/// One trace over one wire, under each policy.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) trace: String,
    pub(crate) wire: &'static str,
    pub(crate) outcomes: Vec<(String, Outcome)>,
}

/// All of it.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Results {
    pub(crate) table: Vec<ShareRow>,
    pub(crate) figure: Vec<SortRow>,
    pub(crate) suite: Vec<Comparison>,
}

fn config(policy: &str) -> PlannerConfig {
    let policy = policy.parse().expect("the tables name policies that exist");
    PlannerConfig { policy, ..PlannerConfig::default() }
}

/// The paper's evaluation, and the policies against each other.
pub(crate) fn run_all(seed: u64, quick: bool) -> Results {
    let (runs, sets, mib) = if quick { (3, &WORKING_SETS[..4], 32) } else { (10, &WORKING_SETS[..], 128) };
    let seeds = seed..seed + runs;
    Results {
        table: table(seeds.clone(), sets),
        figure: figure(seeds, mib),
        suite: compare(&suite_traces(mib / 4, seed), seed),
    }
}

fn table(seeds: std::ops::Range<u64>, sets: &[u64]) -> Vec<ShareRow> {
    let share = |policy: &str, mib: u64| {
        let of = |seed| run(&sequential(mib, seed), Wire::GIGABIT.options(seed), config(policy)).share();
        seeds.clone().map(of).sum::<f64>() / (seeds.end - seeds.start) as f64
    };
    let policies = TABLE.iter().flat_map(|(_, policies, _)| policies.iter());
    let row = |policy: &&str| ShareRow {
        policy: (*policy).into(),
        shares: sets.iter().map(|mib| share(policy, *mib)).collect(),
    };
    policies.map(row).collect()
}

fn figure(seeds: std::ops::Range<u64>, mib: u64) -> Vec<SortRow> {
    let runs = (seeds.end - seeds.start) as f64;
    let paper = FIGURE.iter().map(|(name, policy, order, _)| (*name, *policy, *order));
    let lines: Vec<_> = paper.chain(NOT_THE_PAPERS).collect();
    let row = |(name, ..): &(&str, _, _)| SortRow { name: (*name).into(), faults: Vec::new() };
    let mut rows: Vec<SortRow> = lines.iter().map(row).collect();
    for processes in PROCESSES {
        let traces: Vec<Trace> =
            seeds.clone().map(|seed| quicksort(processes, mib, mib, 0.2, seed)).collect();
        for (row, (_, policy, order)) in rows.iter_mut().zip(&lines) {
            let of = |trace: &Trace| {
                run_in_order(trace, *order, Wire::GIGABIT.options(1), config(policy)).network_faults as f64
            };
            row.faults.push(traces.iter().map(of).sum::<f64>() / runs);
        }
    }
    rows
}

/// Each trace over both wires under each policy, the default one last.
pub(crate) fn compare(traces: &[Trace], seed: u64) -> Vec<Comparison> {
    let policies = || Policy::FIXED.into_iter().chain([Policy::Adaptive]);
    let of = |trace: &Trace, wire: Wire| Comparison {
        trace: trace.name.clone(),
        wire: wire.name,
        outcomes: policies()
            .map(|policy| {
                let config = PlannerConfig { policy, ..PlannerConfig::default() };
                (policy.to_string(), run(trace, wire.options(seed), config))
            })
            .collect(),
    };
    [Wire::GIGABIT, Wire::RDMA]
        .iter()
        .flat_map(|wire| traces.iter().map(move |trace| of(trace, *wire)))
        .collect()
}

/// The fixed policy under which the guest waits least: what the default is measured by.
pub(crate) fn best_fixed(comparison: &Comparison) -> &(String, Outcome) {
    let fixed = &comparison.outcomes[..Policy::FIXED.len()];
    fixed.iter().min_by_key(|(_, outcome)| outcome.stall_ns).expect("there are fixed policies")
}
