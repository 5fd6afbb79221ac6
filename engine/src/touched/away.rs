//! Asks another process to take guest memory out of its mappings: what libpostcopy_handover.so has for that
//! (`vmm-glue/handover/src/away.rs`, which says what is where in the page that both sides map).

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use postcopy_transport::HostMemory;
use rustix::thread::futex;

use crate::memory::PAGE_SIZE;
use crate::proc_pages::memfd;

/// What the memfd of the page is called.
const NAME: &str = "postcopy-away";
/// Where its words are: how often it was asked, the last request that was done, and what was wrong with that.
const ASKED: u64 = 0;
const DONE: u64 = 4;
const WRONG: u64 = 8;
/// How long the process may take. 16 GiB of small pages take about a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// The page of another process by which it is asked.
#[derive(Debug)]
pub(super) struct Away(HostMemory);

impl Away {
    /// That of the process of this folder in /proc, if it has one.
    ///
    /// Errors: this process may not look into that one, or the page could be made shorter while it is read.
    pub(super) fn of(process: &Path) -> io::Result<Option<Self>> {
        let page = memfd(process, NAME)?.map(|file| HostMemory::map_sealed(file, PAGE_SIZE as usize));
        Ok(page.transpose()?.map(Self))
    }

    /// Has the memory taken out. Returns when it was, once, since this was called.
    ///
    /// Errors: the process does not answer, or could not (EINVAL: its memory is locked).
    pub(super) fn take_out(&self) -> io::Result<()> {
        let (asked, done, wrong) = (self.word(ASKED)?, self.word(DONE)?, self.word(WRONG)?);
        let request = asked.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        futex::wake(asked, futex::Flags::empty(), 1)?;
        let end = Instant::now() + PATIENCE;
        loop {
            let last = done.load(Ordering::Acquire);
            // Another may have asked after this.
            if last.wrapping_sub(request) as i32 >= 0 {
                return match wrong.load(Ordering::Relaxed) {
                    0 => Ok(()),
                    code => Err(io::Error::from_raw_os_error(code as i32)),
                };
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not take its pages out"));
            }
            let wait =
                rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // For nothing, at once or in vain: looked at again.
            let _ = futex::wait(done, futex::Flags::empty(), last, Some(&wait));
        }
    }

    fn word(&self, offset: u64) -> io::Result<&AtomicU32> {
        let at = self.0.at(offset, size_of::<u32>()).ok_or(io::ErrorKind::UnexpectedEof)?;
        // SAFETY: `at` checked that it lies inside the mapping, which begins on a page, so that the word is aligned, and
        // lives as long as `self`. Everybody reaches it by atomic access, and the file cannot be made shorter.
        Ok(unsafe { AtomicU32::from_ptr(at.cast()) })
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, SealFlags, memfd_create};

    use super::*;

    #[test]
    fn a_page_that_could_be_made_shorter_while_it_is_read_is_refused() {
        let this = Path::new("/proc/self");
        assert!(Away::of(this).unwrap().is_none());
        let file = memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, PAGE_SIZE).unwrap();
        let refused = Away::of(this).unwrap_err().to_string();
        assert!(refused.contains("not sealed"), "{refused}");
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(Away::of(this).unwrap().is_some());
    }
}
