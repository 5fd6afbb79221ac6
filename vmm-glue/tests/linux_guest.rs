//! A stock Linux kernel: boots, moves between VMs of this process, and does not notice.
//!
//! Ignored by default, because it needs a KVM that runs such a kernel at a bearable speed and two
//! files: `POSTCOPY_KERNEL` (or `LAB_KERNEL`) names a bzImage, `POSTCOPY_INITRD` what
//! `scripts/guest-image` printed. In the lab:
//!
//! ```text
//! scripts/soft-roce/lab --env POSTCOPY_INITRD=FILE -- target/debug/deps/linux_guest-HASH --ignored
//! ```

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::pager::{Pager, missing};
use common::*;
use postcopy_engine::memory::GuestMemory;
use postcopy_vmm::{BootSource, DEFAULT_CMDLINE, ExitReason, Vm, VmConfig};
use serde_json::Value;

const SLOW: Duration = Duration::from_secs(120);

fn source(parameters: &str) -> BootSource {
    let path = |names: &[&str]| {
        let found = names.iter().find_map(std::env::var_os);
        found.unwrap_or_else(|| panic!("set {} to run this test", names.join(" or "))).into()
    };
    BootSource {
        kernel: path(&["POSTCOPY_KERNEL", "LAB_KERNEL"]),
        initrd: Some(path(&["POSTCOPY_INITRD"])),
        cmdline: format!("{DEFAULT_CMDLINE} {parameters}"),
    }
}

/// Reports that the guest has printed, whole lines only.
fn reports(text: &str) -> Vec<Value> {
    let json = |line: &str| serde_json::from_str(line.strip_prefix("pcguest: ")?.strip_suffix('\n')?).ok();
    text.split_inclusive('\n').filter_map(json).collect()
}

/// Waits for `count` reports on this console; checks that nothing is wrong in any.
fn wait_for_reports(capture: &Capture, count: usize) -> Value {
    let all = capture.wait_for("reports", SLOW, |text| {
        assert!(!text.contains("BAD"), "{text}");
        let all = reports(text);
        (all.len() >= count).then_some(all)
    });
    for report in &all {
        assert_eq!((&report["bad"], &report["monotonic_ok"]), (&0.into(), &true.into()), "{report}");
    }
    all.last().unwrap().clone()
}

fn number(report: &Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// The guest as the test carries it from VM to VM.
struct Guest {
    config: VmConfig,
    vm: Vm,
    memory: GuestMemory,
    capture: Capture,
}

impl Guest {
    fn boot(cpus: u8, mib: u64, parameters: &str) -> Self {
        let config = config(cpus, mib);
        let (memory, capture) = (memory(&config), Capture::default());
        let start = Instant::now();
        let vm = Vm::boot(config.clone(), memory.clone(), &source(parameters), capture.console()).unwrap();
        println!("loaded in {:?}", start.elapsed());
        vm.start().unwrap();
        capture.wait_for("the guest program", SLOW, |text| text.contains("pcguest: up").then_some(()));
        println!("up in {:?}", start.elapsed());
        Self { config, vm, memory, capture }
    }

    /// Pauses, saves, and restores into a new VM with a copy of the memory.
    fn moved(self) -> Self {
        let start = Instant::now();
        self.vm.pause().unwrap();
        let paused = start.elapsed();
        let state = self.vm.save().unwrap();
        let saved = start.elapsed();
        let (memory, capture) = (copy(&self.memory), Capture::default());
        let copied = start.elapsed();
        let vm = Vm::restore(self.config.clone(), memory.clone(), &state, capture.console()).unwrap();
        println!(
            "paused {paused:?}, saved {} bytes {:?}, copied {:?}, restored {:?}, early pages {:x?}",
            state.len(),
            saved - paused,
            copied - saved,
            start.elapsed() - copied,
            vm.early_pages(),
        );
        drop(self.vm);
        vm.start().unwrap();
        Self { config: self.config, vm, memory, capture }
    }
}

fn moves(cpus: u8) {
    let mut guest = Guest::boot(cpus, 256, "pcguest.mb=64 pcguest.access=write pcguest.report_ms=300");
    let mut before = wait_for_reports(&guest.capture, 2);
    for _ in 0..5 {
        let start = Instant::now();
        guest = guest.moved();
        let after = wait_for_reports(&guest.capture, 3);
        let passed = number(&after, "uptime_s") - number(&before, "uptime_s");
        println!("guest time {passed:.2} s, host time {:.2} s", start.elapsed().as_secs_f64());
        assert!(passed > 0.0 && passed < start.elapsed().as_secs_f64() + 2.0, "{before}\n{after}");
        assert!(number(&after, "pages") > number(&before, "pages"));
        assert!(number(&after, "ticks") > number(&before, "ticks"));
        before = after;
        std::thread::sleep(Duration::from_millis(200));
    }
    println!("{before}");
    assert!(!guest.capture.text().contains("soft lockup"));
    guest.vm.console_input(b"verify\n");
    guest.capture.wait_for("verification", SLOW, |text| text.contains("verified 16384 bad 0").then_some(()));
    guest.vm.console_input(b"poweroff\n");
    assert_eq!(guest.vm.exit_event().wait(SLOW), Some(ExitReason::Reset));
}

#[test]
#[ignore = "needs a KVM that runs a stock kernel, and POSTCOPY_INITRD"]
fn linux_moves_five_times() {
    moves(1);
}

#[test]
#[ignore = "needs a KVM that runs a stock kernel, and POSTCOPY_INITRD"]
fn linux_with_two_vcpus_moves_five_times() {
    moves(2);
}

/// Restores over memory of which every page is missing, and lets a pager bring what is touched.
#[test]
#[ignore = "needs a KVM that runs a stock kernel, and POSTCOPY_INITRD"]
fn linux_goes_on_over_missing_pages() {
    let guest = Guest::boot(1, 256, "pcguest.mb=64 pcguest.report_ms=300");
    let before = wait_for_reports(&guest.capture, 2);
    guest.vm.pause().unwrap();
    let start = Instant::now();
    let state = guest.vm.save().unwrap();
    let (memory, capture) = (memory(&guest.config), Capture::default());
    let pager = Pager::start(missing(&memory), guest.memory.clone(), memory.clone());
    let vm = Vm::restore(guest.config.clone(), memory, &state, capture.console()).unwrap();
    assert_eq!(pager.served(), 0, "restore touched guest memory");
    vm.start().unwrap();
    println!("down for {:?}", start.elapsed());
    let after = wait_for_reports(&capture, 5);
    println!("{after}\n{} pages served", pager.served());
    assert!(number(&after, "uptime_s") > number(&before, "uptime_s"));
    vm.console_input(b"verify\n");
    capture.wait_for("verification", SLOW, |text| text.contains("verified 16384 bad 0").then_some(()));
    assert!(pager.served() > 16384);
    assert!(!capture.text().contains("soft lockup"));
    vm.console_input(b"poweroff\n");
    assert_eq!(vm.exit_event().wait(SLOW), Some(ExitReason::Reset));
}
