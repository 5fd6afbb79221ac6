//! A stock QEMU's guest, and a destination that has no room for its memory. `stock.rs` says what ignored tests need.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::time::Duration;

use postcopy_e2e::cutter::Line;
use postcopy_e2e::qemu::{LOOPBACK, Plain, Tmpfs};
use postcopy_e2e::{Scratch, assert_refused, stderr, wait_until};

#[test]
fn a_guest_that_is_larger_than_the_file_system_of_its_ram() {
    let scratch = Scratch::new("stock-room");
    let small = Tmpfs::new(&scratch, 200);
    let machine = Plain::firmware();
    let source = machine.start(&scratch, "a");
    let (_destination, to) = machine.within(&small.file("ram")).receive(&scratch, "b", LOOPBACK, &[]);
    let refused = source.try_migrate(to, "tcp");
    assert_refused(&refused, &["the file system of its RAM has room for", "remount,size=", "runs on here"]);
    assert_eq!(source.status(), "running");
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_guest_for_which_room_runs_out_waits_and_goes_on_when_there_is_some() {
    let scratch = Scratch::new("stock-room-lost");
    let small = Tmpfs::new(&scratch, 260);
    let machine = Plain::linux("pcguest.mb=64 pcguest.access=write");
    let source = machine.start(&scratch, "q0");
    source.wait_for_reports(2);
    let (next, to) = machine.within(&small.file("ram")).receive(&scratch, "q1", LOOPBACK, &[]);
    let line = Line::to(to, 8 << 20);
    let report = std::thread::scope(|scope| {
        let moving = scope.spawn(|| source.try_migrate(line.address(), "tcp"));
        let arrived = || next.status_of_pcvm()["arrival"]["total_pages"].as_u64().unwrap_or(0);
        wait_until("it runs there", || next.status_of_pcvm()["state"] == "running" && arrived() > 0);
        small.fill();
        wait_until("it is stranded", || next.log().contains("there is no memory left here"));
        std::thread::sleep(Duration::from_secs(1));
        assert!(!next.console().contains("BAD"));
        small.free();
        moving.join().unwrap()
    });
    assert!(report.status.success(), "{}", stderr(&report));
    next.wait_for_reports(1);
    next.verify();
}
