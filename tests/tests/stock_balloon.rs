//! What a stock QEMU's guest does not use is kept in its balloon: `pcvm balloon`.
//!
//! What needs a Linux guest is ignored unless asked for: it needs POSTCOPY_KERNEL, and in POSTCOPY_INITRD what
//! `scripts/guest-image --modules` printed.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::os::unix::net::UnixStream;
use std::process::Command;

use postcopy_e2e::process::Process;
use postcopy_e2e::qemu::{LOOPBACK, MEMORY_BYTES, Plain, QemuGuest};
use postcopy_e2e::{Scratch, assert_refused, pcvm, program};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const BALLOON: [&str; 2] = ["-device", "virtio-balloon-pci,deflate-on-oom=on"];

fn with(machine: Plain, more: &[&str]) -> Plain {
    Plain { more: more.iter().map(|more| (*more).to_owned()).collect(), ..machine }
}

/// A `pcvm balloon` that has a turn each second.
fn keep(scratch: &Scratch, name: &str, guest: &QemuGuest) -> Process {
    let [told, said] = ["told", "said"].map(|kind| scratch.file(&format!("{name}.{kind}")));
    let mut command = Command::new(program("pcvm"));
    command.args(["balloon", "--interval", "1", "--json", "--qmp"]).arg(&guest.place().qmp);
    Process::start_printing(&mut command, told, said)
}

/// What it has changed.
fn changes(keeper: &Process) -> Vec<Value> {
    let told = keeper.console();
    // A line that is being written has no end yet.
    let whole = told.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Waits until it has ended, well; gives what it said.
fn wait_for_end(keeper: &Process) -> String {
    let (ended_well, said) = keeper.wait_for_end();
    assert!(ended_well, "{said}");
    said
}

/// Bytes that the guest has.
fn has(guest: &QemuGuest) -> u64 {
    guest.qmp("query-balloon", json!({}))["actual"].as_u64().unwrap()
}

/// Waits until much of what the guest does not use is in its balloon.
fn wait_until_taken(guest: &QemuGuest, keeper: &Process) {
    guest.wait_until("its balloon has what it does not use", || has(guest) < MEMORY_BYTES / 8 * 5);
    assert!(!changes(keeper).is_empty(), "it tells of that: {}", keeper.log());
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn what_a_guest_does_not_use_is_in_its_balloon_and_comes_back_when_it_does() {
    let scratch = Scratch::new("stock-balloon-all-the-time");
    let machine = with(Plain::linux("pcguest.mb=32 pcguest.access=write pcguest.pace_us=1000"), &BALLOON);
    let guest = machine.start(&scratch, "q0");
    guest.wait_for_reports(1);
    let keeper = keep(&scratch, "b0", &guest);
    wait_until_taken(&guest, &keeper);
    let little = has(&guest);

    // More than it was left: it takes that back, and is not taken it from again at once.
    guest.type_line("hold 100");
    guest.wait_until("the guest has what it needs", || guest.console().contains("holds 100"));
    guest.verify();
    guest.wait_until("it was seen", || changes(&keeper).iter().any(|change| change["pressed"] == true));
    assert!(has(&guest) > little + (64 << 20), "{}", keeper.log());
    guest.type_line("hold 0");
    wait_until_taken(&guest, &keeper);
    assert!(!guest.console().contains("Out of memory"), "{}", guest.console());

    // The same monitor, in turn.
    let (next, to) = machine.receive(&scratch, "q1", LOOPBACK, &[]);
    guest.migrate(&next, to, "tcp");
    let said = wait_for_end(&keeper);
    assert!(said.contains("QEMU has ended"), "{said}");
    assert!(has(&next) < MEMORY_BYTES / 8 * 5, "the balloon moves with the guest");
    next.wait_for_reports(1);
    next.verify();
    println!("{said}");

    let keeper = keep(&scratch, "b1", &next);
    next.type_line("hold 100");
    next.wait_until("the guest has what it needs", || next.console().contains("holds 100"));
    // Somebody else has the monitor for a while.
    let other = UnixStream::connect(&next.place().qmp).unwrap();
    keeper.wait_until("it says that another client is there", || keeper.log().contains("has another client"));
    drop(other);
    next.type_line("hold 0");
    wait_until_taken(&next, &keeper);
    kill_process(Pid::from_raw(keeper.pid() as i32).unwrap(), Signal::TERM).unwrap();
    wait_for_end(&keeper);
    next.wait_until("the guest has all of its memory", || has(&next) == MEMORY_BYTES);
    next.verify();
}

#[test]
fn a_balloon_that_cannot_be_kept_is_refused() {
    let scratch = Scratch::new("stock-balloon-refused");
    for (at, (more, said)) in [
        (&[][..], "has no balloon (-device virtio-balloon-pci,deflate-on-oom=on)"),
        (&["-device", "virtio-balloon-pci"], "does not give way to a guest that runs out of memory"),
        (&BALLOON, "does the guest have the driver"),
    ]
    .into_iter()
    .enumerate()
    {
        let guest = with(Plain::firmware(), more).start(&scratch, &format!("a{at}"));
        let out = pcvm(&["balloon", "--qmp", guest.place().qmp.to_str().unwrap()]);
        assert_refused(&out, &["free memory cannot be taken", said]);
        assert_eq!(has_polling(&guest), 0, "it is asked for nothing any more");
    }
    let nobody = scratch.file("nobody");
    let out = pcvm(&["balloon", "--qmp", nobody.to_str().unwrap()]);
    assert_refused(&out, &["cannot reach QEMU's monitor", "-qmp unix:"]);
}

/// How often QEMU asks the guest for its statistics; 0 where it has no balloon.
fn has_polling(guest: &QemuGuest) -> u64 {
    let balloon =
        json!({"path": "/machine/peripheral-anon/device[0]", "property": "guest-stats-polling-interval"});
    guest.try_qmp("qom-get", balloon).ok().and_then(|interval| interval.as_u64()).unwrap_or(0)
}
