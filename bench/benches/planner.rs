//! What the planner costs a page: a whole drain, with a fault now and then, no I/O.
#![allow(missing_docs)] // criterion's macros make functions without documentation

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use postcopy_engine::memory::PageIndex;
use postcopy_engine::planner::{Action, Planner};

/// Pages of 1 GiB.
const PAGES: u64 = 262_144;

/// Drains everything; each read lands at once, and every hundredth step faults somewhere.
fn drain() -> Planner {
    let mut planner = Planner::new(PAGES);
    let (mut actions, mut pending, mut step) = (Vec::new(), Vec::new(), 0u64);
    planner.map_extended(PAGES, (0..PAGES).step_by(3).map(PageIndex), &mut actions);
    while planner.outstanding() > 0 {
        step += 1;
        if step.is_multiple_of(100) {
            let known = planner.fault(PageIndex(step * 7919 % PAGES), &mut actions);
            assert!(known);
        }
        planner.drain(8, &mut actions);
        pending.append(&mut actions);
        for action in pending.drain(..) {
            if let Action::Read(lane, run) = action {
                planner.landed(lane, run, &mut actions);
            }
        }
        actions.clear();
    }
    planner
}

fn planner(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planner");
    group.sample_size(10).throughput(Throughput::Elements(PAGES));
    group.bench_function("drain-1GiB", |b| b.iter(drain));
    group.finish();
}

criterion_group!(benches, planner);
criterion_main!(benches);
