//! The network between source and destination is lost after the handover: the guest waits, nothing of it is lost, and
//! its memory comes when there is a way again. The tiny guest, on this host's KVM, verifies every word that it reads.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::net::SocketAddr;
use std::process::Output;

use postcopy_e2e::authority::Authority;
use postcopy_e2e::cutter::{Line, cut_after};
use postcopy_e2e::reports::{assert_whole, number};
use postcopy_e2e::strangers::Strangers;
use postcopy_e2e::system::Hosts;
use postcopy_e2e::{Pcvm, Scratch, assert_refused, free_port, pcvm, stderr};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Bytes a second of the line that is cut: the guest has 6 MiB that are not zero.
const SLOW: u64 = 2 << 20;
/// Pages of the guest.
const PAGES: u64 = 2048;
/// Messages until the one that hands the guest over, and that one.
const WITH_COMMIT: i64 = 9;

fn recover(source: &Pcvm, more: &[&str]) -> Output {
    let control = source.control().to_str().unwrap();
    pcvm(&[&["recover", "--quiet", "--json", "--control", control][..], more].concat())
}

/// Loses the network while the guest's memory comes.
fn lose_in_the_drain(lose: impl FnOnce(), source: &Pcvm, destination: &Pcvm) {
    source
        .wait_until("its memory is on its way", |source| source.status()["migration"]["phase"] == "draining");
    lose();
    destination.wait_until("the guest is stranded", |there| there.status()["state"] == "stranded");
}

/// Begins a move that is cut while the memory comes, and not tried again; what was said of it.
fn strand(line: &Line, source: &Pcvm, destination: &Pcvm) -> Output {
    let to = line.address().to_string();
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| source.try_migrate(&to, &["--transport", "tcp", "--patience", "0"]));
        lose_in_the_drain(|| line.cut(), source, destination);
        moving.join().unwrap()
    })
}

/// The guest is whole and runs, and the source has ended well.
fn assert_over(report: &Value, source: Pcvm, destination: &Pcvm) {
    assert_whole(report, PAGES);
    destination.assert_runs();
    let (ended_well, log) = source.wait();
    assert!(ended_well, "{log}");
}

/// Moves the guest, whose network is lost while the memory comes, and back when both sides have said so.
fn outlives(
    (source, destination): (Pcvm, &Pcvm),
    (to, migrate): (&str, &[&str]),
    lose: impl FnOnce(),
    restore: impl FnOnce(),
) -> Value {
    let report = std::thread::scope(|scope| {
        let moving = scope.spawn(|| source.migrate(to, &[&["--transport", "tcp"][..], migrate].concat()));
        lose_in_the_drain(lose, &source, destination);
        source.wait_until("the source tries again", |source| {
            source.status()["migration"]["phase"] == "recovering"
        });
        let printed = destination.console();
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert_eq!(destination.console(), printed, "it waits for its memory");
        restore();
        moving.join().unwrap()
    });
    assert_over(&report, source, destination);
    report
}

/// That over a line that is cut and mended.
fn outlives_a_cut(name: &str, receive: &[&str], migrate: &[&str]) -> Value {
    outlives_a_cut_with(name, receive, migrate, |_| {})
}

/// That, with something done at the destination's port before the line is mended.
fn outlives_a_cut_with(name: &str, receive: &[&str], migrate: &[&str], first: impl FnOnce(u16)) -> Value {
    let scratch = Scratch::new(&format!("outlives-{name}"));
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, receive);
    let line = Line::to(([127, 0, 0, 1], port), SLOW);
    let to = line.address().to_string();
    let restore = || {
        first(port);
        line.mend();
    };
    outlives((source, &destination), (&to, migrate), || line.cut(), restore)
}

#[test]
fn a_guest_outlives_a_lost_network() {
    outlives_a_cut("pool", &["--self-service", "off"], &[]);
    outlives_a_cut("in-place", &["--self-service", "off", "--landing", "in-place"], &[]);
    outlives_a_cut("shards", &["--self-service", "off", "--shards", "3"], &[]);
}

#[test]
#[ignore = "needs to be told of KVM's page faults: run by scripts/test in the lab"]
fn one_whose_vcpu_serves_itself_does() {
    for (name, more) in [
        ("self", vec![]),
        ("self-in-place", vec!["--landing", "in-place"]),
        ("self-shards", vec!["--shards", "3"]),
    ] {
        let report = outlives_a_cut(name, &[&["--self-service", "on"][..], &more].concat(), &[]);
        let blocked = report["vcpu_blocktime_us"][0].as_u64().unwrap();
        assert!(blocked > 300_000, "{name}: it waited for at least as long as it was watched: {blocked} µs");
    }
}

#[test]
fn one_that_moves_by_hybrid_does() {
    outlives_a_cut("hybrid", &[], &["--mode", "hybrid"]);
}

#[test]
fn one_whose_hosts_speak_under_tls_does() {
    let scratch = Scratch::new("outlives-tls");
    let folder = Authority::default().folder(&scratch, "certificates", "127.0.0.1");
    let tls = ["--tls", folder.to_str().unwrap()];
    outlives_a_cut("tls-line", &tls, &tls);
}

#[test]
fn strangers_who_say_nothing_do_not_keep_its_source_away() {
    let mut strangers = None;
    outlives_a_cut_with("strangers", &[], &[], |port| strangers = Some(Strangers::at(port)));
}

/// Neither side is told: a connection whose other end is silent for 20 s is lost (ADR 16).
#[test]
#[ignore = "needs root, for hosts of its own: run by scripts/test in the lab"]
fn one_whose_host_vanished_does() {
    let scratch = Scratch::new("vanishes");
    let hosts = Hosts::new(8 * SLOW);
    let source = Pcvm::run_tiny_on(&hosts, 0, &scratch, "a");
    let there = SocketAddr::new(Hosts::address(1), 7070).to_string();
    let destination = Pcvm::start_on(&hosts, 1, &scratch, "b", &["receive", "--listen", &there]);
    outlives((source, &destination), (&there, &[]), || hosts.part(), || hosts.join());
}

/// The memory comes over another transport, and another way, than it began to.
fn recovers_over(transport: &str, address: &str, receive: &[&str]) {
    let scratch = Scratch::new(&format!("recover-{transport}"));
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let there = format!("{address}:{port}");
    let destination = Pcvm::start(&scratch, "b", &[&["receive", "--listen", &there][..], receive].concat());
    assert_refused(&recover(&source, &[]), &["no guest has left"]);
    let line = Line::to(there.parse::<SocketAddr>().unwrap(), SLOW);
    let out = strand(&line, &source, &destination);
    assert_refused(&out, &["the guest is at the destination", "kept on offer here", "pcvm recover"]);
    assert_eq!(source.status()["state"], "kept");
    // Nor does it go, with all that the guest has not got, when it is told to.
    let tell = |signal| kill_process(Pid::from_raw(source.pid() as i32).unwrap(), signal).unwrap();
    // Whoever runs the tests may have hang-ups ignored.
    tell(Signal::HUP);
    for (times, signal) in [Signal::TERM, Signal::INT].into_iter().enumerate() {
        tell(signal);
        let said = |source: &Pcvm| source.log().matches("`pcvm quit` ends this process").count();
        source.wait_until("it says why it stays", |source| said(source) > times);
    }
    assert_eq!(source.status()["state"], "kept");

    // The line is still cut, and nobody else's guest gets in meanwhile.
    assert_refused(&recover(&source, &["--patience", "1"]), &["kept on offer here"]);
    let other = Pcvm::run_tiny(&scratch, "c");
    let out = other.try_migrate(&there, &["--transport", "tcp"]);
    assert_refused(&out, &["a guest is here already", "the guest runs on here"]);

    let out = recover(&source, &["--to", &there, "--transport", transport]);
    assert!(out.status.success(), "{}", stderr(&out));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["transport"], transport);
    assert_over(&report, source, &destination);
}

#[test]
fn a_source_that_was_not_patient_is_told_to_recover_over_another_way() {
    for transport in ["tcp", "shm"] {
        recovers_over(transport, "127.0.0.1", &[]);
    }
}

#[test]
#[ignore = "needs an RDMA device at LAB_RDMA_ADDR: run by scripts/test in the lab"]
fn it_recovers_over_verbs() {
    let address = postcopy_e2e::variable("LAB_RDMA_ADDR");
    recovers_over("verbs", &address, &["--self-service", "off"]);
    recovers_over("verbs", &address, &["--self-service", "on", "--landing", "pool"]);
}

#[test]
fn a_doubt_ends_when_the_destination_is_heard_again() {
    let scratch = Scratch::new("doubt-ends");
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    // Its lanes live, so all is there when the source comes back; a control connection of that kind is not cut.
    let cut = format!("127.0.0.1:{}", cut_after(WITH_COMMIT, port));
    let report = source.migrate(&cut, &["--patience", &u64::MAX.to_string()]);
    assert!(number(&report, "/downtime_us") > 0, "{report}");
    assert_over(&report, source, &destination);
}

/// Ends a guest that waits for its memory, as a user would.
fn ends_while_stranded(name: &str, receive: &[&str]) {
    let scratch = Scratch::new(&format!("ends-{name}"));
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, receive);
    let line = Line::to(([127, 0, 0, 1], port), SLOW);
    strand(&line, &source, &destination);
    let console = destination.console();
    let out = pcvm(&["quit", "--control", destination.control().to_str().unwrap()]);
    assert!(out.status.success(), "{}", stderr(&out));
    let (ended_well, log) = destination.wait();
    assert!(ended_well, "{log}");
    assert!(!console.contains("BAD"), "{console}");
}

#[test]
fn a_stranded_guest_can_be_ended() {
    ends_while_stranded("handler", &["--self-service", "off"]);
}

#[test]
#[ignore = "needs to be told of KVM's page faults: run by scripts/test in the lab"]
fn a_stranded_guest_whose_vcpu_serves_itself_can_be_ended() {
    ends_while_stranded("self", &["--self-service", "on"]);
}

#[test]
fn a_guest_that_outlived_a_lost_network_moves_on() {
    let scratch = Scratch::new("moves-on");
    let ([a, b], [port_a, port_b]) = Pcvm::pair(&scratch);
    for turn in 0..4 {
        let (from, to, port) = if turn % 2 == 0 { (&a, &b, port_b) } else { (&b, &a, port_a) };
        let line = Line::to(([127, 0, 0, 1], port), SLOW);
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| from.migrate(&line.address().to_string(), &["--transport", "tcp"]));
            lose_in_the_drain(|| line.cut(), from, to);
            line.mend();
            assert_whole(&moving.join().unwrap(), PAGES);
        });
        to.assert_runs();
        from.wait_until("it waits again", |from| from.status()["state"] == "waiting");
    }
}
