//! The process that takes a stock QEMU's guest in, `pcvm receive --vmm qemu`, is killed while the guest's memory comes:
//! QEMU and its guest wait, and another process goes on. `stock.rs` says what ignored tests need.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::net::SocketAddr;
use std::process::Output;

use postcopy_e2e::cutter::Line;
use postcopy_e2e::qemu::{LOOPBACK, Plain, QemuGuest, address};
use postcopy_e2e::{Scratch, assert_refused, free_port, pcvm};
use rustix::process::{Pid, Signal, kill_process};

fn refused(scratch: &Scratch, qemu: i32, more: &[&str]) -> Output {
    let (control, listen) = (scratch.file("refused.sock"), format!("127.0.0.1:{}", free_port()));
    let qemu = qemu.to_string();
    let fixed =
        ["receive", "--listen", &listen, "--control", control.to_str().unwrap(), "--take-over", &qemu];
    pcvm(&[&fixed, more].concat())
}

/// Has a guest whose receiver is killed while its memory comes, over a line of so many bytes a second, go on under another, with
/// these options for both.
fn outlives(name: &str, (mode, rate): (&str, u64), options: &[&str]) {
    let scratch = Scratch::new(name);
    let machine = Plain::linux("pcguest.mb=64 pcguest.access=write");
    // By the library what it writes is seen, in hybrid.
    let source = machine.start_preloaded(&scratch, "q0");
    source.wait_for_reports(2);
    let (mut destination, to) = machine.receive(&scratch, "q1", LOOPBACK, options);
    let line = Line::to(to, rate);
    let mut moving = source.migrate_until(line.address(), mode, "runs at the destination");
    let first = destination.qemu();
    assert_refused(&refused(&scratch, first, &["--vmm", "qemu"]), &["lives"]);

    for turn in 0..3 {
        let qemu = destination.kill_pcvm();
        assert_eq!(qemu, first);
        let printed = destination.console();
        std::thread::sleep(std::time::Duration::from_millis(300));
        let more = destination.console()[printed.len()..].to_owned();
        assert!(!more.contains("BAD"), "{more}");
        destination.take_over(qemu, to, options);
        if turn < 2 {
            // The source comes back by itself, and is left in the middle once more.
            let back = || destination.status_of_pcvm()["state"] == "running";
            destination.wait_until("the source is back", back);
        }
    }
    line.mend();
    assert!(moving.wait().unwrap().success());
    assert_there(&destination, &source, to);
}

/// Its memory has come and is right, and its QEMU goes back to what it was, so that it can be moved on.
fn assert_there(destination: &QemuGuest, source: &QemuGuest, to: SocketAddr) {
    destination.wait_for_reports(1);
    destination.verify();
    source.wait_until("its QEMU has ended", || !source.lives());
    let status = destination.status_of_pcvm();
    assert_eq!(
        (&status["state"], &status["arrival"]["outstanding_pages"]),
        (&"running".into(), &0.into()),
        "{to}"
    );
    let ours = |one: &&serde_json::Value| one["capability"] == "x-ignore-shared";
    destination.wait_until("it is set back", || {
        let now = destination.qmp("query-migrate-capabilities", serde_json::json!({}));
        now.as_array().unwrap().iter().find(ours).unwrap()["state"] == false
    });
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn another_goes_on_where_one_was_killed() {
    outlives("receiver-pool", ("postcopy", 4 << 20), &[]);
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn another_goes_on_in_place_and_by_several_threads() {
    outlives("receiver-in-place", ("postcopy", 4 << 20), &["--landing", "in-place", "--shards", "3"]);
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn another_goes_on_with_a_hybrid_move() {
    outlives("receiver-hybrid", ("hybrid", 16 << 20), &[]);
}

#[test]
#[ignore = "needs RDMA: run by scripts/test in the lab"]
fn another_goes_on_over_verbs() {
    let scratch = Scratch::new("receiver-verbs");
    let machine = Plain::linux("pcguest.mb=160 pcguest.access=write");
    let source = machine.start(&scratch, "q0");
    source.wait_for_reports(2);
    let verbs = ["--transport", "verbs"];
    let (mut destination, to) = machine.receive(&scratch, "q1", address(), &verbs);
    let mut moving = source.migrate_over_until(&verbs, to, "postcopy", "runs at the destination");
    let qemu = destination.kill_pcvm();
    destination.take_over(qemu, to, &verbs);
    let state = destination.status_of_pcvm()["state"].clone();
    assert!(moving.wait().unwrap().success(), "{state}");
    assert_there(&destination, &source, to);
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_guest_that_was_not_handed_over_is_left_to_its_source() {
    let scratch = Scratch::new("receiver-early");
    let machine = Plain::linux("pcguest.mb=64 pcguest.access=write");
    let source = machine.start_preloaded(&scratch, "q0");
    source.wait_for_reports(2);
    let (destination, to) = machine.receive(&scratch, "q1", LOOPBACK, &[]);
    let line = Line::to(to, 1 << 20);
    let mut moving = source.migrate_until(line.address(), "hybrid", "its memory is read once");
    let qemu = destination.kill_pcvm();
    assert_refused(&refused(&scratch, qemu, &["--vmm", "qemu"]), &["was not handed over", "end the process"]);
    kill_process(Pid::from_raw(qemu).unwrap(), Signal::KILL).unwrap();
    assert!(!moving.wait().unwrap().success(), "its destination is gone");
    source.wait_for_reports(2);
}

#[test]
fn what_was_not_left_behind_is_not_taken_over() {
    let scratch = Scratch::new("receiver-nothing");
    assert_refused(&refused(&scratch, i32::MAX, &["--vmm", "qemu"]), &["there is no process"]);
    assert_refused(&refused(&scratch, std::process::id() as i32, &["--vmm", "qemu"]), &["is no QEMU that"]);
    assert_refused(
        &refused(&scratch, 1, &["--vmm", "qemu", "--again"]),
        &["--again needs QEMU's command line"],
    );
    assert_refused(&refused(&scratch, 1, &[]), &["--take-over is for --vmm qemu"]);
    // No guest has come to it.
    let (waiting, _) = Plain::firmware().receive(&scratch, "a", LOOPBACK, &[]);
    let qemu = waiting.kill_pcvm();
    assert_refused(&refused(&scratch, qemu, &["--vmm", "qemu"]), &["no guest has come"]);
    kill_process(Pid::from_raw(qemu).unwrap(), Signal::KILL).unwrap();
}
