//! The flags that say how lanes are made: which RDMA device, and how many paths.

use std::net::IpAddr;

use clap::Args;
use postcopy_transport::{EndpointOptions, MAX_PATHS};
use serde::{Deserialize, Serialize};

/// How lanes are made. Everything is found, or has its usual value, where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceArgs {
    /// RDMA device; several are rails that lanes are spread over, and both sides need as many.
    /// Default: the one that owns the address of the control connection.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub device: Vec<String>,
    /// RDMA port, from 1. Default: the first active one.
    #[arg(long, value_name = "N")]
    pub ib_port: Option<u8>,
    /// GID index on RoCE. Default: the RoCE v2 entry of the control connection's address.
    #[arg(long, value_name = "N")]
    pub gid_index: Option<u32>,
    /// Path MTU in bytes, 256 to 4096. Default: the port's.
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Local ACK timeout of queue pairs, 4.096 µs × 2^N, 1 to 31. Default: 14, 67 ms.
    #[arg(long, value_name = "N")]
    pub timeout: Option<u8>,
    /// Times that a queue pair sends again before it fails, 0 to 7. Default: 7.
    #[arg(long, value_name = "N")]
    pub retry: Option<u8>,
    /// Register memory for on-demand paging, where the device has it: nothing is pinned.
    #[arg(long)]
    pub on_demand_paging: bool,
    /// Queue pairs, or TCP connections, of a lane, 1 to 16; the side that reads decides. Default: 1,
    /// or one a rail.
    #[arg(long, visible_alias = "connections", value_name = "N", value_parser = paths)]
    pub queue_pairs: Option<usize>,
}

fn paths(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=MAX_PATHS).contains(&count) => Ok(count),
        _ => Err(format!("a lane has 1 to {MAX_PATHS} of them")),
    }
}

impl DeviceArgs {
    /// What the transport takes. `local` is this host's address on the network to the peer.
    pub fn endpoint(&self, local: Option<IpAddr>) -> EndpointOptions {
        EndpointOptions {
            devices: self.device.clone(),
            port: self.ib_port,
            gid_index: self.gid_index,
            local,
            paths: self.queue_pairs,
            mtu: self.mtu,
            ack_timeout: self.timeout,
            retries: self.retry,
            on_demand: self.on_demand_paging,
            spin: None,
        }
    }

    /// True if something was said that only RDMA has.
    pub fn is_chosen(&self) -> bool {
        let of_any_wire = Self { queue_pairs: self.queue_pairs, ..Self::default() };
        *self != of_any_wire
    }
}
