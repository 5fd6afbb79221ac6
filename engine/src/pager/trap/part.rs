//! The trap under one part of the guest mapping: a userfaultfd of its own, behind page numbers that
//! count from the part's first page.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use userfaultfd::{Error as UffdError, Event, EventBuffer, RegisterMode, Uffd};

use super::{TrapEvent, Whose, failed};
use crate::memory::{PAGE_SIZE, PageIndex};
use crate::pager::PagerError;
use crate::pager::shards::Part;
use crate::planner::Run;

/// A registered part of the guest mapping. Clones share one descriptor.
#[derive(Clone)]
pub(in crate::pager) struct PartTrap {
    uffd: Arc<Uffd>,
    part: Part,
    /// Address of the part's first byte in the process that has the guest mapping.
    base: u64,
    whose: Whose,
    /// Events that were read while a page was being published.
    early: Arc<Mutex<Vec<TrapEvent>>>,
}

impl PartTrap {
    /// Registers `part` of the guest mapping, which starts at `guest`, with a userfaultfd that is set
    /// up and has nothing registered.
    pub(super) fn over(uffd: Uffd, part: Part, guest: u64, whose: Whose) -> Result<Self, PagerError> {
        let base = guest.wrapping_add(part.offset());
        let (start, mode) = (base as *mut libc::c_void, RegisterMode::MISSING | RegisterMode::MINOR);
        uffd.register_with_mode(start, part.bytes() as usize, mode)
            .map_err(|error| PagerError::Userfault { operation: "UFFDIO_REGISTER", source: errno(error) })?;
        Ok(Self { uffd: Arc::new(uffd), part, base, whose, early: Arc::default() })
    }

    /// Which part it is.
    pub(in crate::pager) fn part(&self) -> Part {
        self.part
    }

    /// Address of its first byte in the process that has the guest mapping.
    pub(in crate::pager) fn base(&self) -> u64 {
        self.base
    }

    /// Whether touches are told to who touched, and not to the pager.
    pub(in crate::pager) fn is_for_self_service(&self) -> bool {
        self.whose == Whose::Threads
    }

    /// Adds what has happened since the last call to `seen`. Never blocks.
    pub(in crate::pager) fn take(
        &self,
        buffer: &mut EventBuffer,
        seen: &mut Vec<TrapEvent>,
    ) -> Result<(), PagerError> {
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
    pub(in crate::pager) fn publish(&self, run: Run) -> Result<(), PagerError> {
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
    pub(in crate::pager) fn publish_zero(&self, page: PageIndex, landed: bool) -> Result<(), PagerError> {
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
    pub(in crate::pager) fn show_again(&self, page: PageIndex) -> Result<(), PagerError> {
        match self.whose {
            Whose::Theirs => self.publish_zero(page, false),
            Whose::Pager | Whose::Threads => self.wake(page),
        }
    }

    /// Wakes who waits for a page that is mapped.
    pub(in crate::pager) fn wake(&self, page: PageIndex) -> Result<(), PagerError> {
        let woken = self.uffd.wake(self.address(page.offset()), PAGE_SIZE as usize);
        woken.map_err(|error| PagerError::Userfault { operation: "UFFDIO_WAKE", source: errno(error) })
    }

    /// Ends the trapping: every page is published or zero. What was never touched reads as zeros
    /// from now on, which is what it is.
    pub(in crate::pager) fn release(&self) -> Result<(), PagerError> {
        let (base, len) = (self.address(0), self.part.bytes() as usize);
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

impl AsFd for PartTrap {
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

/// The system error inside the binding's error.
pub(super) fn errno(error: UffdError) -> io::Error {
    match error {
        UffdError::SystemError(code) | UffdError::CopyFailed(code) | UffdError::ZeropageFailed(code) => {
            io::Error::from_raw_os_error(code as i32)
        }
        UffdError::OpenDevUserfaultfd(source) => source,
        other => io::Error::other(other.to_string()),
    }
}
