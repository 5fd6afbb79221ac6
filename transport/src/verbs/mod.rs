//! One-sided reads by RDMA READ: the peer's NIC answers, its CPU takes no part.
//!
//! Both sides make a reliable-connected queue pair for each lane and exchange its address
//! (`wire.rs`) through the caller's control channel. The exporter's memory is registered for remote
//! *reading* only; the importer's for local writing only.

mod device;
mod lane;
mod notify;
mod queue_pair;
mod wire;

use std::sync::Arc;

use sideway::ibverbs::AccessFlags;
use zerocopy::IntoBytes;

pub use device::device_names;
use device::{Registered, VerbsDevice};
pub use lane::VerbsLane;
use queue_pair::Connection;
use wire::QueuePairAddress;

use crate::endpoint::EndpointOptions;
use crate::error::SetupError;
use crate::memory::HostMemory;
use crate::region::RemoteRegion;

/// Most reads posted to one queue pair. Those past `max_qp_rd_atom` wait in the send queue, so the
/// device never runs dry between two doorbells.
const DEPTH: usize = 64;

fn register(
    device: &VerbsDevice,
    memories: &[HostMemory],
    access: AccessFlags,
) -> Result<Vec<Registered>, SetupError> {
    let one = |memory: &HostMemory| {
        device.register(memory, access).map(|key| Registered { key, memory: memory.clone() })
    };
    memories.iter().map(one).collect()
}

/// Exports memory by RDMA. Once its lanes are granted it is passive. Fields drop in order.
pub struct VerbsExporter {
    connections: Vec<Connection>,
    exported: Vec<Registered>,
    device: Arc<VerbsDevice>,
}

impl VerbsExporter {
    /// Opens a device and registers `memories` for remote reading.
    ///
    /// Errors: no device fits `options`, or the registration is refused (locked-memory limit).
    pub fn new(memories: &[HostMemory], options: &EndpointOptions) -> Result<Self, SetupError> {
        let device = Arc::new(VerbsDevice::open(options)?);
        let exported = register(&device, memories, AccessFlags::RemoteRead)?;
        Ok(Self { connections: Vec::new(), exported, device })
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device.name
    }

    /// The capabilities to give to the importer, in the order of the memories.
    pub fn regions(&self) -> Vec<RemoteRegion> {
        let region = |registered: &Registered| {
            let memory = &registered.memory;
            RemoteRegion::new(memory.base() as u64, memory.len() as u64, registered.key.rkey().into())
        };
        self.exported.iter().map(region).collect()
    }

    /// Connects a queue pair to the importer's, and returns its own address.
    ///
    /// Errors: the request is malformed, or the device refuses.
    pub fn grant(&mut self, request: &[u8]) -> Result<Vec<u8>, SetupError> {
        let peer = QueuePairAddress::decode(request)?;
        let mut connection = Connection::new(&self.device, 1, AccessFlags::RemoteRead)?;
        connection.connect(&peer)?;
        let address = connection.address().as_bytes().to_vec();
        self.connections.push(connection);
        Ok(address)
    }
}

/// Opens lanes to an exporter.
pub struct VerbsImporter {
    memories: Arc<Vec<Registered>>,
    device: Arc<VerbsDevice>,
}

/// A lane that awaits the exporter's grant.
pub struct VerbsRequest(Connection);

impl VerbsImporter {
    /// Opens a device and registers `memories` for reads to land in.
    ///
    /// Errors: no device fits `options`, or the registration is refused (locked-memory limit).
    pub fn new(memories: &[HostMemory], options: &EndpointOptions) -> Result<Self, SetupError> {
        let device = Arc::new(VerbsDevice::open(options)?);
        let memories = Arc::new(register(&device, memories, AccessFlags::LocalWrite)?);
        Ok(Self { memories, device })
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device.name
    }

    /// Starts a lane: what to keep, and what to send to the exporter.
    pub fn request(&self) -> Result<(VerbsRequest, Vec<u8>), SetupError> {
        let connection = Connection::new(&self.device, DEPTH as u32, AccessFlags::LocalWrite)?;
        let address = connection.address().as_bytes().to_vec();
        Ok((VerbsRequest(connection), address))
    }

    /// Finishes a lane with the exporter's grant.
    ///
    /// Errors: the grant is malformed, or the device refuses.
    pub fn connect(&self, request: VerbsRequest, grant: &[u8]) -> Result<VerbsLane, SetupError> {
        let VerbsRequest(mut connection) = request;
        connection.connect(&QueuePairAddress::decode(grant)?)?;
        Ok(VerbsLane::new(connection, self.memories.clone(), DEPTH))
    }
}
