//! The destination's side of the data path: landing memory, and the lanes into it.

use postcopy_transport::tcp::Stream;
use postcopy_transport::{
    AnyLane, EndpointOptions, HostMemory, Importer, LaneClass, LaneRequest, LocalRegion, RemoteRegion,
    SetupError, Transport,
};

use crate::export::{Export, LANES};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::pagemap::map_bytes;
use crate::pager::{
    Landing, LandingMemory, Pager, PagerConfig, PagerError, Round, RoundWatch, SourceMemory, Trap, read_once,
};
use crate::planner::Bandwidth;

/// The lanes of a migration.
pub struct Lanes {
    /// Urgent and bulk, of each shard.
    pub shards: Vec<[AnyLane; LANES]>,
    /// One for each thread that serves its own faults.
    pub servers: Vec<AnyLane>,
}

/// Where pages land, registered.
pub struct Import {
    importer: Importer,
    /// What pages land for, if it is of this process.
    memory: Option<GuestMemory>,
    pages: u64,
    map_memory: HostMemory,
    landing: LandingMemory,
}

impl Import {
    /// Registers where pages land, of `memory` or in a pool for so many shards, and room for the page map. With a
    /// round of pre-copy before it they must land in place.
    ///
    /// Errors: the transport is not available, or memory can not be registered.
    pub fn new(
        transport: Transport,
        memory: &GuestMemory,
        (landing, shards): (Landing, usize),
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        let pages = memory.layout().total_pages();
        match landing.resolved(transport, false) {
            Landing::Pool => {
                let import = Self::for_others(transport, pages, shards, options)?;
                Ok(Self { memory: Some(memory.clone()), ..import })
            }
            Landing::Auto | Landing::InPlace => {
                let populated = options.pins_memory(transport);
                let landing = |region, _| LandingMemory::InPlace { region, populated };
                let import = Self::register(transport, (memory.landing().clone(), pages), landing, options)?;
                Ok(Self { memory: Some(memory.clone()), ..import })
            }
        }
    }

    /// Registers a pool, for so many shards, and room for the page map of so many pages: of memory that
    /// another program has, and this process has not ([`Trap::adopt_anonymous`]).
    ///
    /// Errors: as [`Import::new`].
    pub fn for_others(
        transport: Transport,
        pages: u64,
        shards: usize,
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        let pool = HostMemory::anonymous("landing-pool", LandingMemory::pool_bytes(shards));
        let pool = pool.map_err(no_room)?;
        let landing = |region, memory| LandingMemory::Pool { region, memory, shards };
        Self::register(transport, (pool, pages), landing, options)
    }

    fn register(
        transport: Transport,
        (memory, pages): (HostMemory, u64),
        landing: impl FnOnce(LocalRegion, HostMemory) -> LandingMemory,
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        // Behind the map, the headers that shards read at the same time.
        let bytes = usize::try_from(map_bytes(pages) + PAGE_SIZE);
        let bytes = bytes.map_err(|error| no_room(std::io::Error::other(error)))?;
        let map_memory = HostMemory::anonymous("page-map-landing", bytes).map_err(no_room)?;
        let importer = Importer::new(transport, &[memory.clone(), map_memory.clone()], options)?;
        let landing = landing(importer.regions()[0], memory);
        Ok(Self { importer, memory: None, pages, map_memory, landing })
    }

    /// Starts the two lanes of each of so many shards, and one for each of `servers` threads: what to
    /// keep, and what to send to the source.
    ///
    /// Errors: the device refuses.
    pub fn request(
        &self,
        shards: usize,
        servers: usize,
    ) -> Result<(Vec<LaneRequest>, Vec<Vec<u8>>), SetupError> {
        let classes = std::iter::repeat_n([LaneClass::Urgent, LaneClass::Bulk], shards).flatten();
        let classes = classes.chain(std::iter::repeat_n(LaneClass::Urgent, servers));
        let requests: Result<Vec<_>, _> = classes.map(|class| self.importer.request(class)).collect();
        Ok(requests?.into_iter().unzip())
    }

    /// Finishes the lanes of so many shards and of threads, each with the streams that it needs
    /// ([`LaneRequest::streams`]).
    ///
    /// Errors: a grant is missing or malformed, or the system or device refuses.
    pub fn connect(
        &self,
        shards: usize,
        requests: Vec<LaneRequest>,
        grants: &[Vec<u8>],
        streams: Vec<Vec<Stream>>,
    ) -> Result<Lanes, SetupError> {
        let malformed = || SetupError::Malformed { what: "lane grants" };
        if grants.len() != requests.len() || streams.len() != requests.len() {
            return Err(malformed());
        }
        let each = requests.into_iter().zip(grants).zip(streams);
        let lanes = each.map(|((request, grant), streams)| self.importer.connect(request, grant, streams));
        let mut lanes = lanes.collect::<Result<Vec<_>, _>>()?.into_iter();
        let pair = |_| Some([lanes.next()?, lanes.next()?]);
        let pairs = (0..shards).map(pair).collect::<Option<Vec<_>>>().ok_or_else(malformed)?;
        Ok(Lanes { shards: pairs, servers: lanes.collect() })
    }

    /// The two lanes of each of so many shards to an export in this process.
    ///
    /// Errors: as [`Import::connect`].
    pub fn connect_local(
        &self,
        export: &mut Export,
        shards: usize,
    ) -> Result<Vec<[AnyLane; LANES]>, SetupError> {
        let mut pair = || {
            let urgent = self.importer.connect_local(&mut export.exporter, LaneClass::Urgent)?;
            Ok([urgent, self.importer.connect_local(&mut export.exporter, LaneClass::Bulk)?])
        };
        (0..shards).map(|_| pair()).collect()
    }

    /// A lane for one thread that serves its own faults, to an export in this process.
    ///
    /// Errors: as [`Import::connect`].
    pub fn connect_one_local(&self, export: &mut Export) -> Result<AnyLane, SetupError> {
        self.importer.connect_local(&mut export.exporter, LaneClass::Urgent)
    }

    /// Pages of guest memory.
    pub fn total_pages(&self) -> u64 {
        self.pages
    }

    /// Reads the source's memory once, while its guest runs there, over the bulk one of `lanes`, which a
    /// shard will have, at this bandwidth at most.
    ///
    /// Errors: the lane fails, the source's regions do not fit, pages land in a pool, or `watch` ended the
    /// round.
    pub fn pre_copy(
        &self,
        lanes: &mut [AnyLane; LANES],
        regions: [RemoteRegion; 2],
        max_bandwidth: Option<Bandwidth>,
        watch: &RoundWatch,
    ) -> Result<Round, PagerError> {
        let source = self.source(regions, Round::none());
        let [_, bulk] = lanes;
        read_once(&source, self.total_pages(), bulk, max_bandwidth, watch)
    }

    fn source(&self, regions: [RemoteRegion; 2], round: Round) -> SourceMemory {
        SourceMemory {
            memory: regions[0],
            map: regions[1],
            landing: self.landing.clone(),
            map_landing: self.importer.regions()[1],
            map_memory: self.map_memory.clone(),
            round,
        }
    }

    /// Starts the pager over connected lanes. `round` is what is here already.
    ///
    /// Errors: the source's regions do not fit, or the system refuses a thread.
    pub fn start(
        &self,
        trap: Trap,
        lanes: Vec<[AnyLane; LANES]>,
        regions: [RemoteRegion; 2],
        round: Round,
        config: PagerConfig,
    ) -> Result<Pager, PagerError> {
        Pager::start(trap, self.memory.as_ref(), &self.source(regions, round), lanes, config)
    }

    /// Has a pager that was [parted](Pager::part) from its source go on over these lanes. Where its pages
    /// landed in place this must be made for that too.
    ///
    /// Errors: as [`Pager::go_on`].
    pub fn go_on(
        &self,
        pager: &mut Pager,
        lanes: Lanes,
        regions: [RemoteRegion; 2],
        config: PagerConfig,
    ) -> Result<(), PagerError> {
        let Lanes { shards, servers } = lanes;
        pager.go_on(self.source(regions, Round::none()), shards, servers, config)
    }
}

fn no_room(source: std::io::Error) -> SetupError {
    SetupError::Io { operation: "making room for what arrives", source }
}
