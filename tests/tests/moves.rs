//! A real guest moves between processes of this host: the tiny guest, on this host's KVM.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use postcopy_e2e::reports::{assert_whole, number};
use postcopy_e2e::{Pcvm, Scratch, assert_refused, free_port, pcvm, stderr};
use serde_json::Value;

/// The rounds that the guest has printed at one console: ascending by one, none bad.
fn rounds(console: &str) -> Vec<u64> {
    assert!(!console.contains("BAD") && !console.contains(" bad "), "{console}");
    let round = |line: &str| line.strip_prefix("tiny: round ")?.strip_suffix(" ok")?.parse().ok();
    let rounds: Vec<u64> = console.lines().filter_map(round).collect();
    assert!(rounds.windows(2).all(|pair| pair[1] == pair[0] + 1), "{rounds:?}");
    rounds
}

fn moves_over(transport: &str, mode: &str, (shards, landing): (u64, &str)) {
    let scratch = Scratch::new(&format!("moves-{transport}-{mode}-{shards}-{landing}"));
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination =
        Pcvm::receive(&scratch, "b", port, &["--shards", &shards.to_string(), "--landing", landing]);
    let report = source.migrate(&format!("127.0.0.1:{port}"), &["--transport", transport, "--mode", mode]);
    assert_eq!(number(&report, "/pager/shards"), shards);
    assert_eq!((&report["transport"], &report["mode"]), (&transport.into(), &mode.into()));
    assert_whole(&report, 2048);
    let (kept, read_before) =
        (number(&report, "/pager/pages/kept_pages"), number(&report, "/pager/precopy_pages"));
    if mode == "hybrid" {
        // The guest goes round a part of its memory and writes it; what it booted from stays as it was.
        let after = number(&report, "/pager/fault_bytes") + number(&report, "/pager/bulk_bytes");
        assert!(0 < kept && kept <= read_before && after > 0, "{report}");
        assert!(number(&report, "/precopy_us") <= number(&report, "/setup_us"), "{report}");
        assert_eq!(number(&report, "/pager/precopy_bytes") / 4096, read_before, "{report}");
    } else {
        assert_eq!((kept, read_before, number(&report, "/precopy_us")), (0, 0, 0), "{report}");
    }
    assert!(number(&report, "/downtime_us") > 0 && number(&report, "/state_bytes") > 1000, "{report}");
    let waited = report["vcpu_blocktime_us"].as_array().unwrap();
    let told = report["query_migrate"]["postcopy-vcpu-blocktime"].as_array().unwrap();
    assert!(waited.len() == 1 && told.len() == 1, "the guest has one vCPU: {report}");
    let cores = std::thread::available_parallelism().unwrap().get() as u64;
    let cpu = number(&report, "/source_cpu_us");
    assert!(cpu > 0 && cpu <= number(&report, "/total_us") * cores, "{report}");

    let at_source = rounds(&source.console());
    let (ended_well, log) = source.wait();
    assert!(ended_well, "{log}");
    destination.wait_for_progress();
    assert_eq!(destination.status()["state"], "running");
    let at_destination = rounds(&destination.console());
    // Characters on their way through the serial port may be printed on either side, so the round
    // of the move itself may be split between the two.
    let last = at_source.last().unwrap();
    assert!(at_destination[0] == last + 1 || at_destination[0] == last + 2, "{last} then {at_destination:?}");
}

#[test]
fn over_tcp() {
    moves_over("tcp", "postcopy", (1, "in-place"));
}

#[test]
fn over_shared_memory() {
    moves_over("shm", "postcopy", (1, "in-place"));
}

#[test]
fn hybrid_over_tcp() {
    moves_over("tcp", "hybrid", (1, "in-place"));
}

#[test]
fn hybrid_over_shared_memory() {
    moves_over("shm", "hybrid", (1, "in-place"));
}

#[test]
fn memory_by_several_threads() {
    for (transport, mode) in [("tcp", "postcopy"), ("shm", "hybrid")] {
        moves_over(transport, mode, (3, "in-place"));
    }
}

#[test]
fn memory_that_lands_in_a_pool() {
    for (transport, shards) in [("tcp", 1), ("shm", 1), ("tcp", 3)] {
        moves_over(transport, "postcopy", (shards, "pool"));
    }
}

#[test]
fn memory_in_the_order_in_which_the_guest_has_used_it() {
    for (mode, shards) in [("postcopy", "1"), ("hybrid", "1"), ("postcopy", "3")] {
        let scratch = Scratch::new(&format!("moves-order-{mode}-{shards}"));
        let port = free_port();
        let source = Pcvm::run_tiny(&scratch, "a");
        let more = ["--order", "recency", "--shards", shards, "--policy", "bubble:dual"];
        let destination = Pcvm::receive(&scratch, "b", port, &more);
        let report = source.migrate(&format!("127.0.0.1:{port}"), &["--mode", mode]);
        assert_whole(&report, 2048);
        // It goes round a part of its memory all the time.
        let ordered = number(&report, "/ordered_pages");
        assert!((16..2048).contains(&ordered), "{report}");
        assert!(number(&report, "/setup_us") > 1_500_000, "it was watched: {report}");
        destination.wait_for_progress();
        assert!(!destination.console().contains("BAD"));
    }
}

#[test]
fn what_crosses_in_a_second_is_the_lesser_of_both_sides_limits() {
    const MIB: u64 = 1 << 20;
    for (mode, shards, here, there, least) in
        [("postcopy", "1", "8M", "16M", 8), ("hybrid", "1", "16M", "8M", 8), ("postcopy", "3", "6M", "8M", 6)]
    {
        let scratch = Scratch::new(&format!("moves-limit-{mode}-{shards}"));
        let port = free_port();
        let source = Pcvm::run_tiny(&scratch, "a");
        let receive = ["--max-bandwidth", there, "--shards", shards];
        let destination = Pcvm::receive(&scratch, "b", port, &receive);
        let migrate = ["--max-bandwidth", here, "--mode", mode];
        let report = source.migrate(&format!("127.0.0.1:{port}"), &migrate);
        assert_whole(&report, 2048);
        assert_eq!(number(&report, "/pager/max_bandwidth"), least * MIB, "{report}");
        // What may be made up for at the start, and the last read's time is still to come: of each shard.
        let spared = 3 * (128 << 10) + least * MIB / 100;
        let least_us = |bytes: u64| bytes.saturating_sub(spared) * 1_000_000 / (least * MIB);
        let (bytes, before) = (number(&report, "/pager/bulk_bytes"), number(&report, "/pager/precopy_bytes"));
        // After the stop the guest may ask for most of it, page by page.
        assert!(mode == "postcopy" || before > MIB / 2, "{report}");
        assert!(number(&report, "/resident_us") >= least_us(bytes), "{report}");
        assert!(number(&report, "/precopy_us") >= least_us(before), "{report}");
        destination.assert_runs();
    }
}

#[test]
fn a_move_is_called_off_while_the_guest_still_runs() {
    let scratch = Scratch::new("moves-called-off");
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, &["--again"]);
    let to = format!("127.0.0.1:{port}");
    let cancel = || pcvm(&["cancel", "--control", source.control().to_str().unwrap()]);
    assert_refused(&cancel(), &["no guest is being moved"]);
    // In its round of pre-copy, which would take hours; then where there is nobody to say no more than hello.
    let dead_end = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = dead_end.local_addr().unwrap().to_string();
    for (to, phase) in [(&to, "pre-copy"), (&nowhere, "setup")] {
        let slow = ["--mode", "hybrid", "--max-bandwidth", "1K"];
        let moving = source.begin_migration(to, &slow);
        source.wait_until("it is on its way", |source| source.status()["migration"]["phase"] == phase);
        let out = cancel();
        assert!(out.status.success(), "{}", stderr(&out));
        source.assert_runs();
        assert_refused(&moving.wait_with_output().unwrap(), &["called off", "the guest runs on here"]);
    }
    destination.wait_until("it waits again", |there| there.status()["state"] == "waiting");
    assert!(destination.log().contains("called off"), "{}", destination.log());
    // Once it was stopped, which the last pages show that are still to come, it moves.
    let slow = ["--max-bandwidth", "1M"];
    let moving = source.begin_migration(&to, &slow);
    source.wait_until("it has left", |source| source.status()["migration"]["phase"] == "draining");
    assert_refused(&cancel(), &["too late"]);
    assert!(moving.wait_with_output().unwrap().status.success());
    destination.assert_runs();
}

#[test]
fn what_may_cross_is_changed_while_a_guest_arrives() {
    let scratch = Scratch::new("moves-limit-changed");
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, &["--shards", "2"]);
    let limit = |to: &str| pcvm(&["limit", "--control", destination.control().to_str().unwrap(), to]);
    assert_refused(&limit("1M"), &["no guest's memory is on its way here"]);
    // What the guest does not ask for would take hours; but it asks for most of it before long.
    let moving = source.begin_migration(&format!("127.0.0.1:{port}"), &["--max-bandwidth", "64"]);
    destination.wait_until("it is on its way", |there| there.status()["arrival"]["max_bandwidth"] == 64);
    let out = limit("none");
    assert!(
        out.status.success() || destination.status()["arrival"]["outstanding_pages"] == 0,
        "{}",
        stderr(&out)
    );
    let out = moving.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", stderr(&out));
    destination.assert_runs();
}

#[test]
fn a_guest_that_is_ended_while_its_memory_comes_is_not_waited_for() {
    let scratch = Scratch::new("moves-ended");
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    let slow = ["--json", "--max-bandwidth", "64", "--patience", "600"];
    let moving = source.begin_migration(&format!("127.0.0.1:{port}"), &slow);
    destination.wait_until("it is on its way", |there| there.status()["state"] == "running");
    assert!(pcvm(&["quit", "--control", destination.control().to_str().unwrap()]).status.success());
    let out = moving.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", source.log());
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let outstanding = number(&report, "/pager/outstanding_pages");
    // It may have asked for all of it before.
    assert_eq!(report["guest_ended"], outstanding > 0, "{report}");
    for process in [source, destination] {
        let (ended_well, log) = process.wait();
        assert!(ended_well, "{log}");
    }
}

#[test]
fn back_and_forth_between_two_processes() {
    let scratch = Scratch::new("back-and-forth");
    let ([a, b], [port_a, port_b]) = Pcvm::pair(&scratch);
    for turn in 0..10 {
        let (from, to, port) = if turn % 2 == 0 { (&a, &b, port_b) } else { (&b, &a, port_a) };
        // A guest's memory is watched anew in each process that it comes to.
        let mode = if turn % 3 == 0 { "postcopy" } else { "hybrid" };
        from.migrate(&format!("127.0.0.1:{port}"), &["--mode", mode]);
        to.wait_for_progress();
        from.wait_until("it waits again", |from| from.status()["state"] == "waiting");
    }
    assert!(!a.console().contains("BAD") && !b.console().contains("BAD"));
    a.type_line("q");
    let (ended_well, log) = a.wait();
    assert!(ended_well, "a guest that resets itself ends its process well: {log}");
}

#[test]
fn a_moved_guest_reads_its_console_on() {
    let scratch = Scratch::new("console");
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    source.migrate(&format!("127.0.0.1:{port}"), &[]);
    destination.type_line("z");
    destination.wait_for_console("tiny: got z");
}
