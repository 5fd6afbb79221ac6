//! Reads the source's page map over the bulk lane, a part at a time: header, then new bits.

use postcopy_transport::{HostMemory, LocalRegion, Read, RemoteRegion, Token};

use super::PagerError;
use crate::memory::PageIndex;
use crate::pagemap::{BITMAP_OFFSET, decode_known, map_bytes, zeros_in};

/// Bytes of bitmap read at once: covers 524,288 pages, 2 GiB of guest memory.
const PART: u64 = 64 << 10;

/// Tokens with this bit are the map reader's; the others name runs of pages.
pub(super) const MAP_TOKEN: u64 = 1 << 63;

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
    pages: u64,
    known: u64,
    state: State,
    landing: HostMemory,
    local: LocalRegion,
    remote: RemoteRegion,
    /// Bytes read so far, headers among them.
    pub(super) bytes: u64,
}

impl MapReader {
    pub(super) fn new(
        pages: u64,
        landing: HostMemory,
        local: LocalRegion,
        remote: RemoteRegion,
    ) -> Result<Self, PagerError> {
        if remote.len() != map_bytes(pages) || landing.len() as u64 != map_bytes(pages) {
            return Err(PagerError::Peer("its page map has the wrong size"));
        }
        Ok(Self { pages, known: 0, state: State::Idle, landing, local, remote, bytes: 0 })
    }

    /// Whether the whole map has been read.
    pub(super) fn finished(&self) -> bool {
        self.known == self.pages
    }

    /// The next read, if none is under way and the map is not finished.
    pub(super) fn next(&mut self) -> Option<Read> {
        if self.finished() || !matches!(self.state, State::Idle) {
            return None;
        }
        self.state = State::Header;
        Some(self.read(0, 16))
    }

    /// The last read has landed. Returns a follow-up read, or what is newly known.
    pub(super) fn landed(&mut self) -> Result<Landed, PagerError> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => Err(PagerError::Peer("a map read completed that was not posted")),
            State::Header => self.header(),
            State::Bits { from, to } => {
                let mut bits = vec![0; (to - from).div_ceil(8) as usize];
                let inside = self.landing.read(BITMAP_OFFSET + from / 8, &mut bits);
                assert!(inside, "the bits were just read there");
                self.known = to;
                Ok(Landed::Known { to, zeros: zeros_in(&bits, from, to).collect() })
            }
        }
    }

    fn header(&mut self) -> Result<Landed, PagerError> {
        let mut header = [0; 16];
        let inside = self.landing.read(0, &mut header);
        assert!(inside, "the header was just read there");
        let known = decode_known(&header, self.pages).ok_or(PagerError::Peer("its page map is malformed"))?;
        // The next part begins at a whole byte; a known end inside a byte is the end of memory.
        let to = known.min(self.known + PART * 8);
        if to <= self.known || (to < self.pages && !to.is_multiple_of(8)) {
            return Ok(Landed::NothingNew);
        }
        let from = self.known;
        self.state = State::Bits { from, to };
        let len = (to - from).div_ceil(8) as u32;
        Ok(Landed::Read(self.read(BITMAP_OFFSET + from / 8, len)))
    }

    fn read(&mut self, offset: u64, len: u32) -> Read {
        self.bytes += u64::from(len);
        let local = self.local.slice(offset, len).expect("map_bytes made room for header and bits");
        let remote = self.remote.slice(offset, len).expect("new() checked the peer's length");
        Read::new(Token(MAP_TOKEN), local, remote).expect("both slices have the same length")
    }
}

/// What a landed map read leads to.
pub(super) enum Landed {
    /// Read this next.
    Read(Read),
    /// The map covers pages below `to` now, of which `zeros` are new and zero.
    Known { to: u64, zeros: Vec<PageIndex> },
    /// The source has not got further.
    NothingNew,
}
