//! What the kernel says of a process's pages: /proc/PID/pagemap, of its mappings: /proc/PID/smaps, and of its memfds:
//! /proc/PID/fd.

mod scan;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::SplitAsciiWhitespace;

use postcopy_transport::HostMemory;

use crate::memory::PAGE_SIZE;
use crate::page_set::PageSet;
use crate::places::Places;

pub(crate) use self::scan::{Which, scan};

/// Bytes of a page's entry.
const ENTRY: u64 = 8;
/// Bytes of entries read at once.
const CHUNK: usize = 64 << 10;

/// A page's entry, of Documentation/admin-guide/mm/pagemap.rst.
#[derive(Clone, Copy)]
pub(crate) struct Entry(u64);

impl Entry {
    /// The page is mapped there.
    pub(crate) fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// It was written, by that mapping, since the process's bits were cleared; or the mapping is new.
    pub(crate) fn is_soft_dirty(self) -> bool {
        self.0 >> 55 & 1 == 1
    }
}

/// Shows each page of these places in the process of this folder in /proc.
pub(crate) fn each(process: &Path, places: &Places, mut show: impl FnMut(u64, Entry)) -> std::io::Result<()> {
    let map = File::open(process.join("pagemap"))?;
    let mut buffer = vec![0u8; CHUNK];
    for place in places.each() {
        let (to, pages, mut at) = (place.offset / PAGE_SIZE, place.len / PAGE_SIZE, 0);
        while at < pages {
            let count = (pages - at).min(CHUNK as u64 / ENTRY);
            let entries = &mut buffer[..(count * ENTRY) as usize];
            map.read_exact_at(entries, (place.address / PAGE_SIZE + at) * ENTRY)?;
            for (page, entry) in (to + at..).zip(entries.chunks_exact(ENTRY as usize)) {
                let word = entry.try_into().map(u64::from_le_bytes).unwrap_or_default();
                show(page, Entry(word));
            }
            at += count;
        }
    }
    Ok(())
}

/// A memfd of this name that the process of this folder in /proc has open, for reading and writing, if it has one.
///
/// Errors: this process may not look into that one.
pub fn memfd(process: &Path, name: &str) -> std::io::Result<Option<File>> {
    let wanted = format!("/memfd:{name} (deleted)");
    for entry in std::fs::read_dir(process.join("fd"))?.flatten() {
        // It may have been closed meanwhile.
        if std::fs::read_link(entry.path()).is_ok_and(|link| link == Path::new(&wanted)) {
            return File::options().read(true).write(true).open(entry.path()).map(Some);
        }
    }
    Ok(None)
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

/// Whether some of these places of process `pid` are of huge pages of hugetlbfs.
///
/// Errors: this process may not look into that one.
pub(crate) fn is_hugetlbfs(pid: i32, places: &Places) -> std::io::Result<bool> {
    let mut huge = false;
    for place in places.each() {
        each_field(pid, place.address..place.address + place.len, |name, mut values| {
            let kib = values.next().and_then(|value| value.parse::<u64>().ok());
            huge |= name == "KernelPageSize:" && kib.is_some_and(|kib| kib << 10 > PAGE_SIZE);
        })?;
    }
    Ok(huge)
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
    mapped_in(Path::new("/proc/self"), &places_of(memory))
}

fn places_of(memory: &HostMemory) -> Places {
    Places::one(memory.base() as u64, memory.len() as u64)
}

/// Those pages of these places that are mapped in the process of this folder in /proc.
pub(crate) fn mapped_in(process: &Path, places: &Places) -> std::io::Result<PageSet> {
    match scan(&File::open(process.join("pagemap"))?, places, Which::Mapped) {
        // An older kernel.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => mapped_by_entries(process, places),
        mapped => mapped,
    }
}

fn mapped_by_entries(process: &Path, places: &Places) -> std::io::Result<PageSet> {
    let mut mapped = PageSet::new(places.pages(), false);
    each(process, places, |page, entry| {
        if entry.is_present() {
            mapped.put(page, page + 1, true);
        }
    })?;
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_was_given_back_is_seen_also_when_it_is_used_again() {
        let memory = HostMemory::anonymous("given-back", 64 << 12).unwrap();
        let theirs = memory.map_again().unwrap();
        for page in 0..64 {
            assert!(memory.write(page << 12, &[1]));
        }
        assert_eq!(unmapped(&memory).unwrap(), 0);
        memory.discard(5 << 12..7 << 12).unwrap();
        assert!(theirs.write(5 << 12, &[2]), "used again by another process");
        assert_eq!(unmapped(&memory).unwrap(), 2);
        let by_entries = mapped_by_entries(Path::new("/proc/self"), &places_of(&memory)).unwrap();
        let runs = |set: &PageSet| set.runs(64).map(|run| (run.first.0, run.count)).collect::<Vec<_>>();
        assert_eq!(runs(&by_entries), [(0, 5), (7, 57)]);
        assert_eq!(runs(&mapped(&memory).unwrap()), runs(&by_entries));
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
