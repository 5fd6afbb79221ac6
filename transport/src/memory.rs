//! Host memory that a wire may read from or land in.
//!
//! A [`HostMemory`] is a shared mapping of a file (a memfd), or of several as if they were one. It is memory that a peer, a device or
//! a guest can change at any moment, so no Rust reference into it is ever made but to atomics: only raw pointers
//! and the accessors here.

mod mapping;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use mapping::Mapping;
use rustix::mm::ProtFlags;

/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;
/// MADV_COLLAPSE of linux/mman.h (Linux 6.1).
const COLLAPSE: libc::c_int = 25;
/// Bytes that are looked at together, a cache line.
const LINE: usize = 64;

/// A shared mapping of a whole file, or of several one after the other, and the files. Cloning is cheap and shares all.
#[derive(Clone)]
pub struct HostMemory {
    mapping: Arc<Mapping>,
    files: Arc<[FilePart]>,
}

/// A file whose first `len` bytes are mapped.
pub(crate) struct FilePart {
    file: File,
    len: usize,
}

impl std::fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMemory").field("base", &self.base()).field("len", &self.len()).finish()
    }
}

impl HostMemory {
    /// Maps the first `len` bytes of `file`, readable and writable.
    ///
    /// Errors: what mmap(2) reports.
    pub fn map(file: File, len: usize) -> io::Result<Self> {
        Self::map_all([(file, len)])
    }

    /// Maps the first bytes of each file, so many, one after the other, readable and writable.
    ///
    /// Errors: the length of one that others follow is no multiple of a page's, or what mmap(2) reports.
    pub fn map_all(files: impl IntoIterator<Item = (File, usize)>) -> io::Result<Self> {
        let parts = files.into_iter().map(|(file, len)| FilePart { file, len });
        Self::of(parts.collect(), ProtFlags::READ | ProtFlags::WRITE)
    }

    fn of(files: Arc<[FilePart]>, protection: ProtFlags) -> io::Result<Self> {
        let explained = |error| {
            let huge = files.iter().find_map(|part| hugetlbfs_page(part.file.as_fd()).ok().flatten());
            match huge {
                Some(page) => not_enough(error, files.iter().map(|part| part.len as u64).sum(), page),
                None => error,
            }
        };
        let mapping = Mapping::new(&files, protection).map_err(explained)?;
        Ok(Self { mapping: Arc::new(mapping), files })
    }

    /// As [`HostMemory::map`], of a memfd of another process, of which no reads can fault.
    ///
    /// Errors: the file is shorter than `len` or not sealed against shrinking, or what mmap(2) reports.
    pub fn map_sealed(file: File, len: usize) -> io::Result<Self> {
        refuse_unsealed(&file, len)?;
        Self::map(file, len)
    }

    /// As [`HostMemory::map_sealed`], for reading only.
    ///
    /// Errors: as there.
    pub(crate) fn map_peer(file: File, len: usize) -> io::Result<Self> {
        refuse_unsealed(&file, len)?;
        Self::of([FilePart { file, len }].into(), ProtFlags::READ)
    }

    /// Makes an anonymous file of `len` bytes (a memfd named `name`, sealed in its length) and
    /// maps it.
    ///
    /// Errors: what memfd_create(2), ftruncate(2) or mmap(2) report.
    pub fn anonymous(name: &str, len: usize) -> io::Result<Self> {
        use rustix::fs::{MemfdFlags, SealFlags};
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(len as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Self::map(file, len)
    }

    /// As [`HostMemory::anonymous`], of huge pages of 2 MiB, which the system must have reserved: a
    /// registration of them takes a device fewer translations. `len` is rounded up to whole ones.
    ///
    /// Errors: as there; what to do if there are not enough.
    pub fn huge(name: &str, len: usize) -> io::Result<Self> {
        use rustix::fs::{MemfdFlags, SealFlags};
        let len = len.next_multiple_of(HUGE_PAGE);
        let flags =
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let none = |error| not_enough(error, len as u64, HUGE_PAGE as u64);
        let file = File::from(rustix::fs::memfd_create(name, flags).map_err(|e| none(e.into()))?);
        file.set_len(len as u64).map_err(none)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Self::map(file, len)
    }

    /// A second mapping of the same bytes of the same files.
    ///
    /// Errors: what mmap(2) reports.
    pub fn map_again(&self) -> io::Result<Self> {
        Self::of(self.files.clone(), ProtFlags::READ | ProtFlags::WRITE)
    }

    /// First address of the mapping in this process.
    pub fn base(&self) -> *mut u8 {
        self.mapping.base()
    }

    /// Addresses of the mapping in this process.
    pub fn addresses(&self) -> Range<u64> {
        let base = self.base() as u64;
        base..base + self.len() as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// True if the mapping has no bytes (mmap refuses such a mapping, so it never is).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The files behind the mapping in their order, and how many bytes of each it has.
    pub fn files(&self) -> impl Iterator<Item = (BorrowedFd<'_>, u64)> {
        self.files.iter().map(|part| (part.file.as_fd(), part.len as u64))
    }

    /// Whether nobody else holds this mapping any more.
    pub fn is_last(&self) -> bool {
        Arc::strong_count(&self.mapping) == 1
    }

    /// The next stretch, from `offset` on, that has content in its file, holes left out; `None` if there is none.
    ///
    /// Errors: what lseek(2) reports.
    pub fn next_content(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::{SeekFrom, seek};
        let mut begin = 0;
        for (file, len) in self.files() {
            let end = begin + len;
            if offset < end {
                match seek(file, SeekFrom::Data(offset.saturating_sub(begin))) {
                    // The file may be longer than what is mapped of it.
                    Ok(start) if start < len => {
                        let hole = seek(file, SeekFrom::Hole(start))?.min(len);
                        return Ok(Some(begin + start..begin + hole));
                    }
                    Ok(_) | Err(rustix::io::Errno::NXIO) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            begin = end;
        }
        Ok(None)
    }

    /// Makes holes of these bytes in their files, which give the memory back. They are zero from then on, wherever the
    /// files are mapped.
    ///
    /// Errors: what fallocate(2) reports.
    pub fn discard(&self, bytes: Range<u64>) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let mut begin = 0;
        for (file, len) in self.files() {
            let (from, to) = (bytes.start.max(begin), bytes.end.min(begin + len));
            if from < to {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, hole, from - begin, to - from)?;
            }
            begin += len;
        }
        Ok(())
    }

    /// Has the bytes from `offset` on, a multiple of [`HUGE_PAGE`] and as many, backed by one huge page
    /// from now on, here and wherever else the file is mapped. Their content stays as it is.
    ///
    /// Errors: what madvise(2) reports: EINVAL, the kernel has no MADV_COLLAPSE (older than 6.1), or not
    /// for this memory; ENOMEM, there is no huge page free; EBUSY, EAGAIN: somebody uses the memory.
    pub fn collapse(&self, offset: u64) -> io::Result<()> {
        let whole = offset.is_multiple_of(HUGE_PAGE as u64);
        let at = self.at(offset, HUGE_PAGE).filter(|_| whole).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the whole range lies in this mapping, and the advice changes no content.
        match unsafe { libc::madvise(at.cast(), HUGE_PAGE, COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Takes all pages out of this mapping, those of a huge page at a time: who uses the memory waits for as
    /// long as it takes for one, as KVM has its guest do. They stay in the file, and are mapped again when they
    /// are touched, which /proc/self/pagemap shows.
    ///
    /// Errors: what madvise(2) reports.
    pub fn unmap_pages(&self) -> io::Result<()> {
        for first in (0..self.len()).step_by(HUGE_PAGE) {
            let len = HUGE_PAGE.min(self.len() - first);
            let at = self.base().wrapping_add(first);
            // SAFETY: the range lies in this mapping, which is shared: its content is the file's.
            if unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Address of `offset`, if `len` bytes from there lie inside the mapping.
    pub fn at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len as u64)?;
        (end <= self.len() as u64).then(|| self.base().wrapping_add(offset as usize))
    }

    /// Copies `bytes` to `offset`. Returns false, and writes nothing, if they do not fit.
    ///
    /// Not for a mapping of a peer's memory, which is read-only.
    #[must_use]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some(to) = self.at(offset, bytes.len()) else { return false };
        // SAFETY: `at` checked that the whole target lies inside the mapping, which is writable
        // and lives as long as `self`; `bytes` is a distinct Rust slice, so they cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        true
    }

    /// Copies from `offset` into `bytes`. Returns false, and reads nothing, if out of range.
    #[must_use]
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, bytes.len()) else { return false };
        // SAFETY: as in `write`, with the directions exchanged.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        true
    }

    /// `len` bytes from `offset` on, one by one: others may change them at any time. `None` if out of range.
    ///
    /// Not for a mapping of a peer's memory, which is read-only.
    pub fn bytes(&self, offset: u64, len: usize) -> Option<&[AtomicU8]> {
        let first = self.at(offset, len)?;
        // SAFETY: `at` checked that all of them lie inside the mapping, which is writable and lives as long as `self`; an
        // atomic byte has the size and alignment of a byte, and may be changed by others.
        Some(unsafe { std::slice::from_raw_parts(first.cast::<AtomicU8>(), len) })
    }

    /// Whether all `len` bytes from `offset` on are zero: both multiples of 64. Stops at 64 that are not.
    /// `None` if they are no such multiples or out of range.
    pub fn is_zero(&self, offset: u64, len: usize) -> Option<bool> {
        let aligned = offset.is_multiple_of(LINE as u64) && len.is_multiple_of(LINE);
        let from = self.at(offset, len).filter(|_| aligned)?;
        let words = from.cast::<u64>();
        let zero = (0..len / size_of::<u64>()).step_by(8).all(|first| {
            let word = |at: usize| {
                // SAFETY: `at` checked that it lies inside the mapping, which begins on a page, so that the word is
                // aligned, and lives as long as `self`. It is read as what others may change at any time.
                unsafe { AtomicU64::from_ptr(words.wrapping_add(first + at)) }.load(Ordering::Relaxed)
            };
            word(0) | word(1) | word(2) | word(3) | word(4) | word(5) | word(6) | word(7) == 0
        });
        Some(zero)
    }
}

/// Bytes of the file's pages, if it is of hugetlbfs.
///
/// Errors: what fstatfs(2) reports.
pub fn hugetlbfs_page(file: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    const MAGIC: u64 = 0x9584_58f6;
    let system = rustix::fs::fstatfs(file)?;
    Ok((system.f_type as u64 == MAGIC).then_some(system.f_bsize as u64))
}

/// With what to do about it: `error` has come of taking `len` bytes of huge pages of `page` bytes.
fn not_enough(error: io::Error, len: u64, page: u64) -> io::Error {
    let (needed, mib) = (len.div_ceil(page), page >> 20);
    // The default size, on x86-64.
    let how = match page == HUGE_PAGE as u64 {
        true => format!("sysctl vm.nr_hugepages={needed}"),
        false => format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", page >> 10),
    };
    let said = format!(
        "{error}; {needed} huge pages of {mib} MiB are needed: reserve them ({how} or more) or go without"
    );
    io::Error::new(error.kind(), said)
}

/// Refuses a memfd of another process that is shorter than `len` or could be made so: our reads could then fault.
fn refuse_unsealed(file: &File, len: usize) -> io::Result<()> {
    let sealed = rustix::fs::fcntl_get_seals(file)?.contains(rustix::fs::SealFlags::SHRINK);
    if !sealed || file.metadata()?.len() < len as u64 {
        return Err(io::Error::other("the peer's memfd is short or not sealed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_files_are_one_memory() {
        let file = |pages: u64| {
            let file = File::from(rustix::fs::memfd_create("part", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
            // Longer than what is mapped of it, and with content there.
            file.set_len((pages + 1) << 12).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"behind", pages << 12).unwrap();
            file
        };
        let lens = [3 << 12, HUGE_PAGE, 5 << 12];
        let memory = HostMemory::map_all(lens.map(|len| (file(len as u64 >> 12), len))).unwrap();
        let again = memory.map_again().unwrap();
        let (first, last) = (lens[0] as u64, (lens[0] + lens[1]) as u64);
        assert_eq!((memory.len(), again.len()), (lens.iter().sum(), memory.len()));
        assert_eq!(memory.files().map(|(_, len)| len as usize).collect::<Vec<_>>(), lens);
        assert_eq!(memory.next_content(0).unwrap(), None);
        // Over a border, and to the end.
        assert!(memory.write(first - 4, b"borders!") && memory.write(last + (4 << 12), b"end"));
        let mut seen = [0; 8];
        assert!(again.read(first - 4, &mut seen) && &seen == b"borders!");
        let border = [first - 4096..first, first..first + 4096];
        assert_eq!(memory.next_content(0).unwrap(), Some(border[0].clone()));
        assert_eq!(memory.next_content(first).unwrap(), Some(border[1].clone()));
        let end = last + (4 << 12)..last + (5 << 12);
        assert_eq!(memory.next_content(first + 4096).unwrap(), Some(end.clone()));
        memory.discard(border[0].start..border[1].end).unwrap();
        assert_eq!(memory.next_content(0).unwrap(), Some(end));
        assert!(again.read(first - 4, &mut seen) && seen == [0; 8]);
        let odd = HostMemory::map_all([(file(1), 100), (file(1), 4096)]).unwrap_err();
        assert_eq!(odd.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_single_byte_anywhere_is_not_zero_and_a_range_that_cannot_be_looked_at_is_refused() {
        let memory = HostMemory::anonymous("zero", 8192).unwrap();
        assert_eq!(memory.is_zero(4096, 4096), Some(true));
        for at in [4096, 4096 + 63, 4096 + 64 + 8, 8191] {
            assert!(memory.write(at, &[0x80]));
            assert_eq!(memory.is_zero(4096, 4096), Some(false), "byte {at}");
            assert!(memory.write(at, &[0]));
        }
        assert!(memory.write(4095, &[1]));
        assert_eq!(memory.is_zero(4096, 4096), Some(true), "the byte before counts to another page");
        for (offset, len) in [(0, 8200), (8192, 64), (u64::MAX - 63, 64), (8, 64), (0, 63)] {
            assert_eq!(memory.is_zero(offset, len), None, "{len} bytes at {offset}");
        }
    }
}
