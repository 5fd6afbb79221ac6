//! pcbench as its users run it: forms of the report, many readers of one server, comparisons.
//!
//! Refusals and hostile servers are in `pcbench_refusals.rs`, faults in `pcbench_fault.rs`.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use postcopy_e2e::{
    Scratch, Served, number, pcbench, pcbench_report as report, program, stderr, stdout, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const SHORT: [&str; 4] = ["--iterations", "200", "--rounds", "2"];

#[test]
fn the_loopback_measures_every_transport_and_says_what_it_means() {
    let out = pcbench(&["--transport", "shm,tcp", "--sizes", "64,4K", "--verify", "--iterations", "300"]);
    assert!(out.status.success(), "{}", stderr(&out));
    let text = stdout(&out);
    for word in ["shm", "tcp", "4K", "p99.99", "95% CI", "A 4 KiB page over tcp takes", "debug build"] {
        assert!(text.contains(word), "`{word}` is not in:\n{text}");
    }
}

#[test]
fn the_json_is_versioned_and_consistent() {
    let report = report(&[&["--transport", "tcp,shm", "--sizes", "8..64"], &SHORT[..]].concat());
    assert_eq!(report["version"], 2);
    assert_eq!(report["measurements"].as_array().unwrap().len(), 2 * 4);
    for m in report["measurements"].as_array().unwrap() {
        assert_eq!(m["latency"]["count"], 400, "{m}");
        let names = ["min_us", "p50_us", "p90_us", "p99_us", "p999_us", "p9999_us", "max_us"];
        let values: Vec<f64> = names.iter().map(|name| number(m, &format!("/latency/{name}"))).collect();
        assert!(values.is_sorted() && values[0] > 0.0, "{values:?}");
        assert!(number(m, "/median_ci/low_us") <= number(m, "/median_ci/high_us"), "{m}");
        assert!(number(m, "/mb_per_s") > 0.0 && number(m, "/stdev_us") > 0.0, "{m}");
        assert_eq!(m["rounds"].as_array().unwrap().len(), 2);
    }
    assert!(report["environment"]["cores"].as_u64().unwrap() >= 1);
}

#[test]
fn each_way_to_wait_reads_every_byte_right() {
    for completion in ["poll", "event", "adaptive"] {
        let args = ["--transport", "tcp,shm", "--sizes", "100,64K", "--verify", "--completion", completion];
        let report = report(&[&args[..], &["--depth", "8", "--lanes", "2"], &SHORT].concat());
        for m in report["measurements"].as_array().unwrap() {
            assert_eq!(m["latency"]["count"], 400, "{completion}: {m}");
        }
    }
}

#[test]
fn every_form_of_the_report_is_written() {
    let scratch = Scratch::new("forms");
    let file = |name: &str| scratch.file(name).to_str().unwrap().to_owned();
    let files = [
        "--report",
        &file("a.html"),
        "--plot",
        &file("a.svg"),
        "--hgrm",
        &file("a.hgrm"),
        "--hlog",
        &file("a.hlog"),
    ];
    let args = [&["--transport", "tcp", "--sizes", "64,4K", "--format", "csv"][..], &files, &SHORT].concat();
    let out = pcbench(&args);
    assert!(out.status.success(), "{}", stderr(&out));
    assert!(stdout(&out).starts_with("transport,bytes,") && stdout(&out).lines().count() == 3);
    let read = |name: &str| std::fs::read_to_string(scratch.file(name)).unwrap();
    let page = read("a.html");
    assert!(page.starts_with("<!DOCTYPE html>") && page.matches("<svg").count() == 3);
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!outside.contains("http://") && !outside.contains("https://"), "the page needs something else");
    assert!(read("a.svg").starts_with("<svg"));
    assert!(read("a-tcp-64.hgrm").contains("1/(1-Percentile)") && read("a-tcp-4096.hgrm").contains("#[Max"));
    assert!(read("a.hlog").contains("Tag=tcp-4096,"));
    for (format, header) in [("perftest", "t_typical[usec]"), ("osu", "# Size")] {
        let out =
            pcbench(&[&["--transport", "shm", "--sizes", "4K", "--format", format], &SHORT[..]].concat());
        assert!(out.status.success() && stdout(&out).contains(header), "{}", stdout(&out));
    }
}

#[test]
fn both_sides_read_at_the_same_time() {
    let served = Served::start(&[]);
    let args = ["read", served.address(), "--transport", "tcp,shm", "--bidirectional", "--sizes", "4K,64K"];
    let report = report(&[&args[..], &["--depth", "4", "--lanes", "2", "--verify"], &SHORT].concat());
    for m in report["measurements"].as_array().unwrap() {
        assert!(m["reverse"]["latency"]["count"].as_u64().unwrap() > 0, "{m}");
        assert!(number(m, "/reverse/mb_per_s") > 0.0, "{m}");
    }
}

#[test]
fn an_open_loop_counts_the_wait_of_every_read_that_a_stall_delays() {
    let served = Served::start(&[]);
    let mut command = Command::new(program("pcbench"));
    command.args([
        "read",
        served.address(),
        "--transport",
        "tcp",
        "--sizes",
        "64",
        "--json",
        "--rounds",
        "1",
    ]);
    command.args(["--rate", "1000", "--duration", "2"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let reader = command.spawn().unwrap();
    wait_until("the reader is served", || served.log().contains("reads over tcp"));
    std::thread::sleep(Duration::from_millis(600));
    kill_process(served.pid(), Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    kill_process(served.pid(), Signal::CONT).unwrap();
    let out = reader.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    // Half a second of 2 s: a quarter of all reads were due while the server stood, and each waited.
    // A closed loop, or times from the post, would have one long read among 2000.
    let latency = &report["measurements"][0]["latency"];
    assert_eq!(latency["count"], 2000, "{latency}");
    assert!(number(&report, "/measurements/0/latency/p90_us") > 100_000.0, "{latency}");
}

/// A reader that reads on until its time is over.
fn reader(address: &str, seconds: &str) -> Child {
    let mut command = Command::new(program("pcbench"));
    command.args(["read", address, "--transport", "tcp", "--sizes", "4K,64K", "--verify", "--rounds", "2"]);
    command.args(["--duration", seconds, "--json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn ten_clients_and_three_of_them_killed() {
    let served = Served::start(&[]);
    let mut readers: Vec<Child> = (0..10).map(|_| reader(served.address(), "1.5")).collect();
    wait_until("all ten are served", || served.log().matches("reads over tcp").count() == 10);
    for victim in readers.drain(..3) {
        kill_process(Pid::from_child(&victim), Signal::KILL).unwrap();
        assert!(!victim.wait_with_output().unwrap().status.success());
    }
    wait_until("the lanes of the dead are free", || {
        served.log().matches("gone, its lanes are free").count() == 3
    });
    for reader in readers {
        let out = reader.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", stderr(&out));
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        for m in report["measurements"].as_array().unwrap() {
            assert!(m["latency"]["count"].as_u64().unwrap() > 0, "{m}");
        }
    }
    wait_until("nothing is left of them at the server", || served.threads() == 1);
    let late =
        report(&[&["read", served.address(), "--transport", "tcp", "--sizes", "4K"], &SHORT[..]].concat());
    assert_eq!(late["measurements"][0]["latency"]["count"], 400);
}

#[test]
fn a_full_server_refuses_and_serves_on() {
    let served = Served::start(&["--max-clients", "1"]);
    let first = reader(served.address(), "1");
    wait_until("the first is served", || served.log().contains("reads over tcp"));
    let out = pcbench(&["read", served.address(), "--transport", "tcp", "--sizes", "64"]);
    postcopy_e2e::assert_refused(&out, &["refused", "1 readers are served already"]);
    let out = first.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", stderr(&out));
}

/// A report whose medians are so many µs, certain to 1 %.
fn with_medians(report: &Value, median_us: f64) -> Value {
    let mut report = report.clone();
    for m in report["measurements"].as_array_mut().unwrap() {
        let values = [("/latency/p50_us", 1.0), ("/median_ci/low_us", 0.99), ("/median_ci/high_us", 1.01)];
        for (path, factor) in values {
            *m.pointer_mut(path).unwrap() = (median_us * factor).into();
        }
    }
    report
}

#[test]
fn comparisons_end_with_a_status_for_scripts() {
    let scratch = Scratch::new("compare");
    let measured = report(&[&["--transport", "shm", "--sizes", "64,4K"], &SHORT[..]].concat());
    let write = |name: &str, report: &Value| {
        let path = scratch.file(name);
        std::fs::write(&path, report.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (a, b) =
        (write("a.json", &with_medians(&measured, 5.0)), write("b.json", &with_medians(&measured, 15.0)));
    let status = |args: &[&str]| pcbench(&[&["compare"], args].concat()).status.code();
    assert_eq!(status(&[&a, &a, "--fail-above", "5%"]), Some(0));
    assert_eq!(status(&[&a, &b]), Some(0), "without a limit nothing fails");
    assert_eq!(status(&[&b, &a, "--fail-above", "5%"]), Some(0), "faster is not worse");
    assert_eq!(status(&[&a, &b, "--fail-above", "5"]), Some(1));
    assert_eq!(status(&[&a, &b, "--fail-above", "300%"]), Some(0));
    let out = pcbench(&["compare", &a, &b, "--fail-above", "5%", "--json"]);
    let comparison: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&comparison["worse"], &comparison["differences"][0]["verdict"]),
        (&true.into(), &"worse".into())
    );
    assert!((number(&comparison, "/differences/0/p50_percent") - 200.0).abs() < 0.1);
}

#[test]
fn doctor_looks_at_everything_and_changes_nothing() {
    let out = pcbench(&["doctor", "--json"]);
    let examination: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(examination["ready"], out.status.success());
    let checks = examination["checks"].as_array().unwrap();
    for name in
        ["kernel", "userfaultfd", "/dev/kvm", "locked memory", "RDMA", "Soft-RoCE (rdma_rxe)", "SCHED_FIFO"]
    {
        let found = checks.iter().find(|check| check["name"] == name);
        let found = found.unwrap_or_else(|| panic!("{name} is missing: {examination}"));
        assert_eq!(found["status"] == "ok", found.get("remedy").is_none(), "{found}");
    }
    let text = stdout(&pcbench(&["doctor"]));
    assert!(text.contains("userfaultfd"), "{text}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let scratch = Scratch::new("manual");
    let bash = stdout(&pcbench(&["completions", "bash"]));
    assert!(bash.contains("--give-up-after") && bash.contains("doctor"));
    let folder = scratch.file("man");
    assert!(pcbench(&["man", "--dir", folder.to_str().unwrap()]).status.success());
    for page in ["pcbench.1", "pcbench-serve.1", "pcbench-read.1", "pcbench-compare.1", "pcbench-doctor.1"] {
        assert!(folder.join(page).exists(), "{page}");
    }
    assert!(std::fs::read_to_string(folder.join("pcbench-read.1")).unwrap().contains("rounds"));
}
