//! The source's side of the data path: guest memory and its page map, open for reading.

use std::net::TcpStream;

use postcopy_transport::{EndpointOptions, Exporter, HostMemory, RemoteRegion, SetupError, Transport};

use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::pagemap::PageMap;

/// Lanes of every migration: urgent and bulk, in this order. Those of threads that serve their own
/// faults follow.
pub const LANES: usize = 2;

/// Most lanes of one migration: [`LANES`], and one for each of 64 threads.
pub const MAX_LANES: usize = LANES + 64;

/// Guest memory, exported. Passive but for the thread that fills the page map (and, over TCP, one
/// responder a lane). Dropping it closes the lanes and takes the memory back.
pub struct Export {
    pub(crate) exporter: Exporter,
    map: PageMap,
    memory: HostMemory,
    pinned: bool,
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
        let memory = memory.guest().clone();
        let exporter = Exporter::new(transport, &[memory.clone(), map.memory().clone()], options)?;
        Ok(Self { exporter, map, memory, pinned: options.pins_memory(transport) })
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
    pub fn attach(&mut self, stream: TcpStream) -> Result<(), SetupError> {
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

    /// Starts to fill the page map. The guest must be frozen, and stay so as long as `self` lives.
    ///
    /// Errors: the system refuses a thread.
    pub fn describe_pages(&mut self) -> Result<(), SetupError> {
        let started = self.map.fill(&self.memory);
        started.map_err(|source| SetupError::Io { operation: "starting the page map's thread", source })
    }
}

/// How many pages of a mapping this process has no mapping for, by /proc/self/pagemap.
fn unmapped(memory: &HostMemory) -> std::io::Result<u64> {
    use std::os::unix::fs::FileExt;
    /// Bytes of an entry, and its bit for a page that is mapped.
    const ENTRY: u64 = 8;
    const PRESENT: u64 = 1 << 63;
    let map = std::fs::File::open("/proc/self/pagemap")?;
    let (mut at, pages) = (memory.base() as u64 / PAGE_SIZE, memory.len() as u64 / PAGE_SIZE);
    let (end, mut gone) = (at + pages, 0);
    let mut entries = vec![0u8; 64 << 10];
    while at < end {
        let bytes = entries.len().min(((end - at) * ENTRY) as usize);
        map.read_exact_at(&mut entries[..bytes], at * ENTRY)?;
        let present =
            |entry: &[u8]| entry.try_into().is_ok_and(|entry| u64::from_le_bytes(entry) & PRESENT != 0);
        gone += entries[..bytes].chunks_exact(ENTRY as usize).filter(|entry| !present(entry)).count() as u64;
        at += bytes as u64 / ENTRY;
    }
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_was_given_back_is_seen_also_when_it_is_used_again() {
        use rustix::fs::{FallocateFlags, fallocate};
        let memory = HostMemory::anonymous("given-back", 64 << 12).unwrap();
        let theirs = memory.map_again().unwrap();
        for page in 0..64 {
            assert!(memory.write(page << 12, &[1]));
        }
        assert_eq!(unmapped(&memory).unwrap(), 0);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(memory.file(), hole, 5 << 12, 2 << 12).unwrap();
        assert!(theirs.write(5 << 12, &[2]), "used again by another process");
        assert_eq!(unmapped(&memory).unwrap(), 2);
    }
}
