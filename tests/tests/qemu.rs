//! A stock QEMU guest with two vCPUs, a disk under writes and an open TCP connection moves, and
//! nothing of it is lost.
//!
//! Ignored by default; `scripts/test` runs it in the lab. It needs root, KVM, and two variables: a
//! bzImage in `LAB_KERNEL`, and what `scripts/guest-image --modules` printed in `POSTCOPY_INITRD`.
//! `POSTCOPY_MOVES` says how often pcvm moves the guest over each transport (10).
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::net::SocketAddr;
use std::time::Duration;

use postcopy_e2e::qemu::{Connection, Machine, Network, Place, QemuGuest, Storage};
use postcopy_e2e::{Scratch, assert_refused, free_port, pcvm, stderr, variable};
use postcopy_guest::audit;
use serde_json::{Value, json};

/// A small disk, so that the journal goes round it several times.
const DISK_BYTES: u64 = 1 << 20;
/// A balloon by which the guest is asked for memory.
const BALLOON: [&str; 2] = ["-device", "virtio-balloon-pci"];
/// Between two messages, on each of which the guest has to wake up.
const CHAT_PACE: Duration = Duration::from_millis(5);

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_with_disk_and_network_moves_by_qemus_own_migration() {
    let scratch = Scratch::new("qemu-own");
    let (storage, network) = (Storage::new(&scratch), Network::new(2));
    let image = storage.image("disk.img", DISK_BYTES);
    let load = "pcguest.mb=32 pcguest.pattern=random pcguest.access=write pcguest.pace_us=1000";
    let machine = Machine::new(image.clone(), load);
    let source = QemuGuest::start(&machine, Place::new(&scratch, "source", network.tap(0)), &[]);
    source.wait_for_reports(1);
    let chatter = Connection::open(Machine::echo()).keep_busy(CHAT_PACE);
    chatter.wait_for(20);
    let before = source.wait_for_reports(1);

    let uri = format!("tcp:127.0.0.1:{}", free_port());
    let place = Place::new(&scratch, "destination", network.tap(1));
    let destination = QemuGuest::start(&machine, place, &["-incoming", &uri]);
    let account = source.migrate_by_qemu(&uri);
    assert_eq!(source.status(), "postmigrate");
    drop(source);
    let after = destination.wait_for_reports(2);
    chatter.wait_for(20);
    let (mut connection, longest) = chatter.stop();
    connection.exchange();
    destination.verify();
    let last = destination.power_off();

    let count = |report: &Value| report["disk_blocks"].as_u64().unwrap();
    assert!(count(&before) > 0 && count(&after) > count(&before), "{before}\n{after}");
    let journal = audit::audit(&image).unwrap();
    journal.assert_holds(count(&last));
    assert_eq!(journal.highest, count(&last), "the guest knows of all that is there");
    println!(
        "downtime {} ms; {} blocks of the journal, {} before the move; {} messages, the longest {longest:?}",
        account["downtime"],
        journal.highest,
        count(&before),
        connection.messages(),
    );
}

/// Moves the guest to `next` by pcvm, which is asked for memory as soon as the guest runs there, while its
/// own still comes; gives the report.
fn move_under_a_balloon(
    guest: &QemuGuest,
    next: &QemuGuest,
    to: SocketAddr,
    (transport, mode): (&str, &str),
) -> Value {
    let (report, inflated) = std::thread::scope(|scope| {
        let inflate = scope.spawn(|| {
            next.wait_until("the guest runs at the destination", || next.status() == "running");
            next.qmp("balloon", json!({ "value": 200 << 20 }))
        });
        (guest.migrate_by(next, to, transport, mode), inflate.join())
    });
    assert!(inflated.is_ok(), "the guest was not asked for memory; see above");
    next.qmp("balloon", json!({ "value": 256 << 20 }));
    report
}

/// Whether a thread of this kernel serves a network: it is named so, as a process of its own or (Linux 6.4) one of
/// QEMU's threads.
fn kernel_serves() -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let tasks = processes.filter_map(|process| std::fs::read_dir(process.path().join("task")).ok());
    let names = tasks.flatten().flatten().map(|task| std::fs::read_to_string(task.path().join("comm")));
    names.flatten().any(|name| name.starts_with("vhost-"))
}

/// Moves a guest with a disk, a network, which QEMU or (`vhost`) the kernel serves, and a memory writer from
/// process to process.
fn moves_by_pcvm(transport: &str, mode: &str, vhost: bool) {
    let moves: usize = std::env::var("POSTCOPY_MOVES").map_or(10, |moves| moves.parse().unwrap());
    let scratch = Scratch::new("qemu-pcvm");
    let (storage, network) = (Storage::new(&scratch), Network::new(2));
    let image = storage.image("disk.img", DISK_BYTES);
    let load = "pcguest.mb=64 pcguest.pattern=random pcguest.access=write pcguest.pace_us=100";
    let mut machine = Machine::new(image.clone(), load);
    machine.vhost = vhost;
    let address = variable("LAB_RDMA_ADDR").parse().unwrap();
    let mut guest = QemuGuest::start(&machine, Place::new(&scratch, "q0", network.tap(0)), &BALLOON);
    guest.wait_for_reports(1);
    let chatter = Connection::open(Machine::echo()).keep_busy(CHAT_PACE);
    chatter.wait_for(20);
    for at in 1..=moves {
        let place = Place::new(&scratch, &format!("q{at}"), network.tap(at % 2));
        let line = machine.command_line(&place, &BALLOON);
        // By one thread and by two in turn; what it is to keep of a round has to land in place.
        let shards = 1 + at % 2;
        let landing = if mode == "hybrid" || at % 4 < 2 { "in-place" } else { "pool" };
        let order = if at % 3 == 0 { "recency" } else { "address" };
        let options = ["--shards", &shards.to_string(), "--landing", landing, "--order", order];
        let (next, to) = QemuGuest::receive(place, &line, address, &options);
        let report = move_under_a_balloon(&guest, &next, to, (transport, mode));
        assert_eq!(report["pager"]["shards"], shards, "{report}");
        let recent = &report["pager"]["pages"]["recent_pages"];
        assert!(mode == "hybrid" || recent.as_u64() > Some(0), "what it wrote last is told: {report}");
        assert_eq!(report["ordered_pages"].as_u64() > Some(0), order == "recency", "{report}");
        let touched = &report["touched_pages"];
        assert!(touched.as_u64() > Some(0), "QEMU says how many pages it has touched: {report}");
        println!(
            "{transport} {mode} move {at} ({landing}): set up {} µs, downtime {} µs, resident {} µs, {} network faults, \
             {touched} pages touched, {} kept, {} given back",
            report["setup_us"],
            report["downtime_us"],
            report["resident_us"],
            report["pager"]["pages"]["network_faults"],
            report["pager"]["pages"]["kept_pages"],
            report["pager"]["pages"]["discarded_pages"]
        );
        next.wait_for_reports(1);
        chatter.wait_for(20);
        assert_eq!(kernel_serves(), vhost, "who serves the network");
        next.verify();
        let (ended_well, said) = guest.wait_for_end();
        assert!(ended_well, "what the guest has left: {said}");
        guest = next;
    }
    let (mut connection, longest) = chatter.stop();
    connection.exchange();
    let last = guest.power_off()["disk_blocks"].as_u64().unwrap();
    let journal = audit::audit(&image).unwrap();
    journal.assert_holds(last);
    assert_eq!(journal.highest, last, "the guest knows of all that is there");
    println!("{last} blocks of the journal, {} messages, the longest {longest:?}", connection.messages());
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_with_disk_and_network_moves_by_pcvm_over_tcp() {
    moves_by_pcvm("tcp", "postcopy", false);
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_with_disk_and_network_moves_by_pcvm_over_verbs() {
    moves_by_pcvm("verbs", "postcopy", false);
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_whose_network_the_kernel_serves_moves_by_pcvm() {
    moves_by_pcvm("tcp", "postcopy", true);
}

/// What the kernel writes to the guest's memory is noted too.
#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_with_disk_and_network_moves_in_hybrid_over_tcp() {
    moves_by_pcvm("tcp", "hybrid", true);
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_with_disk_and_network_moves_in_hybrid_over_verbs() {
    moves_by_pcvm("verbs", "hybrid", false);
}

/// What the guest calls free is taken out of it before it moves, and given back when it has moved or cannot.
#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_leaves_its_free_memory_behind() {
    let scratch = Scratch::new("qemu-free");
    let (storage, network) = (Storage::new(&scratch), Network::new(2));
    let image = storage.image("disk.img", DISK_BYTES);
    let machine =
        Machine::new(image, "pcguest.mb=64 pcguest.pattern=random pcguest.access=write pcguest.pace_us=1000");
    let source = QemuGuest::start(&machine, Place::new(&scratch, "q0", network.tap(0)), &BALLOON);
    source.wait_for_reports(1);
    let has_all = |guest: &QemuGuest| guest.qmp("query-balloon", json!({}))["actual"] == 256u64 << 20;
    let migrate = |to: SocketAddr, more: &[&str]| {
        let (from, to) = (source.place().qmp.to_str().unwrap().to_owned(), to.to_string());
        let args =
            ["migrate", "--transport", "tcp", "--balloon", "95", "--json", "--qmp", &from, "--to", &to];
        pcvm(&[&args[..], more].concat())
    };
    let refused = migrate("127.0.0.1:9".parse().unwrap(), &["--quiet"]);
    assert_refused(&refused, &["cannot reach 127.0.0.1:9", "the guest runs on here"]);
    source.wait_until("the guest has its memory back", || has_all(&source));

    let place = Place::new(&scratch, "q1", network.tap(1));
    let line = machine.command_line(&place, &BALLOON);
    let (next, to) = QemuGuest::receive(place, &line, variable("LAB_RDMA_ADDR").parse().unwrap(), &[]);
    let out = migrate(to, &[]);
    let said = stderr(&out);
    assert!(out.status.success(), "{said}");
    let took = said.split("balloon took ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let took: u64 = took.parse().unwrap();
    assert!((50..200).contains(&took), "{said}");
    next.wait_until("the guest has its memory back", || has_all(&next));
    next.wait_for_reports(1);
    next.verify();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    println!("the balloon took {took} MiB; {}", report["pager"]["pages"]);
}
