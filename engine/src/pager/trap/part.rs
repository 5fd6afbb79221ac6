//! The trap under one part of the guest mapping: a userfaultfd of its own, behind page numbers that
//! count from the part's first page.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use postcopy_transport::HostMemory;
use userfaultfd::{Error as UffdError, Event, EventBuffer, RegisterMode, Uffd};

use super::{TrapEvent, Whose, failed};
use crate::memory::{PAGE_SIZE, PageIndex};
use crate::pager::ledger::Ledger;
use crate::pager::shards::Part;
use crate::pager::{PagerError, locked};
use crate::places::Places;
use crate::planner::Run;

/// A registered part of the guest mapping. Clones share one descriptor.
#[derive(Clone)]
pub(in crate::pager) struct PartTrap {
    uffd: Arc<Uffd>,
    part: Part,
    /// Where the part is in the process that has the guest mapping.
    places: Places,
    whose: Whose,
    /// No file is behind it: pages can only be copied in.
    anonymous: bool,
    /// Events that were read while a page was being published.
    early: Arc<Mutex<Vec<TrapEvent>>>,
    /// Events wait: the source's guest may run.
    held: Arc<AtomicBool>,
    /// Which pages were given back, where that is told: what has landed for them since is stale.
    ledger: Ledger,
}

impl PartTrap {
    /// Registers `part` of the guest mapping, which is at `guest`, with a userfaultfd that is set
    /// up and has nothing registered.
    pub(super) fn over(
        uffd: Uffd,
        (part, guest): (Part, &Places),
        whose: Whose,
        ledger: &Ledger,
    ) -> Result<Self, PagerError> {
        let trap = Self::new(uffd, (part, guest), whose, ledger);
        trap.registered(RegisterMode::MISSING | RegisterMode::MINOR)
    }

    /// As [`PartTrap::over`], for a mapping of another process that has no file behind it.
    pub(super) fn over_anonymous(
        uffd: Uffd,
        (part, guest): (Part, &Places),
        ledger: &Ledger,
    ) -> Result<Self, PagerError> {
        let trap = Self::new(uffd, (part, guest), Whose::Theirs, ledger);
        Self { anonymous: true, ..trap }.registered(RegisterMode::MISSING)
    }

    /// As [`PartTrap::over`], which another process has done that has ended since.
    pub(super) fn registered_before(uffd: Uffd, (part, guest): (Part, &Places), ledger: &Ledger) -> Self {
        Self::new(uffd, (part, guest), Whose::Theirs, ledger)
    }

    fn new(uffd: Uffd, (part, guest): (Part, &Places), whose: Whose, ledger: &Ledger) -> Self {
        Self {
            uffd: Arc::new(uffd),
            part,
            places: guest.part(part.offset(), part.bytes()),
            whose,
            anonymous: false,
            early: Arc::default(),
            held: Arc::default(),
            ledger: ledger.clone(),
        }
    }

    fn registered(self, mode: RegisterMode) -> Result<Self, PagerError> {
        for place in self.places.each() {
            let (at, len) = (place.address as *mut libc::c_void, place.len as usize);
            self.uffd.register_with_mode(at, len, mode).map_err(not_done("UFFDIO_REGISTER"))?;
        }
        Ok(self)
    }

    pub(super) fn note_in(&mut self, ledger: &Ledger) {
        self.ledger = ledger.clone();
    }

    /// Which part it is.
    pub(in crate::pager) fn part(&self) -> Part {
        self.part
    }

    /// Address of its first byte in the process that has the guest mapping.
    pub(in crate::pager) fn base(&self) -> u64 {
        self.at(0).0 as u64
    }

    /// Whether touches are told to who touched, and not to the pager.
    pub(in crate::pager) fn is_for_self_service(&self) -> bool {
        self.whose == Whose::Threads
    }

    /// Leaves events where they are, or not.
    pub(super) fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Release);
    }

    /// Adds what has happened since the last call to `seen`, unless it is [held](PartTrap::hold). Never blocks.
    pub(in crate::pager) fn take(
        &self,
        buffer: &mut EventBuffer,
        seen: &mut Vec<TrapEvent>,
    ) -> Result<(), PagerError> {
        if self.held.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.whose == Whose::Theirs {
            seen.append(&mut locked(&self.early));
        }
        let events = match self.uffd.read_events(buffer) {
            Ok(events) => events,
            Err(error) => return wait_or(error),
        };
        // Nothing else is registered.
        let page = |address: u64| self.places.offset_of(address).map(PageIndex::containing);
        for event in events {
            match event {
                Ok(Event::Pagefault { addr, thread_id, .. }) => {
                    let fault = |page| TrapEvent::Fault { page, thread: thread_id.as_raw() };
                    seen.extend(page(addr as u64).map(fault));
                }
                Ok(Event::Remove { start, end }) => {
                    let Some(PageIndex(first)) = page(start as u64) else { continue };
                    let pages = (end as u64).saturating_sub(start as u64) / PAGE_SIZE;
                    let end = first.saturating_add(pages).min(self.part.pages);
                    if self.whose == Whose::Theirs {
                        self.ledger.give_back(self.part, first, end);
                    }
                    seen.push(TrapEvent::Discarded { first: PageIndex(first), end: PageIndex(end) });
                }
                Ok(_) => {}
                Err(error) => return wait_or(error),
            }
        }
        Ok(())
    }

    /// The address space is being changed. Where the change is told of, it ends when that was heard.
    fn let_change(&self) -> Result<(), PagerError> {
        if self.whose != Whose::Theirs {
            return Ok(());
        }
        let mut heard = Vec::new();
        self.take(&mut EventBuffer::new(1), &mut heard)?;
        locked(&self.early).append(&mut heard);
        Ok(())
    }

    /// Maps a run that has landed into the guest, and wakes who waits for it.
    pub(in crate::pager) fn publish(&self, run: Run) -> Result<(), PagerError> {
        let (mut at, end) = (run.first.offset(), run.first.offset() + u64::from(run.count) * PAGE_SIZE);
        while at < end {
            let (address, here) = self.at(at);
            match self.uffd.r#continue(address, here.min(end - at) as usize, true) {
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

    /// Copies a run that has landed at `offset` of `pool` into the guest, and wakes who waits for it.
    pub(in crate::pager) fn copy_in(
        &self,
        run: Run,
        pool: &HostMemory,
        offset: u64,
    ) -> Result<(), PagerError> {
        let len = u64::from(run.count) * PAGE_SIZE;
        let from = pool.at(offset, len as usize).ok_or_else(|| failed("UFFDIO_COPY", Some(libc::EINVAL)))?;
        let mut done = 0;
        while done < len {
            let at = run.first.offset() + done;
            let (address, here) = self.at(at);
            let rest = self.not_given_back(PageIndex::containing(at), here.min(len - done));
            if rest == 0 {
                self.publish_zero(PageIndex::containing(at), false)?;
                done += PAGE_SIZE;
                continue;
            }
            let source = from.wrapping_add(done as usize);
            // SAFETY: `rest` bytes from `source` lie in the pool, which is borrowed, and the run lies in the
            // registered guest mapping; the kernel fills only pages that are not there (EEXIST otherwise).
            let copied = unsafe { self.uffd.copy(source.cast(), address, rest as usize, true) };
            match copied {
                Ok(copied) => done += copied as u64,
                Err(UffdError::PartiallyCopied(copied)) if (1..rest as usize).contains(&copied) => {
                    done += copied as u64;
                }
                // The address space is being changed.
                Err(UffdError::PartiallyCopied(_)) => self.let_change()?,
                Err(error) => match errno(error).raw_os_error() {
                    Some(libc::EEXIST) => {
                        self.wake(PageIndex::containing(at))?;
                        done += PAGE_SIZE;
                    }
                    code => return Err(not_filled("UFFDIO_COPY", code)),
                },
            }
        }
        Ok(())
    }

    /// How many bytes of so many from this page on have not been given back.
    fn not_given_back(&self, page: PageIndex, len: u64) -> u64 {
        if self.whose != Whose::Theirs {
            return len;
        }
        let end = page.0 + len / PAGE_SIZE;
        let first = self.ledger.first_given_back(self.part, page.0, end);
        (first.unwrap_or(end) - page.0) * PAGE_SIZE
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
            let zeroed = unsafe { self.uffd.zeropage(self.at(page.offset()).0, PAGE_SIZE as usize, true) };
            match zeroed {
                Ok(_) => return Ok(()),
                Err(error) => match errno(error).raw_os_error() {
                    // It is here already.
                    Some(libc::EEXIST) if self.anonymous => return self.wake(page),
                    Some(libc::EEXIST) => return self.publish(Run::one(page)),
                    Some(libc::EAGAIN) => self.let_change()?,
                    code => return Err(not_filled("UFFDIO_ZEROPAGE", code)),
                },
            }
        }
    }

    /// Shows a page that was published before to who waits for it: he was late to ask, or has
    /// discarded it since, or the kernel has taken it out of the mapping (reclaim).
    pub(in crate::pager) fn show_again(&self, page: PageIndex) -> Result<(), PagerError> {
        match self.whose {
            Whose::Theirs => self.publish_zero(page, false),
            Whose::Pager | Whose::Threads => self.publish(Run::one(page)),
        }
    }

    /// Wakes who waits for a page that is mapped.
    pub(in crate::pager) fn wake(&self, page: PageIndex) -> Result<(), PagerError> {
        self.wake_bytes(self.at(page.offset()).0, PAGE_SIZE)
    }

    /// Wakes whoever waits, for whichever page: what is not there they ask for again.
    pub(in crate::pager) fn wake_all(&self) -> Result<(), PagerError> {
        self.places.each().try_for_each(|place| self.wake_bytes(place.address as *mut _, place.len))
    }

    fn wake_bytes(&self, address: *mut libc::c_void, len: u64) -> Result<(), PagerError> {
        self.uffd.wake(address, len as usize).map_err(not_done("UFFDIO_WAKE"))
    }

    /// Ends the trapping: every page is published or zero. What was never touched reads as zeros
    /// from now on, which is what it is.
    pub(in crate::pager) fn release(&self) -> Result<(), PagerError> {
        for place in self.places.each() {
            let (at, len) = (place.address as *mut libc::c_void, place.len as usize);
            self.uffd.unregister(at, len).map_err(not_done("UFFDIO_UNREGISTER"))?;
        }
        // Unregistering wakes who waits before it changes the mapping. Where faults take only the
        // lock of their mapping (Linux 6.7), one may begin to wait in between and sleep for ever;
        // none can after it.
        self.wake_all()?;
        self.hear_the_last()
    }

    /// Whoever gives pages back waits until that was heard, also if he had begun before the trap was
    /// lifted: nobody may be left waiting. Nobody begins after it.
    fn hear_the_last(&self) -> Result<(), PagerError> {
        if self.whose != Whose::Theirs {
            return Ok(());
        }
        // Publishing is refused for this reason before any other.
        let changing = || match self.uffd.r#continue(self.at(0).0, PAGE_SIZE as usize, false) {
            Ok(_) => false,
            Err(error) => errno(error).raw_os_error() == Some(libc::EAGAIN),
        };
        while changing() {
            self.let_change()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Address of a byte of the part, and how many follow in the same mapping. The kernel refuses what lies past the end
    /// (EINVAL): it is not registered.
    fn at(&self, offset: u64) -> (*mut libc::c_void, u64) {
        let (address, here) = self.places.at(offset).unwrap_or((0, PAGE_SIZE));
        (address as *mut libc::c_void, here)
    }
}

impl AsFd for PartTrap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `self.uffd`, which the borrow cannot outlive.
        unsafe { BorrowedFd::borrow_raw(self.uffd.as_raw_fd()) }
    }
}

/// A page was not made. What a copy has made before it, it finds when it is tried again.
fn not_filled(operation: &'static str, code: Option<i32>) -> PagerError {
    match code {
        Some(libc::ENOMEM) => {
            PagerError::NoRoom { operation, source: io::Error::from_raw_os_error(libc::ENOMEM) }
        }
        code => failed(operation, code),
    }
}

fn not_done(operation: &'static str) -> impl Fn(UffdError) -> PagerError {
    move |error| PagerError::Userfault { operation, source: errno(error) }
}

fn wait_or(error: UffdError) -> Result<(), PagerError> {
    match errno(error) {
        source if source.kind() == io::ErrorKind::WouldBlock => Ok(()),
        source => Err(PagerError::Userfault { operation: "reading faults", source }),
    }
}

/// The system error inside the binding's error.
pub(crate) fn errno(error: UffdError) -> io::Error {
    match error {
        UffdError::SystemError(code) | UffdError::CopyFailed(code) | UffdError::ZeropageFailed(code) => {
            io::Error::from_raw_os_error(code as i32)
        }
        UffdError::OpenDevUserfaultfd(source) => source,
        other => io::Error::other(other.to_string()),
    }
}
