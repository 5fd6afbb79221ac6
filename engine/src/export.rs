//! The source's side of the data path: guest memory and its page map, open for reading.

use postcopy_transport::tcp::Stream;
use postcopy_transport::{EndpointOptions, Exporter, HostMemory, RemoteRegion, SetupError, Transport};

use crate::memory::GuestMemory;
use crate::pagemap::{Dirty, Of, PageMap};
use crate::pager::MAX_SHARDS;
use crate::proc_pages::unmapped;

/// Lanes of every shard: urgent and bulk, in this order. Those of threads that serve their own faults
/// follow on those of the last shard.
pub const LANES: usize = 2;

/// Most threads that serve their own faults in one migration.
pub const MAX_SERVERS: usize = 64;

/// Most lanes of one migration.
pub const MAX_LANES: usize = LANES * MAX_SHARDS + MAX_SERVERS;

/// Guest memory, exported. Passive but for the thread that fills the page map (and, over TCP, one
/// responder a lane). Dropping it closes the lanes and takes the memory back.
pub struct Export {
    pub(crate) exporter: Exporter,
    map: PageMap,
    memory: HostMemory,
    pinned: bool,
}

/// Memory that a transport has registered, and whether that pinned it.
pub(crate) struct Registered {
    exporter: Exporter,
    pinned: bool,
}

impl Registered {
    fn new(
        transport: Transport,
        memories: &[HostMemory],
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        let exporter = Exporter::new(transport, memories, options)?;
        Ok(Self { exporter, pinned: options.pins_memory(transport) })
    }
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").finish_non_exhaustive()
    }
}

impl Export {
    /// Registers `memory` and an empty page map. The guest may still run.
    ///
    /// Errors: the transport is not available, or memory can not be registered.
    pub fn new(
        transport: Transport,
        memory: &GuestMemory,
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        let map = PageMap::new(memory.layout().total_pages())
            .map_err(|source| SetupError::Io { operation: "making the page map", source })?;
        // Not the guest's own: pages leave that and come back while it is watched (`touched`).
        let memory = memory.landing().clone();
        let registered = Registered::new(transport, &[memory.clone(), map.memory().clone()], options)?;
        let Registered { exporter, pinned } = registered;
        Ok(Self { exporter, map, memory, pinned })
    }

    /// What registers the same memory once more, for other lanes. To be called where that may take long.
    pub(crate) fn again(
        &self,
        transport: Transport,
        options: EndpointOptions,
    ) -> impl FnOnce() -> Result<Registered, SetupError> + Send + use<> {
        let memories = [self.memory.clone(), self.map.memory().clone()];
        move || Registered::new(transport, &memories, &options)
    }

    /// Closes all lanes; others are granted from now on.
    pub(crate) fn renew(&mut self, Registered { exporter, pinned }: Registered) {
        (self.exporter, self.pinned) = (exporter, pinned);
    }

    /// Guest memory and page map, as the destination will read them.
    pub fn regions(&self) -> [RemoteRegion; 2] {
        let regions = self.exporter.regions();
        [regions[0], regions[1]]
    }

    /// Answers a lane request.
    ///
    /// Errors: it is malformed, or the device refuses.
    pub fn grant(&mut self, request: &[u8]) -> Result<Vec<u8>, SetupError> {
        self.exporter.grant(request)
    }

    /// How many connected streams the granted lanes still need.
    pub fn awaited(&self) -> usize {
        self.exporter.awaited()
    }

    /// Gives the first lane that awaits one a stream.
    ///
    /// Errors: the transport uses no streams, or the system refuses.
    pub fn attach(&mut self, stream: Stream) -> Result<(), SetupError> {
        self.exporter.attach(stream)
    }

    /// Whether what was registered is still all of the guest's memory. A device that pins memory keeps
    /// the pages that it was given: one that the guest has given back since, and used again, is another
    /// now. The mapping of such a page is gone from this process. The guest must be frozen.
    ///
    /// Errors: how many pages it is about.
    pub fn check_pages(&self) -> Result<(), SetupError> {
        let failed =
            |source| SetupError::Io { operation: "looking for pages that the guest gave back", source };
        if !self.pinned {
            return Ok(());
        }
        let gone = unmapped(&self.memory).map_err(failed)?;
        match gone {
            0 => Ok(()),
            gone => Err(failed(std::io::Error::other(format!(
                "it gave {gone} back (balloon, free-page reporting) after its memory was registered with the \
                 device; try again, or over tcp"
            )))),
        }
    }

    /// Starts to fill the page map while the guest runs: for a round of pre-copy, where what the guest writes must
    /// be logged already; and so that less is left to be done when it is frozen.
    ///
    /// Errors: the system refuses a thread.
    pub fn describe_running(&mut self) -> Result<(), SetupError> {
        self.describe(Of::Running)
    }

    /// Whether all of the memory has been looked at since that was started.
    pub fn is_described(&self) -> bool {
        self.map.is_filled()
    }

    /// Starts to fill the page map. The guest must be frozen, and stay so as long as `self` lives. If
    /// there was a round of pre-copy, `dirty` tells what was written since it began.
    ///
    /// Errors: the system refuses a thread.
    pub fn describe_pages(&mut self, dirty: Option<Dirty>) -> Result<(), SetupError> {
        self.describe(Of::Frozen(dirty))
    }

    fn describe(&mut self, of: Of) -> Result<(), SetupError> {
        let started = self.map.fill(&self.memory, of);
        started.map_err(|source| SetupError::Io { operation: "starting the page map's thread", source })
    }
}
