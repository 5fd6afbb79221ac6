//! Guests of a stock QEMU that move to another version of it.
//!
//! Each test needs POSTCOPY_NEWER_QEMU, a program newer than the QEMU that is installed and not older than
//! 8.1 (`scripts/qemu-of-backports` prints one). What needs a Linux guest takes what stock.rs takes too.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use postcopy_e2e::qemu::{LOOPBACK, NOBODY, Plain, address, transports};
use postcopy_e2e::{Scratch, assert_refused, variable, wait_until};

/// Both have this machine.
fn of_both(machine: Plain) -> Plain {
    Plain { kind: "pc-q35-7.2".into(), ..machine }
}

/// The machine in the newer QEMU.
fn newer(machine: &Plain) -> Plain {
    Plain { qemu: variable("POSTCOPY_NEWER_QEMU"), ..machine.clone() }
}

#[test]
#[ignore = "needs a second QEMU and a Linux kernel: run by scripts/test"]
fn a_stock_guest_moves_to_a_newer_qemu_and_on() {
    for transport in transports() {
        let scratch = Scratch::new(&format!("newer-{transport}"));
        let machine = of_both(Plain::linux("pcguest.mb=64 pcguest.access=write"));
        let mut guest = machine.start(&scratch, "q0");
        guest.wait_for_reports(2);
        for name in ["q1", "q2"] {
            let (next, to) = newer(&machine).receive(&scratch, name, address(), &[]);
            let (from, onto) = (guest.version(), next.version());
            assert!(onto >= (8, 1) && onto >= from, "{onto:?} is not newer than {from:?}");
            let report = guest.migrate(&next, to, &transport);
            let [downtime, resident] = ["downtime_us", "resident_us"].map(|name| &report[name]);
            println!("{transport}: {from:?} to {onto:?}, downtime {downtime} µs, resident {resident} µs");
            next.wait_for_reports(1);
            next.verify();
            let other = newer(&machine).start(&scratch, &format!("{name}-other"));
            wait_until("it is set up for moves of its own", || next.settings() == other.settings());
            guest = next;
        }
    }
}

#[test]
#[ignore = "needs a second QEMU: run by scripts/test"]
fn a_guest_of_a_newer_qemu_is_not_moved_to_an_older() {
    let scratch = Scratch::new("older");
    let machine = of_both(Plain::firmware());
    let source = newer(&machine).start(&scratch, "a");
    let (older, to) = machine.receive(&scratch, "b", LOOPBACK, &[]);
    assert!(older.version() < source.version(), "it is not newer");
    let out = source.try_migrate(to, "tcp");
    assert_refused(&out, &["does not fit this side", "is older", "the guest runs on here"]);
    assert_eq!(source.status(), "running");
}

#[test]
#[ignore = "needs a second QEMU: run by scripts/test"]
fn a_memfd_of_a_newer_qemu_is_refused() {
    let scratch = Scratch::new("newer-memfd");
    let source = newer(&Plain::in_a_memfd()).start(&scratch, "a");
    let words = ["a memfd, which QEMU from 8.1 on", "memory-backend-file"];
    assert_refused(&source.try_migrate(NOBODY, "tcp"), &words);
    assert_eq!(source.status(), "running");
}
