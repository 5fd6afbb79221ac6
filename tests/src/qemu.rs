//! Stock QEMU guests, for tests that move them between processes: machines, the processes that they
//! run in, and speaking to both.
//!
//! [`Machine`] has two vCPUs, a disk and a network, and needs root, KVM, a bzImage in `LAB_KERNEL`,
//! and what `scripts/guest-image --modules` printed in `POSTCOPY_INITRD`. [`Plain`] runs anywhere.

mod huge_pages;
mod network;
mod plain;
mod storage;
mod tmpfs;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

pub use huge_pages::HugePages;
pub use network::{Chatter, Connection, Network};
pub use plain::{Plain, library};
pub use storage::Storage;
pub use tmpfs::Tmpfs;

use crate::process::Process;
use crate::{PATIENCE, Scratch, free_port, pcvm, program, reports, stderr, variable};

/// The guest's memory.
pub const MEMORY_BYTES: u64 = 256 << 20;

/// The program.
const QEMU: &str = "qemu-system-x86_64";
/// The port of the guest's echo.
const ECHO_PORT: u16 = 7777;
const MAC: &str = "52:54:00:77:00:02";

/// Where all of it may be on one host.
pub const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Where nobody listens: nothing gets that far.
pub const NOBODY: SocketAddr = SocketAddr::new(LOOPBACK, 9);

/// Where destinations listen: at LAB_RDMA_ADDR, if it is set.
pub fn address() -> IpAddr {
    std::env::var("LAB_RDMA_ADDR").map_or(LOOPBACK, |address| address.parse().unwrap())
}

/// The transports to move over, as POSTCOPY_TRANSPORTS has them: `tcp` if it is not set.
pub fn transports() -> Vec<String> {
    let names = std::env::var("POSTCOPY_TRANSPORTS").unwrap_or_else(|_| "tcp".into());
    names.split(',').map(str::to_owned).collect()
}

/// What is the same of the guest wherever it runs.
pub struct Machine {
    load: String,
    image: PathBuf,
    /// Whether the host's kernel serves the network (vhost-net), instead of QEMU.
    pub vhost: bool,
}

/// One process's share: files and an interface that no two processes may have in common.
pub struct Place {
    /// The file that is the guest's memory here. Removed when dropped.
    pub ram: PathBuf,
    /// The QMP socket. It serves one client at a time.
    pub qmp: PathBuf,
    name: String,
    tap: String,
    console: PathBuf,
    tty: PathBuf,
    log: PathBuf,
    /// The socket of the pcvm that holds it.
    pub control: PathBuf,
}

impl Place {
    /// Files named after `name`, and the tap of a [`Network`].
    pub fn new(scratch: &Scratch, name: &str, tap: &str) -> Self {
        let file = |kind: &str| scratch.file(&format!("{name}.{kind}"));
        // Tests run side by side in one process: their scratch directories tell them apart.
        let test = scratch.file("").file_name().unwrap().to_string_lossy().into_owned();
        Self {
            ram: format!("/dev/shm/{test}-{name}").into(),
            qmp: file("qmp"),
            name: name.to_owned(),
            tap: tap.to_owned(),
            console: file("console"),
            tty: file("tty"),
            log: file("log"),
            control: file("control"),
        }
    }

    /// As [`Place::new`], for a machine without a network.
    pub fn apart(scratch: &Scratch, name: &str) -> Self {
        Self::new(scratch, name, "")
    }

    /// QEMU's arguments that make its console and monitor be here, and nothing else.
    fn args(&self) -> Vec<String> {
        let (console, tty, qmp) = (self.console.display(), self.tty.display(), self.qmp.display());
        let chardev = format!("socket,id=tty,path={tty},server=on,wait=off,logfile={console}");
        let qmp = format!("unix:{qmp},server=on,wait=off");
        let bare = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "chardev:tty"];
        let rest = ["-chardev", &chardev, "-qmp", &qmp];
        bare.iter().chain(&rest).map(|argument| (*argument).to_owned()).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.ram);
    }
}

impl Machine {
    /// A machine with a journal on the disk `image`, an echo at [`Machine::echo`], and `load`, more
    /// of the guest program's parameters as on the kernel command line.
    pub fn new(image: PathBuf, load: &str) -> Self {
        Self { load: load.to_owned(), image, vhost: false }
    }

    /// Where the guest's echo listens, once it is up.
    pub fn echo() -> SocketAddr {
        (network::GUEST, ECHO_PORT).into()
    }

    fn cmdline(&self) -> String {
        let net = format!("pcguest.net={}/{} pcguest.echo={ECHO_PORT}", network::GUEST, network::PREFIX);
        let quiet = "console=ttyS0 quiet panic=-1 no_timer_check";
        format!("{quiet} pcguest.disk=/dev/vda {net} {}", self.load)
    }

    /// QEMU's command line for this machine at `place`, and then `extra`.
    pub fn command_line(&self, place: &Place, extra: &[&str]) -> Vec<String> {
        let (ram, image, tap) = (place.ram.display(), self.image.display(), &place.tap);
        let vhost = if self.vhost { ",vhost=on" } else { "" };
        let pairs = [
            ("-name", place.name.clone()),
            ("-machine", "q35,accel=kvm,memory-backend=ram0".to_owned()),
            ("-cpu", "host".to_owned()),
            ("-smp", "2".to_owned()),
            ("-m", format!("{}M", MEMORY_BYTES >> 20)),
            ("-object", format!("memory-backend-file,id=ram0,size={MEMORY_BYTES},mem-path={ram},share=on")),
            ("-kernel", variable("LAB_KERNEL")),
            ("-initrd", variable("POSTCOPY_INITRD")),
            ("-append", self.cmdline()),
            ("-drive", format!("file={image},if=virtio,cache=none,format=raw")),
            ("-netdev", format!("tap,id=net0,ifname={tap},script=no,downscript=no{vhost}")),
            ("-device", format!("virtio-net-pci,netdev=net0,mac={MAC}")),
        ];
        let pairs = pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        let here = std::iter::once(QEMU.to_owned()).chain(place.args()).chain(["-no-reboot".to_owned()]);
        here.chain(pairs).chain(extra.iter().map(|extra| (*extra).to_owned())).collect()
    }
}

/// A QEMU process that holds the guest or waits for it, by itself or under pcvm. Ended when dropped.
pub struct QemuGuest {
    process: Process,
    tty: UnixStream,
    place: Place,
    under_pcvm: bool,
    /// QEMU, if another pcvm has started it than has it.
    taken_over: Option<i32>,
}

impl Deref for QemuGuest {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl QemuGuest {
    /// Starts QEMU with the machine's arguments and `extra`, as `-incoming`.
    pub fn start(machine: &Machine, place: Place, extra: &[&str]) -> Self {
        let line = machine.command_line(&place, extra);
        Self::start_by_itself(place, &line)
    }

    /// Starts a QEMU by its command line, which is of `place`.
    pub fn start_by_itself(place: Place, line: &[String]) -> Self {
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]);
        Self::launch(command, place, false)
    }

    /// Starts `pcvm receive` with `options` and such a QEMU, which waits for a guest; says where.
    pub fn receive(place: Place, line: &[String], address: IpAddr, options: &[&str]) -> (Self, SocketAddr) {
        let to = SocketAddr::new(address, free_port());
        let listen = to.to_string();
        let mut command = Command::new(program("pcvm"));
        command.args(["receive", "--vmm", "qemu", "--listen", &listen, "--control"]).arg(&place.control);
        command.args(options).arg("--").args(line);
        (Self::launch(command, place, true), to)
    }

    fn launch(mut command: Command, place: Place, under_pcvm: bool) -> Self {
        let process = Process::start(&mut command, place.console.clone(), place.log.clone(), &place.qmp);
        let tty = UnixStream::connect(&place.tty).unwrap_or_else(|e| panic!("{e}; it {}", process.story()));
        let mut unread = tty.try_clone().unwrap();
        // The console is read from its log; what also comes here must not pile up.
        std::thread::spawn(move || std::io::copy(&mut unread, &mut std::io::sink()));
        let guest = Self { process, tty, place, under_pcvm, taken_over: None };
        // QEMU answers once it is all set up: one that waits for a guest listens by then. The socket is
        // there a moment before anybody listens.
        guest.wait_until("QEMU answers", || guest.try_qmp("query-status", json!({})).is_ok());
        guest
    }

    /// Kills the pcvm that has it, and leaves QEMU behind, whose process id it gives.
    pub fn kill_pcvm(&self) -> i32 {
        let (qemu, pcvm) = (self.qemu(), Pid::from_raw(self.pid() as i32).unwrap());
        kill_process(pcvm, Signal::KILL).unwrap();
        self.wait_until("pcvm has ended", || !self.lives());
        qemu
    }

    /// Has another `pcvm receive` with `options` go on at `to` with the QEMU that was left behind.
    pub fn take_over(&mut self, qemu: i32, to: SocketAddr, options: &[&str]) {
        let Place { console, log, control, .. } = &self.place;
        let mut command = Command::new(program("pcvm"));
        command.args(["receive", "--vmm", "qemu", "--listen", &to.to_string(), "--control"]).arg(control);
        command.args(["--take-over", &qemu.to_string()]).args(options);
        // What the one before has left is in nobody's way.
        self.process = Process::start(&mut command, console.clone(), log.clone(), control);
        let answers = || pcvm(&["status", "--control", control.to_str().unwrap()]).status.success();
        self.process.wait_until("it answers", answers);
        self.taken_over = Some(qemu);
    }

    /// This process's files.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// QEMU's own process id.
    pub fn qemu(&self) -> i32 {
        let process = self.pid();
        if let Some(qemu) = self.taken_over.or((!self.under_pcvm).then_some(process as i32)) {
            return qemu;
        }
        let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
        let children =
            threads.map(|thread| std::fs::read_to_string(thread.path().join("children")).unwrap_or_default());
        children.collect::<String>().split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Has QEMU do something; gives its answer, or its refusal.
    pub fn try_qmp(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let broken = |error: std::io::Error| format!("QMP: {command}: {error}");
        let mut stream = UnixStream::connect(&self.place.qmp).map_err(broken)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(broken)?;
        let mut lines = BufReader::new(stream.try_clone().map_err(broken)?).lines();
        let mut answer = Value::Null;
        let capabilities = json!({ "execute": "qmp_capabilities" });
        for request in [capabilities, json!({ "execute": command, "arguments": arguments })] {
            stream.write_all(format!("{request}\n").as_bytes()).map_err(broken)?;
            // Events come in between, and the greeting first.
            answer = loop {
                let line = lines.next().ok_or_else(|| format!("QMP ended before it answered {command}"))?;
                let answer: Value =
                    serde_json::from_str(&line.map_err(broken)?).map_err(|error| error.to_string())?;
                if answer.get("return").is_some() || answer.get("error").is_some() {
                    break answer;
                }
            };
        }
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(format!("{command}: {}", answer["error"]["desc"])),
        }
    }

    /// Has QEMU do something that must succeed; gives its answer.
    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.try_qmp(command, arguments).unwrap_or_else(|error| panic!("{error}; it {}", self.story()))
    }

    /// What QEMU's own migration is set to: capabilities, parameters, whether it describes its state.
    pub fn settings(&self) -> [Value; 3] {
        let suppressed = json!({"path": "/machine", "property": "suppress-vmdesc"});
        let of = |command| self.qmp(command, json!({}));
        [of("query-migrate-capabilities"), of("query-migrate-parameters"), self.qmp("qom-get", suppressed)]
    }

    /// Whether the guest runs here, as QEMU says: `running`, `inmigrate`, `postmigrate`, …
    pub fn status(&self) -> String {
        self.qmp("query-status", json!({}))["status"].as_str().unwrap_or_default().to_owned()
    }

    /// QEMU's version, major and minor.
    pub fn version(&self) -> (u64, u64) {
        let version = &self.qmp("query-version", json!({}))["qemu"];
        let part = |name: &str| version[name].as_u64().unwrap();
        (part("major"), part("minor"))
    }

    /// Types a line at the guest's console.
    pub fn type_line(&self, text: &str) {
        (&self.tty).write_all(format!("{text}\n").as_bytes()).unwrap();
    }

    /// The guest's reports here, once there are `more` of them than now, all of them well.
    pub fn wait_for_reports(&self, more: usize) -> Value {
        let wanted = reports::walks(&self.console()).len() + more;
        self.wait_until("the guest reports", || reports::walks(&self.console()).len() >= wanted);
        reports::assert_well(&self.console())
    }

    /// Has the guest verify all of its memory.
    pub fn verify(&self) {
        let before = reports::verdicts(&self.console()).len();
        self.type_line("verify");
        let answered = || reports::verdicts(&self.console()).len() > before;
        self.wait_until("the guest has verified its memory", answered);
        let console = self.console();
        let verdict = reports::verdicts(&console).pop().unwrap_or_default();
        assert!(verdict.ends_with(" bad 0") && !console.contains("BAD"), "{verdict}: {console}");
    }

    /// Has the guest report for the last time and end; gives that report.
    pub fn power_off(&self) -> Value {
        self.type_line("poweroff");
        let (succeeded, said) = self.wait_for_end();
        assert!(succeeded, "{said}");
        reports::assert_well(&self.console())
    }

    /// What pcvm says of a guest that it holds.
    pub fn status_of_pcvm(&self) -> Value {
        let out = pcvm(&["status", "--json", "--control", self.place.control.to_str().unwrap()]);
        assert!(out.status.success(), "{}", stderr(&out));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Has pcvm move the guest to where a process waits for it.
    pub fn try_migrate(&self, to: SocketAddr, transport: &str) -> Output {
        self.try_migrate_by(to, transport, "postcopy")
    }

    /// As [`QemuGuest::try_migrate`], in a mode.
    pub fn try_migrate_by(&self, to: SocketAddr, transport: &str, mode: &str) -> Output {
        self.try_migrate_with(to, &["--transport", transport, "--mode", mode])
    }

    /// As [`QemuGuest::try_migrate`], with these options.
    pub fn try_migrate_with(&self, to: SocketAddr, options: &[&str]) -> Output {
        let (from, to) = (self.place.qmp.to_str().unwrap(), to.to_string());
        pcvm(&[&["migrate", "--quiet", "--json", "--qmp", from, "--to", &to], options].concat())
    }

    /// As [`QemuGuest::try_migrate`], which must succeed, to `next`; gives the report.
    pub fn migrate(&self, next: &Self, to: SocketAddr, transport: &str) -> Value {
        self.migrate_by(next, to, transport, "postcopy")
    }

    /// As [`QemuGuest::migrate`], in a mode.
    pub fn migrate_by(&self, next: &Self, to: SocketAddr, transport: &str, mode: &str) -> Value {
        let out = self.try_migrate_by(to, transport, mode);
        let stories = || format!("source {}\ndestination {}", self.story(), next.story());
        assert!(out.status.success(), "{}\n{}", stderr(&out), stories());
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["transport"], transport);
        report
    }

    /// Begins to move it over tcp; gives pcvm's process as soon as that has `said` so.
    pub fn migrate_until(&self, to: SocketAddr, mode: &str, said: &str) -> Child {
        self.migrate_over_until(&["--transport", "tcp"], to, mode, said)
    }

    /// As [`QemuGuest::migrate_until`], by what these flags say.
    pub fn migrate_over_until(&self, wire: &[&str], to: SocketAddr, mode: &str, said: &str) -> Child {
        let mut moving = Command::new(program("pcvm"))
            .args(["migrate", "--mode", mode])
            .args(wire)
            .arg("--qmp")
            .arg(&self.place.qmp)
            .args(["--to", &to.to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It stays open: pcvm goes on to write there.
        let lines = BufReader::new(moving.stderr.as_mut().unwrap()).lines().map_while(Result::ok);
        let mut all = Vec::new();
        let found = lines.inspect(|line| all.push(line.clone())).any(|line| line.contains(said));
        assert!(found, "pcvm has not said {said:?}, but {all:?}; QEMU {}", self.story());
        moving
    }

    /// Moves the guest to a process that waits for it at `uri`, by QEMU's own pre-copy, and waits
    /// until that is done. Gives QEMU's account of it.
    pub fn migrate_by_qemu(&self, uri: &str) -> Value {
        self.qmp("migrate-set-parameters", json!({ "max-bandwidth": 10u64 << 30 }));
        self.qmp("migrate", json!({ "uri": uri }));
        let account = || self.qmp("query-migrate", json!({}));
        let is_over = || ["completed", "failed"].map(Value::from).contains(&account()["status"]);
        self.wait_until("QEMU has moved the guest", || {
            std::thread::sleep(Duration::from_millis(90));
            is_over()
        });
        let account = account();
        assert_eq!(account["status"], "completed", "{account}; it {}", self.story());
        account
    }
}

impl Drop for QemuGuest {
    fn drop(&mut self) {
        // Ended by force, pcvm would leave its QEMU behind.
        if self.under_pcvm && self.lives() {
            let _ = pcvm(&["quit", "--control", self.place.control.to_str().unwrap()]);
            let begin = Instant::now();
            while self.lives() && begin.elapsed() < Duration::from_secs(15) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
