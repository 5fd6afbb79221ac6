//! The destination's side of the data path: landing memory, and the lanes into it.

use std::net::TcpStream;

use postcopy_transport::{
    AnyLane, EndpointOptions, HostMemory, Importer, LaneClass, LaneRequest, RemoteRegion, SetupError,
    Transport,
};

use crate::export::{Export, LANES};
use crate::memory::GuestMemory;
use crate::pagemap::map_bytes;
use crate::pager::{Pager, PagerConfig, PagerError, Round, RoundWatch, SourceMemory, Trap, read_once};

/// The lanes of a migration.
pub struct Lanes {
    /// Urgent and bulk.
    pub shard: [AnyLane; LANES],
    /// One for each thread that serves its own faults.
    pub servers: Vec<AnyLane>,
}

/// Landing memory, registered.
pub struct Import {
    importer: Importer,
    memory: GuestMemory,
    map_memory: HostMemory,
    pinned: bool,
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
        let pinned = options.pins_memory(transport);
        Ok(Self { importer, memory: memory.clone(), map_memory, pinned })
    }

    /// Starts the two lanes, and one for each of `servers` threads: what to keep, and what to send
    /// to the source.
    ///
    /// Errors: the device refuses.
    pub fn request(&self, servers: usize) -> Result<(Vec<LaneRequest>, Vec<Vec<u8>>), SetupError> {
        let classes = [LaneClass::Urgent, LaneClass::Bulk].into_iter();
        let classes = classes.chain(std::iter::repeat_n(LaneClass::Urgent, servers));
        let requests: Result<Vec<_>, _> = classes.map(|class| self.importer.request(class)).collect();
        Ok(requests?.into_iter().unzip())
    }

    /// Finishes the lanes, each with the streams that it needs ([`LaneRequest::streams`]).
    ///
    /// Errors: a grant is missing or malformed, or the system or device refuses.
    pub fn connect(
        &self,
        requests: Vec<LaneRequest>,
        grants: &[Vec<u8>],
        streams: Vec<Vec<TcpStream>>,
    ) -> Result<Lanes, SetupError> {
        let malformed = || SetupError::Malformed { what: "lane grants" };
        if grants.len() != requests.len() || streams.len() != requests.len() {
            return Err(malformed());
        }
        let each = requests.into_iter().zip(grants).zip(streams);
        let lanes = each.map(|((request, grant), streams)| self.importer.connect(request, grant, streams));
        let mut lanes = lanes.collect::<Result<Vec<_>, _>>()?.into_iter();
        let (urgent, bulk) = lanes.next().zip(lanes.next()).ok_or_else(malformed)?;
        Ok(Lanes { shard: [urgent, bulk], servers: lanes.collect() })
    }

    /// The two lanes to an export in this process.
    ///
    /// Errors: as [`Import::connect`].
    pub fn connect_local(&self, export: &mut Export) -> Result<[AnyLane; LANES], SetupError> {
        let urgent = self.importer.connect_local(&mut export.exporter, LaneClass::Urgent)?;
        Ok([urgent, self.importer.connect_local(&mut export.exporter, LaneClass::Bulk)?])
    }

    /// A lane for one thread that serves its own faults, to an export in this process.
    ///
    /// Errors: as [`Import::connect`].
    pub fn connect_one_local(&self, export: &mut Export) -> Result<AnyLane, SetupError> {
        self.importer.connect_local(&mut export.exporter, LaneClass::Urgent)
    }

    /// Pages of guest memory.
    pub fn total_pages(&self) -> u64 {
        self.memory.layout().total_pages()
    }

    /// Reads the source's memory once, while its guest runs there. `lanes` are those that the pager will
    /// have.
    ///
    /// Errors: the lane fails, the source's regions do not fit, or `watch` ended the round.
    pub fn pre_copy(
        &self,
        lanes: &mut [AnyLane; LANES],
        regions: [RemoteRegion; 2],
        watch: &RoundWatch,
    ) -> Result<Round, PagerError> {
        let source = self.source(regions, Round::none());
        let [_, bulk] = lanes;
        read_once(&source, self.total_pages(), bulk, watch)
    }

    fn source(&self, regions: [RemoteRegion; 2], round: Round) -> SourceMemory {
        let local = self.importer.regions();
        SourceMemory {
            memory: regions[0],
            map: regions[1],
            landing: local[0],
            map_landing: local[1],
            map_memory: self.map_memory.clone(),
            populated: self.pinned,
            round,
        }
    }

    /// Starts the pager over connected lanes. `round` is what is here already.
    ///
    /// Errors: the source's regions do not fit, or the system refuses a thread.
    pub fn start(
        &self,
        trap: Trap,
        lanes: [AnyLane; LANES],
        regions: [RemoteRegion; 2],
        round: Round,
        config: PagerConfig,
    ) -> Result<Pager, PagerError> {
        let [urgent, bulk] = lanes;
        Pager::start(trap, &self.memory, self.source(regions, round), urgent, bulk, config)
    }
}
