//! What the planner costs a page: a whole drain, with a fault now and then, no I/O.
#![allow(missing_docs)] // criterion's macros make functions without documentation

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use postcopy_engine::memory::PageIndex;
use postcopy_engine::planner::{Action, Nanos, News, Planner, PlannerConfig, Policy};

/// Pages of 1 GiB.
const PAGES: u64 = 262_144;

/// Drains everything; each read lands at once, and every hundredth step faults somewhere.
fn drain(policy: Policy) -> Planner {
    let mut planner = Planner::new(PAGES, PlannerConfig { policy, ..PlannerConfig::default() });
    let (mut actions, mut pending, mut step) = (Vec::new(), Vec::new(), 0u64);
    let zeros = (0..PAGES).step_by(3).map(PageIndex).collect();
    planner.map_extended(News { known: PAGES, zeros, ..News::default() }, &mut actions);
    while planner.outstanding() > 0 {
        step += 1;
        let now = Nanos(step * 10_000);
        if step.is_multiple_of(100) {
            let known = planner.fault(PageIndex(step * 7919 % PAGES), now, &mut actions);
            assert!(known);
        }
        planner.drain(8, now, &mut actions);
        pending.append(&mut actions);
        for action in pending.drain(..) {
            if let Action::Read(why, run) = action {
                let known = planner.landed(why.lane(), run, Nanos(now.0 + 5_000), &mut actions);
                assert!(known);
            }
        }
        actions.clear();
    }
    planner
}

fn planner(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planner");
    group.sample_size(10).throughput(Throughput::Elements(PAGES));
    group.bench_function("drain-1GiB", |b| b.iter(|| drain(Policy::Linear)));
    for policy in [Policy::FIXED[2], Policy::FIXED[5], Policy::Adaptive] {
        group.bench_function(format!("drain-1GiB-{policy}"), |b| b.iter(|| drain(policy)));
    }
    group.finish();
}

criterion_group!(benches, planner);
criterion_main!(benches);
