//! Stock QEMU guests for tests: started, spoken to by QMP, typed at, and moved by `pcvm`.
//!
//! On a host without nested virtualisation QEMU emulates the guest's processors, which the paging
//! does not notice: its faults are those of QEMU's threads.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use crate::{PATIENCE, Pcvm, Scratch, free_port, pcvm, stderr, variable, wait_until};

/// RAM of a guest, in MiB.
pub const RAM_MIB: u64 = 256;

/// What a guest is started with.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The machine type.
    pub kind: String,
    /// RAM backend, with `NAME` where its file's name goes; none: RAM that nobody else can map.
    pub backend: Option<String>,
    /// MiB of RAM.
    pub mib: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Kernel, initramfs and command line; none: only the firmware runs.
    pub kernel: Option<(String, String, String)>,
    /// More arguments.
    pub more: Vec<String>,
}

impl Machine {
    /// Two vCPUs whose RAM is a shared file in memory; only firmware.
    pub fn firmware() -> Self {
        let backend = "memory-backend-file,id=ram0,size=MIBM,mem-path=/dev/shm/NAME,share=on".to_owned();
        Self {
            kind: "q35".into(),
            backend: Some(backend),
            mib: RAM_MIB,
            cpus: 2,
            kernel: None,
            more: Vec::new(),
        }
    }

    /// The same with the test guest, as POSTCOPY_KERNEL and POSTCOPY_INITRD say.
    pub fn linux(load: &str) -> Self {
        let line = format!("console=ttyS0 quiet panic=-1 no_timer_check {load}");
        let kernel = Some((variable("POSTCOPY_KERNEL"), variable("POSTCOPY_INITRD"), line));
        Self { kernel, ..Self::firmware() }
    }

    /// QEMU's arguments, for a guest whose files are named after `name`.
    pub fn arguments(&self, scratch: &Scratch, name: &str) -> Vec<String> {
        // Emulated unless told otherwise: a KVM that cannot run a stock guest looks like one that can.
        let accelerator = std::env::var("POSTCOPY_ACCELERATOR").unwrap_or_else(|_| "tcg".into());
        let processor = if accelerator == "kvm" { "host" } else { "max" };
        let mut machine = format!("{},accel={accelerator}", self.kind);
        let mut arguments = Vec::new();
        if let Some(backend) = &self.backend {
            machine += ",memory-backend=ram0";
            let backend = backend.replace("NAME", &ram_name(name)).replace("MIB", &self.mib.to_string());
            arguments.extend(["-object".to_owned(), backend]);
        }
        let tty = format!(
            "socket,id=tty,path={},server=on,wait=off,logfile={}",
            scratch.file(&format!("{name}.tty")).display(),
            scratch.file(&format!("{name}.console")).display()
        );
        let monitor = format!("unix:{},server=on,wait=off", scratch.file(&format!("{name}.qmp")).display());
        let (mib, cpus) = (format!("{}M", self.mib), self.cpus.to_string());
        let fixed = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "chardev:tty"];
        arguments.extend(fixed.map(str::to_owned));
        for (name, value) in [
            ("-machine", &machine),
            ("-cpu", &processor.to_owned()),
            ("-m", &mib),
            ("-smp", &cpus),
            ("-chardev", &tty),
            ("-qmp", &monitor),
        ] {
            arguments.extend([name.to_owned(), value.clone()]);
        }
        if let Some((kernel, initrd, line)) = &self.kernel {
            for (name, value) in [("-kernel", kernel), ("-initrd", initrd), ("-append", line)] {
                arguments.extend([name.to_owned(), value.clone()]);
            }
        }
        arguments.extend(self.more.iter().cloned());
        arguments
    }
}

fn ram_name(name: &str) -> String {
    format!("postcopy-test-{}-{name}", std::process::id())
}

/// Who runs the process in which a guest is.
enum Holder {
    Qemu(Mutex<Child>),
    Pcvm(Pcvm),
}

/// A guest in a QEMU, or a place for one. Ended when dropped.
pub struct StockGuest {
    holder: Holder,
    files: PathBuf,
    name: String,
}

impl StockGuest {
    /// Starts QEMU by itself.
    pub fn start(scratch: &Scratch, name: &str, machine: &Machine) -> Self {
        let log = std::fs::File::create(scratch.file(&format!("{name}.log"))).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        let child = command.args(machine.arguments(scratch, name)).stdin(Stdio::null()).stderr(log).spawn();
        let guest = Self {
            holder: Holder::Qemu(Mutex::new(child.expect("qemu-system-x86_64 is needed"))),
            files: scratch.file(""),
            name: name.to_owned(),
        };
        guest.wait_for_monitor();
        guest
    }

    /// Starts `pcvm receive --vmm qemu`, and waits until it can take a guest in. Gives its port too.
    pub fn receive(scratch: &Scratch, name: &str, machine: &Machine, address: &str) -> (Self, u16) {
        let port = free_port();
        let listen = format!("{address}:{port}");
        let qemu = machine.arguments(scratch, name);
        // The options of pcvm come before --, so they are given by a name of their own.
        let pcvm = Pcvm::start_with(scratch, name, &["receive", "--vmm", "qemu", "--listen", &listen], &qemu);
        let guest = Self { holder: Holder::Pcvm(pcvm), files: scratch.file(""), name: name.to_owned() };
        guest.wait_for_monitor();
        (guest, port)
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.files.join(format!("{}.{suffix}", self.name))
    }

    fn wait_for_monitor(&self) {
        wait_until("QEMU's monitor answers", || UnixStream::connect(self.monitor()).is_ok());
    }

    /// Path of QEMU's monitor.
    pub fn monitor(&self) -> PathBuf {
        self.file("qmp")
    }

    /// The process of pcvm that holds the guest.
    pub fn pcvm(&self) -> &Pcvm {
        match &self.holder {
            Holder::Pcvm(pcvm) => pcvm,
            Holder::Qemu(_) => panic!("QEMU runs by itself"),
        }
    }

    /// What the guest has printed here.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.file("console")).unwrap_or_default()).into_owned()
    }

    /// What QEMU, or pcvm and it, have said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    /// Waits until the guest has printed `text` here, `times` times.
    pub fn wait_for(&self, text: &str, times: usize) {
        let begin = Instant::now();
        while self.console().matches(text).count() < times {
            let story = || format!("console:\n{}\nlog:\n{}", self.console(), self.log());
            assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {text}\n{}", story());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Types a line at the guest's console.
    pub fn type_line(&self, text: &str) {
        let mut tty = UnixStream::connect(self.file("tty")).unwrap();
        tty.write_all(format!("{text}\n").as_bytes()).unwrap();
        // What is not read before the connection ends is lost.
        std::thread::sleep(std::time::Duration::from_millis(200));
    }

    /// Has the guest verify every byte of its memory.
    pub fn verify(&self) {
        self.type_line("verify");
        self.wait_for("verified ", 1);
        wait_until("the verdict is whole", || self.console().contains(" bad "));
        let console = self.console();
        let verdict = console.lines().find(|line| line.contains("verified ")).unwrap();
        assert!(verdict.trim_end().ends_with(" bad 0"), "{verdict}");
        assert!(!console.contains("BAD") && !console.contains("\"bad\":1"), "{console}");
    }

    /// Carries out a command of QMP.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Value {
        let mut stream = UnixStream::connect(self.monitor()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        for line in
            [json!({"execute": "qmp_capabilities"}), json!({"execute": command, "arguments": arguments})]
        {
            stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
        let answers =
            BufReader::new(stream).lines().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let mut answers = answers.filter(|answer| answer.get("return").or(answer.get("error")).is_some());
        answers.nth(1).unwrap()
    }

    /// Whether the guest runs here.
    pub fn runs(&self) -> bool {
        self.qmp("query-status", &json!({}))["return"]["running"] == true
    }

    /// Asks for the guest to be moved; `--qmp` is this one's.
    pub fn try_migrate(&self, to: &str, more: &[&str]) -> std::process::Output {
        let monitor = self.monitor();
        let from = ["migrate", "--quiet", "--qmp", monitor.to_str().unwrap(), "--to", to];
        pcvm(&[&from[..], more].concat())
    }

    /// Moves the guest; returns the report.
    pub fn migrate(&self, to: &str, more: &[&str]) -> Value {
        let out = self.try_migrate(to, &[&["--json"][..], more].concat());
        assert!(out.status.success(), "{}\nlog:\n{}", stderr(&out), self.log());
        serde_json::from_slice(&out.stdout).unwrap()
    }
}

impl Drop for StockGuest {
    fn drop(&mut self) {
        if let Holder::Qemu(child) = &self.holder {
            let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(Path::new("/dev/shm").join(ram_name(&self.name)));
    }
}
