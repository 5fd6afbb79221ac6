//! One-sided reads beside their floors, in one run: bare sockets for TCP, a copy for shared memory.
//!
//! `read`: one read at a time, both ends spinning. `move`: a whole region, as the drain moves it.
#![allow(missing_docs)] // criterion's macros make functions without documentation

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use postcopy_bench::{Loopback, PingPong, REGION, Stream};
use postcopy_transport::{LaneClass, Transport};

fn reads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read");
    for bytes in [4096u32, 65536] {
        group.throughput(Throughput::Bytes(bytes.into()));
        {
            // In a scope: its server spins as long as it lives.
            let mut floor = PingPong::new(bytes as usize);
            let name = BenchmarkId::new("floor-sockets", bytes);
            group.bench_function(name, |b| b.iter(|| floor.round_trip()));
        }
        let (from, mut to) = (vec![7u8; bytes as usize], vec![0u8; bytes as usize]);
        group.bench_function(BenchmarkId::new("floor-copy", bytes), |b| {
            b.iter(|| std::hint::black_box(&mut to).copy_from_slice(std::hint::black_box(&from)));
        });
        for transport in Transport::ALL.into_iter().filter(|transport| transport.available().is_ok()) {
            let mut lane = Loopback::new(transport, LaneClass::Urgent);
            let name = BenchmarkId::new(transport.name(), bytes);
            group.bench_function(name, |b| b.iter(|| lane.read(bytes)));
        }
    }
    group.finish();
}

fn moves(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("move");
    group.throughput(Throughput::Bytes(REGION as u64)).sample_size(20);
    const PIECE: u32 = 128 << 10;
    let mut floor = Stream::new(PIECE as usize);
    group.bench_function("floor-sockets", |b| b.iter(|| floor.run()));
    for transport in Transport::ALL.into_iter().filter(|transport| transport.available().is_ok()) {
        let mut lane = Loopback::new(transport, LaneClass::Bulk);
        for bytes in [64 << 10, PIECE] {
            let name = BenchmarkId::new(transport.name(), bytes);
            group.bench_function(name, |b| b.iter(|| lane.move_all(bytes)));
        }
    }
    group.finish();
}

criterion_group!(benches, reads, moves);
criterion_main!(benches);
