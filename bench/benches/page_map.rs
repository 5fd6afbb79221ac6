//! What the source's page map costs: all of a guest's memory told zero pages from others, while it runs and
//! again when it is frozen. The floor looks at the zero bytes alone, in memory of this process.
#![allow(missing_docs)] // criterion's macros make functions without documentation

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::pagemap::{Known, Of, PageMap, decode_known};
use postcopy_transport::HostMemory;

/// Pages of 256 MiB: half with content, a quarter zero, a quarter holes, in turn by this many.
const PAGES: u64 = 65_536;
const TURN: u64 = 64;

fn guest() -> HostMemory {
    let memory = HostMemory::anonymous("guest", (PAGES * PAGE_SIZE) as usize).expect("a memfd of 256 MiB");
    for page in 0..PAGES {
        match page / TURN % 4 {
            0 | 2 => assert!(memory.write(page * PAGE_SIZE, &[1])),
            1 => assert!(memory.write(page * PAGE_SIZE, &[0])),
            _ => {}
        }
    }
    memory
}

fn filled(mut map: PageMap, memory: &HostMemory, of: Of) -> PageMap {
    let frozen = matches!(of, Of::Frozen(_));
    map.fill(memory, of).expect("a thread");
    let mut header = [0; 16];
    while decode_known(&header, PAGES) != Some(Known { pages: PAGES, frozen }) {
        assert!(map.memory().read(0, &mut header));
        std::hint::spin_loop();
    }
    map
}

fn page_map(criterion: &mut Criterion) {
    let memory = guest();
    let zeros: Vec<u8> = (0..PAGES / 4 * PAGE_SIZE).map(|_| std::hint::black_box(0)).collect();
    let empty = || PageMap::new(PAGES).expect("memory for a map");
    let mut group = criterion.benchmark_group("page-map");
    group.sample_size(10).throughput(Throughput::Elements(PAGES));
    group.bench_function("floor-zero-bytes", |b| {
        let page = [0u8; PAGE_SIZE as usize];
        b.iter(|| std::hint::black_box(&zeros).chunks(page.len()).all(|other| other == page));
    });
    group.bench_function("running", |b| {
        b.iter_batched(empty, |map| filled(map, &memory, Of::Running), BatchSize::PerIteration);
    });
    group.bench_function("frozen", |b| {
        let known = || filled(empty(), &memory, Of::Running);
        b.iter_batched(known, |map| filled(map, &memory, Of::Frozen(None)), BatchSize::PerIteration);
    });
    group.finish();
}

criterion_group!(benches, page_map);
criterion_main!(benches);
