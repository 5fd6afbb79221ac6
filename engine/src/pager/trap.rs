//! The trap under the guest mapping: userfaultfd, behind page numbers.
//!
//! A page of the guest mapping is in one of three states for the kernel: no page in the file
//! (a *missing* fault), a page in the file but not in the guest mapping (a *minor* fault: it may be
//! half-landed), or mapped. Publishing is UFFDIO_CONTINUE, which maps the file's page. Both kinds
//! of fault come here, so the guest never sees a page before it is whole.
//!
//! Fail closed: the descriptor lives as long as any clone of [`Trap`] does. While it lives, a guest
//! that touches a page which nobody publishes waits; only closing it would show zeros.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use postcopy_transport::HostMemory;
use userfaultfd::{Error as UffdError, Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::memory::{GuestMemory, PAGE_SIZE, PageIndex};
use crate::pager::PagerError;
use crate::planner::Run;

/// UFFD_FEATURE_MINOR_SHMEM of linux/userfaultfd.h (Linux 5.14); the binding has no name for it.
const MINOR_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 10);

/// The registered guest mapping. Clones share one descriptor.
#[derive(Clone)]
pub struct Trap {
    uffd: Arc<Uffd>,
    memory: GuestMemory,
    signals: bool,
}

impl Trap {
    /// Registers the guest mapping of `memory` for missing and minor faults, which the pager's
    /// thread serves.
    ///
    /// Errors: userfaultfd is refused (EPERM: who runs this may not), the kernel has no minor
    /// faults on shared memory (older than 5.14), or the registration fails.
    pub fn register(memory: &GuestMemory) -> Result<Self, PagerError> {
        Self::with(memory, false)
    }

    /// As [`Trap::register`], but the thread that touches a page is told by a signal (SIGBUS), or
    /// KVM by an error, and serves the fault itself.
    ///
    /// Errors: as [`Trap::register`].
    pub fn register_for_self_service(memory: &GuestMemory) -> Result<Self, PagerError> {
        Self::with(memory, true)
    }

    fn with(memory: &GuestMemory, signals: bool) -> Result<Self, PagerError> {
        let mut features = FeatureFlags::MISSING_SHMEM | MINOR_SHMEM;
        if signals {
            features |= FeatureFlags::SIGBUS;
        }
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(features)
            .create()
            .map_err(refused)?;
        let guest = memory.guest();
        uffd.register_with_mode(
            guest.base().cast(),
            guest.len(),
            RegisterMode::MISSING | RegisterMode::MINOR,
        )
        .map_err(|error| PagerError::Userfault { operation: "UFFDIO_REGISTER", source: errno(error) })?;
        Ok(Self { uffd: Arc::new(uffd), memory: memory.clone(), signals })
    }

    /// Whether touches are told to who touched, and not to the pager.
    pub fn is_for_self_service(&self) -> bool {
        self.signals
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

    /// Reads the faults that are pending into `faults`. Never blocks.
    pub fn take_faults(
        &self,
        buffer: &mut EventBuffer,
        faults: &mut Vec<PageIndex>,
    ) -> Result<(), PagerError> {
        let base = self.memory.guest().base() as u64;
        let events = match self.uffd.read_events(buffer) {
            Ok(events) => events,
            Err(error) => return wait_or(error),
        };
        for event in events {
            match event {
                Ok(Event::Pagefault { addr, .. }) => {
                    let offset = (addr as u64).wrapping_sub(base);
                    faults.push(PageIndex::containing(offset));
                }
                Ok(_) => {}
                Err(error) => return wait_or(error),
            }
        }
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
                    Some(libc::EAGAIN) => {}
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
                    Some(libc::EAGAIN) => {}
                    code => return Err(failed("UFFDIO_ZEROPAGE", code)),
                },
            }
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
        let guest = self.memory.guest();
        let (base, len) = (guest.base().cast(), guest.len());
        let done = self.uffd.unregister(base, len);
        done.map_err(|error| PagerError::Userfault { operation: "UFFDIO_UNREGISTER", source: errno(error) })?;
        // Unregistering wakes who waits before it changes the mapping. Where faults take only the
        // lock of their mapping (Linux 6.7), one may begin to wait in between and sleep for ever;
        // none can after it.
        let woken = self.uffd.wake(base, len);
        woken.map_err(|error| PagerError::Userfault { operation: "UFFDIO_WAKE", source: errno(error) })
    }

    fn address(&self, offset: u64) -> *mut libc::c_void {
        self.memory.guest().base().wrapping_add(offset as usize).cast()
    }
}

impl AsFd for Trap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `self.uffd`, which the borrow cannot outlive.
        unsafe { BorrowedFd::borrow_raw(self.uffd.as_raw_fd()) }
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
