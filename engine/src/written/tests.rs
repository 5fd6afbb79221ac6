//! What is told of writes, by each way that this kernel has.

use std::process::Command;

use userfaultfd::{FeatureFlags, UffdBuilder};

use postcopy_transport::HostMemory;

use super::*;
use crate::memory::PAGE_SIZE;

const PAGES: u64 = 2048;

fn me() -> i32 {
    std::process::id() as i32
}

fn memory(name: &str) -> HostMemory {
    let memory = HostMemory::anonymous(name, (PAGES * PAGE_SIZE) as usize).unwrap();
    (0..64).for_each(|page| assert!(memory.write(page << 12, &[1])));
    memory
}

fn place(memory: &HostMemory) -> Places {
    Places::one(memory.base() as u64, memory.len() as u64)
}

fn listed(pages: &PageSet) -> Vec<u64> {
    (0..64).filter(|page| pages.has(*page)).collect()
}

/// What is told of a process that writes and reads; `log` has just begun.
fn tells(memory: &HostMemory, mut log: WriteLog) {
    assert_eq!(log.written().unwrap().len(), 0, "nothing was written yet");
    let unmapped = log.dirty().unwrap();
    assert!(
        unmapped.len() == PAGES - 64 && unmapped.has(64) && unmapped.has(PAGES - 1),
        "{}",
        unmapped.len()
    );
    assert!(memory.write(7 << 12, &[2]) && memory.write((63 << 12) + 4095, &[2]));
    let mut byte = [0];
    assert!(memory.read(9 << 12, &mut byte));
    assert_eq!(listed(&log.dirty().unwrap()), [7, 63]);
    assert_eq!(listed(&log.written().unwrap()), [7, 63]);
    assert_eq!(listed(&log.take().unwrap()), [7, 63]);
    assert!(memory.write(8 << 12, &[3]));
    assert_eq!(listed(&log.dirty().unwrap()), [8]);
    // Those that were never there, and may be now.
    assert!(
        memory.write(100 << 12, &[3]) && log.dirty().unwrap().has(100) && log.written().unwrap().has(100)
    );
    memory.discard(20 << 12..22 << 12).unwrap();
    assert_eq!(listed(&log.dirty().unwrap()), [8, 20, 21], "pages that were given back count as written");
    assert_eq!(listed(&log.written().unwrap()), [8], "and are not among those that were");
    // More than are told of at once.
    let many: Vec<u64> = (0..PAGES).step_by(2).collect();
    many.iter().for_each(|page| assert!(memory.write(page << 12, &[4])));
    let taken = log.take().unwrap();
    assert!(many.iter().all(|page| taken.has(*page)));
    assert_eq!(log.written().unwrap().len(), 0);
    for page in &many {
        assert!(memory.read(page << 12, &mut byte) && byte == [4]);
    }
}

/// Also on a kernel without the bits, where it must say so.
#[test]
fn soft_dirty_bits_tell_what_was_written() {
    let memory = memory("soft-dirty");
    if soft_dirty::is_noted().unwrap() {
        let way = Way { pid: me(), tracker: None };
        tells(&memory, way.begin(place(&memory)).unwrap());
        return;
    }
    // In a process that has made none; the other test has one here.
    let mut other = Command::new("sleep").arg("60").spawn().unwrap();
    let error = Way::of(other.id() as i32).unwrap_err().to_string();
    other.kill().and_then(|()| other.wait()).unwrap();
    assert!(error.contains("CONFIG_MEM_SOFT_DIRTY") && error.contains("has made no userfaultfd"), "{error}");
}

/// Where the kernel has it (Linux 6.7).
#[test]
fn write_protection_tells_what_was_written() {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).require_features(FeatureFlags::from_bits_retain(WP_ASYNC));
    let Ok(_made) = builder.create() else { return };
    let memory = memory("protected");
    let log = Way::of(me()).unwrap().begin(place(&memory)).unwrap();
    assert!(log.is_taken_at_once(), "{log:?}");
    tells(&memory, log);
    // Nothing is left: another may register it.
    let log = Way::of(me()).unwrap().begin(place(&memory)).unwrap();
    drop(log);
    let elsewhere = Way::of(me()).unwrap().begin(Places::one(1 << 12, PAGES * PAGE_SIZE)).unwrap_err();
    assert!(elsewhere.raw_os_error().is_some(), "{elsewhere}");
}

/// Huge pages, where the system has some to give.
#[test]
fn writes_to_hugetlbfs_are_noted_by_protection_or_not_at_all() {
    let Ok(memory) = HostMemory::huge("huge", 4 << 20) else { return };
    let refused = Way { pid: me(), tracker: None }.begin(place(&memory)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::Unsupported, "{refused}");
    assert!(refused.to_string().contains("no soft-dirty bits"), "{refused}");
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).require_features(FeatureFlags::from_bits_retain(WP_ASYNC));
    let Ok(_made) = builder.create() else { return };
    assert!(memory.write(0, &[1]) && memory.write(2 << 20, &[1]));
    let mut log = Way::of(me()).unwrap().begin(place(&memory)).unwrap();
    assert!(log.written().unwrap().is_empty());
    assert!(memory.write((3 << 20) + 5, &[2]));
    let written = log.take().unwrap();
    assert!(written.has(768) && !written.has(511), "the page of it, which is a large one: {written:?}");
    assert!(log.written().unwrap().is_empty());
    assert!(memory.write(7, &[3]));
    assert!(log.dirty().unwrap().has(0) && !log.dirty().unwrap().has(768));
}
