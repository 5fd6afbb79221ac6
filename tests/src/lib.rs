//! Drives the built programs as a user would: processes, sockets, files, and what they print.
//!
//! The programs are taken from the build directory that this test itself is in; `scripts/test`
//! builds them first (`cargo build -p postcopy-tools`).
#![allow(clippy::unwrap_used)] // everything here serves tests, where a panic is the report

pub mod authority;
pub mod cutter;
pub mod process;
pub mod qemu;
pub mod reports;
pub mod strangers;
pub mod system;
pub mod tap;

use std::io::{BufRead, BufReader, Read};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use process::Process;
use system::Hosts;

/// How long anything may take before a test calls it hung. The lab is slow.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The path of a built program.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(path.exists(), "{} is not built; run `cargo build -p postcopy-tools` first", path.display());
    path
}

/// A variable that whoever runs a test of the lab has to set.
pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; see the head of the test's file"))
}

/// A directory for one test, removed at its end.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new empty directory, named after the test.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("postcopy-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A path in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The tiny guest as a kernel file.
    pub fn tiny_kernel(&self) -> PathBuf {
        let path = self.file("tiny.elf");
        std::fs::write(&path, postcopy_guest::tiny::tiny_elf()).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// TCP ports of this host that nobody listens on now, each another.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let bound = [(); N].map(|()| std::net::TcpListener::bind("0.0.0.0:0").unwrap());
    bound.map(|listener| listener.local_addr().unwrap().port())
}

/// One such port.
pub fn free_port() -> u16 {
    free_ports::<1>()[0]
}

/// A pcvm process that holds a guest or waits for one. Ended when dropped.
pub struct Pcvm {
    process: Process,
    control: PathBuf,
}

impl Deref for Pcvm {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl Pcvm {
    /// Starts `pcvm ARGS --control … --console …` with files named after `name`.
    pub fn start(scratch: &Scratch, name: &str, args: &[&str]) -> Self {
        Self::launch(scratch, name, Command::new(program("pcvm")).args(args))
    }

    /// As [`Pcvm::start`], on a host.
    pub fn start_on(hosts: &Hosts, host: usize, scratch: &Scratch, name: &str, args: &[&str]) -> Self {
        Self::launch(scratch, name, hosts.command(host, &program("pcvm")).args(args))
    }

    /// As [`Pcvm::start`], logging what `filter` says.
    pub fn start_logging(scratch: &Scratch, name: &str, args: &[&str], filter: &str) -> Self {
        Self::launch(scratch, name, Command::new(program("pcvm")).args(args).env("RUST_LOG", filter))
    }

    fn launch(scratch: &Scratch, name: &str, command: &mut Command) -> Self {
        let [control, console, log] =
            ["sock", "console", "log"].map(|suffix| scratch.file(&format!("{name}.{suffix}")));
        command.arg("--control").arg(&control).arg("--console").arg(&console);
        Self { process: Process::start(command, console, log, &control), control }
    }

    /// Runs the tiny guest in 8 MiB.
    pub fn run_tiny(scratch: &Scratch, name: &str) -> Self {
        Self::tiny(scratch, &[], |args| Self::start(scratch, name, args))
    }

    /// As [`Pcvm::run_tiny`], on a host.
    pub fn run_tiny_on(hosts: &Hosts, host: usize, scratch: &Scratch, name: &str) -> Self {
        Self::tiny(scratch, &[], |args| Self::start_on(hosts, host, scratch, name, args))
    }

    fn tiny(scratch: &Scratch, more: &[&str], start: impl FnOnce(&[&str]) -> Self) -> Self {
        let kernel = scratch.tiny_kernel();
        let run = ["run", "--kernel", kernel.to_str().unwrap(), "--memory", "8M"];
        let guest = start(&[&run[..], more].concat());
        guest.wait_for_console("tiny: round 1 ok");
        guest
    }

    /// Waits for a guest on a port of the loopback.
    pub fn receive(scratch: &Scratch, name: &str, port: u16, more: &[&str]) -> Self {
        let listen = format!("127.0.0.1:{port}");
        Self::start(scratch, name, &[&["receive", "--listen", &listen][..], more].concat())
    }

    /// Two processes on the loopback that take guests from each other, and where each waits; the first runs the tiny
    /// guest.
    pub fn pair(scratch: &Scratch) -> ([Self; 2], [u16; 2]) {
        let ports @ [port_a, port_b] = free_ports();
        let listen = format!("127.0.0.1:{port_a}");
        let more = ["--again", "--listen", &listen];
        let a = Self::tiny(scratch, &more, |args| Self::start(scratch, "a", args));
        let b = Self::receive(scratch, "b", port_b, &["--again"]);
        ([a, b], ports)
    }

    /// The control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Waits until `reached` says so.
    pub fn wait_until(&self, what: &str, reached: impl Fn(&Self) -> bool) {
        self.process.wait_until(what, || reached(self));
    }

    /// The process's status.
    pub fn status(&self) -> Value {
        let out = pcvm(&["status", "--json", "--control", self.control.to_str().unwrap()]);
        assert!(out.status.success(), "{}", stderr(&out));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Moves the guest away; returns the report.
    pub fn migrate(&self, to: &str, more: &[&str]) -> Value {
        let out = self.try_migrate(to, &[&["--json"][..], more].concat());
        assert!(out.status.success(), "{}\n{}", stderr(&out), self.log());
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Asks for the guest to be moved away.
    pub fn try_migrate(&self, to: &str, more: &[&str]) -> Output {
        run(&mut self.migration(to, more))
    }

    /// The same, without waiting for what comes of it.
    pub fn begin_migration(&self, to: &str, more: &[&str]) -> Child {
        let piped = |command: &mut Command| command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        piped(&mut self.migration(to, more)).unwrap()
    }

    /// The command that asks for it.
    pub fn migration(&self, to: &str, more: &[&str]) -> Command {
        let mut command = Command::new(program("pcvm"));
        command.args(["migrate", "--quiet", "--to", to, "--control"]).arg(&self.control).args(more);
        command
    }

    /// The guest runs here, and has found no word that is wrong.
    pub fn assert_runs(&self) {
        self.wait_for_progress();
        assert_eq!(self.status()["state"], "running");
        let console = self.console();
        assert!(!console.contains("BAD") && !console.contains(" bad "), "{console}");
    }

    /// Types a line at the guest's console.
    pub fn type_line(&self, text: &str) {
        let out = pcvm(&["type", "--control", self.control.to_str().unwrap(), text]);
        assert!(out.status.success(), "{}", stderr(&out));
    }

    /// Waits for the process to end; returns whether it succeeded, and what it said.
    pub fn wait(self) -> (bool, String) {
        self.wait_for_end()
    }
}

/// What `pcvm receive` is given that is to be refused.
pub fn receive_args(scratch: &Scratch, listen: &str) -> Vec<String> {
    let control = scratch.file("refused.sock");
    ["receive", "--listen", listen, "--console", "none", "--control", control.to_str().unwrap()]
        .map(str::to_owned)
        .to_vec()
}

/// A `pcbench serve` process on the loopback. Ended when dropped.
pub struct Served {
    child: Child,
    address: String,
    log: Arc<Mutex<String>>,
}

impl Served {
    /// Starts `pcbench serve ARGS` on a port of its choice.
    pub fn start(args: &[&str]) -> Self {
        let mut command = Command::new(program("pcbench"));
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(args);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        let address = first.rsplit(" on ").next().unwrap().to_owned();
        assert!(first.contains("serving"), "{first}");
        let log = Arc::new(Mutex::new(String::new()));
        let written = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                *written.lock().unwrap() += &(line + "\n");
            }
        });
        Self { child, address, log }
    }

    /// Where it listens: HOST:PORT.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What it has said since it listens.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Process id.
    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).map_or(0, Iterator::count)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `reached` says so.
pub fn wait_until(what: &str, reached: impl Fn() -> bool) {
    let begin = Instant::now();
    while !reached() {
        assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs pcbench to its end.
pub fn pcbench(args: &[&str]) -> Output {
    run(Command::new(program("pcbench")).args(args))
}

/// Runs pcbench, which must succeed; what it printed as JSON.
pub fn pcbench_report(args: &[&str]) -> Value {
    let out = pcbench(&[args, &["--json"]].concat());
    assert!(out.status.success(), "{args:?}: {}", stderr(&out));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Runs pcvm to its end.
pub fn pcvm(args: &[&str]) -> Output {
    run(Command::new(program("pcvm")).args(args))
}

/// Runs a program to its end, which must come in time.
pub fn run(command: &mut Command) -> Output {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read_out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).map(|_| bytes)
    });
    let read_err = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        err.read_to_end(&mut bytes).map(|_| bytes)
    });
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begin.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("{command:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let (stdout, stderr) = (read_out.join().unwrap().unwrap(), read_err.join().unwrap().unwrap());
    Output { status, stdout, stderr }
}

/// What a program said on stderr.
pub fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// What a program printed.
pub fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The number at a JSON pointer of a report.
pub fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {report}"))
}

/// Checks that a program refused with one clear line that has each of `words`.
pub fn assert_refused(out: &Output, words: &[&str]) {
    let said = stderr(out);
    assert!(!out.status.success(), "it succeeded: {said}");
    let lines: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 1, "one line is wanted: {said}");
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}
