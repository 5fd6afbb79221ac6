//! What is seen from outside of what a stock QEMU touches of its guest's memory.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::ops::Range;
use std::os::unix::fs::FileExt;

use postcopy_e2e::Scratch;
use postcopy_e2e::qemu::{Plain, QemuGuest};
use postcopy_e2e::system::kernel_is_since;
use postcopy_engine::page_set::PageSet;
use postcopy_engine::places::Places;
use postcopy_engine::session::UseLog;
use postcopy_engine::touched::TouchedThere;
use serde_json::json;

/// Where a guest of this size has its RAM in its QEMU.
fn mapping(guest: &QemuGuest, mib: u64) -> Range<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.qemu())).unwrap();
    let shared = maps.lines().filter(|line| line.contains(" rw-s "));
    let ranges = shared.filter_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).unwrap();
        Some(hex(start)..hex(end))
    });
    ranges.into_iter().find(|range| range.end - range.start == mib << 20).unwrap()
}

fn watch(guest: &QemuGuest, mib: u64) -> std::io::Result<Option<TouchedThere>> {
    let at = mapping(guest, mib);
    let places = Places::new([(at.start, at.end - at.start)]).unwrap();
    TouchedThere::of(guest.qemu(), &places)
}

/// What QEMU reads at these physical addresses, by its own mapping.
fn read(guest: &QemuGuest, address: u64) -> String {
    let line = format!("xp /1024wx {address:#x}");
    let words = guest.qmp("human-monitor-command", json!({"command-line": line}));
    words.as_str().unwrap().to_owned()
}

fn pages(set: &PageSet) -> Vec<u64> {
    set.runs(u32::MAX).flat_map(|run| run.first.0..run.first.0 + u64::from(run.count)).collect()
}

#[test]
fn what_a_stock_guest_only_reads_is_seen_and_its_memory_stays() {
    if !kernel_is_since(5, 19) {
        return; // then it is not watched
    }
    let scratch = Scratch::new("stock-uses");
    let machine = Plain::firmware();
    let guest = machine.start_preloaded(&scratch, "q");
    guest.qmp("stop", json!({}));
    let ram = std::fs::File::options().write(true).open(&guest.place().ram).unwrap();
    ram.write_all_at(&0x1234_abcd_u32.to_le_bytes().repeat(1024), 0x5000 << 12).unwrap();
    let before = std::fs::read(&guest.place().ram).unwrap();
    let mut watch = watch(&guest, machine.mib).unwrap().unwrap();
    watch.mark().unwrap();
    assert_eq!(read(&guest, 0x5000 << 12).matches("0x1234abcd").count(), 1024);
    assert_eq!(read(&guest, 0x5003 << 12).matches("0x00000000").count(), 1024);
    assert_eq!(pages(&watch.since_mark().unwrap()), [0x5000, 0x5003]);
    assert_eq!(pages(&watch.since_mark().unwrap()), [0x5000, 0x5003]);
    watch.mark().unwrap();
    assert!(watch.since_mark().unwrap().is_empty());
    drop(watch);
    assert!(before == std::fs::read(&guest.place().ram).unwrap(), "its memory has changed");
    guest.qmp("cont", json!({}));
    assert_eq!(guest.status(), "running");
}

#[test]
fn a_guest_that_cannot_be_watched_is_let_be() {
    let scratch = Scratch::new("stock-not-watched");
    let without = Plain::firmware().start(&scratch, "without");
    assert!(watch(&without, 256).unwrap().is_none());
    // Memory that QEMU was told to lock stays where it is.
    let more = ["-overcommit", "mem-lock=on"].map(String::from).to_vec();
    let locked = Plain { more, ..Plain::firmware() }.start_preloaded(&scratch, "locked");
    let refused = watch(&locked, 256).map(drop).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput, "{refused}");
    assert_eq!(locked.status(), "running");
}
