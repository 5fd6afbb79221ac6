//! A stock QEMU guest with two vCPUs, a disk under writes and an open TCP connection moves, and
//! nothing of it is lost.
//!
//! Ignored by default; `scripts/test` runs it in the lab. It needs root, KVM, and two variables: a
//! bzImage in `LAB_KERNEL`, and what `scripts/guest-image --modules` printed in `POSTCOPY_INITRD`.
//! `POSTCOPY_MOVES` says how often pcvm moves the guest over each transport (10).
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::process::Command;
use std::time::Duration;

use postcopy_e2e::qemu::{Connection, Machine, Network, Place, QemuGuest, Storage};
use postcopy_e2e::{Scratch, free_port, pcvm, program, stderr, variable};
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
    let account = source.migrate(&uri);
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

/// Starts a QEMU under pcvm that waits for the guest at `port`.
fn receiver(scratch: &Scratch, machine: &Machine, place: Place, port: u16) -> QemuGuest {
    let mut command = Command::new(program("pcvm"));
    let listen = format!("{}:{port}", variable("LAB_RDMA_ADDR"));
    let control = scratch.file(&format!("control-{port}"));
    command.args(["receive", "--vmm", "qemu", "--listen", &listen, "--control", control.to_str().unwrap()]);
    command.args(["--", "qemu-system-x86_64"]).args(machine.args(&place, &BALLOON));
    QemuGuest::start_by(command, place)
}

/// Moves the guest to `next` by pcvm; gives the report.
fn move_by_pcvm(guest: &QemuGuest, next: &QemuGuest, port: u16, transport: &str) -> Value {
    let (from, to) = (guest.place().qmp.to_str().unwrap(), format!("{}:{port}", variable("LAB_RDMA_ADDR")));
    let out = std::thread::scope(|scope| {
        let inflate = scope.spawn(|| {
            // As soon as the guest runs there, it is asked for memory, while its own still comes.
            next.wait_until("the guest runs at the destination", || next.status() == "running");
            next.qmp("balloon", json!({ "value": 200 << 20 }))
        });
        let arguments =
            ["migrate", "--qmp", from, "--to", &to, "--transport", transport, "--json", "--quiet"];
        let out = pcvm(&arguments);
        drop(inflate.join());
        out
    });
    next.qmp("balloon", json!({ "value": 256 << 20 }));
    let stories = || format!("source {}\ndestination {}", guest.story(), next.story());
    assert!(out.status.success(), "{}\n{}", stderr(&out), stories());
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Moves a guest with a disk, a network and a memory writer from process to process.
fn moves_by_pcvm(transport: &str) {
    let moves: usize = std::env::var("POSTCOPY_MOVES").map_or(10, |moves| moves.parse().unwrap());
    let scratch = Scratch::new("qemu-pcvm");
    let (storage, network) = (Storage::new(&scratch), Network::new(2));
    let image = storage.image("disk.img", DISK_BYTES);
    let load = "pcguest.mb=64 pcguest.pattern=random pcguest.access=write pcguest.pace_us=100";
    let machine = Machine::new(image.clone(), load);
    let mut guest = QemuGuest::start(&machine, Place::new(&scratch, "q0", network.tap(0)), &BALLOON);
    guest.wait_for_reports(1);
    let chatter = Connection::open(Machine::echo()).keep_busy(CHAT_PACE);
    chatter.wait_for(20);
    for at in 1..=moves {
        let port = free_port();
        let place = Place::new(&scratch, &format!("q{at}"), network.tap(at % 2));
        let next = receiver(&scratch, &machine, place, port);
        let report = move_by_pcvm(&guest, &next, port, transport);
        assert_eq!(report["transport"], transport);
        println!(
            "{transport} move {at}: downtime {} µs, resident {} µs, {} network faults, {} pages given back",
            report["downtime_us"],
            report["resident_us"],
            report["pager"]["pages"]["network_faults"],
            report["pager"]["pages"]["discarded_pages"]
        );
        next.wait_for_reports(1);
        chatter.wait_for(20);
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
    moves_by_pcvm("tcp");
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_stock_guest_with_disk_and_network_moves_by_pcvm_over_verbs() {
    moves_by_pcvm("verbs");
}
