//! Guests of a stock QEMU whose RAM is in several backends, one for each NUMA node. `stock.rs` says what ignored tests need.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::net::IpAddr;

use postcopy_e2e::cutter::Line;
use postcopy_e2e::qemu::{LOOPBACK, NOBODY, Plain, address};
use postcopy_e2e::{Scratch, assert_refused};
use postcopy_engine::written::Way;

/// The machine with two nodes of these sizes, the second of which has the backend whose name comes first.
fn of_nodes(machine: Plain, kind: &str, mib: [u64; 2]) -> Plain {
    of_named_nodes(machine, kind, ["ram-b", "ram-a"], mib)
}

fn of_named_nodes(machine: Plain, kind: &str, ids: [&str; 2], mib: [u64; 2]) -> Plain {
    let node = |(number, (id, mib)): (usize, (&str, u64))| {
        let object = kind.replace("ID", id).replace("MIB", &mib.to_string());
        ["-object".into(), object, "-numa".into(), format!("node,nodeid={number},memdev={id}")]
    };
    let more = ids.into_iter().zip(mib).enumerate().flat_map(node);
    let more = more.chain(machine.more.clone()).collect();
    Plain { backend: None, mib: mib.iter().sum(), more, ..machine }
}

/// Files that QEMU makes in a folder, and names itself.
const FILES: &str = "memory-backend-file,id=ID,size=MIBM,mem-path=/dev/shm,share=on";
const MEMFDS: &str = "memory-backend-memfd,id=ID,size=MIBM,share=on";

/// Moves a guest of two nodes on and on, at last in hybrid where this kernel shows what it writes.
fn moves(transport: &str, address: IpAddr) {
    let scratch = Scratch::new(&format!("stock-nodes-{transport}"));
    let load = "pcguest.mb=160 pcguest.access=write pcguest.pace_us=20";
    let machine = of_nodes(Plain::linux(load), FILES, [128, 128]);
    let mut guest = machine.start_preloaded(&scratch, "q0");
    guest.wait_for_reports(2);
    let mut modes = vec![("postcopy", "3")];
    modes.extend(Way::of(guest.qemu()).is_ok().then_some(("hybrid", "2")));
    for (at, (mode, shards)) in modes.into_iter().enumerate() {
        let (next, to) = machine.receive(&scratch, &format!("q{}", at + 1), address, &["--shards", shards]);
        let report = guest.migrate_by(&next, to, transport, mode);
        assert_eq!(report["memory_bytes"], 256 << 20, "{report}");
        let kept = report["pager"]["pages"]["kept_pages"].as_u64().unwrap();
        assert_eq!(kept > 0, mode == "hybrid", "{report}");
        next.wait_for_reports(2);
        next.verify();
        guest = next;
    }
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_guest_of_two_nodes_moves_on_and_on() {
    moves("tcp", LOOPBACK);
}

#[test]
#[ignore = "needs RDMA and a Linux kernel: run by scripts/test"]
fn a_guest_of_two_nodes_moves_on_and_on_over_verbs() {
    moves("verbs", address());
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_guest_of_two_nodes_outlives_who_takes_it_in() {
    let scratch = Scratch::new("stock-nodes-killed");
    let machine = of_nodes(Plain::linux("pcguest.mb=96 pcguest.access=write"), FILES, [96, 160]);
    let source = machine.start(&scratch, "q0");
    source.wait_for_reports(1);
    let options = ["--shards", "2"];
    let (mut destination, to) = machine.receive(&scratch, "q1", LOOPBACK, &options);
    let line = Line::to(to, 8 << 20);
    let mut moving = source.migrate_until(line.address(), "postcopy", "runs at the destination");
    let qemu = destination.kill_pcvm();
    destination.take_over(qemu, to, &options);
    let back = || destination.status_of_pcvm()["state"] == "running";
    destination.wait_until("the source is back", back);
    line.mend();
    assert!(moving.wait().unwrap().success());
    destination.wait_for_reports(2);
    destination.verify();
}

#[test]
fn backends_that_are_not_those_of_the_source_are_refused() {
    let scratch = Scratch::new("stock-nodes-unlike");
    let source = of_nodes(Plain::firmware(), FILES, [128, 128]).start(&scratch, "q0");
    let others = ["ram-c", "ram-a"];
    for (name, other) in [
        ("sizes", of_nodes(Plain::firmware(), FILES, [64, 192])),
        ("one", Plain::firmware()),
        ("names", of_named_nodes(Plain::firmware(), FILES, others, [128, 128])),
    ] {
        let (_there, to) = other.receive(&scratch, name, LOOPBACK, &[]);
        let words = ["is made of ram-a (128 MiB), ram-b (128 MiB)", "the same backends", "runs on here"];
        assert_refused(&source.try_migrate(to, "tcp"), &words);
        assert_eq!(source.status(), "running");
    }
}

/// Two memfds of one size are called the same.
#[test]
fn files_that_cannot_be_told_apart_are_refused_and_others_are_not() {
    let scratch = Scratch::new("stock-nodes-memfd");
    let alike = of_nodes(Plain::firmware(), MEMFDS, [128, 128]);
    let source = alike.start(&scratch, "q0");
    if source.version() >= (8, 1) {
        return; // it moves no memfd at all: `stock.rs` has what is said
    }
    let words = ["can be told to be its RAM (ram-a, ", "each must have a mem-path"];
    assert_refused(&source.try_migrate(NOBODY, "tcp"), &words);
    assert_eq!(source.status(), "running");
    assert_refused(&alike.receive_to_the_end(&scratch, "q1"), &words);
    let unlike = of_nodes(Plain::firmware(), MEMFDS, [96, 160]);
    let source = unlike.start(&scratch, "q2");
    let (next, to) = unlike.receive(&scratch, "q3", LOOPBACK, &[]);
    source.migrate(&next, to, "tcp");
    assert_eq!(next.status(), "running");
}
