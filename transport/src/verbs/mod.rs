//! One-sided reads by RDMA READ: the peer's NIC answers, its CPU takes no part.
//!
//! Both sides make a reliable-connected queue pair for each lane and exchange its address
//! (`wire.rs`) through the caller's control channel. The exporter's memory is registered for remote
//! *reading* only; the importer's for local writing only.

mod device;
mod lane;
mod notify;
mod queue_pair;
mod queues;
mod wire;

use std::sync::Arc;

use sideway::ibverbs::AccessFlags;
use zerocopy::IntoBytes;

pub use device::device_names;
use device::{Registered, VerbsDevice};
pub use lane::VerbsLane;
use queue_pair::Connection;
use wire::{KeyPair, QueuePairAddress};

use crate::endpoint::EndpointOptions;
use crate::error::SetupError;
use crate::lane::LaneClass;
use crate::memory::HostMemory;
use crate::region::RemoteRegion;

/// Most reads posted to one queue pair. Those past `max_qp_rd_atom` wait in the send queue, so the
/// device never runs dry between two doorbells.
const DEPTH: usize = 64;

/// A device, and what is registered with it.
struct Rail {
    registered: Arc<Vec<Registered>>,
    device: Arc<VerbsDevice>,
}

impl Rail {
    /// Opens every device that `options` name, or the best one, and registers `memories` with each.
    fn open_all(
        memories: &[HostMemory],
        options: &EndpointOptions,
        access: AccessFlags,
    ) -> Result<Vec<Self>, SetupError> {
        let names: Vec<Option<&str>> = match options.devices.as_slice() {
            [] => vec![None],
            names => names.iter().map(|name| Some(name.as_str())).collect(),
        };
        let open = |name| {
            let device = Arc::new(VerbsDevice::open(name, options)?);
            let one = |memory: &HostMemory| {
                let key = device.register(memory, access, options.on_demand)?;
                Ok(Registered { key, memory: memory.clone() })
            };
            let registered = memories.iter().map(one).collect::<Result<Vec<_>, SetupError>>()?;
            Ok(Self { registered: Arc::new(registered), device })
        };
        names.into_iter().map(open).collect()
    }
}

/// Feeds any bytes to the decoders of addresses and keys.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_addresses(bytes: &[u8]) {
    let _ = QueuePairAddress::decode(bytes);
    if let Some(keys) = KeyPair::decode_all(bytes) {
        let _ = KeyPair::translate(&keys, bytes.len() as u64);
    }
}

/// Exports memory by RDMA. Once its lanes are granted it is passive. Fields drop in order.
pub struct VerbsExporter {
    connections: Vec<Connection>,
    rails: Vec<Rail>,
}

impl VerbsExporter {
    /// Opens the devices and registers `memories` for remote reading.
    ///
    /// Errors: no device fits `options`, or the registration is refused (locked-memory limit).
    pub fn new(memories: &[HostMemory], options: &EndpointOptions) -> Result<Self, SetupError> {
        let rails = Rail::open_all(memories, options, AccessFlags::RemoteRead)?;
        Ok(Self { connections: Vec::new(), rails })
    }

    /// The capabilities to give to the importer, in the order of the memories: those of the first
    /// rail. The others' keys go with the grants of their paths.
    pub fn regions(&self) -> Vec<RemoteRegion> {
        let region = |registered: &Registered| {
            let memory = &registered.memory;
            RemoteRegion::new(memory.base() as u64, memory.len() as u64, registered.key.rkey().into())
        };
        self.rails[0].registered.iter().map(region).collect()
    }

    /// Connects a queue pair to the importer's, and returns its own address, with the keys of the
    /// memories on its rail.
    ///
    /// Errors: the request is malformed, there is no such rail, or the device refuses.
    pub(crate) fn grant(&mut self, request: &[u8]) -> Result<Vec<u8>, SetupError> {
        let malformed = || SetupError::Malformed { what: "queue pair request" };
        let (rail, address) = request.split_first().ok_or_else(malformed)?;
        let peer = QueuePairAddress::decode(address)?;
        let rails = self.rails.len();
        let reason = || format!("the peer uses {} RDMA devices and this side {rails}", rail + 1);
        let own =
            self.rails.get(usize::from(*rail)).ok_or_else(|| SetupError::Option { reason: reason() })?;
        let mut connection = Connection::new(&own.device, 1, AccessFlags::RemoteRead)?;
        connection.connect(&peer)?;
        let mut grant = connection.address().as_bytes().to_vec();
        for (first, here) in self.rails[0].registered.iter().zip(own.registered.iter()) {
            grant.extend_from_slice(KeyPair::new(first.key.rkey(), here.key.rkey()).as_bytes());
        }
        self.connections.push(connection);
        Ok(grant)
    }
}

/// Opens lanes to an exporter.
pub struct VerbsImporter {
    rails: Vec<Rail>,
}

/// A path of a lane that awaits the exporter's grant.
pub(crate) struct VerbsRequest {
    connection: Connection,
    memories: Arc<Vec<Registered>>,
    class: LaneClass,
}

impl VerbsImporter {
    /// Opens the devices and registers `memories` for reads to land in.
    ///
    /// Errors: no device fits `options`, or the registration is refused (locked-memory limit).
    pub fn new(memories: &[HostMemory], options: &EndpointOptions) -> Result<Self, SetupError> {
        let access = AccessFlags::LocalWrite | AccessFlags::RelaxedOrdering;
        Ok(Self { rails: Rail::open_all(memories, options, access)? })
    }

    /// Starts path number `at` of a lane: what to keep, and what to send to the exporter.
    pub(crate) fn request(&self, at: usize, class: LaneClass) -> Result<(VerbsRequest, Vec<u8>), SetupError> {
        let rail = at % self.rails.len();
        let Rail { registered, device } = &self.rails[rail];
        let connection = Connection::new(device, DEPTH as u32, AccessFlags::LocalWrite)?;
        let mut blob = vec![rail as u8];
        blob.extend_from_slice(connection.address().as_bytes());
        Ok((VerbsRequest { connection, memories: registered.clone(), class }, blob))
    }

    /// Finishes a path with the exporter's grant.
    ///
    /// Errors: the grant is malformed, or the device refuses.
    pub(crate) fn connect(&self, request: VerbsRequest, grant: &[u8]) -> Result<VerbsLane, SetupError> {
        let VerbsRequest { mut connection, memories, class } = request;
        let malformed = || SetupError::Malformed { what: "queue pair grant" };
        let split = grant.split_at_checked(size_of::<QueuePairAddress>());
        let (address, keys) = split.ok_or_else(malformed)?;
        connection.connect(&QueuePairAddress::decode(address)?)?;
        let keys = KeyPair::decode_all(keys).ok_or_else(malformed)?;
        Ok(VerbsLane::new(connection, memories, keys, DEPTH, class))
    }
}
