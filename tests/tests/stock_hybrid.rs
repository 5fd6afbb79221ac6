//! Guests of a stock QEMU that move after a round of pre-copy, by whichever way this kernel has to see what they
//! write.
//!
//! Needs POSTCOPY_KERNEL and POSTCOPY_INITRD, as `stock.rs`.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use postcopy_e2e::cutter::Line;
use postcopy_e2e::qemu::{LOOPBACK, Plain};
use postcopy_e2e::system::kernel_is_since;
use postcopy_e2e::{Scratch, assert_refused};
use postcopy_engine::written::Way;

const LOAD: &str = "pcguest.mb=64 pcguest.access=write pcguest.pace_us=100";

/// Where nobody can see what a guest writes, that is said. The library brings what the kernel has for it since 6.7;
/// a guest that came by `pcvm receive` has it.
#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_stock_guest_moves_in_hybrid_or_is_told_why_it_cannot() {
    let scratch = Scratch::new("stock-hybrid");
    let machine = Plain::linux(LOAD);
    for preloaded in [false, true] {
        let name = |place: &str| format!("{place}-{preloaded}");
        let start = if preloaded { Plain::start_preloaded } else { Plain::start };
        let mut guest = start(&machine, &scratch, &name("q0"));
        guest.wait_for_reports(2);
        for place in ["q1", "q2"] {
            let (next, to) = machine.receive(&scratch, &name(place), LOOPBACK, &[]);
            if let Err(error) = Way::of(guest.qemu()) {
                assert!(!(preloaded && kernel_is_since(6, 7)), "{error}");
                let out = guest.try_migrate_by(to, "tcp", "hybrid");
                let why =
                    ["CONFIG_MEM_SOFT_DIRTY", "has made no userfaultfd", "--mode postcopy", "runs on here"];
                assert_refused(&out, &why);
                assert_eq!(guest.status(), "running");
                break;
            }
            let report = guest.migrate_by(&next, to, "tcp", "hybrid");
            assert!(report["pager"]["pages"]["kept_pages"].as_u64().unwrap() > 0, "{report}");
            next.wait_for_reports(1);
            next.verify();
            guest = next;
        }
    }
}

/// A `pcvm migrate` that is killed takes nothing back of what it set up to see the guest's writes.
#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_move_that_is_killed_in_its_round_can_be_made_again() {
    let scratch = Scratch::new("stock-hybrid-killed");
    let machine = Plain::linux(LOAD);
    let guest = machine.start_preloaded(&scratch, "q0");
    guest.wait_for_reports(1);
    if Way::of(guest.qemu()).is_err() {
        return; // the other test has what is said then
    }
    let (_unused, to) = machine.receive(&scratch, "q1", LOOPBACK, &[]);
    let line = Line::to(to, 8 << 20);
    let mut moving = guest.migrate_until(line.address(), "hybrid", "its memory is read once");
    moving.kill().and_then(|()| moving.wait()).unwrap();
    guest.wait_for_reports(2);
    guest.verify();
    let (next, to) = machine.receive(&scratch, "q2", LOOPBACK, &[]);
    let report = guest.migrate_by(&next, to, "tcp", "hybrid");
    assert!(report["pager"]["pages"]["kept_pages"].as_u64().unwrap() > 0, "{report}");
    next.wait_for_reports(1);
    next.verify();
}
