//! The destination's side of the data path: landing memory, and the lanes into it.

use std::net::TcpStream;

use postcopy_transport::{
    AnyLane, EndpointOptions, HostMemory, Importer, Lane, LaneRequest, RemoteRegion, SetupError, Transport,
};

use crate::export::LANES;
use crate::memory::GuestMemory;
use crate::pagemap::map_bytes;
use crate::pager::{Pager, PagerConfig, PagerError, SourceMemory, Trap};

/// Landing memory, registered.
pub struct Import {
    importer: Importer,
    memory: GuestMemory,
    map_memory: HostMemory,
}

impl Import {
    /// Registers the landing mapping of `memory` and room for the page map.
    ///
    /// Errors: the transport is not available, or memory can not be registered.
    pub fn new(
        transport: Transport,
        memory: &GuestMemory,
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        let failed = |source| SetupError::Io { operation: "making room for the page map", source };
        let bytes = usize::try_from(map_bytes(memory.layout().total_pages()));
        let bytes = bytes.map_err(|error| failed(std::io::Error::other(error)))?;
        let map_memory = HostMemory::anonymous("page-map-landing", bytes).map_err(failed)?;
        let importer = Importer::new(transport, &[memory.landing().clone(), map_memory.clone()], options)?;
        Ok(Self { importer, memory: memory.clone(), map_memory })
    }

    /// Starts the two lanes: what to keep, and what to send to the source.
    ///
    /// Errors: the device refuses.
    pub fn request(&self) -> Result<([LaneRequest; LANES], [Vec<u8>; LANES]), SetupError> {
        let (urgent, urgent_blob) = self.importer.request()?;
        let (bulk, bulk_blob) = self.importer.request()?;
        Ok(([urgent, bulk], [urgent_blob, bulk_blob]))
    }

    /// Finishes the two lanes.
    ///
    /// Errors: a grant is malformed, or the system or device refuses.
    pub fn connect(
        &self,
        requests: [LaneRequest; LANES],
        grants: &[Vec<u8>; LANES],
        streams: [Option<TcpStream>; LANES],
    ) -> Result<[AnyLane; LANES], SetupError> {
        let ([urgent, bulk], [urgent_stream, bulk_stream]) = (requests, streams);
        let urgent = self.importer.connect(urgent, &grants[0], urgent_stream)?;
        let bulk = self.importer.connect(bulk, &grants[1], bulk_stream)?;
        Ok([urgent, bulk])
    }

    /// Starts the pager over connected lanes.
    ///
    /// Errors: the source's regions do not fit, or the system refuses a thread.
    pub fn start<L: Lane + 'static>(
        &self,
        trap: Trap,
        lanes: [L; LANES],
        regions: [RemoteRegion; 2],
        config: PagerConfig,
    ) -> Result<Pager, PagerError> {
        let local = self.importer.regions();
        let source = SourceMemory {
            memory: regions[0],
            map: regions[1],
            landing: local[0],
            map_landing: local[1],
            map_memory: self.map_memory.clone(),
            populated: self.importer.pins_memory(),
        };
        Pager::start(trap, &self.memory, source, lanes, config)
    }
}
