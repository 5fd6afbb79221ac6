//! Where reads land: in the guest's own memory, or in a pool from which pages are copied in.
//!
//! In place, the wire writes a second mapping of the guest's file, all of which it must know; a page is
//! then published as it lies. A pool is a few MiB that the wire knows instead: the kernel copies from it
//! into the guest as it publishes (UFFDIO_COPY), and the guest's memory may be any.

use std::collections::HashMap;
use std::str::FromStr;

use postcopy_transport::{HostMemory, LocalRegion, LocalSlice, Transport};
use serde::{Deserialize, Serialize};

use super::PagerError;
use super::trap::PartTrap;
use crate::export::MAX_SERVERS;
use crate::memory::{PAGE_SIZE, PageIndex};
use crate::planner::{LaneId, MAX_READ_PAGES, Run};

/// Where reads are to land.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Landing {
    /// In a pool, unless a round of pre-copy or a device asks for in place.
    #[default]
    Auto,
    /// In the guest's memory, all of which is registered: no copy.
    InPlace,
    /// In a pool of some MiB that is registered in its stead: nothing of the guest is pinned, and
    /// registration takes no time, for a copy of each page.
    Pool,
}

impl Landing {
    /// In place or in a pool: what was chosen, else what suits. A device writes memory that is registered
    /// by itself, and a round of pre-copy stays where it lands; else the pool's copy costs less than the page
    /// faults that landing in place takes.
    pub fn resolved(self, transport: Transport, round: bool) -> Self {
        match self {
            Self::Auto if round || transport == Transport::Verbs => Self::InPlace,
            Self::Auto => Self::Pool,
            chosen => chosen,
        }
    }
}

impl std::fmt::Display for Landing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::InPlace => "in-place",
            Self::Pool => "pool",
        })
    }
}

impl FromStr for Landing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known =
            [Self::Auto, Self::InPlace, Self::Pool].into_iter().find(|landing| landing.to_string() == text);
        known.ok_or_else(|| "auto, in-place or pool is needed".into())
    }
}

/// Slots of a shard for reads of each lane, which have one each until they are published. More wait.
const SLOTS: usize = 64;
/// Bytes of a slot, by lane: a fault's read is of a page.
const SLOT_BYTES: [u64; 2] = [PAGE_SIZE, MAX_READ_PAGES as u64 * PAGE_SIZE];
const SHARD_BYTES: u64 = SLOTS as u64 * (SLOT_BYTES[0] + SLOT_BYTES[1]);

/// Registered memory that reads land in.
#[derive(Clone, Debug)]
pub enum LandingMemory {
    /// The guest's own.
    InPlace {
        /// All of it.
        region: LocalRegion,
        /// Whether it is populated already (pinned by its registration).
        populated: bool,
    },
    /// A pool.
    Pool {
        /// All of it.
        region: LocalRegion,
        /// The memory behind it.
        memory: HostMemory,
        /// For so many shards.
        shards: usize,
    },
}

impl LandingMemory {
    /// Bytes of a pool for so many shards, and for threads that serve themselves.
    pub(crate) fn pool_bytes(shards: usize) -> usize {
        SHARD_BYTES as usize * shards + MAX_SERVERS * PAGE_SIZE as usize
    }

    /// Whether so many pages of guest memory, cut for so many shards, can land here.
    pub(super) fn fits(&self, pages: u64, cut: usize) -> bool {
        match self {
            Self::InPlace { region, .. } => region.slice((pages - 1) * PAGE_SIZE, PAGE_SIZE as u32).is_some(),
            Self::Pool { memory, shards, .. } => cut <= *shards && memory.len() >= Self::pool_bytes(*shards),
        }
    }

    /// Whether the guest's memory has all its pages already.
    pub(super) fn populated(&self) -> bool {
        matches!(self, Self::InPlace { populated: true, .. })
    }

    /// Where the reads of a shard land.
    pub(super) fn of_shard(&self, shard: usize) -> Place {
        let first = SHARD_BYTES * shard as u64;
        let bulk = first + SLOTS as u64 * SLOT_BYTES[0];
        let slots = |first: u64, bytes: u64| (0..SLOTS as u64).map(|at| first + at * bytes).rev().collect();
        self.place([slots(first, SLOT_BYTES[0]), slots(bulk, SLOT_BYTES[1])])
    }

    /// Where the reads of so manieth thread that serves itself land, if there is room for it.
    pub(super) fn of_server(&self, server: usize) -> Option<Place> {
        let shards = match self {
            Self::InPlace { .. } => 0,
            Self::Pool { shards, .. } => *shards,
        };
        let slot = SHARD_BYTES * shards as u64 + PAGE_SIZE * server as u64;
        (server < MAX_SERVERS).then(|| self.place([vec![slot], Vec::new()]))
    }

    fn place(&self, free: [Vec<u64>; 2]) -> Place {
        match self {
            Self::InPlace { region, .. } => Place::InPlace(*region),
            Self::Pool { region, memory, .. } => {
                let (region, memory) = (*region, memory.clone());
                Place::Pool(Pool { region, memory, free, used: HashMap::new() })
            }
        }
    }
}

/// Where the reads of one thread land. Runs are of the guest's memory, not of a part.
pub(super) enum Place {
    InPlace(LocalRegion),
    Pool(Pool),
}

/// A part of a pool.
pub(super) struct Pool {
    region: LocalRegion,
    memory: HostMemory,
    /// Offsets of free slots, by lane.
    free: [Vec<u64>; 2],
    /// The slots of runs that are not published, by their first page.
    used: HashMap<PageIndex, (LaneId, u64)>,
}

impl Place {
    /// Where a read of `run` lands, or `None` if that must wait until another is published.
    pub(super) fn take(&mut self, lane: LaneId, run: Run) -> Option<LocalSlice> {
        let bytes = run.count * PAGE_SIZE as u32;
        let slice = match self {
            Self::InPlace(region) => region.slice(run.first.offset(), bytes),
            Self::Pool(pool) => {
                let slot = pool.free[lane as usize].pop()?;
                pool.used.insert(run.first, (lane, slot));
                let fits = u64::from(bytes) <= SLOT_BYTES[lane as usize];
                pool.region.slice(slot, bytes).filter(|_| fits)
            }
        };
        Some(slice.expect("fits() has checked the memory, and no read is longer than its slot"))
    }

    /// How many more reads of a lane can land.
    pub(super) fn room(&self, lane: LaneId) -> usize {
        match self {
            Self::InPlace(_) => usize::MAX,
            Self::Pool(pool) => pool.free[lane as usize].len(),
        }
    }

    /// Publishes a run of the trap's part that has landed here.
    pub(super) fn publish(&mut self, trap: &PartTrap, run: Run) -> Result<(), PagerError> {
        let Self::Pool(pool) = self else { return trap.publish(run) };
        let landed = pool.used.remove(&trap.part().global(run.first));
        let (lane, slot) = landed.expect("what is published has landed, and has done so once");
        let published = trap.copy_in(run, &pool.memory, slot);
        pool.free[lane as usize].push(slot);
        published
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_threads_land_in_the_same_bytes() {
        let shards = 3;
        let memory = HostMemory::anonymous("pool", LandingMemory::pool_bytes(shards)).unwrap();
        let (_, region) = postcopy_transport::sim::SimLink::regions(0, memory.len() as u64);
        let landing = LandingMemory::Pool { region, memory, shards };
        assert!(landing.fits(1 << 30, shards) && !landing.fits(1, shards + 1) && !landing.populated());
        let places = (0..shards).map(|shard| landing.of_shard(shard));
        let servers = (0..MAX_SERVERS).map(|server| landing.of_server(server).unwrap());
        let mut taken = Vec::new();
        for place in places.chain(servers) {
            let Place::Pool(pool) = place else { panic!("not in place") };
            for (slots, bytes) in pool.free.iter().zip(SLOT_BYTES) {
                taken.extend(slots.iter().map(|slot| *slot..*slot + bytes));
            }
        }
        taken.sort_by_key(|slot| slot.start);
        assert!(taken.windows(2).all(|pair| pair[0].end == pair[1].start), "gaps or overlaps");
        assert_eq!(taken.last().unwrap().end as usize, LandingMemory::pool_bytes(shards));
        assert!(landing.of_server(MAX_SERVERS).is_none());
    }

    #[test]
    fn a_choice_is_read_as_it_is_written() {
        for landing in [Landing::Auto, Landing::InPlace, Landing::Pool] {
            assert_eq!(landing.to_string().parse(), Ok(landing));
        }
        assert!("heap".parse::<Landing>().is_err());
    }
}
