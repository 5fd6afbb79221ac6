//! Choosing and opening an RDMA device.

use std::net::{IpAddr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::address::{Gid, GidEntry, GidType};
use sideway::ibverbs::device::{Device, DeviceInfo, DeviceList};
use sideway::ibverbs::device_context::{DeviceContext, LinkLayer, PortState};
use sideway::ibverbs::memory_region::MemoryRegion;
use sideway::ibverbs::protection_domain::ProtectionDomain;

use crate::endpoint::EndpointOptions;
use crate::error::SetupError;
use crate::memory::HostMemory;

/// Local ACK timeout: 4.096 µs × 2^14 = 67 ms, doubled by many devices. perftest's default.
const ACK_TIMEOUT: u8 = 14;
/// Retries before the queue pair fails: the most that three bits hold.
const RETRIES: u8 = 7;

/// An opened device with the port and address that lanes will use.
pub(crate) struct VerbsDevice {
    pub(crate) name: String,
    pub(crate) context: Arc<DeviceContext>,
    pub(crate) domain: Arc<ProtectionDomain>,
    pub(crate) port: u8,
    pub(crate) lid: u16,
    /// Active MTU as the verbs code.
    pub(crate) mtu: u16,
    /// Index in the port's table, and the address. `None` on InfiniBand by LID.
    pub(crate) gid: Option<(u8, Gid)>,
    /// Outstanding reads per queue pair, as target and as initiator (the smaller).
    pub(crate) read_atoms: u8,
    /// Local ACK timeout as the verbs code.
    pub(crate) ack_timeout: u8,
    /// Times that a queue pair sends again.
    pub(crate) retries: u8,
}

fn none(reason: impl Into<String>) -> SetupError {
    SetupError::Unavailable { transport: "verbs", reason: reason.into() }
}

/// Names of the RDMA devices of this machine.
///
/// Errors: libibverbs is missing or finds no RDMA stack in the kernel.
pub fn device_names() -> Result<Vec<String>, SetupError> {
    let list = devices()?;
    Ok(list.iter().map(|device| device.name()).collect())
}

fn devices() -> Result<DeviceList, SetupError> {
    let missing = "no RDMA device: libibverbs or the kernel's RDMA stack is missing; install rdma-core, \
                   or make a Soft-RoCE device with scripts/soft-roce/setup";
    DeviceList::new().map_err(|error| none(format!("{missing} ({error})")))
}

impl VerbsDevice {
    /// Opens the device named `wanted` as `options` say, or the one that fits best.
    pub(crate) fn open(wanted: Option<&str>, options: &EndpointOptions) -> Result<Self, SetupError> {
        let list = devices()?;
        let names: Vec<String> = list.iter().map(|device| device.name()).collect();
        if names.is_empty() {
            return Err(none(
                "this machine has no RDMA device; scripts/soft-roce/setup makes a software one",
            ));
        }
        if let Some(wanted) = wanted
            && !names.iter().any(|name| name == wanted)
        {
            return Err(none(format!(
                "no RDMA device named {wanted}; this machine has {}",
                names.join(", ")
            )));
        }
        let mut best: Option<(u8, Self)> = None;
        let mut refusals = Vec::new();
        for device in list.iter().filter(|device| wanted.is_none_or(|wanted| device.name() == wanted)) {
            match Self::open_one(&device, options) {
                Ok((rank, opened)) if best.as_ref().is_none_or(|(best, _)| rank > *best) => {
                    best = Some((rank, opened));
                }
                Ok(_) => {}
                Err(error) => refusals.push(format!("{}: {error}", device.name())),
            }
        }
        best.map(|(_, device)| device).ok_or_else(|| none(refusals.join("; ")))
    }

    /// Opens one device; the rank says how well it fits (2: owns the local address).
    fn open_one(device: &Device<'_>, options: &EndpointOptions) -> Result<(u8, Self), SetupError> {
        let name = device.name();
        let failed = |operation| {
            let device = name.clone();
            move |reason: String| SetupError::Verbs { operation, device, reason }
        };
        let context = device.open().map_err(|e| failed("ibv_open_device")(e.to_string()))?;
        let attributes = context.query_device().map_err(|e| failed("ibv_query_device")(e.to_string()))?;
        let port = choose_port(&context, attributes.phys_port_cnt(), options.port)?;
        let state = context.query_port(port).map_err(|e| failed("ibv_query_port")(e.to_string()))?;
        let infiniband = state.link_layer() == LinkLayer::InfiniBand;
        let (rank, gid) = match choose_gid(&context, port, options)? {
            Some((rank, index, gid)) => (rank, Some((index, gid))),
            None if infiniband => (1, None),
            None => {
                return Err(none(format!("port {port} has no usable GID; give its interface an address")));
            }
        };
        let domain = context.alloc_pd().map_err(|e| failed("ibv_alloc_pd")(e.to_string()))?;
        let atoms = attributes.max_qp_rd_atom().min(attributes.max_qp_init_rd_atom()).clamp(1, 128);
        let opened = Self {
            name,
            domain,
            port,
            lid: state.lid(),
            mtu: choose_mtu(state.active_mtu() as u16, options.mtu)?,
            ack_timeout: within("ACK timeout", options.ack_timeout, 1..=31)?.unwrap_or(ACK_TIMEOUT),
            retries: within("number of retries", options.retries, 0..=7)?.unwrap_or(RETRIES),
            gid,
            read_atoms: atoms as u8,
            context,
        };
        Ok((rank, opened))
    }

    /// Registers `memory`, for the peer to read or for reads to land in.
    ///
    /// Pins every page of it, unless `on_demand`.
    pub(crate) fn register(
        &self,
        memory: &HostMemory,
        mut access: AccessFlags,
        on_demand: bool,
    ) -> Result<Arc<MemoryRegion>, SetupError> {
        if on_demand {
            access |= AccessFlags::OnDemand;
        }
        // SAFETY: the mapping is valid for its whole length, and whoever keeps the registration
        // keeps a clone of `memory` beside it (see `Registered`), so it stays mapped.
        let registration = unsafe { self.domain.reg_mr(memory.base() as usize, memory.len(), access) };
        registration.map_err(|error| match on_demand {
            true => SetupError::Option {
                reason: format!(
                    "{} cannot register memory for on-demand paging ({error}); leave that option out",
                    self.name
                ),
            },
            false => SetupError::Register {
                device: self.name.clone(),
                bytes: memory.len(),
                memlock: memlock(),
                source: std::io::Error::other(error.to_string()),
            },
        })
    }
}

/// A registration and the memory under it. The field order deregisters before it unmaps.
pub(crate) struct Registered {
    pub(crate) key: Arc<MemoryRegion>,
    pub(crate) memory: HostMemory,
}

fn memlock() -> String {
    match rustix::process::getrlimit(rustix::process::Resource::Memlock).current {
        Some(bytes) => format!("{} KiB", bytes >> 10),
        None => "unlimited".into(),
    }
}

/// The verbs code of the path MTU: what the port has active, or less if `wanted`.
fn choose_mtu(active: u16, wanted: Option<u16>) -> Result<u16, SetupError> {
    let bytes = |code: u16| 128u16 << code;
    let Some(wanted) = wanted else { return Ok(active) };
    let code = (1..=active).find(|code| bytes(*code) == wanted);
    code.ok_or_else(|| SetupError::Option {
        reason: format!(
            "an MTU of {wanted} bytes is none of 256, 512, 1024, 2048 and 4096, or more than the port's {}",
            bytes(active)
        ),
    })
}

fn within(what: &str, wanted: Option<u8>, range: RangeInclusive<u8>) -> Result<Option<u8>, SetupError> {
    match wanted {
        Some(value) if !range.contains(&value) => Err(SetupError::Option {
            reason: format!("the {what} is {} to {}, not {value}", range.start(), range.end()),
        }),
        other => Ok(other),
    }
}

fn choose_port(context: &DeviceContext, count: u8, wanted: Option<u8>) -> Result<u8, SetupError> {
    let active = |port: &u8| context.query_port(*port).is_ok_and(|p| p.port_state() == PortState::Active);
    match wanted {
        Some(port) if port == 0 || port > count => {
            Err(none(format!("port {port} does not exist; the device has ports 1 to {count}")))
        }
        Some(port) if !active(&port) => Err(none(format!("port {port} is not active"))),
        Some(port) => Ok(port),
        None => (1..=count).find(active).ok_or_else(|| none("no port is active; check the link")),
    }
}

/// The GID to use, with its rank and index.
fn choose_gid(
    context: &DeviceContext,
    port: u8,
    options: &EndpointOptions,
) -> Result<Option<(u8, u8, Gid)>, SetupError> {
    let table = context.query_gid_table().map_err(|error| none(format!("reading the GID table: {error}")))?;
    let of_port = || table.iter().filter(|entry| entry.port_num() == u32::from(port));
    if let Some(wanted) = options.gid_index {
        let entry = of_port().find(|entry| entry.gid_index() == wanted);
        let known: Vec<String> = of_port().map(|entry| entry.gid_index().to_string()).collect();
        let entry =
            entry.ok_or_else(|| none(format!("no GID index {wanted}; the port has {}", known.join(", "))))?;
        return Ok(Some((2, wanted as u8, entry.gid())));
    }
    let local = options.local.map(as_ipv6);
    let best = of_port().filter(|entry| entry.gid_index() <= 255).max_by_key(|entry| fitness(entry, local));
    Ok(best.map(|entry| {
        let owns = local.is_some_and(|local| Ipv6Addr::from(entry.gid()) == local);
        (1 + u8::from(owns), entry.gid_index() as u8, entry.gid())
    }))
}

/// Which entry of a GID table to prefer: this host's address, then RoCE v2, then a routable one.
fn fitness(entry: &GidEntry, local: Option<Ipv6Addr>) -> (bool, bool, bool) {
    let owns = local.is_some_and(|local| Ipv6Addr::from(entry.gid()) == local);
    (owns, entry.gid_type() == GidType::RoceV2, !entry.gid().is_unicast_link_local())
}

fn as_ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}
