//! The page map: what the source says of its pages without sending them.
//!
//! The source publishes the map as a memory region of its own and fills it while it serves, in
//! ascending order; the destination reads it one-sided, like any other memory. The drain follows
//! the map and so never carries a zero page, nor one that crossed before and is still the same.
//!
//! ```text
//! 0            8             16                              64
//! | known: u64 | version u32 |  zeros (reserved)             | 2 bits a page: see [`Said`] …
//! ```
//!
//! The bits of a page mean something once the page is below `known`. The source writes a part of
//! them, and only then raises `known` over it; the destination reads `known`, and only then the
//! bits below it. Little-endian, as x86 and the other fields of this protocol.
//!
//! In a hybrid migration the map is filled twice: while the guest runs, for the round of pre-copy,
//! and again when it is frozen. The highest bit of `known` says that the guest is frozen, so that
//! what was true of a running guest is never taken for the end of it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use postcopy_transport::HostMemory;

use crate::memory::{PAGE_SIZE, PageIndex};
use crate::page_set::PageSet;

/// Offset of the pages' bits in the map's memory.
pub const BITS_OFFSET: u64 = 64;
/// Pages that a byte of the map tells of.
pub const PAGES_A_BYTE: u64 = 4;
/// Version of the layout above.
const VERSION: u32 = 2;
/// Set in `known` when the map is of the frozen guest.
const FROZEN: u64 = 1 << 63;
/// Pages that the source looks at before it raises `known`: 8 MiB of guest memory.
const STEP_PAGES: u64 = 2048;

const _: () = assert!(STEP_PAGES.is_multiple_of(PAGES_A_BYTE));

/// What a map says of a page. It has two bits, as here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It is to be read.
    Content = 0,
    /// Every byte of it is zero.
    Zero = 1,
    /// It has not been written since the round of pre-copy began.
    Clean = 2,
}

/// How far a map is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Pages below this one are known.
    pub pages: u64,
    /// The guest stands still. If not, what is said may no longer be so.
    pub frozen: bool,
}

/// Bytes of the map's memory for `pages` pages, in whole pages.
pub fn map_bytes(pages: u64) -> u64 {
    (BITS_OFFSET + pages.div_ceil(PAGES_A_BYTE)).next_multiple_of(PAGE_SIZE)
}

/// Reads the header. `None` if it is no header of ours, or knows more pages than there are.
pub fn decode_known(header: &[u8; 16], pages: u64) -> Option<Known> {
    let word = u64::from_le_bytes(header[..8].try_into().ok()?);
    let version = u32::from_le_bytes(header[8..12].try_into().ok()?);
    let known = Known { pages: word & !FROZEN, frozen: word & FROZEN != 0 };
    (version == VERSION && known.pages <= pages).then_some(known)
}

/// The pages of which `bits` says `said`: the part of the map that begins with page `first` (a multiple
/// of [`PAGES_A_BYTE`]), below page `end`.
pub fn pages_said(bits: &[u8], first: u64, end: u64, said: Said) -> impl Iterator<Item = PageIndex> {
    let of = move |(at, byte): (usize, &u8)| {
        let (byte, base) = (*byte, first + at as u64 * PAGES_A_BYTE);
        (0..PAGES_A_BYTE).filter(move |at| byte >> (2 * at) & 3 == said as u8).map(move |at| base + at)
    };
    bits.iter().enumerate().flat_map(of).filter(move |page| *page < end).map(PageIndex)
}

/// What tells which pages a guest has written since the round of pre-copy began.
pub struct Dirty {
    /// Called once, in the thread that fills the map. `None` if it cannot be told, and all of them may be.
    pub tell: Box<dyn FnOnce() -> Option<PageSet> + Send>,
    /// The guest may have given pages back, so that one that was not written may be zero now.
    pub discards: bool,
}

/// Of which guest a map is filled.
pub enum Of {
    /// One that runs on: a hint, for the round of pre-copy and for the next time, which takes most pages as
    /// they were found.
    Running,
    /// One that is frozen and stays so. If there was a round, what it has written since that began.
    Frozen(Option<Dirty>),
}

/// The source's map, and the thread that fills it.
#[derive(Debug)]
pub struct PageMap {
    map: HostMemory,
    pages: u64,
    zeros: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PageMap {
    /// An empty map for `pages` pages: nothing is known.
    ///
    /// Errors: the system has no memory for it.
    pub fn new(pages: u64) -> std::io::Result<Self> {
        let len = usize::try_from(map_bytes(pages)).map_err(std::io::Error::other)?;
        let map = HostMemory::anonymous("page-map", len)?;
        let written = map.write(8, &VERSION.to_le_bytes());
        debug_assert!(written);
        Ok(Self { map, pages, zeros: Arc::default(), stop: Arc::default(), thread: None })
    }

    /// The memory to export.
    pub fn memory(&self) -> &HostMemory {
        &self.map
    }

    /// Zero pages found so far.
    pub fn zeros(&self) -> u64 {
        self.zeros.load(Ordering::Relaxed)
    }

    /// Starts to fill the map from `memory`, from its beginning. What was found to have content while the guest ran is
    /// not looked at again: if it is zero now it crosses for nothing.
    ///
    /// Errors: the system refuses a thread.
    pub fn fill(&mut self, memory: &HostMemory, of: Of) -> std::io::Result<()> {
        self.end();
        let earlier = self.looked_at()?;
        publish_known(&self.map, 0);
        self.stop.store(false, Ordering::Relaxed);
        self.zeros.store(0, Ordering::Relaxed);
        let (memory, map, pages) = (memory.clone(), self.map.clone(), self.pages);
        let (zeros, stop) = (self.zeros.clone(), self.stop.clone());
        let scan = move || {
            let (frozen, dirty) = match of {
                Of::Running => (0, None),
                Of::Frozen(dirty) => (FROZEN, dirty.map(|dirty| (dirty.discards, dirty.tell))),
            };
            let dirty = dirty.and_then(|(discards, tell)| Some((discards, tell()?)));
            let mut content = Content { memory: &memory, stretch: 0..0, earlier };
            for first in (0..pages).step_by(STEP_PAGES as usize) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let end = (first + STEP_PAGES).min(pages);
                zeros.fetch_add(scan_step(&mut content, &map, first, end, dirty.as_ref()), Ordering::Relaxed);
                publish_known(&map, end | frozen);
            }
        };
        self.thread = Some(std::thread::Builder::new().name("page-map".into()).spawn(scan)?);
        Ok(())
    }

    /// Pages below this one were looked at while the guest ran.
    fn looked_at(&self) -> std::io::Result<u64> {
        let mut header = [0; 16];
        let known = self.map.read(0, &mut header).then(|| decode_known(&header, self.pages)).flatten();
        let known = known.ok_or_else(|| std::io::Error::other("the page map's own header is malformed"))?;
        Ok(if known.frozen { 0 } else { known.pages })
    }

    /// Whether the filling has come to its end.
    pub fn is_filled(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the filling, if it is under way.
    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Drop for PageMap {
    fn drop(&mut self) {
        self.end();
    }
}

/// Writes the bits of pages `first..end` and returns how many of them are zero.
///
/// `dirty` has the pages written since the map was filled before, and whether others may have been given
/// back: if not, a page that was not written is what the map said then, and is not looked at. Zero comes
/// before clean: a page that was zero in the round did not cross, and need not.
fn scan_step(
    content: &mut Content<'_>,
    map: &HostMemory,
    first: u64,
    end: u64,
    dirty: Option<&(bool, PageSet)>,
) -> u64 {
    let used = (end - first).div_ceil(PAGES_A_BYTE) as usize;
    let mut bits = [0u8; (STEP_PAGES / PAGES_A_BYTE) as usize];
    let inside = map.read(BITS_OFFSET + first / PAGES_A_BYTE, &mut bits[..used]);
    let mut zeros = 0;
    for page in first..end {
        let (at, shift) = (((page - first) / PAGES_A_BYTE) as usize, 2 * (page % PAGES_A_BYTE));
        let clean = dirty.is_some_and(|(_, dirty)| !dirty.has(page));
        let same = clean && dirty.is_some_and(|(discards, _)| !discards);
        let was_zero = bits[at] >> shift & 3 == Said::Zero as u8;
        // A page that crossed before is the same unless it was given back: that is looked for. Others may cross in vain.
        let had_content = page < content.earlier && !was_zero && !clean;
        let zero = if same { was_zero } else { content.is_zero(PageIndex(page), had_content) };
        let said = match zero {
            true => Said::Zero,
            false if clean => Said::Clean,
            false => Said::Content,
        };
        bits[at] = bits[at] & !(3 << shift) | (said as u8) << shift;
        zeros += u64::from(zero);
    }
    let written = map.write(BITS_OFFSET + first / PAGES_A_BYTE, &bits[..used]);
    assert!(inside && written, "map_bytes made room for every page");
    zeros
}

/// The content of memory, looked at in ascending order.
struct Content<'a> {
    memory: &'a HostMemory,
    /// Bytes of the file that have content, as far as was asked: what lies before them is a hole.
    stretch: Range<u64>,
    /// Pages below this one were looked at while the guest ran.
    earlier: u64,
}

impl Content<'_> {
    /// Whether every byte of the page is zero, or, if it `had_content`, whether it has become a hole. A hole is not
    /// touched: that would fill it. Most pages that are not zero show it in their first bytes.
    fn is_zero(&mut self, page: PageIndex, had_content: bool) -> bool {
        let offset = page.offset();
        if offset >= self.stretch.end {
            // Where it cannot be told, each page is looked at.
            let next = self.memory.next_content(offset).unwrap_or(Some(offset..offset + PAGE_SIZE));
            self.stretch = next.unwrap_or(u64::MAX..u64::MAX);
        }
        let look = || self.memory.is_zero(offset, PAGE_SIZE as usize).expect("the page lies in guest memory");
        offset + PAGE_SIZE <= self.stretch.start || !had_content && look()
    }
}

/// Sets `known`, after everything that was written to the bits.
fn publish_known(map: &HostMemory, known: u64) {
    let at = map.at(0, 8).expect("the header lies in the map");
    // SAFETY: the address is inside the mapping, aligned (mappings begin on a page) and lives as
    // long as `map`; a peer only reads it.
    let word = unsafe { AtomicU64::from_ptr(at.cast()) };
    word.store(known.to_le(), Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(map: &mut PageMap) {
        map.thread.take().unwrap().join().unwrap();
    }

    fn known(map: &PageMap, pages: u64) -> Option<Known> {
        let mut header = [0; 16];
        assert!(map.memory().read(0, &mut header));
        decode_known(&header, pages)
    }

    fn said(map: &PageMap, pages: u64, said: Said) -> Vec<u64> {
        let mut bits = vec![0; pages.div_ceil(PAGES_A_BYTE) as usize];
        assert!(map.memory().read(BITS_OFFSET, &mut bits));
        pages_said(&bits, 0, pages, said).map(|page| page.0).collect()
    }

    #[test]
    fn the_map_tells_zero_pages_from_pages_with_one_byte_set() {
        let pages = STEP_PAGES + 13;
        let memory = HostMemory::anonymous("guest", (pages * PAGE_SIZE) as usize).unwrap();
        let written = [0, 7, 8, STEP_PAGES - 1, STEP_PAGES, pages - 1];
        for (n, page) in written.iter().enumerate() {
            // One byte, at another place each time, the last byte of a page among them.
            let within = [0, 4095, 255, 256, 2000, 4095][n];
            assert!(memory.write(page * PAGE_SIZE + within, &[1]));
        }
        let mut map = PageMap::new(pages).unwrap();
        map.fill(&memory, Of::Frozen(None)).unwrap();
        finished(&mut map);
        assert_eq!(map.zeros(), pages - written.len() as u64);
        assert_eq!(known(&map, pages), Some(Known { pages, frozen: true }));
        let expected: Vec<u64> = (0..pages).filter(|page| !written.contains(page)).collect();
        assert_eq!(said(&map, pages, Said::Zero), expected);
        assert_eq!(said(&map, pages, Said::Content), written);
    }

    #[test]
    fn the_map_of_a_running_guest_is_none_of_a_frozen_one_and_what_it_wrote_is_not_clean() {
        let pages = 40;
        let memory = HostMemory::anonymous("guest", (pages * PAGE_SIZE) as usize).unwrap();
        let touch = |page: u64, byte: u8| assert!(memory.write(page * PAGE_SIZE, &[byte]));
        (0..10).for_each(|page| touch(page, 1));
        let mut map = PageMap::new(pages).unwrap();
        map.fill(&memory, Of::Running).unwrap();
        finished(&mut map);
        assert_eq!(known(&map, pages), Some(Known { pages, frozen: false }));
        assert_eq!(said(&map, pages, Said::Content), (0..10).collect::<Vec<_>>());
        // One page with content becomes zero, and crosses all the same; one that was zero gets some, one is written
        // anew.
        [(3, 0), (20, 1), (5, 2)].into_iter().for_each(|(page, byte)| touch(page, byte));
        let mut dirty = PageSet::new(pages, false);
        dirty.add_log(0, &[1 << 3 | 1 << 20 | 1 << 5], pages);
        let frozen =
            |told: Option<PageSet>, discards| Of::Frozen(Some(Dirty { tell: Box::new(|| told), discards }));
        map.fill(&memory, frozen(Some(dirty.clone()), false)).unwrap();
        finished(&mut map);
        assert_eq!(known(&map, pages), Some(Known { pages, frozen: true }));
        assert_eq!(said(&map, pages, Said::Clean), [0, 1, 2, 4, 6, 7, 8, 9]);
        assert_eq!(said(&map, pages, Said::Content), [3, 5, 20]);
        assert_eq!(map.zeros(), pages - 11);
        // A page that was given back was not written, and is zero.
        touch(6, 0);
        map.fill(&memory, frozen(Some(dirty), true)).unwrap();
        finished(&mut map);
        assert_eq!(said(&map, pages, Said::Clean), [0, 1, 2, 4, 7, 8, 9]);
        // What cannot be told may have been written.
        map.fill(&memory, frozen(None, false)).unwrap();
        finished(&mut map);
        assert!(said(&map, pages, Said::Clean).is_empty());
    }

    #[test]
    fn a_header_that_no_source_of_ours_writes_is_refused() {
        let header = |known: u64, version: u32| {
            let mut bytes = [0u8; 16];
            bytes[..8].copy_from_slice(&known.to_le_bytes());
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            bytes
        };
        let known = |known, version| decode_known(&header(known, version), 10);
        assert_eq!(known(10, VERSION), Some(Known { pages: 10, frozen: false }));
        assert_eq!(known(10 | FROZEN, VERSION), Some(Known { pages: 10, frozen: true }));
        assert_eq!(known(11, VERSION), None);
        assert_eq!(known(u64::MAX, VERSION), None);
        assert_eq!(known(1, VERSION + 1), None);
    }

    #[test]
    fn bits_past_the_end_are_not_pages() {
        let zeros = pages_said(&[0x55, 0x55], 8, 11, Said::Zero);
        assert_eq!(zeros.map(|page| page.0).collect::<Vec<_>>(), [8, 9, 10]);
        assert_eq!(pages_said(&[0xff], 0, 4, Said::Clean).count(), 0, "the fourth value means nothing yet");
    }
}
