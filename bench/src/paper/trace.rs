//! A guest's first touches, and the file that holds them.
//!
//! ```text
//! {"trace":1,"name":"…","pages":N,"touches":M}\n     one line of JSON
//! then M times two numbers: how far the page is from the one before (zigzag), think time in ns;
//! each 7 bits a byte, lowest first, the top bit set in all but the last (LEB128)
//! ```

use std::time::Duration;

use postcopy_engine::memory::PageIndex;
use postcopy_engine::page_set::PageSet;
use postcopy_engine::planner::Run;
use postcopy_engine::session::{RECENCY_LAPS, last_first};
use serde::{Deserialize, Serialize};

/// Version of the file format.
const VERSION: u32 = 1;
/// Most pages and touches that a file may announce: 16 TiB.
const MAX_PAGES: u64 = 1 << 32;

/// A guest touches a page for the first time since it was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// The page.
    pub page: u64,
    /// What the guest computed since the touch before.
    pub think_ns: u64,
}

/// What a guest does after it was moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// What reports call it.
    pub name: String,
    /// Pages of the guest.
    pub pages: u64,
    /// Its touches, each page at most once.
    pub touches: Vec<Touch>,
    /// When pages were used last before the move, the one used longest ago first. Not kept in files.
    pub used: Vec<Used>,
}

/// A page that a guest used before it was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The page.
    pub page: u64,
    /// How long before the move it was used last.
    pub ago_ns: u64,
}

/// In which order pages lie for the planner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOrder {
    /// By address.
    Address,
    /// By their last use before the move, the one used longest ago first: the paper's LRU order.
    Lru,
    /// As the engine's source tells it: by the lap of its watching in which their block of 64 KiB was last used, the last
    /// lap first, in each by address.
    Laps,
}

/// Why a trace file was refused.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It does not begin as one does.
    #[error("this is no trace file of version {VERSION}: {0}")]
    Header(&'static str),
    /// It breaks off, or names a page twice or one that the guest has not.
    #[error("touch {at} of the trace is malformed: {what}")]
    Touch {
        /// Which, from 0.
        at: u64,
        /// How.
        what: &'static str,
    },
}

#[derive(Serialize, Deserialize)]
struct Header {
    trace: u32,
    name: String,
    pages: u64,
    touches: u64,
}

impl Trace {
    /// The order of the pages that were used before the move; the others follow by address.
    pub fn order(&self, order: PageOrder) -> Vec<Run> {
        match order {
            PageOrder::Address => Vec::new(),
            PageOrder::Lru => self.used.iter().map(|used| Run::one(PageIndex(used.page))).collect(),
            PageOrder::Laps => last_first(&self.laps(), self.pages),
        }
    }

    /// What was used in each lap of the source's watching, which ends with the move.
    fn laps(&self) -> [PageSet; RECENCY_LAPS.len()] {
        let mut later: u128 = RECENCY_LAPS.iter().map(Duration::as_nanos).sum();
        RECENCY_LAPS.map(|lap| {
            let mut pages = PageSet::new(self.pages, false);
            let begun = later;
            later -= lap.as_nanos();
            let within = |used: &&Used| (later..begun).contains(&u128::from(used.ago_ns));
            self.used.iter().filter(within).for_each(|used| pages.put(used.page, used.page + 1, true));
            pages
        })
    }

    /// The file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let header = Header {
            trace: VERSION,
            name: self.name.clone(),
            pages: self.pages,
            touches: self.touches.len() as u64,
        };
        let mut bytes = serde_json::to_vec(&header).expect("a header of numbers and a name is JSON");
        bytes.push(b'\n');
        let mut before = 0i64;
        for touch in &self.touches {
            let step = touch.page as i64 - before;
            put(&mut bytes, (step << 1 ^ step >> 63) as u64);
            put(&mut bytes, touch.think_ns);
            before = touch.page as i64;
        }
        bytes
    }

    /// The trace in a file.
    ///
    /// Errors: it is no trace file, or a malformed one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TraceError> {
        let end = bytes.iter().position(|byte| *byte == b'\n').ok_or(TraceError::Header("it has no line"))?;
        let header = serde_json::from_slice(&bytes[..end]);
        let header: Header = header.map_err(|_| TraceError::Header("its first line is no header"))?;
        if header.trace != VERSION || header.pages > MAX_PAGES {
            return Err(TraceError::Header("another version, or more pages than a guest has"));
        }
        let (mut rest, mut touches, mut before) = (&bytes[end + 1..], Vec::new(), 0i64);
        let mut seen = std::collections::HashSet::new();
        for at in 0..header.touches {
            let broken = |what| TraceError::Touch { at, what };
            let step = take(&mut rest).ok_or(broken("the file breaks off"))?;
            let think_ns = take(&mut rest).ok_or(broken("the file breaks off"))?;
            before = before.wrapping_add((step >> 1) as i64 ^ -((step & 1) as i64));
            let page = u64::try_from(before).ok().filter(|page| *page < header.pages);
            let page = page.ok_or(broken("the guest has no such page"))?;
            if !seen.insert(page) {
                return Err(broken("its page was touched before"));
            }
            touches.push(Touch { page, think_ns });
        }
        Ok(Self { name: header.name, pages: header.pages, touches, used: Vec::new() })
    }
}

fn put(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> Trace {
        let touch = |page, think_ns| Touch { page, think_ns };
        let touches = vec![touch(7, 0), touch(3, 1_000_000_000), touch(900, 127)];
        Trace { name: "three".into(), pages: 1000, touches, used: vec![] }
    }

    #[test]
    fn a_trace_file_says_what_went_in() {
        let bytes = trace().to_bytes();
        assert_eq!(Trace::from_bytes(&bytes).unwrap(), trace());
        assert!(
            bytes.starts_with(b"{\"trace\":1,\"name\":\"three\",\"pages\":1000,\"touches\":3}\n\x0e\x00\x07")
        );
        for end in 0..bytes.len() {
            assert!(Trace::from_bytes(&bytes[..end]).is_err(), "cut at {end}");
        }
        let mut twice = trace();
        twice.touches.push(twice.touches[0]);
        assert!(
            Trace::from_bytes(&twice.to_bytes()).is_err_and(|error| error.to_string().contains("before"))
        );
        let outside = Trace { pages: 900, ..trace() };
        assert!(Trace::from_bytes(&outside.to_bytes()).is_err());
    }

    #[test]
    fn pages_lie_as_they_were_used() {
        let used = |page, ago_ms: u64| Used { page, ago_ns: ago_ms * 1_000_000 };
        let used = [used(9, 1700), used(2, 1500), used(999, 1400), used(4, 90), used(5, 80), used(3, 10)];
        let used = Trace { used: used.into(), ..trace() };
        let run = |first, count| Run { first: PageIndex(first), count };
        assert_eq!(used.order(PageOrder::Address), []);
        assert_eq!(used.order(PageOrder::Lru), [9, 2, 999, 4, 5, 3].map(|page| run(page, 1)));
        assert_eq!(used.order(PageOrder::Laps), [run(0, 16), run(992, 8)]);
    }
}
