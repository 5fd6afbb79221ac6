//! What this machine is, from /proc and /sys: for reports and for their readers.
//!
//! Nothing here fails: what cannot be read is absent from the description.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Processor, kernel and what else moves latencies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Model of the processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// NUMA nodes.
    pub numa_nodes: usize,
    /// The kernel's release.
    pub kernel: String,
    /// True if the processor says that it is a virtual machine's.
    pub virtual_machine: bool,
    /// Frequency governor of processor 0, if its frequency can change.
    pub governor: Option<String>,
    /// Load average over one minute.
    pub load: f64,
    /// Transparent huge pages of shared memory, as the kernel's setting says.
    pub shmem_huge_pages: Option<String>,
    /// Huge pages reserved, of the default size.
    pub reserved_huge_pages: u64,
    /// RDMA devices.
    pub rdma: Vec<RdmaPort>,
}

/// A port of an RDMA device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RdmaPort {
    /// Device.
    pub device: String,
    /// Port, from 1.
    pub port: u32,
    /// Version of the device's firmware.
    pub firmware: String,
    /// State of the port, such as `ACTIVE`.
    pub state: String,
    /// Rate of the link, in the kernel's words.
    pub rate: String,
    /// InfiniBand or Ethernet.
    pub link: String,
    /// The network interface under it, on RoCE.
    pub interface: Option<String>,
    /// MTU of that interface in bytes. RoCE uses the largest of 256, 512, … 4096 that fits.
    pub interface_mtu: Option<u32>,
    /// NUMA node of the device, if the machine has several.
    pub numa_node: Option<u32>,
    /// Entries of the port's GID table that are set.
    pub gids: u32,
}

/// A file's contents without the white space around, if it can be read.
pub fn file(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The chosen word of a setting such as `always [madvise] never`.
pub fn chosen(setting: &str) -> Option<String> {
    Some(setting.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Names in a directory, sorted.
pub fn names(path: impl AsRef<Path>) -> Vec<String> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

impl Machine {
    /// The machine that this runs on.
    pub fn here() -> Self {
        let cpuinfo = file("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| cpuinfo.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
        let load = file("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok());
        let reserved = file("/proc/sys/vm/nr_hugepages").and_then(|text| text.parse().ok());
        let nodes = names("/sys/devices/system/node");
        let is_node = |name: &&String| name.strip_prefix("node").is_some_and(|n| n.parse::<u32>().is_ok());
        Self {
            cpu: field("model name").map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            numa_nodes: nodes.iter().filter(is_node).count().max(1),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            virtual_machine: field("flags")
                .is_some_and(|(_, flags)| flags.split(' ').any(|f| f == "hypervisor")),
            governor: file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            load: load.unwrap_or(0.0),
            shmem_huge_pages: file("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
                .and_then(|s| chosen(&s)),
            reserved_huge_pages: reserved.unwrap_or(0),
            rdma: rdma_ports(Path::new("/sys/class/infiniband")),
        }
    }

    /// Processor, cores and kernel on one line.
    pub fn line(&self) -> String {
        let cores = if self.cores == 1 { "core" } else { "cores" };
        format!("{}, {} {cores}, Linux {}", self.cpu, self.cores, self.kernel)
    }
}

/// Every port of every device below `/sys/class/infiniband`.
pub fn rdma_ports(class: &Path) -> Vec<RdmaPort> {
    let mut ports = Vec::new();
    for device in names(class) {
        let at = class.join(&device);
        for port in names(at.join("ports")) {
            ports.push(rdma_port(&at, &device, &port));
        }
    }
    ports
}

fn rdma_port(at: &Path, device: &str, port: &str) -> RdmaPort {
    let ports = at.join("ports").join(port);
    let text = |path: &str| file(ports.join(path)).unwrap_or_default();
    let interface = file(ports.join("gid_attrs/ndevs/0")).filter(|name| !name.is_empty());
    let mtu = interface.as_ref().and_then(|name| file(format!("/sys/class/net/{name}/mtu"))?.parse().ok());
    let node = file(at.join("device/numa_node")).and_then(|node| node.parse().ok());
    let set = |name: &String| {
        file(ports.join("gids").join(name)).is_some_and(|gid| gid.chars().any(|c| !matches!(c, '0' | ':')))
    };
    RdmaPort {
        device: device.to_owned(),
        port: port.parse().unwrap_or(0),
        firmware: file(at.join("fw_ver")).unwrap_or_default(),
        state: text("state").split(": ").last().unwrap_or_default().to_owned(),
        rate: text("rate"),
        link: text("link_layer"),
        interface,
        interface_mtu: mtu,
        numa_node: node,
        gids: names(ports.join("gids")).iter().filter(|name| set(name)).count() as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_processor_and_a_kernel() {
        let here = Machine::here();
        assert!(here.cores >= 1 && !here.kernel.is_empty(), "{here:?}");
    }

    #[test]
    fn a_setting_names_what_is_chosen() {
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("nothing"), None);
    }
}
