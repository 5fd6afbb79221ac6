//! RDMA: devices, ports, GIDs, and whether a software device can be made.

use std::path::Path;

use postcopy_tools::machine::{Machine, RdmaPort, names};
use postcopy_transport::Transport;

use super::Check;

const ETHERNET: &str = "Ethernet";
/// Room that RoCE v2 takes in a packet beside the payload, in bytes.
const ROCE_OVERHEAD: u32 = 100;

pub(super) fn checks(machine: &Machine) -> Vec<Check> {
    let mut out = vec![library(machine), software(machine)];
    for port in &machine.rdma {
        out.push(link(port));
        out.push(gids(port));
        out.extend(mtu(port));
    }
    out
}

fn library(machine: &Machine) -> Check {
    const NAME: &str = "RDMA";
    let devices: Vec<&str> = machine.rdma.iter().map(|port| port.device.as_str()).collect();
    match Transport::Verbs.available() {
        Ok(()) => Check::ok(NAME, format!("devices: {}", devices.join(", "))),
        Err(error) if devices.is_empty() => Check::note(
            NAME,
            error.to_string(),
            "TCP is used instead; Soft-RoCE: scripts/soft-roce/setup, or scripts/soft-roce/lab in a virtual machine",
        ),
        Err(error) => Check::note(
            NAME,
            format!("the kernel has {}, the library finds none: {error}", devices.join(", ")),
            "install rdma-core with the device's provider, and load ib_uverbs",
        ),
    }
}

/// Whether the module for Soft-RoCE is there or could be loaded.
fn software(machine: &Machine) -> Check {
    const NAME: &str = "Soft-RoCE (rdma_rxe)";
    if Path::new("/sys/module/rdma_rxe").exists() {
        return Check::ok(NAME, "loaded");
    }
    let tree = format!("/lib/modules/{}", machine.kernel);
    let folder = format!("{tree}/kernel/drivers/infiniband/sw/rxe");
    if names(folder).iter().any(|name| name.starts_with("rdma_rxe")) {
        return Check::ok(NAME, "can be loaded: scripts/soft-roce/setup");
    }
    match machine.rdma.is_empty() {
        true => Check::note(
            NAME,
            "this kernel has no such module",
            "install the distribution's full kernel (linux-modules-extra on Ubuntu), or use scripts/soft-roce/lab",
        ),
        false => Check::ok(NAME, "no module, and none needed"),
    }
}

fn link(port: &RdmaPort) -> Check {
    let found = format!(
        "{} port {}: {}, {}, {}, firmware {}",
        port.device, port.port, port.state, port.rate, port.link, port.firmware
    );
    match port.state.as_str() {
        "ACTIVE" => Check::ok("RDMA link", found),
        _ if port.link == ETHERNET => {
            let interface = port.interface.as_deref().unwrap_or("IFACE");
            Check::note("RDMA link", found, format!("`ip link set {interface} up`, and check the cable"))
        }
        _ => Check::note("RDMA link", found, "check the cable, and that a subnet manager runs (opensm)"),
    }
}

fn gids(port: &RdmaPort) -> Check {
    let found = format!("{} port {}: {} GIDs", port.device, port.port, port.gids);
    // The link-local one is always there; routed RoCE v2 needs that of an address.
    match port.link == ETHERNET && port.gids < 2 {
        true => {
            let interface = port.interface.as_deref().unwrap_or("IFACE");
            Check::note(
                "RDMA GIDs",
                found,
                format!("give {interface} an IP address: RoCE v2 has a GID for each"),
            )
        }
        false => Check::ok("RDMA GIDs", found),
    }
}

fn mtu(port: &RdmaPort) -> Option<Check> {
    let mtu = port.interface_mtu.filter(|_| port.link == ETHERNET)?;
    let interface = port.interface.as_deref().unwrap_or("IFACE");
    let carried =
        [4096, 2048, 1024, 512, 256].into_iter().find(|size| size + ROCE_OVERHEAD <= mtu).unwrap_or(0);
    let found = format!("{interface} has {mtu}, so RoCE packets carry {carried} bytes");
    Some(match carried {
        4096 => Check::ok("RDMA MTU", found),
        _ => Check::note(
            "RDMA MTU",
            found,
            format!("`ip link set {interface} mtu 9000` at both ends and between"),
        ),
    })
}
