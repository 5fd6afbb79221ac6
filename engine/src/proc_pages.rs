//! What the kernel says of a process's pages: /proc/PID/pagemap, and of its mappings: /proc/PID/smaps.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::SplitAsciiWhitespace;

use postcopy_transport::HostMemory;

use crate::memory::PAGE_SIZE;
use crate::page_set::PageSet;

/// Bytes of a page's entry.
const ENTRY: u64 = 8;
/// Bytes of entries read at once.
const CHUNK: usize = 64 << 10;

/// A page's entry, of Documentation/admin-guide/mm/pagemap.rst.
#[derive(Clone, Copy)]
struct Entry(u64);

impl Entry {
    /// The page is mapped there.
    fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// It was written, by that mapping, since the process's bits were cleared; or the mapping is new.
    fn is_soft_dirty(self) -> bool {
        self.0 >> 55 & 1 == 1
    }
}

/// Shows each of `pages` pages from address `base` on in the process of this folder in /proc.
fn each(process: &Path, base: u64, pages: u64, mut show: impl FnMut(u64, Entry)) -> std::io::Result<()> {
    let map = File::open(process.join("pagemap"))?;
    let (first, mut buffer, mut at) = (base / PAGE_SIZE, vec![0u8; CHUNK], 0);
    while at < pages {
        let count = (pages - at).min(CHUNK as u64 / ENTRY);
        let entries = &mut buffer[..(count * ENTRY) as usize];
        map.read_exact_at(entries, (first + at) * ENTRY)?;
        for (page, entry) in (at..).zip(entries.chunks_exact(ENTRY as usize)) {
            let word = entry.try_into().map(u64::from_le_bytes).unwrap_or_default();
            show(page, Entry(word));
        }
        at += count;
    }
    Ok(())
}

/// Whether some of these addresses of process `pid` are under a trap of userfaultfd for missing or minor faults:
/// pages that are to be there have not come yet, and another mapping of the same file would show zeros for them.
///
/// Errors: this process may not look into that one.
pub fn is_trapped(pid: i32, addresses: Range<u64>) -> std::io::Result<bool> {
    let mut trapped = false;
    each_field(pid, addresses, |name, mut values| {
        // VM_UFFD_MISSING and VM_UFFD_MINOR, of Documentation/filesystems/proc.rst and fs/proc/task_mmu.c.
        trapped |= name == "VmFlags:" && values.any(|flag| matches!(flag, "um" | "ui"));
    })?;
    Ok(trapped)
}

/// Shows each field of /proc/PID/smaps, and its values, of the mappings that have some of these addresses.
pub(crate) fn each_field(
    pid: i32,
    addresses: Range<u64>,
    mut show: impl FnMut(&str, SplitAsciiWhitespace<'_>),
) -> std::io::Result<()> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = |word: &str| word.split_once('-').and_then(|(from, end)| Some(hex(from)?..hex(end)?));
    let mut ours = false;
    // A line at a time: the kernel makes them as they are read, and memory that comes later may be long.
    for line in BufReader::new(File::open(format!("/proc/{pid}/smaps"))?).lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        match words.next().unwrap_or_default() {
            name if name.ends_with(':') => {
                if ours {
                    show(name, words);
                }
            }
            first => {
                let Some(mapping) = range(first) else { continue };
                if mapping.start >= addresses.end {
                    break;
                }
                ours = mapping.end > addresses.start;
            }
        }
    }
    Ok(())
}

/// How many pages of a mapping this process has no mapping for.
pub(crate) fn unmapped(memory: &HostMemory) -> std::io::Result<u64> {
    Ok(memory.len() as u64 / PAGE_SIZE - mapped(memory)?.len())
}

/// The pages of a mapping of this process that are mapped.
pub(crate) fn mapped(memory: &HostMemory) -> std::io::Result<PageSet> {
    let (base, pages) = (memory.base() as u64, memory.len() as u64 / PAGE_SIZE);
    let mut mapped = PageSet::new(pages, false);
    each(Path::new("/proc/self"), base, pages, |page, entry| {
        if entry.is_present() {
            mapped.put(page, page + 1, true);
        }
    })?;
    Ok(mapped)
}

/// Writes of another process to a part of its address space, noted by the kernel's soft-dirty bits
/// (Documentation/admin-guide/mm/soft-dirty.rst).
#[derive(Debug)]
pub struct SoftDirty {
    process: std::path::PathBuf,
    base: u64,
    pages: u64,
}

impl SoftDirty {
    /// Begins to note what process `pid` writes to the `pages` pages from address `base` on.
    ///
    /// No device may be writing there: a write of which the address was taken before is not seen.
    ///
    /// Errors: the kernel notes no such thing (CONFIG_MEM_SOFT_DIRTY), or this process may not look into
    /// that one.
    pub fn begin(pid: i32, base: u64, pages: u64) -> std::io::Result<Self> {
        let process = std::path::PathBuf::from(format!("/proc/{pid}"));
        let log = Self { process, base, pages };
        log.clear()?;
        Ok(log)
    }

    /// Clears the bits of all pages of the process.
    fn clear(&self) -> std::io::Result<()> {
        std::fs::write(self.process.join("clear_refs"), "4")
    }

    /// As [`SoftDirty::dirty`], and begins anew. Nothing may be written meanwhile: it would not be noted.
    ///
    /// Errors: the process is gone.
    pub fn take(&mut self) -> std::io::Result<PageSet> {
        let dirty = self.dirty()?;
        self.clear()?;
        Ok(dirty)
    }

    /// The pages that may have been written since. A page that is not mapped any more, because it was
    /// given back or went to swap, has lost its bit, and counts as written.
    ///
    /// Errors: the process is gone.
    pub fn dirty(&self) -> std::io::Result<PageSet> {
        self.those(|entry| !entry.is_present() || entry.is_soft_dirty())
    }

    /// The pages that were written since, as far as they are mapped still.
    ///
    /// Errors: the process is gone.
    pub fn written(&self) -> std::io::Result<PageSet> {
        self.those(|entry| entry.is_present() && entry.is_soft_dirty())
    }

    fn those(&self, wanted: impl Fn(Entry) -> bool) -> std::io::Result<PageSet> {
        let mut pages = PageSet::new(self.pages, false);
        each(&self.process, self.base, self.pages, |page, entry| {
            if wanted(entry) {
                pages.put(page, page + 1, true);
            }
        })?;
        Ok(pages)
    }

    /// Whether this kernel notes writes.
    ///
    /// Errors: it does not, with the reason.
    pub fn check() -> std::io::Result<()> {
        let probe = HostMemory::anonymous("soft-dirty", PAGE_SIZE as usize)?;
        // The bit of a page that is new and written is set wherever there are such bits.
        let written = probe.write(0, &[1]);
        debug_assert!(written);
        let mut noted = false;
        each(Path::new("/proc/self"), probe.base() as u64, 1, |_, entry| noted = entry.is_soft_dirty())?;
        let without =
            "this kernel does not note which pages a process writes (CONFIG_MEM_SOFT_DIRTY is not set)";
        if noted { Ok(()) } else { Err(std::io::Error::new(std::io::ErrorKind::Unsupported, without)) }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;

    #[test]
    fn a_page_that_was_given_back_is_seen_also_when_it_is_used_again() {
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

    /// Also on a kernel without the bits, where it must say so.
    #[test]
    fn what_is_written_after_the_beginning_is_dirty_and_what_is_read_is_not() {
        let memory = HostMemory::anonymous("dirty", 64 << 12).unwrap();
        (0..64).for_each(|page| assert!(memory.write(page << 12, &[1])));
        if let Err(error) = SoftDirty::check() {
            assert!(error.to_string().contains("CONFIG_MEM_SOFT_DIRTY"), "{error}");
            return;
        }
        let log = SoftDirty::begin(std::process::id() as i32, memory.base() as u64, 64).unwrap();
        assert!(memory.write(7 << 12, &[2]) && memory.write((63 << 12) + 4095, &[2]));
        let mut byte = [0];
        assert!(memory.read(9 << 12, &mut byte));
        let dirty = log.dirty().unwrap();
        let pages: Vec<u64> = (0..64).filter(|page| dirty.has(*page)).collect();
        assert_eq!(pages, [7, 63]);
        let mut log = log;
        assert_eq!(log.take().unwrap(), dirty);
        assert!(memory.write(8 << 12, &[3]));
        assert_eq!(log.dirty().unwrap().len(), 1);
        assert_eq!(log.written().unwrap(), log.dirty().unwrap());
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(memory.file(), hole, 20 << 12, 2 << 12).unwrap();
        assert_eq!(log.dirty().unwrap().len(), 3, "pages that were given back count as written");
        assert_eq!(log.written().unwrap().len(), 1, "and are not among those that were");
    }

    #[test]
    fn memory_that_has_not_all_arrived_is_known_by_its_trap() {
        use crate::memory::{GuestMemory, MemoryLayout};
        use crate::pager::{FaultsTo, Shards, Trap};
        let memory = GuestMemory::new(MemoryLayout::pc(64 << 12, 64 << 12).unwrap()).unwrap();
        let pid = std::process::id() as i32;
        assert!(!is_trapped(pid, memory.guest().addresses()).unwrap());
        let trap = Trap::register(&memory, FaultsTo::Pager, Shards::ONE).unwrap();
        assert!(is_trapped(pid, memory.guest().addresses()).unwrap());
        assert!(!is_trapped(pid, memory.landing().addresses()).unwrap());
        drop(trap);
        assert!(!is_trapped(pid, memory.guest().addresses()).unwrap());
    }
}
