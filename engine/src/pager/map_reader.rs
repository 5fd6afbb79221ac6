//! Reads the source's page map, what it says of the pages of one shard, a stretch at a time: header,
//! then new bits.

use std::time::Duration;

use postcopy_transport::{HostMemory, LocalRegion, Read, RemoteRegion};

use super::shards::Part;
use super::token::MAP_TOKEN;
use super::{PagerError, SourceMemory};
use crate::memory::PageIndex;
use crate::page_set::PageSet;
use crate::pagemap::{BITS_OFFSET, PAGES_A_BYTE, Said, decode_known, map_bytes, pages_said};
use crate::planner::News;

/// Bytes of the map's header.
const HEADER: u32 = 16;
/// Bytes of the map read at once: covers 2048 pages, 8 MiB of guest memory. A fault may wait behind it, and
/// behind what is done for each of these pages.
const STRETCH: u64 = 512;
/// Pages of which one read of the map tells.
pub const MAP_STRETCH: u64 = STRETCH * PAGES_A_BYTE;
/// How long to wait for the source's page map to grow: it tells nobody when it does. Doubled each time
/// that it has not, up to the most.
pub(super) const MAP_PATIENCE: Duration = Duration::from_micros(500);
const MOST_PATIENCE: Duration = Duration::from_millis(4);

enum State {
    /// Nothing is posted; the next read is the header.
    Idle,
    Header,
    /// The bits of pages `from..to`.
    Bits {
        from: u64,
        to: u64,
    },
}

/// Where the reading of the map stands.
pub(super) struct MapReader {
    /// Pages of the guest.
    pages: u64,
    part: Part,
    /// Pages of the guest below this one are known, from the part's first on.
    known: u64,
    /// As far as the map went when its header was read.
    said: u64,
    /// The guest stands still: what a map of a running one says does not count.
    frozen: bool,
    patience: Duration,
    /// What the round of pre-copy has left here, of the part.
    held: PageSet,
    state: State,
    landing: HostMemory,
    local: LocalRegion,
    /// Where headers land: shards read theirs at the same time.
    header_at: u64,
    remote: RemoteRegion,
    /// Bytes read so far, headers among them.
    pub(super) bytes: u64,
}

impl MapReader {
    /// For what the map of a frozen guest of so many pages says of `part`, which is the `shard`-th. Of
    /// the part, `held` is here already, as it was.
    pub(super) fn of_frozen(
        pages: u64,
        source: &SourceMemory,
        (shard, part): (usize, Part),
        held: PageSet,
    ) -> Result<Self, PagerError> {
        let (landing, local, remote) = (source.map_memory.clone(), source.map_landing, source.map);
        let header_at = match shard {
            0 => 0,
            later => map_bytes(pages) + u64::from(HEADER) * (later as u64 - 1),
        };
        let room = map_bytes(pages).max(header_at + u64::from(HEADER));
        if remote.len() != map_bytes(pages) || (landing.len() as u64) < room {
            return Err(PagerError::Peer("its page map has the wrong size"));
        }
        let (known, frozen, patience, state) = (part.first, true, MAP_PATIENCE, State::Idle);
        let (said, bytes) = (known, 0);
        Ok(Self {
            pages,
            part,
            known,
            said,
            frozen,
            patience,
            held,
            state,
            landing,
            local,
            header_at,
            remote,
            bytes,
        })
    }

    /// For the map of a guest that runs.
    pub(super) fn of_running(pages: u64, source: &SourceMemory) -> Result<Self, PagerError> {
        let all = Part { first: 0, pages };
        let reader = Self::of_frozen(pages, source, (0, all), PageSet::new(0, false))?;
        Ok(Self { frozen: false, ..reader })
    }

    /// Whether all that the map says of the part has been read.
    pub(super) fn finished(&self) -> bool {
        self.known == self.part.end()
    }

    /// Whether all that the map was seen to say has been read.
    pub(super) fn caught_up(&self) -> bool {
        self.known >= self.said
    }

    /// Whether there is a next read: the map is not finished, and none is under way.
    pub(super) fn wants_more(&self) -> bool {
        !self.finished() && matches!(self.state, State::Idle)
    }

    /// The next read, if there is one.
    pub(super) fn next(&mut self) -> Option<Read> {
        if !self.wants_more() {
            return None;
        }
        if self.known < self.said {
            return Some(self.bits());
        }
        self.state = State::Header;
        Some(self.read(0, self.header_at, HEADER))
    }

    /// The last read has landed. Returns a follow-up read, or what is newly known.
    pub(super) fn landed(&mut self) -> Result<Landed, PagerError> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => Err(PagerError::Peer("a map read completed that was not posted")),
            State::Header => self.header(),
            State::Bits { from, to } => {
                let mut bits = vec![0; (to - from).div_ceil(PAGES_A_BYTE) as usize];
                let inside = self.landing.read(BITS_OFFSET + from / PAGES_A_BYTE, &mut bits);
                assert!(inside, "the bits were just read there");
                (self.known, self.patience) = (to, MAP_PATIENCE);
                let first = self.part.first;
                let said = |said| pages_said(&bits, from, to, said).map(|page| PageIndex(page.0 - first));
                // A page that is zero now and was not in the round is not zero here: it is read.
                let zeros = said(Said::Zero).filter(|page| !self.held.has(page.0)).collect();
                let kept = said(Said::Clean).filter(|page| self.held.has(page.0)).collect();
                Ok(Landed::Known(News { known: to - first, zeros, kept }))
            }
        }
    }

    fn header(&mut self) -> Result<Landed, PagerError> {
        let mut header = [0; 16];
        let inside = self.landing.read(self.header_at, &mut header);
        assert!(inside, "the header was just read there");
        let known = decode_known(&header, self.pages).ok_or(PagerError::Peer("its page map is malformed"))?;
        if self.frozen && !known.frozen {
            return Ok(self.nothing_new());
        }
        // The next stretch begins at a whole byte; a known end inside a byte is the end of memory.
        let said = known.pages.min(self.part.end());
        if said <= self.known || (said < self.pages && !said.is_multiple_of(PAGES_A_BYTE)) {
            return Ok(self.nothing_new());
        }
        self.said = said;
        Ok(Landed::Read(self.bits()))
    }

    /// Reads on in what the map is known to say.
    fn bits(&mut self) -> Read {
        let (from, to) = (self.known, self.said.min(self.known + MAP_STRETCH));
        self.state = State::Bits { from, to };
        let len = (to - from).div_ceil(PAGES_A_BYTE) as u32;
        let at = BITS_OFFSET + from / PAGES_A_BYTE;
        self.read(at, at, len)
    }

    fn nothing_new(&mut self) -> Landed {
        let patience = self.patience;
        self.patience = (patience * 2).min(MOST_PATIENCE);
        Landed::NothingNew(patience)
    }

    fn read(&mut self, offset: u64, landing: u64, len: u32) -> Read {
        self.bytes += u64::from(len);
        let local = self.local.slice(landing, len).expect("of_frozen() checked the room for header and bits");
        let remote = self.remote.slice(offset, len).expect("of_frozen() checked the peer's length");
        Read::new(MAP_TOKEN, local, remote).expect("both slices have the same length")
    }
}

/// What a landed map read leads to.
pub(super) enum Landed {
    /// Read this next.
    Read(Read),
    /// The map covers more now.
    Known(News),
    /// The source has not got further; ask again after so long.
    NothingNew(Duration),
}
