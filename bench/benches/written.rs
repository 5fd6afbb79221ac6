//! What it costs to be told which pages of a guest another process has written (Linux 6.7; nothing is measured on an
//! older kernel). The floor reads an entry of 8 bytes for each page, as /proc/PID/pagemap has them, and looks at none.
#![allow(missing_docs)] // criterion's macros make functions without documentation

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::places::Places;
use postcopy_engine::written::{WP_ASYNC, Way, WriteLog};
use postcopy_transport::HostMemory;
use userfaultfd::{FeatureFlags, UffdBuilder};

/// Pages of 1 GiB, and every so manieth is written.
const PAGES: u64 = 262_144;
const EVERY: usize = 100;

fn write(memory: &HostMemory) {
    for page in (0..PAGES).step_by(EVERY) {
        assert!(memory.write(page * PAGE_SIZE, &[2]));
    }
}

fn written(criterion: &mut Criterion) {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).require_features(FeatureFlags::from_bits_retain(WP_ASYNC));
    let Ok(_made) = builder.create() else {
        return println!("this kernel has no asynchronous write protection: nothing is measured");
    };
    let memory = HostMemory::anonymous("guest", (PAGES * PAGE_SIZE) as usize).expect("a memfd of 1 GiB");
    (0..PAGES).for_each(|page| assert!(memory.write(page * PAGE_SIZE, &[1])));
    let base = memory.base() as u64;
    let way = Way::of(std::process::id() as i32).expect("this process has made a userfaultfd");
    let places = Places::new([(base, PAGES * PAGE_SIZE)]).expect("the memory has whole pages");
    let mut log = way.begin(places).expect("the memory is one mapping");
    write(&memory);

    let mut group = criterion.benchmark_group("written");
    group.sample_size(10).throughput(Throughput::Elements(PAGES));
    let entries = File::open("/proc/self/pagemap").expect("/proc is there");
    let mut buffer = vec![0u8; 64 << 10];
    group.bench_function("floor-entries", |b| {
        b.iter(|| {
            for at in (0..PAGES * 8).step_by(buffer.len()) {
                let from = base / PAGE_SIZE * 8 + at;
                entries.read_exact_at(&mut buffer, from).expect("entries of mapped pages");
            }
        });
    });
    group.bench_function("dirty", |b| b.iter(|| black_box(log.dirty().expect("this process lives"))));
    group.bench_function("written", |b| b.iter(|| black_box(log.written().expect("this process lives"))));
    let take = |log: &mut WriteLog| black_box(log.take().expect("this process lives"));
    group.bench_function("take", |b| {
        b.iter_batched(|| write(&memory), |()| take(&mut log), BatchSize::PerIteration);
    });
    group.finish();
}

criterion_group!(benches, written);
criterion_main!(benches);
