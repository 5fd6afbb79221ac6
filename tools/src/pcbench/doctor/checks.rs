//! Limits, memory and processors.

use std::process::{Command, Stdio};

use postcopy_tools::machine::{Machine, chosen, file};
use rustix::process::{Resource, getrlimit};

use super::Check;

/// Capabilities that matter here, with their numbers in linux/capability.h.
const NAMES: [(&str, u32); 6] = [
    ("CAP_IPC_LOCK", 14),
    ("CAP_NET_ADMIN", 12),
    ("CAP_SYS_PTRACE", 19),
    ("CAP_SYS_NICE", 23),
    ("CAP_PERFMON", 38),
    ("CAP_BPF", 39),
];
const CAP_SYS_ADMIN: u32 = 21;

/// The effective capabilities of this process.
pub(super) struct Capabilities(u64);

impl Capabilities {
    pub(super) fn of_this_process() -> Self {
        let status = file("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        Self(line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        let number = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
        let set = |number: u32| self.0 >> number & 1 == 1;
        // CAP_SYS_ADMIN implies CAP_BPF and CAP_PERFMON, which were split off from it.
        number.is_some_and(set) || (["CAP_BPF", "CAP_PERFMON"].contains(&name) && set(CAP_SYS_ADMIN))
    }
}

pub(super) fn checks(machine: &Machine) -> Vec<Check> {
    let capabilities = Capabilities::of_this_process();
    vec![
        privileges(&capabilities),
        memlock(&capabilities),
        shmem_huge_pages(machine),
        reserved_huge_pages(machine),
        cores(machine),
        numa(machine),
        governor(machine),
        sched_fifo(&capabilities),
    ]
}

fn privileges(capabilities: &Capabilities) -> Check {
    let held: Vec<&str> = NAMES.iter().map(|(name, _)| *name).filter(|name| capabilities.has(name)).collect();
    match held.len() == NAMES.len() {
        true => Check::ok("capabilities", held.join(" ")),
        false => {
            let found = if held.is_empty() { "none that matter here".into() } else { held.join(" ") };
            Check::note(
                "capabilities",
                found,
                "root has all; which is needed for what stands beside each check",
            )
        }
    }
}

/// RDMA pins guest memory; 1 GiB is a small guest.
fn memlock(capabilities: &Capabilities) -> Check {
    const NAME: &str = "locked memory";
    const SMALL_GUEST: u64 = 1 << 30;
    let limit = getrlimit(Resource::Memlock).current;
    match limit {
        None => Check::ok(NAME, "unlimited"),
        Some(_) if capabilities.has("CAP_IPC_LOCK") => Check::ok(NAME, "unlimited by CAP_IPC_LOCK"),
        Some(bytes) if bytes >= SMALL_GUEST => Check::ok(NAME, format!("{} MiB", bytes >> 20)),
        Some(bytes) => Check::note(
            NAME,
            format!("{} KiB", bytes >> 10),
            "RDMA pins guest memory: `ulimit -l unlimited`, or memlock in /etc/security/limits.conf",
        ),
    }
}

fn shmem_huge_pages(machine: &Machine) -> Check {
    const NAME: &str = "huge pages of shmem";
    match machine.shmem_huge_pages.as_deref() {
        None => Check::note(
            NAME,
            "this kernel has none",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE maps memory faster",
        ),
        Some(setting @ ("never" | "deny")) => Check::note(
            NAME,
            setting,
            "guests in huge pages run faster, but fault whole: \
             `echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled` leaves the choice to the VMM",
        ),
        Some(setting) => Check::ok(NAME, setting),
    }
}

fn reserved_huge_pages(machine: &Machine) -> Check {
    const NAME: &str = "hugetlbfs";
    let free = file("/proc/meminfo").and_then(|text| {
        text.lines().find_map(|line| line.strip_prefix("HugePages_Free:")?.trim().parse::<u64>().ok())
    });
    let thp = file("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|setting| chosen(&setting));
    let found = format!(
        "{} pages reserved, {} free; anonymous memory: {}",
        machine.reserved_huge_pages,
        free.unwrap_or(0),
        thp.as_deref().unwrap_or("unknown")
    );
    match machine.reserved_huge_pages {
        0 => Check::note(
            NAME,
            found,
            "registrations of large guests are faster in huge pages: `sysctl vm.nr_hugepages=N`",
        ),
        _ => Check::ok(NAME, found),
    }
}

fn cores(machine: &Machine) -> Check {
    match machine.cores {
        1 | 2 => Check::note(
            "processors",
            format!("{} for this process", machine.cores),
            "vCPUs, pager and responder share them: expect longer tails; 4 or more leave one to the pager",
        ),
        cores => Check::ok("processors", format!("{cores} for this process")),
    }
}

fn numa(machine: &Machine) -> Check {
    let nodes = machine.numa_nodes;
    let near: Vec<String> = machine
        .rdma
        .iter()
        .filter_map(|port| Some(format!("{} at node {}", port.device, port.numa_node?)))
        .collect();
    match nodes {
        1 => Check::ok("NUMA", "one node"),
        _ if near.is_empty() => Check::ok("NUMA", format!("{nodes} nodes")),
        _ => Check::ok("NUMA", format!("{nodes} nodes; {}; --cpu auto stays near", near.join(", "))),
    }
}

fn governor(machine: &Machine) -> Check {
    const NAME: &str = "processor frequency";
    match machine.governor.as_deref() {
        None => Check::ok(NAME, "not ours to choose (fixed, or the hypervisor's)"),
        Some("performance") => Check::ok(NAME, "performance"),
        Some(other) => Check::note(
            NAME,
            format!("governor {other}"),
            "`cpupower frequency-set -g performance` for latencies that repeat",
        ),
    }
}

fn sched_fifo(capabilities: &Capabilities) -> Check {
    const NAME: &str = "SCHED_FIFO";
    const REMEDY: &str = "a pager above all vCPUs needs CAP_SYS_NICE, or rtprio in /etc/security/limits.conf";
    // A control group may refuse even root, so it is tried; by another program, as it is here to stay.
    match (runs_as("--fifo", "1"), capabilities.has("CAP_SYS_NICE"), getrlimit(Resource::Rtprio).current) {
        (Some(true), ..) => Check::ok(NAME, "allowed"),
        (Some(false), ..) => Check::note(NAME, "refused", REMEDY),
        (None, false, Some(0)) => Check::note(NAME, "not allowed: no CAP_SYS_NICE, rtprio limit 0", REMEDY),
        (None, ..) => Check::ok(NAME, "allowed, as capabilities and limits say (no chrt to try it)"),
    }
}

/// Whether a program may run under a scheduling policy, if chrt is there to try.
fn runs_as(policy: &str, priority: &str) -> Option<bool> {
    let mut command = Command::new("chrt");
    command.args([policy, priority, "true"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().ok().map(|status| status.success())
}
