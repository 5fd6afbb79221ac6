//! The page map: which pages of the source are zero, told without sending them.
//!
//! The source publishes the map as a memory region of its own and fills it while it serves, in
//! ascending order; the destination reads it one-sided, like any other memory. The drain follows
//! the map and so never carries a zero page.
//!
//! ```text
//! 0            8             16                              64
//! | known: u64 | version u32 |  zeros (reserved)             | bitmap: 1 bit a page, 1 = zero …
//! ```
//!
//! The bit of a page means something once the page is below `known`. The source writes a part of
//! the bitmap, and only then raises `known` over it; the destination reads `known`, and only then
//! the bitmap below it. Little-endian, as x86 and the other fields of this protocol.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use postcopy_transport::HostMemory;

use crate::memory::{PAGE_SIZE, PageIndex};

/// Offset of the bitmap in the map's memory.
pub const BITMAP_OFFSET: u64 = 64;
/// Version of the layout above.
const VERSION: u32 = 1;
/// Pages that the source looks at before it raises `known`: 8 MiB of guest memory.
const STEP_PAGES: u64 = 2048;
/// Bytes of a page compared at once.
const CHUNK: usize = 256;

const _: () = assert!(STEP_PAGES.is_multiple_of(8) && PAGE_SIZE.is_multiple_of(CHUNK as u64));

/// Bytes of the map's memory for `pages` pages, in whole pages.
pub fn map_bytes(pages: u64) -> u64 {
    (BITMAP_OFFSET + pages.div_ceil(8)).next_multiple_of(PAGE_SIZE)
}

/// Reads the header: how many pages are known. `None` if it is no header of ours, or knows more
/// pages than there are.
pub fn decode_known(header: &[u8; 16], pages: u64) -> Option<u64> {
    let known = u64::from_le_bytes(header[..8].try_into().ok()?);
    let version = u32::from_le_bytes(header[8..12].try_into().ok()?);
    (version == VERSION && known <= pages).then_some(known)
}

/// The zero pages in `bits`, the part of the bitmap that begins with page `first` (a multiple of
/// 8), below page `end`.
pub fn zeros_in(bits: &[u8], first: u64, end: u64) -> impl Iterator<Item = PageIndex> {
    let set = move |(at, byte): (usize, &u8)| {
        let byte = *byte;
        let base = first + at as u64 * 8;
        (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| base + bit)
    };
    bits.iter().enumerate().flat_map(set).filter(move |page| *page < end).map(PageIndex)
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

    /// Starts to fill the map from `memory`, whose guest must be frozen and stay so.
    ///
    /// Errors: the system refuses a thread.
    pub fn fill(&mut self, memory: &HostMemory) -> std::io::Result<()> {
        let (memory, map, pages) = (memory.clone(), self.map.clone(), self.pages);
        let (zeros, stop) = (self.zeros.clone(), self.stop.clone());
        let scan = move || {
            for first in (0..pages).step_by(STEP_PAGES as usize) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let end = (first + STEP_PAGES).min(pages);
                zeros.fetch_add(scan_step(&memory, &map, first, end), Ordering::Relaxed);
                publish_known(&map, end);
            }
        };
        self.thread = Some(std::thread::Builder::new().name("page-map".into()).spawn(scan)?);
        Ok(())
    }
}

impl Drop for PageMap {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Writes the bitmap of pages `first..end` and returns how many of them are zero.
fn scan_step(memory: &HostMemory, map: &HostMemory, first: u64, end: u64) -> u64 {
    let mut bits = [0u8; (STEP_PAGES / 8) as usize];
    let mut zeros = 0;
    for page in first..end {
        if is_zero(memory, PageIndex(page)) {
            bits[((page - first) / 8) as usize] |= 1 << (page % 8);
            zeros += 1;
        }
    }
    let used = (end - first).div_ceil(8) as usize;
    let written = map.write(BITMAP_OFFSET + first / 8, &bits[..used]);
    assert!(written, "map_bytes made room for every page");
    zeros
}

/// Whether every byte of the page is zero. Most pages that are not show it in their first bytes.
fn is_zero(memory: &HostMemory, page: PageIndex) -> bool {
    let mut chunk = [0u8; CHUNK];
    (0..PAGE_SIZE).step_by(CHUNK).all(|at| {
        let inside = memory.read(page.offset() + at, &mut chunk);
        assert!(inside, "the page lies in guest memory");
        chunk == [0; CHUNK]
    })
}

/// Raises `known`, after everything that was written to the bitmap.
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
        map.fill(&memory).unwrap();
        finished(&mut map);
        assert_eq!(map.zeros(), pages - written.len() as u64);

        let mut header = [0; 16];
        assert!(map.memory().read(0, &mut header));
        assert_eq!(decode_known(&header, pages), Some(pages));
        let mut bits = vec![0; pages.div_ceil(8) as usize];
        assert!(map.memory().read(BITMAP_OFFSET, &mut bits));
        let zeros: Vec<u64> = zeros_in(&bits, 0, pages).map(|page| page.0).collect();
        let expected: Vec<u64> = (0..pages).filter(|page| !written.contains(page)).collect();
        assert_eq!(zeros, expected);
    }

    #[test]
    fn a_header_that_no_source_of_ours_writes_is_refused() {
        let header = |known: u64, version: u32| {
            let mut bytes = [0u8; 16];
            bytes[..8].copy_from_slice(&known.to_le_bytes());
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            bytes
        };
        assert_eq!(decode_known(&header(10, VERSION), 10), Some(10));
        assert_eq!(decode_known(&header(11, VERSION), 10), None);
        assert_eq!(decode_known(&header(u64::MAX, VERSION), 10), None);
        assert_eq!(decode_known(&header(1, VERSION + 1), 10), None);
    }

    #[test]
    fn bits_past_the_end_are_not_pages() {
        assert_eq!(zeros_in(&[0xff, 0xff], 8, 11).map(|page| page.0).collect::<Vec<_>>(), [8, 9, 10]);
    }
}
