//! The flags that choose an RDMA device.

use std::net::IpAddr;

use clap::Args;
use postcopy_transport::EndpointOptions;

/// Which RDMA device. Everything is found where nothing is said.
#[derive(Clone, Debug, Default, Args)]
pub struct DeviceArgs {
    /// RDMA device. Default: the one that owns the address of the control connection.
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// RDMA port, from 1. Default: the first active one.
    #[arg(long, value_name = "N")]
    pub ib_port: Option<u8>,
    /// GID index on RoCE. Default: the RoCE v2 entry of the control connection's address.
    #[arg(long, value_name = "N")]
    pub gid_index: Option<u32>,
}

impl DeviceArgs {
    /// What the transport takes. `local` is this host's address on the network to the peer.
    pub fn endpoint(&self, local: Option<IpAddr>) -> EndpointOptions {
        EndpointOptions { device: self.device.clone(), port: self.ib_port, gid_index: self.gid_index, local }
    }

    /// True if something was said.
    pub fn is_chosen(&self) -> bool {
        self.device.is_some() || self.ib_port.is_some() || self.gid_index.is_some()
    }
}
