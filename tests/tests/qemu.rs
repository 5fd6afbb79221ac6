//! A stock QEMU guest with two vCPUs, a disk under writes and an open TCP connection moves, and
//! nothing of it is lost.
//!
//! Ignored by default; `scripts/test` runs it in the lab. It needs root, KVM, and two variables: a
//! bzImage in `LAB_KERNEL`, and what `scripts/guest-image --modules` printed in `POSTCOPY_INITRD`.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::time::Duration;

use postcopy_e2e::qemu::{Connection, Machine, Network, Place, QemuGuest, Storage};
use postcopy_e2e::{Scratch, free_port};
use postcopy_guest::audit;

/// A small disk, so that the journal goes round it several times.
const DISK_BYTES: u64 = 1 << 20;
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

    let count = |report: &serde_json::Value| report["disk_blocks"].as_u64().unwrap();
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
