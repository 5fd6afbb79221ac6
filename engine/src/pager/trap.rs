//! The trap under the guest mapping: userfaultfd, behind page numbers.
//!
//! A page of the guest mapping is in one of three states for the kernel: no page in the file
//! (a *missing* fault), a page in the file but not in the guest mapping (a *minor* fault: it may be
//! half-landed), or mapped. Publishing is UFFDIO_CONTINUE, which maps the file's page. Both kinds
//! of fault come here, so the guest never sees a page before it is whole.
//!
//! The guest mapping may be another process's: the descriptor then was made there, and the addresses
//! are that process's. Such a guest may give pages back (a balloon, free-page reporting): the kernel
//! tells of it, and what it touches of them afterwards is zero.
//!
//! Fail closed: the descriptor lives as long as any clone of [`Trap`] does. While it lives, a guest
//! that touches a page which nobody publishes waits; only closing it would show zeros.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use postcopy_transport::HostMemory;
use userfaultfd::{Error as UffdError, Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::memory::{GuestMemory, PAGE_SIZE, PageIndex};
use crate::pager::PagerError;
use crate::planner::Run;

/// UFFD_FEATURE_MINOR_SHMEM of linux/userfaultfd.h (Linux 5.14); the binding has no name for it.
const MINOR_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 10);
/// What every trap needs: both kinds of faults of shared memory, and who waits.
const NEEDED: FeatureFlags = FeatureFlags::MISSING_SHMEM.union(MINOR_SHMEM).union(FeatureFlags::THREAD_ID);

/// The registered guest mapping. Clones share one descriptor.
#[derive(Clone)]
pub struct Trap {
    uffd: Arc<Uffd>,
    memory: GuestMemory,
    /// Address of the guest mapping in the process that has it.
    base: u64,
    whose: Whose,
    /// Events that were read while a page was being published.
    early: Arc<Mutex<Vec<TrapEvent>>>,
}

/// Who touches the guest mapping, and who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// Threads of this process, and the pager is told.
    Ours,
    /// Threads of this process, which are told themselves.
    OursForSelfService,
    /// Another process. It may discard pages.
    Theirs,
}

/// What the kernel tells of the guest mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrapEvent {
    /// Somebody waits for a page.
    Fault {
        /// Which.
        page: PageIndex,
        /// Who, as gettid(2) gives it there. Where KVM has a worker wait in the vCPU's stead, the worker.
        thread: i32,
    },
    /// These pages were given back: they are zero from now on, unless something is written there.
    Discarded {
        /// The first.
        first: PageIndex,
        /// One behind the last.
        end: PageIndex,
    },
}

impl Trap {
    /// Registers the guest mapping of `memory` for missing and minor faults, which the pager's
    /// thread serves.
    ///
    /// Errors: userfaultfd is refused (EPERM: who runs this may not), the kernel has no minor
    /// faults on shared memory (older than 5.14), or the registration fails.
    pub fn register(memory: &GuestMemory) -> Result<Self, PagerError> {
        Self::with(memory, Whose::Ours)
    }

    /// As [`Trap::register`], but the thread that touches a page is told by a signal (SIGBUS), or
    /// KVM by an error, and serves the fault itself.
    ///
    /// Errors: as [`Trap::register`].
    pub fn register_for_self_service(memory: &GuestMemory) -> Result<Self, PagerError> {
        Self::with(memory, Whose::OursForSelfService)
    }

    /// Registers the mapping of the guest's memory in another process, which starts at `base` there,
    /// by the userfaultfd `descriptor` that was made there and not set up. Nothing in the file is kept:
    /// what was there is given back first.
    ///
    /// Errors: `descriptor` is none, that mapping cannot be registered, or its pages are larger than
    /// the engine's (hugetlbfs).
    pub fn adopt(descriptor: OwnedFd, base: u64, memory: &GuestMemory) -> Result<Self, PagerError> {
        refuse_hugetlbfs(memory.guest().file())?;
        let empty = |source: io::Error| PagerError::System { operation: "emptying guest memory", source };
        let all = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let emptied = rustix::fs::fallocate(memory.guest().file(), all, 0, memory.guest().len() as u64);
        emptied.map_err(|errno| empty(errno.into()))?;
        rustix::io::ioctl_fionbio(&descriptor, true).map_err(|errno| empty(errno.into()))?;
        set_up(&descriptor, NEEDED | FeatureFlags::EVENT_REMOVE)?;
        // SAFETY: the descriptor is owned and given up here, so `uffd` is its only owner.
        let uffd = unsafe { Uffd::from_raw_fd(descriptor.into_raw_fd()) };
        Self::over(uffd, memory, base, Whose::Theirs)
    }

    fn with(memory: &GuestMemory, whose: Whose) -> Result<Self, PagerError> {
        let mut features = NEEDED;
        if whose == Whose::OursForSelfService {
            features |= FeatureFlags::SIGBUS;
        }
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(features)
            .create()
            .map_err(refused)?;
        Self::over(uffd, memory, memory.guest().base() as u64, whose)
    }

    fn over(uffd: Uffd, memory: &GuestMemory, base: u64, whose: Whose) -> Result<Self, PagerError> {
        let (start, mode) = (base as *mut libc::c_void, RegisterMode::MISSING | RegisterMode::MINOR);
        uffd.register_with_mode(start, memory.guest().len(), mode)
            .map_err(|error| PagerError::Userfault { operation: "UFFDIO_REGISTER", source: errno(error) })?;
        Ok(Self { uffd: Arc::new(uffd), memory: memory.clone(), base, whose, early: Arc::default() })
    }

    /// Whether touches are told to who touched, and not to the pager.
    pub fn is_for_self_service(&self) -> bool {
        self.whose == Whose::OursForSelfService
    }

    /// The trapped mapping.
    pub(super) fn guest(&self) -> &HostMemory {
        self.memory.guest()
    }

    /// Whether this process may use userfaultfd as the pager needs it.
    ///
    /// Errors: as [`Trap::register`].
    pub fn check() -> Result<(), PagerError> {
        let layout = crate::memory::MemoryLayout::pc(PAGE_SIZE, PAGE_SIZE).expect("one page is a layout");
        let memory = GuestMemory::new(layout)
            .map_err(|source| PagerError::Userfault { operation: "memfd_create", source })?;
        Self::register(&memory).map(drop)
    }

    /// Adds what has happened since the last call to `seen`. Never blocks.
    pub fn take(&self, buffer: &mut EventBuffer, seen: &mut Vec<TrapEvent>) -> Result<(), PagerError> {
        if self.whose == Whose::Theirs {
            seen.append(&mut self.early());
        }
        let events = match self.uffd.read_events(buffer) {
            Ok(events) => events,
            Err(error) => return wait_or(error),
        };
        let page = |address: u64| PageIndex::containing(address.wrapping_sub(self.base));
        for event in events {
            match event {
                Ok(Event::Pagefault { addr, thread_id, .. }) => {
                    seen.push(TrapEvent::Fault { page: page(addr as u64), thread: thread_id.as_raw() });
                }
                Ok(Event::Remove { start, end }) => {
                    seen.push(TrapEvent::Discarded { first: page(start as u64), end: page(end as u64) });
                }
                Ok(_) => {}
                Err(error) => return wait_or(error),
            }
        }
        Ok(())
    }

    fn early(&self) -> MutexGuard<'_, Vec<TrapEvent>> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address space is being changed. Where the change is told of, it ends when that was heard.
    fn let_change(&self) -> Result<(), PagerError> {
        if self.whose != Whose::Theirs {
            return Ok(());
        }
        let mut heard = Vec::new();
        self.take(&mut EventBuffer::new(1), &mut heard)?;
        self.early().append(&mut heard);
        Ok(())
    }

    /// Maps a run that has landed into the guest, and wakes who waits for it.
    pub fn publish(&self, run: Run) -> Result<(), PagerError> {
        let (mut at, end) = (run.first.offset(), run.first.offset() + u64::from(run.count) * PAGE_SIZE);
        while at < end {
            match self.uffd.r#continue(self.address(at), (end - at) as usize, true) {
                Ok(mapped) => at += mapped,
                Err(error) => match errno(error).raw_os_error() {
                    // Another thread mapped it first, or the address space is being changed.
                    Some(libc::EEXIST) => {
                        self.wake(PageIndex::containing(at))?;
                        at += PAGE_SIZE;
                    }
                    Some(libc::EAGAIN) => self.let_change()?,
                    // Discarded since it landed.
                    Some(libc::EFAULT) if self.whose == Whose::Theirs => {
                        self.publish_zero(PageIndex::containing(at), false)?;
                        at += PAGE_SIZE;
                    }
                    code => return Err(failed("UFFDIO_CONTINUE", code)),
                },
            }
        }
        Ok(())
    }

    /// Maps a page of zeros into the guest, and wakes who waits for it.
    ///
    /// `landed` says that the file has a page there already (pinned landing memory): it is zero,
    /// since nothing was read into it.
    pub fn publish_zero(&self, page: PageIndex, landed: bool) -> Result<(), PagerError> {
        if landed {
            return self.publish(Run::one(page));
        }
        loop {
            // SAFETY: the page lies in the registered guest mapping, and the planner publishes a
            // page once, so no content is overwritten (the kernel answers EEXIST otherwise).
            let zeroed = unsafe { self.uffd.zeropage(self.address(page.offset()), PAGE_SIZE as usize, true) };
            match zeroed {
                Ok(_) => return Ok(()),
                Err(error) => match errno(error).raw_os_error() {
                    Some(libc::EEXIST) => return self.publish(Run::one(page)),
                    Some(libc::EAGAIN) => self.let_change()?,
                    code => return Err(failed("UFFDIO_ZEROPAGE", code)),
                },
            }
        }
    }

    /// Shows a page that was published before to who waits for it: he was late to ask, or has
    /// discarded it since.
    pub fn show_again(&self, page: PageIndex) -> Result<(), PagerError> {
        match self.whose {
            Whose::Theirs => self.publish_zero(page, false),
            Whose::Ours | Whose::OursForSelfService => self.wake(page),
        }
    }

    /// Wakes who waits for a page that is mapped.
    pub fn wake(&self, page: PageIndex) -> Result<(), PagerError> {
        let woken = self.uffd.wake(self.address(page.offset()), PAGE_SIZE as usize);
        woken.map_err(|error| PagerError::Userfault { operation: "UFFDIO_WAKE", source: errno(error) })
    }

    /// Ends the trapping: every page is published or zero. What was never touched reads as zeros
    /// from now on, which is what it is.
    pub fn release(&self) -> Result<(), PagerError> {
        let (base, len) = (self.address(0), self.memory.guest().len());
        let done = self.uffd.unregister(base, len);
        done.map_err(|error| PagerError::Userfault { operation: "UFFDIO_UNREGISTER", source: errno(error) })?;
        // Unregistering wakes who waits before it changes the mapping. Where faults take only the
        // lock of their mapping (Linux 6.7), one may begin to wait in between and sleep for ever;
        // none can after it.
        let woken = self.uffd.wake(base, len);
        woken.map_err(|error| PagerError::Userfault { operation: "UFFDIO_WAKE", source: errno(error) })?;
        self.hear_the_last()
    }

    /// Whoever gives pages back waits until that was heard, also if he had begun before the trap was
    /// lifted: nobody may be left waiting. Nobody begins after it.
    fn hear_the_last(&self) -> Result<(), PagerError> {
        if self.whose != Whose::Theirs {
            return Ok(());
        }
        // Publishing is refused for this reason before any other.
        let changing = || match self.uffd.r#continue(self.address(0), PAGE_SIZE as usize, false) {
            Ok(_) => false,
            Err(error) => errno(error).raw_os_error() == Some(libc::EAGAIN),
        };
        while changing() {
            self.let_change()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    fn address(&self, offset: u64) -> *mut libc::c_void {
        self.base.wrapping_add(offset) as *mut libc::c_void
    }
}

impl AsFd for Trap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `self.uffd`, which the borrow cannot outlive.
        unsafe { BorrowedFd::borrow_raw(self.uffd.as_raw_fd()) }
    }
}

/// UFFDIO_API and its argument, of linux/userfaultfd.h: the binding does this only for descriptors
/// that it has made itself.
const UFFDIO_API: libc::Ioctl = libc::_IOWR::<Api>(0xaa, 0x3f);
const UFFD_API: u64 = 0xaa;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Pages of hugetlbfs are 2 MiB or 1 GiB, and can be trapped and published only as such.
///
/// Errors: the file is of that kind.
fn refuse_hugetlbfs(file: BorrowedFd<'_>) -> Result<(), PagerError> {
    const MAGIC: u64 = 0x9584_58f6;
    let failed = |source| PagerError::System { operation: "trapping guest memory", source };
    let found = rustix::fs::fstatfs(file).map_err(|errno| failed(errno.into()))?;
    if found.f_type as u64 != MAGIC {
        return Ok(());
    }
    Err(failed(io::Error::other(
        "it is hugetlbfs, and a guest arrives in pages of 4 KiB; give it memory without hugetlb=on or a mem-path \
         on hugetlbfs",
    )))
}

/// Asks for features of a userfaultfd that nobody has asked yet.
fn set_up(descriptor: &OwnedFd, features: FeatureFlags) -> Result<(), PagerError> {
    let mut api = Api { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: the descriptor is open, and the argument is what this request reads and writes.
    let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API, &raw mut api) };
    match answer {
        0 => Ok(()),
        _ => Err(PagerError::Userfault { operation: "UFFDIO_API", source: io::Error::last_os_error() }),
    }
}

fn wait_or(error: UffdError) -> Result<(), PagerError> {
    match errno(error) {
        source if source.kind() == io::ErrorKind::WouldBlock => Ok(()),
        source => Err(PagerError::Userfault { operation: "reading faults", source }),
    }
}

fn failed(operation: &'static str, code: Option<i32>) -> PagerError {
    PagerError::Userfault { operation, source: io::Error::from_raw_os_error(code.unwrap_or(libc::EIO)) }
}

fn refused(error: UffdError) -> PagerError {
    match errno(error) {
        source if matches!(source.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
            PagerError::UserfaultRefused { source }
        }
        source => {
            PagerError::Userfault { operation: "opening userfaultfd (Linux 5.14 or newer is needed)", source }
        }
    }
}

/// The system error inside the binding's error.
fn errno(error: UffdError) -> io::Error {
    match error {
        UffdError::SystemError(code) | UffdError::CopyFailed(code) | UffdError::ZeropageFailed(code) => {
            io::Error::from_raw_os_error(code as i32)
        }
        UffdError::OpenDevUserfaultfd(source) => source,
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests;
