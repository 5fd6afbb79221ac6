//! Guests of a stock QEMU that have arrived under `pcvm receive`: what becomes of them there, and how they move on.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use postcopy_e2e::qemu::{LOOPBACK, NOBODY, Plain, QemuGuest};
use postcopy_e2e::{Scratch, assert_refused, pcvm, program, run, stderr};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

fn runs(guest: &QemuGuest) -> bool {
    guest.status() == "running"
}

/// The command that has the pcvm which holds a guest move it.
fn on(from: &QemuGuest, to: SocketAddr) -> Command {
    let mut command = Command::new(program("pcvm"));
    command.args(["migrate", "--quiet", "--json", "--control"]).arg(&from.place().control);
    command.args(["--to", &to.to_string()]);
    command
}

/// A guest that has arrived under `pcvm receive`.
fn arrived(scratch: &Scratch, machine: &Plain) -> QemuGuest {
    let first = machine.start(scratch, "a");
    let (second, to) = machine.receive(scratch, "b", LOOPBACK, &[]);
    first.migrate(&second, to, "tcp");
    second
}

/// It moves on, and most of its memory is still to come.
fn leaving(scratch: &Scratch, machine: &Plain, from: &QemuGuest) -> (QemuGuest, Child) {
    let (there, to) = machine.receive(scratch, "c", LOOPBACK, &["--max-bandwidth", "200K"]);
    let moving = on(from, to).stdout(Stdio::piped()).spawn().unwrap();
    there.wait_until("it has arrived", || there.status_of_pcvm()["state"] == "running");
    assert!(there.status_of_pcvm()["arrival"]["outstanding_pages"] != 0, "there is more to come");
    (there, moving)
}

#[test]
fn it_moves_on_unless_something_was_plugged_in_that_cannot() {
    let scratch = Scratch::new("arrived-plugged");
    let room = ["-m", "256M,slots=1,maxmem=1G"].map(str::to_owned);
    let machine = Plain { more: room.to_vec(), ..Plain::firmware() };
    let second = arrived(&scratch, &machine);
    let (third, to) = machine.receive(&scratch, "c", LOOPBACK, &[]);
    let moved = run(&mut on(&second, to));
    assert!(moved.status.success(), "{}", stderr(&moved));
    assert!(runs(&third));
    let memory = json!({"qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20});
    third.qmp("object-add", memory);
    third.qmp("device_add", json!({"driver": "pc-dimm", "id": "dimm", "memdev": "more"}));
    let refused = run(&mut on(&third, NOBODY));
    assert_refused(&refused, &["memory that was plugged in", "the guest runs on here"]);
    assert!(runs(&third));
}

#[test]
fn once_it_has_left_it_does_not_need_the_qemu_that_it_has_left() {
    let scratch = Scratch::new("arrived-left");
    let machine = Plain::firmware();
    let second = arrived(&scratch, &machine);
    let (third, mut moving) = leaving(&scratch, &machine, &second);
    kill_process(Pid::from_raw(second.qemu()).unwrap(), Signal::KILL).unwrap();
    // Time in which its end is seen.
    std::thread::sleep(Duration::from_millis(300));
    let limit = ["limit", "--control", third.place().control.to_str().unwrap(), "none"];
    assert!(pcvm(&limit).status.success(), "{}", third.story());
    assert!(moving.wait().unwrap().success(), "{}", second.story());
    assert!(runs(&third));
}

#[test]
fn if_it_ends_while_its_memory_comes_its_source_is_let_go() {
    let scratch = Scratch::new("arrived-ended");
    let machine = Plain::firmware();
    let second = arrived(&scratch, &machine);
    let (third, moving) = leaving(&scratch, &machine, &second);
    // As when it is powered off.
    third.qmp("quit", json!({}));
    let out = moving.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", third.story());
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(report["guest_ended"] == true && report["pager"]["outstanding_pages"] != 0, "{report}");
    for process in [&second, &third] {
        process.wait_until("it has ended", || !process.lives());
    }
}

#[test]
fn one_that_is_stopped_before_it_leaves_stays_and_stays_stopped() {
    let scratch = Scratch::new("arrived-stopped");
    let machine = Plain::firmware();
    let second = arrived(&scratch, &machine);
    // It is watched for a while before it would leave.
    let (third, to) = machine.receive(&scratch, "c", LOOPBACK, &["--again", "--order", "recency"]);
    let mut moving = on(&second, to);
    let moving = moving.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    second.wait_until("it is on its way", || second.status_of_pcvm()["state"] == "migrating");
    second.qmp("stop", json!({}));
    let refused = moving.wait_with_output().unwrap();
    assert_refused(&refused, &["does not run (paused)", "cont"]);
    assert_eq!(second.status(), "paused");
    drop(third);
    second.qmp("cont", json!({}));
    assert!(runs(&second));
}
