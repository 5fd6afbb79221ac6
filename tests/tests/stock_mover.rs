//! The process that moves a stock QEMU's guest, `pcvm migrate --qmp`: that it is in nobody's way when it is not wanted any
//! more, and that another can take its place. `stock.rs` says what ignored tests need.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::net::SocketAddr;
use std::process::{Child, Output};
use std::time::Duration;

use postcopy_e2e::authority::Authority;
use postcopy_e2e::cutter::{Line, assert_cut, cut_after};
use postcopy_e2e::qemu::{LOOPBACK, NOBODY, Plain, QemuGuest};
use postcopy_e2e::{Scratch, assert_refused, pcvm, stderr, stdout, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A guest that has begun to move over a slow line, and runs at the destination.
struct Moving {
    source: QemuGuest,
    destination: QemuGuest,
    to: SocketAddr,
    line: Line,
    process: Child,
}

impl Moving {
    /// Both sides are set up for it by these flags.
    fn begin(scratch: &Scratch, trust: &[&str]) -> Self {
        let machine = Plain::linux("pcguest.mb=64 pcguest.access=write");
        let source = machine.start(scratch, "q0");
        source.wait_for_reports(2);
        let (destination, to) = machine.receive(scratch, "q1", LOOPBACK, trust);
        let line = Line::to(to, 4 << 20);
        let process = source.migrate_over_until(trust, line.address(), "postcopy", "runs at the destination");
        Self { source, destination, to, line, process }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Its memory has come, and is right.
    fn assert_there(&self) {
        self.destination.wait_for_reports(1);
        self.destination.verify();
        self.source.wait_until("its QEMU has ended", || !self.source.lives());
    }
}

fn recover(source: &QemuGuest, to: Option<SocketAddr>, trust: &[&str]) -> Output {
    let to = to.map(|to| to.to_string());
    let to = to.iter().flat_map(|to| ["--to", to]);
    let fixed =
        ["recover", "--json", "--quiet", "--patience", "10", "--qmp", source.place().qmp.to_str().unwrap()];
    pcvm(&fixed.into_iter().chain(to).chain(trust.iter().copied()).collect::<Vec<_>>())
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn another_takes_the_place_of_one_that_was_killed() {
    let scratch = Scratch::new("mover-killed");
    let authority = Authority::default();
    let [hosts, anothers] = ["a", "b"].map(|name| authority.folder(&scratch, name, "127.0.0.1"));
    let [trust, other] = [&hosts, &anothers].map(|folder| ["--tls", folder.to_str().unwrap()]);
    let mut moving = Moving::begin(&scratch, &trust);
    moving.signal(Signal::KILL);
    moving.process.wait().unwrap();
    let stranded = || moving.destination.status_of_pcvm()["state"] == "stranded";
    wait_until("it is stranded", stranded);
    let again = |to, trust: &[&str]| recover(&moving.source, Some(to), trust);
    assert_refused(&again(NOBODY, &trust), &["cannot reach", "stays stopped"]);
    assert_refused(&again(moving.to, &other), &["another certificate", "stays stopped"]);
    assert_refused(&again(moving.to, &[]), &["--tls", "stays stopped"]);
    let out = again(moving.to, &trust);
    assert!(out.status.success(), "{}", stderr(&out));
    let report: Value = serde_json::from_str(&stdout(&out)).unwrap();
    assert_eq!(report["pager"]["outstanding_pages"], 0, "{report}");
    assert_eq!(report["pages_encrypted"], true, "{report}");
    moving.assert_there();
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn it_goes_on_without_its_terminal_and_when_it_is_told_to_end() {
    let scratch = Scratch::new("mover-hung-up");
    let mut moving = Moving::begin(&scratch, &["--transport", "tcp"]);
    // Nobody reads what it says any more.
    drop(moving.process.stderr.take());
    for signal in [Signal::HUP, Signal::TERM, Signal::INT, Signal::HUP] {
        moving.signal(signal);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(moving.process.try_wait().unwrap().is_none(), "it goes on");
    moving.line.mend();
    moving.assert_there();
    assert!(moving.process.wait().unwrap().success());
}

#[test]
fn what_was_not_moved_has_nothing_to_recover() {
    let scratch = Scratch::new("mover-nothing");
    let source = Plain::firmware().start(&scratch, "a");
    let nobody = Some(NOBODY);
    assert_refused(&recover(&source, nobody, &[]), &["it runs here, and has nothing to recover"]);
    source.qmp("stop", serde_json::json!({}));
    assert_refused(&recover(&source, nobody, &[]), &["nobody has moved it away from here"]);
    assert_refused(&recover(&source, None, &[]), &["--to HOST:PORT"]);
    // What a move that failed has kept goes with it.
    source.qmp("cont", serde_json::json!({}));
    let (_destination, to) = Plain::firmware().receive(&scratch, "b", LOOPBACK, &[]);
    let cut = SocketAddr::new(LOOPBACK, cut_after(5, to.port()));
    assert_cut(&source.try_migrate(cut, "tcp"));
    source.qmp("stop", serde_json::json!({}));
    assert_refused(&recover(&source, nobody, &[]), &["nobody has moved it away from here"]);
}
