//! What the tests that run a guest share: a captured console, memory, and the tiny guest.

#![allow(dead_code, unreachable_pub)]

pub mod pager;

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use postcopy_engine::memory::GuestMemory;
use postcopy_guest::tiny::TinyGuest;
use postcopy_vmm::{BootSource, Console, Vm, VmConfig};

/// How long a test waits for something that should take milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// False, and says so, where there is no KVM to test with.
pub fn kvm_is_there() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        println!("SKIPPED: /dev/kvm is absent, so no guest can be run");
    }
    there
}

/// Console output that a test can wait for.
#[derive(Clone, Default)]
pub struct Capture(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.0.lock().unwrap().extend(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Capture {
    pub fn console(&self) -> Console {
        Console::Writer(Box::new(self.clone()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap()).into_owned()
    }

    /// Puts `text` before what was printed.
    pub fn prepend(&self, text: &str) {
        self.0.0.lock().unwrap().splice(0..0, text.bytes());
    }

    /// Waits until `found` gives something for the output so far.
    pub fn wait_for<T>(&self, what: &str, patience: Duration, found: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + patience;
        let mut bytes = self.0.0.lock().unwrap();
        loop {
            if let Some(value) = found(&String::from_utf8_lossy(&bytes)) {
                return value;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(!left.is_zero(), "{what} did not come; the console has:\n{text}");
            bytes = self.0.1.wait_timeout(bytes, left).unwrap().0;
        }
    }

    pub fn wait_for_text(&self, wanted: &str) {
        self.wait_for(wanted, PATIENCE, |text| text.contains(wanted).then_some(()));
    }

    /// Waits until the tiny guest has done at least `rounds` more rounds than it has printed; all
    /// must be good. Returns the last one's number.
    pub fn wait_for_rounds(&self, rounds: usize) -> u64 {
        let before = good_rounds(&self.text()).len();
        self.wait_for("rounds", PATIENCE, |text| {
            let done = good_rounds(text);
            assert!(!text.contains("BAD"), "{text}");
            (done.len() >= before + rounds).then(|| *done.last().unwrap())
        })
    }
}

/// Numbers of the rounds that the tiny guest says were good. Whole lines only.
pub fn good_rounds(text: &str) -> Vec<u64> {
    let number = |line: &str| line.strip_prefix("tiny: round ")?.strip_suffix(" ok\n")?.parse().ok();
    text.split_inclusive('\n').filter_map(number).collect()
}

pub fn config(cpus: u8, mib: u64) -> VmConfig {
    VmConfig { cpus, memory_bytes: mib << 20 }
}

pub fn memory(config: &VmConfig) -> GuestMemory {
    GuestMemory::new(config.layout().unwrap()).unwrap()
}

/// New memory with the same bytes in it.
pub fn copy(from: &GuestMemory) -> GuestMemory {
    let to = GuestMemory::new(from.layout().clone()).unwrap();
    let mut page = vec![0; 4096];
    for offset in (0..from.layout().total_bytes()).step_by(4096) {
        assert!(from.guest().read(offset, &mut page));
        if page.iter().any(|byte| *byte != 0) {
            assert!(to.landing().write(offset, &page));
        }
    }
    to
}

/// A file of this test run, removed when dropped.
pub struct TempFile(pub PathBuf);

impl TempFile {
    pub fn new(bytes: &[u8]) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("postcopy-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    pub fn source(&self) -> BootSource {
        BootSource { kernel: self.0.clone(), initrd: None, cmdline: String::new() }
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A tiny guest of `config` that has not been started.
pub fn boot_tiny(guest: TinyGuest, config: &VmConfig) -> (Vm, GuestMemory, Capture) {
    let file = TempFile::new(&guest.elf());
    let memory = memory(config);
    let capture = Capture::default();
    let vm = Vm::boot(config.clone(), memory.clone(), &file.source(), capture.console()).unwrap();
    (vm, memory, capture)
}
