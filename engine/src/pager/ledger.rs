//! What is known of a guest's pages, where it outlives the process that brings them.
//!
//! The claims of every shard are kept here, and little else: which session it is, and how far. Another process that opens the
//! file of a pager that was killed can go on from it (docs/adr/0020-a-pager-that-was-killed.md). A guest of this very process
//! has one too; nobody else sees it.
//!
//! ```text
//!  offset     0  b"PCLEDGR1"
//!             8  u64, pages
//!            16  the session's name, 16 bytes
//!            32  Stage;  33  1: pages land in place, 0: in a pool
//!            48  for each shard 1: its memory was let go, all of it is the guest's
//!            64  u16, and so many bytes of a note of the VMM's
//!          8192  a byte for each page: its claim (claims.rs)
//!     and behind  a byte for each page: bit 0, it was given back; bit 1, the round of pre-copy has brought it
//! ```
//!
//! All of it is written before what it stands for is done, and by one process at a time, which has the file locked.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use postcopy_transport::HostMemory;
use rustix::fs::{FlockOperation, SealFlags};

use super::shards::{MAX_SHARDS, Part};
use crate::page_set::PageSet;

const MAGIC: &[u8; 8] = b"PCLEDGR1";
const PAGES: u64 = 8;
const SESSION: u64 = 16;
const STAGE: u64 = 32;
const IN_PLACE: u64 = 33;
const RELEASED: u64 = 48;
const NOTE: u64 = 64;
const HEADER: u64 = 8192;
/// The longest note.
const MOST_NOTED: usize = (HEADER - NOTE - 2) as usize;
/// Bits of a page.
const GIVEN_BACK: u8 = 1;
const HELD: u8 = 2;
/// More pages than any guest has: 64 TiB.
const MOST_PAGES: u64 = 1 << 34;

/// How far the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// None has come, or not to the end: it is not this side's.
    None,
    /// It runs here, and its memory follows.
    Draining,
    /// All of it is here, and its source knows.
    Over,
}

/// See the module. Clones share it.
#[derive(Clone)]
pub struct Ledger {
    memory: HostMemory,
    pages: u64,
    /// Keeps others off, where there may be any.
    _lock: Option<Arc<File>>,
}

impl Ledger {
    /// For a guest of so many pages that ends with this process.
    ///
    /// Errors: there is no memory for it.
    pub(super) fn of_this_process(pages: u64) -> io::Result<Self> {
        Ok(Self { memory: HostMemory::anonymous("ledger", length(pages)?)?, pages, _lock: None })
    }

    /// Begins one in an empty memfd, which whoever outlives this process keeps open.
    ///
    /// Errors: another process has begun one there, or there is no memory for it.
    pub fn begin(file: &File, pages: u64) -> io::Result<Self> {
        let lock = locked(file)?;
        let len = length(pages)?;
        file.set_len(len as u64)?;
        rustix::fs::fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let memory = HostMemory::map_sealed(file.try_clone()?, len)?;
        let written = memory.write(PAGES, &pages.to_ne_bytes()) && memory.write(0, MAGIC);
        written.then_some(Self { memory, pages, _lock: Some(lock) }).ok_or_else(broken)
    }

    /// Opens one that another process has begun.
    ///
    /// Errors: that process lives, it has begun none, or this is no ledger.
    pub fn open(file: &File) -> io::Result<Self> {
        let lock = locked(file)?;
        if file.metadata()?.len() == 0 {
            return Err(io::Error::other("no guest has come to it"));
        }
        let mut head = [0; 16];
        let header = HostMemory::map_sealed(file.try_clone()?, HEADER as usize)?;
        let known = header.read(0, &mut head) && head[..8] == *MAGIC;
        let pages = u64::from_ne_bytes(head[8..].try_into().map_err(|_| broken())?);
        if !known {
            return Err(broken());
        }
        let memory = HostMemory::map_sealed(file.try_clone()?, length(pages)?)?;
        Ok(Self { memory, pages, _lock: Some(lock) })
    }

    /// Pages of the guest.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Keeps what the VMM wants to know if another process takes this one's place.
    ///
    /// Errors: it is longer than 8 KiB.
    pub fn note(&self, bytes: &[u8]) -> io::Result<()> {
        let len = u16::try_from(bytes.len()).ok().filter(|len| usize::from(*len) <= MOST_NOTED);
        let len = len.ok_or_else(|| io::Error::other("a note of more than 8 KiB"))?;
        let written = self.memory.write(NOTE + 2, bytes) && self.memory.write(NOTE, &len.to_ne_bytes());
        written.then_some(()).ok_or_else(broken)
    }

    /// What [`Ledger::note`] has kept.
    pub fn noted(&self) -> Vec<u8> {
        let mut len = [0; 2];
        let read = self.memory.read(NOTE, &mut len);
        let mut noted = vec![0; usize::from(u16::from_ne_bytes(len)).min(MOST_NOTED)];
        if read && self.memory.read(NOTE + 2, &mut noted) { noted } else { Vec::new() }
    }

    /// How far the guest is.
    pub fn stage(&self) -> Stage {
        match self.byte(STAGE).load(Ordering::Acquire) {
            1 => Stage::Draining,
            2 => Stage::Over,
            _ => Stage::None,
        }
    }

    /// It arrives in this session.
    pub(crate) fn arrives(&self, session: [u8; 16]) {
        let written = self.memory.write(SESSION, &session);
        debug_assert!(written, "the header is longer");
    }

    /// Its pages land in its own memory, or in a pool.
    pub(super) fn lands(&self, in_place: bool) {
        self.byte(IN_PLACE).store(in_place.into(), Ordering::Release);
    }

    /// It is so far.
    pub(crate) fn is_at(&self, stage: Stage) {
        let stage = match stage {
            Stage::None => 0,
            Stage::Draining => 1,
            Stage::Over => 2,
        };
        self.byte(STAGE).store(stage, Ordering::Release);
    }

    /// The session's name.
    pub(crate) fn session(&self) -> [u8; 16] {
        let mut session = [0; 16];
        let read = self.memory.read(SESSION, &mut session);
        debug_assert!(read, "the header is longer");
        session
    }

    /// Whether pages land in the guest's memory.
    pub(super) fn lands_in_place(&self) -> bool {
        self.byte(IN_PLACE).load(Ordering::Acquire) == 1
    }

    /// Whether the memory of this shard was let go.
    pub(super) fn released(&self, shard: usize) -> &AtomicU8 {
        assert!(shard < MAX_SHARDS, "there are no more shards");
        self.byte(RELEASED + shard as u64)
    }

    /// The claims of a shard's pages.
    pub(super) fn claims(&self, part: Part) -> &[AtomicU8] {
        self.bytes(HEADER + part.first, part.pages as usize)
    }

    /// Pages `first..end` of a shard were given back.
    pub(super) fn give_back(&self, part: Part, first: u64, end: u64) {
        self.mark(
            Part { first: part.first + first, pages: end.min(part.pages).saturating_sub(first) },
            GIVEN_BACK,
        );
    }

    /// The first of pages `first..end` of a shard that was given back.
    pub(super) fn first_given_back(&self, part: Part, first: u64, end: u64) -> Option<u64> {
        let pages = Part { first: part.first + first, pages: end - first };
        let given_back = |page: &AtomicU8| page.load(Ordering::Acquire) & GIVEN_BACK != 0;
        self.bits(pages).iter().position(given_back).map(|at| first + at as u64)
    }

    /// Which of a shard's pages were given back.
    pub(super) fn given_back(&self, part: Part) -> PageSet {
        self.marked(part, GIVEN_BACK)
    }

    /// These pages are here, as they were while the guest ran at the source.
    pub(super) fn hold(&self, held: &PageSet) {
        for run in held.runs(u32::MAX) {
            self.mark(Part { first: run.first.0, pages: run.count.into() }, HELD);
        }
    }

    /// Which pages the round of pre-copy has brought.
    pub(super) fn held(&self) -> PageSet {
        self.marked(Part { first: 0, pages: self.pages }, HELD)
    }

    fn mark(&self, part: Part, bit: u8) {
        self.bits(part).iter().for_each(|page| _ = page.fetch_or(bit, Ordering::AcqRel));
    }

    fn marked(&self, part: Part, bit: u8) -> PageSet {
        let mut set = PageSet::new(part.pages, false);
        for (page, bits) in (0..).zip(self.bits(part)) {
            if bits.load(Ordering::Acquire) & bit != 0 {
                set.put(page, page + 1, true);
            }
        }
        set
    }

    fn bits(&self, part: Part) -> &[AtomicU8] {
        self.bytes(HEADER + self.pages + part.first, part.pages as usize)
    }

    fn byte(&self, at: u64) -> &AtomicU8 {
        &self.bytes(at, 1)[0]
    }

    fn bytes(&self, at: u64, len: usize) -> &[AtomicU8] {
        self.memory.bytes(at, len).expect("a ledger is as long as its pages need, and is asked for those")
    }
}

fn length(pages: u64) -> io::Result<usize> {
    let len = (pages <= MOST_PAGES).then(|| HEADER + 2 * pages).and_then(|len| usize::try_from(len).ok());
    len.ok_or_else(broken)
}

/// Locks it for as long as this process has what is returned. What it holds is a description of its own: a descriptor that was
/// passed on has one with whoever passed it.
fn locked(file: &File) -> io::Result<Arc<File>> {
    use std::os::fd::AsRawFd;
    let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    match rustix::fs::flock(&own, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Arc::new(own)),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(io::Error::other("another process is in charge of this guest's memory, and lives"))
        }
        Err(errno) => Err(errno.into()),
    }
}

fn broken() -> io::Error {
    io::Error::other("that is no ledger of a guest's memory, or one of another version")
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn memfd() -> File {
        memfd_create("ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap().into()
    }

    #[test]
    fn another_finds_what_was_written_once_the_first_is_gone() {
        let file = memfd();
        let part = Part { first: 0, pages: 70 };
        let ledger = Ledger::begin(&file, 70).unwrap();
        ledger.note(b"as the VMM likes it").unwrap();
        ledger.arrives(*b"sixteen bytes of");
        ledger.lands(true);
        ledger.is_at(Stage::Draining);
        ledger.claims(part)[69].store(7, Ordering::Relaxed);
        ledger.give_back(part, 0, 1);
        let mut held = PageSet::new(70, false);
        held.put(60, 70, true);
        ledger.hold(&held);
        assert!(Ledger::open(&file).is_err_and(|error| error.to_string().contains("lives")));
        drop(ledger);
        let other = Ledger::open(&file).unwrap();
        assert_eq!((other.pages(), other.noted().as_slice()), (70, &b"as the VMM likes it"[..]));
        assert_eq!((other.session(), other.stage()), (*b"sixteen bytes of", Stage::Draining));
        assert!(other.lands_in_place());
        assert_eq!(other.claims(part)[69].load(Ordering::Relaxed), 7);
        assert_eq!(other.held(), held);
        let given_back = other.given_back(part);
        assert!(given_back.has(0) && given_back.len() == 1);
        assert_eq!(
            (other.first_given_back(part, 0, 70), other.first_given_back(part, 1, 70)),
            (Some(0), None)
        );
    }

    #[test]
    fn what_is_no_ledger_is_refused() {
        let empty = memfd();
        assert!(Ledger::open(&empty).is_err());
        assert!(Ledger::begin(&empty, u64::MAX).is_err());
        let file = memfd();
        file.set_len(HEADER + 140).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(Ledger::open(&file).is_err(), "nothing is in it");
        // One that says that it is longer than it is.
        let memory = HostMemory::map_sealed(file.try_clone().unwrap(), HEADER as usize).unwrap();
        assert!(memory.write(0, MAGIC) && memory.write(PAGES, &71u64.to_ne_bytes()));
        assert!(Ledger::open(&file).is_err());
        assert!(memory.write(PAGES, &70u64.to_ne_bytes()));
        let ledger = Ledger::open(&file).unwrap();
        assert!(ledger.note(&vec![0; MOST_NOTED + 1]).is_err() && ledger.noted().is_empty());
    }
}
