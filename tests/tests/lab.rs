//! Stock Linux guests and real verbs: in the lab, or on a machine with KVM and an RDMA device.
//!
//! Ignored by default; `scripts/test` runs them in the lab. They need three variables: the address
//! of an RDMA device of this machine in `LAB_RDMA_ADDR`, a bzImage in `LAB_KERNEL`, and what
//! `scripts/guest-image` printed in `POSTCOPY_INITRD`.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

use postcopy_e2e::reports::{assert_well, since, verdicts, walks};
use postcopy_e2e::{
    Pcvm, Scratch, assert_refused, free_port, free_ports, pcbench, program, run, stderr, variable,
};
use serde_json::Value;

/// Moves in a row over each transport.
const MOVES: usize = 20;
const PAGE: usize = 4096;

/// Two processes that hand one Linux guest back and forth.
struct Lab {
    scratch: Scratch,
    address: String,
    ports: [u16; 2],
    hosts: [Pcvm; 2],
    at: usize,
    /// Bytes that its console had there when it came.
    arrived: usize,
    uptime: f64,
}

impl Lab {
    /// Boots a guest of 256 MiB that walks and rewrites `mb` MiB of it in random order.
    fn boot(name: &str, mb: u32, more: &str) -> Self {
        Self::boot_by(name, mb, more, 1, [&[], &[]])
    }

    /// As [`Lab::boot`], with so many vCPUs and more arguments for each of the processes.
    fn boot_by(name: &str, mb: u32, more: &str, cpus: u32, hosts: [&[&str]; 2]) -> Self {
        let (scratch, address) = (Scratch::new(name), variable("LAB_RDMA_ADDR"));
        let ports = free_ports();
        let listen = ports.map(|port| format!("{address}:{port}"));
        let (kernel, initrd) = (variable("LAB_KERNEL"), variable("POSTCOPY_INITRD"));
        let load = format!("pcguest.mb={mb} pcguest.pattern=random pcguest.access=write {more}");
        let cpus = cpus.to_string();
        let run = ["run", "--kernel", &kernel, "--initrd", &initrd, "--memory", "256M", "--cpus", &cpus];
        let run = [&run[..], &["--cmdline", &load, "--again", "--listen", &listen[0]], hosts[0]].concat();
        let receive = [&["receive", "--listen", &listen[1], "--again"], hosts[1]].concat();
        let source = Pcvm::start(&scratch, "a", &run);
        let destination = Pcvm::start(&scratch, "b", &receive);
        source.wait_until("the guest walks its memory", |source| !walks(&source.console()).is_empty());
        Self { scratch, address, ports, hosts: [source, destination], at: 0, arrived: 0, uptime: 0.0 }
    }

    fn here(&self) -> &Pcvm {
        &self.hosts[self.at]
    }

    /// Moves the guest to the other process, and waits until it has reported from there.
    fn go(&mut self, transport: &str) -> Value {
        self.go_by(transport, "postcopy")
    }

    fn go_by(&mut self, transport: &str, mode: &str) -> Value {
        let (from, to) = (&self.hosts[self.at], &self.hosts[1 - self.at]);
        let target = format!("{}:{}", self.address, self.ports[1 - self.at]);
        let arrived = to.console().len();
        let out = from.try_migrate(&target, &["--json", "--transport", transport, "--mode", mode]);
        let stories = || format!("the source {}\nthe destination {}", from.story(), to.story());
        assert!(out.status.success(), "{}\n{}", stderr(&out), stories());
        let report = serde_json::from_slice(&out.stdout).unwrap();
        let reported = |to: &Pcvm| walks(since(&to.console(), arrived)).len() >= 2;
        to.wait_until("the guest reports from there", reported);
        from.wait_until("it waits for another guest", |from| from.status()["state"] == "waiting");
        (self.at, self.arrived) = (1 - self.at, arrived);
        self.check();
        report
    }

    /// No bad page so far, clocks that only go forward, and a guest that is alive.
    fn check(&mut self) {
        let console = self.here().console();
        assert!(!console.contains("BAD"), "{console}");
        let uptime = assert_well(since(&console, self.arrived))["uptime_s"].as_f64().unwrap();
        assert!(uptime > self.uptime, "uptime went from {} to {uptime}", self.uptime);
        self.uptime = uptime;
    }

    /// Has the guest verify all of its memory once more.
    fn verify(&self) {
        self.here().type_line("verify");
        let answered = |here: &Pcvm| !verdicts(&here.console()).is_empty();
        self.here().wait_until("the guest has verified its memory", answered);
        let console = self.here().console();
        let verdict = verdicts(&console)[0];
        assert!(verdict.ends_with(" bad 0"), "{verdict}");
    }
}

fn twenty_moves_over(transport: &str) {
    // Every other move is to the second, whose pages lie as the guest has used them.
    let mut lab = Lab::boot_by(&format!("twenty-{transport}"), 48, "", 1, [&[], &["--order", "recency"]]);
    let mut total = Vec::new();
    for turn in 0..MOVES {
        // Every third in hybrid: the dirty log of a guest that came that way, and of one that did not.
        let mode = if turn % 3 == 2 { "hybrid" } else { "postcopy" };
        let report = lab.go_by(transport, mode);
        assert_eq!(report["transport"], transport);
        let value = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap();
        println!(
            "move {turn} over {transport}, {mode}: downtime {} µs, resident {} µs, {} network faults, {} pages crossed, {} kept",
            value("/downtime_us"),
            value("/resident_us"),
            value("/pager/pages/network_faults"),
            (value("/pager/fault_bytes") + value("/pager/bulk_bytes")) / PAGE as u64,
            value("/pager/pages/kept_pages"),
        );
        assert_eq!(value("/ordered_pages") > 0, turn % 2 == 0, "{report}");
        let (touched, faults) = (value("/touched_pages"), value("/pager/pages/network_faults"));
        println!("{touched} pages touched until then");
        // KVM's own accesses fault too, and are no touches of a vCPU's.
        assert!(touched * 10 >= faults * 9, "{report}");
        total.push(value("/downtime_us"));
    }
    lab.verify();
    total.sort_unstable();
    println!("{MOVES} moves over {transport}: median downtime {} µs", total[MOVES / 2]);
    drop(lab.scratch);
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn vcpus_serve_their_own_faults_over_each_transport() {
    let cpus = std::thread::available_parallelism().unwrap().get().min(2) as u32;
    let here = ["--self-service", "on", "--shards", "2"];
    let there = [&here[..], &["--landing", "pool"]].concat();
    let mut lab = Lab::boot_by("self-service", 64, "", cpus, [&here, &there]);
    for transport in ["verbs", "verbs", "shm", "tcp"] {
        let report = lab.go(transport);
        assert_eq!(report["pager"]["shards"], 2, "{report}");
        let served = report["pager"]["self_served_faults"].as_u64().unwrap();
        let faults = report["pager"]["pages"]["network_faults"].as_u64().unwrap();
        println!("over {transport}: of {faults} network faults {served} were served by who faulted");
        assert!(
            served > 0 && served * 10 >= faults * 9,
            "{served} of {faults}: the vCPUs leave too many to the pager"
        );
    }
    lab.verify();
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn twenty_moves_over_tcp() {
    twenty_moves_over("tcp");
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn twenty_moves_over_verbs() {
    twenty_moves_over("verbs");
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn twenty_moves_over_shm() {
    twenty_moves_over("shm");
}

/// Pages of a process's guest memory that are not all zero.
fn pages_with_content(pid: u32) -> u64 {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_guest = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("memfd:guest-memory"))
    };
    let file = std::fs::File::open(fds.map(|fd| fd.path()).find(is_guest).unwrap()).unwrap();
    let mut block = vec![0u8; 256 * PAGE];
    let mut count = 0;
    for at in (0..file.metadata().unwrap().len()).step_by(block.len()) {
        let got = file.read_at(&mut block, at).unwrap();
        count += block[..got].chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count() as u64;
    }
    count
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn what_crosses_over_verbs_is_the_pages_with_content() {
    // Paced, so that the guest writes few new pages while they are counted.
    let mut lab = Lab::boot("bytes", 64, "pcguest.pace_us=2000");
    let report = lab.go("verbs");
    let resident = pages_with_content(lab.here().pid());
    let value = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap();
    let crossed = (value("/pager/bulk_bytes") + value("/pager/fault_bytes")) / PAGE as u64;
    println!("{crossed} pages crossed, {resident} pages have content");
    assert!(
        crossed.abs_diff(resident) * 50 <= resident,
        "{crossed} is not within 2 % of {resident}: {report}"
    );
    assert!(resident > 64 * 256 && value("/pager/pages/zero_pages") > 0, "{report}");
}

/// A server to read from.
fn serve(port: u16) -> Child {
    let listen = format!("{}:{port}", variable("LAB_RDMA_ADDR"));
    let mut command = Command::new(program("pcbench"));
    let mut child = command.args(["serve", "--listen", &listen]).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::with_capacity(1, child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("serving"), "{line}");
    child
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn reads_over_verbs_go_on_while_the_exporter_is_stopped() {
    let port = free_port();
    let mut server = serve(port);
    let target = format!("{}:{port}", variable("LAB_RDMA_ADDR"));
    let mut reader = Command::new(program("pcbench"))
        .args(["read", &target, "--transport", "verbs", "--sizes", "4K", "--iterations", "3000"])
        .args(["--rounds", "1", "--verify", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut connected = String::new();
    BufReader::with_capacity(1, reader.stderr.as_mut().unwrap()).read_line(&mut connected).unwrap();
    assert!(connected.contains("connected"), "{connected}");
    signal(&server, rustix::process::Signal::STOP);
    // The signal takes effect when it is delivered: wait until it has.
    let pid = rustix::process::Pid::from_child(&server);
    let stopped = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED).unwrap();
    assert!(stopped.is_some_and(|(_, status)| status.stopped()), "the server was not stopped");
    let mut json = String::new();
    reader.stdout.as_mut().unwrap().read_to_string(&mut json).unwrap();
    let read_all = reader.wait().unwrap().success();
    let still = std::fs::read_to_string(format!("/proc/{}/stat", server.id())).unwrap();
    signal(&server, rustix::process::Signal::CONT);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(still.contains(") T "), "the server went on: {still}");
    assert!(read_all);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["measurements"][0]["latency"]["count"], 3000, "{report}");
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_device_or_gid_that_does_not_exist() {
    let port = free_port();
    let mut server = serve(port);
    let target = format!("{}:{port}", variable("LAB_RDMA_ADDR"));
    let read = |more: &[&str]| {
        let verbs = ["read", &target, "--transport", "verbs", "--sizes", "4K", "--iterations", "100"];
        pcbench(&[&verbs[..], more].concat())
    };
    assert_refused(&read(&["--device", "nope0"]), &["no RDMA device named nope0", "this machine has"]);
    assert_refused(&read(&["--gid-index", "200"]), &["no GID index 200", "the port has 0"]);
    assert_refused(&read(&["--ib-port", "9"]), &["port 9 does not exist"]);
    let both = read(&["--verify", "--bidirectional", "--lanes", "2", "--depth", "8", "--json"]);
    assert!(both.status.success(), "{}", stderr(&both));
    let report: Value = serde_json::from_slice(&both.stdout).unwrap();
    assert!(
        report.pointer("/measurements/0/reverse/latency/count").unwrap().as_u64().unwrap() > 0,
        "{report}"
    );
    assert_eq!(report["environment"]["rdma"][0]["state"], "ACTIVE", "{report}");
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn too_little_lockable_memory() {
    let scratch = Scratch::new("memlock");
    let mut lab = Lab::boot("memlock-guest", 16, "");
    let port = free_port();
    let listen = format!("{}:{port}", lab.address);
    // Without CAP_IPC_LOCK, root is subject to the limit as any user is.
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=65536:65536"]);
    command.arg(program("pcvm")).args([
        "receive",
        "--listen",
        &listen,
        "--transport",
        "verbs",
        "--console",
        "none",
    ]);
    command.arg("--control").arg(scratch.file("limited.sock"));
    let limited = std::thread::spawn(move || run(&mut command));
    let control = scratch.file("limited.sock");
    lab.here().wait_until("the receiver listens", |_| control.exists());
    let out = lab.here().try_migrate(&listen, &["--transport", "verbs"]);
    assert_refused(&out, &["cannot register", "ulimit -l", "the guest runs on here"]);
    let out = limited.join().unwrap();
    assert!(!out.status.success() && stderr(&out).contains("ulimit -l"), "{}", stderr(&out));
    lab.check();
    lab.go("verbs");
}
