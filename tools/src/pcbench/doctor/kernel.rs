//! The kernel: its release, userfaultfd and its features, KVM, tracing.

use std::fs::OpenOptions;
use std::path::Path;

use postcopy_tools::machine::{Machine, file};
use userfaultfd::{FeatureFlags, UffdBuilder};

use super::Check;
use super::checks::Capabilities;

/// The first kernel with all that the engine uses.
const NEEDED: (u32, u32) = (5, 17);
/// UFFD_FEATURE_MINOR_SHMEM of linux/userfaultfd.h (Linux 5.14); the binding has no name for it.
const MINOR_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 10);

pub(super) fn checks(machine: &Machine) -> Vec<Check> {
    let capabilities = Capabilities::of_this_process();
    let mut out = vec![release(machine)];
    out.extend(userfaultfd());
    out.extend([kvm(), tracing(&capabilities)]);
    out
}

fn release(machine: &Machine) -> Check {
    let mut numbers = machine.kernel.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("Linux {}", machine.kernel);
    match version >= NEEDED {
        true => Check::ok("kernel", found),
        false => Check::problem("kernel", found, format!("boot Linux {}.{} or newer", NEEDED.0, NEEDED.1)),
    }
}

fn create(user_mode_only: bool, features: FeatureFlags) -> Result<(), userfaultfd::Error> {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(user_mode_only);
    builder.require_features(features).create().map(drop)
}

fn userfaultfd() -> Vec<Check> {
    const NAME: &str = "userfaultfd";
    if let Err(error) = create(false, FeatureFlags::empty()) {
        let allowed = file("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
        let found = format!("refused ({error}); vm.unprivileged_userfaultfd is {allowed:?}");
        let remedy = "run as root or with CAP_SYS_PTRACE, or `sysctl vm.unprivileged_userfaultfd=1`, or give this user \
                      /dev/userfaultfd; in a container, allow the system call in its seccomp profile";
        let user_only = create(true, FeatureFlags::empty()).is_ok();
        let partly =
            if user_only { "; faults of user mode alone are allowed, KVM's are the kernel's" } else { "" };
        return vec![Check::problem(NAME, found + partly, remedy)];
    }
    let mut out = vec![Check::ok(NAME, "allowed, for faults of the kernel (KVM) too")];
    let needed = [
        ("missing shmem", FeatureFlags::MISSING_SHMEM, "faults on pages of shared memory that are not there"),
        ("minor shmem, continue", MINOR_SHMEM, "faults on pages that have landed but are not published"),
    ];
    for (name, feature, what) in needed {
        out.push(match create(false, feature) {
            Ok(()) => Check::ok(name, what),
            Err(_) => Check::problem(name, format!("no {what}"), "boot Linux 5.14 or newer"),
        });
    }
    out.push(match create(false, FeatureFlags::SIGBUS) {
        Ok(()) => Check::ok("sigbus", "a faulting thread can serve itself"),
        Err(_) => Check::note(
            "sigbus",
            "no UFFD_FEATURE_SIGBUS",
            "boot Linux 4.14 or newer for self-service faults",
        ),
    });
    out
}

fn kvm() -> Check {
    const NAME: &str = "/dev/kvm";
    if !Path::new("/dev/kvm").exists() {
        let remedy = "enable virtualisation in the firmware and load kvm_intel or kvm_amd; in a virtual machine, nested \
                      virtualisation at its host. pcbench and embedders of the pager alone need no KVM";
        return Check::problem(NAME, "missing", remedy);
    }
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Check::ok(NAME, "can be opened"),
        Err(error) => Check::problem(NAME, error.to_string(), "add this user to the group `kvm`"),
    }
}

/// What self-service faults need to learn which page a vCPU missed.
fn tracing(capabilities: &Capabilities) -> Check {
    const NAME: &str = "bpf, kvm_page_fault";
    let missing: Vec<&str> =
        ["CAP_BPF", "CAP_PERFMON"].into_iter().filter(|name| !capabilities.has(name)).collect();
    if !missing.is_empty() {
        let found = format!("no {}", missing.join(", no "));
        return Check::note(
            NAME,
            found,
            "for self-service faults of vCPUs, run as root or with these capabilities",
        );
    }
    let folders = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    let readable =
        folders.iter().any(|folder| file(format!("{folder}/events/kvm/kvm_page_fault/id")).is_some());
    match readable {
        true => Check::ok(NAME, "capabilities and the tracepoint are there"),
        false => Check::note(
            NAME,
            "the capabilities are there; the tracepoint cannot be read",
            "`mount -t tracefs tracefs /sys/kernel/tracing`, with kvm loaded, for self-service faults of vCPUs",
        ),
    }
}
