//! The trap under the guest mapping: userfaultfd, behind page numbers.
//!
//! A page of the guest mapping is in one of three states for the kernel: no page in the file
//! (a *missing* fault), a page in the file but not in the guest mapping (a *minor* fault: it may be
//! half-landed), or mapped. Publishing is UFFDIO_CONTINUE, which maps the file's page. Both kinds
//! of fault come here, so the guest never sees a page before it is whole.
//!
//! The guest mapping may be another process's: the descriptor then was made there, and the addresses
//! are that process's; it may have the memory in several mappings ([`Places`]). Such a guest may give pages back (a balloon, free-page reporting): the kernel
//! tells of it, and what it touches of them afterwards is zero.
//!
//! Fail closed: the descriptor lives as long as any clone of [`Trap`] does. While it lives, a guest
//! that touches a page which nobody publishes waits; only closing it would show zeros.

mod part;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

pub(super) use part::PartTrap;
pub(crate) use part::errno;
use postcopy_transport::hugetlbfs_page;
use userfaultfd::{Error as UffdError, FeatureFlags, Uffd, UffdBuilder};

use super::claims::Claims;
use super::ledger::Ledger;
use super::shards::{MAX_SHARDS, Part, Shards};
use crate::memory::{GuestMemory, PAGE_SIZE, PageIndex};
use crate::pager::PagerError;
use crate::places::Places;

/// UFFD_FEATURE_MINOR_SHMEM of linux/userfaultfd.h (Linux 5.14); the binding has no name for it.
const MINOR_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 10);
/// What every trap needs: both kinds of faults of shared memory, and who waits.
const NEEDED: FeatureFlags = FeatureFlags::MISSING_SHMEM.union(MINOR_SHMEM).union(FeatureFlags::THREAD_ID);

/// The registered guest mapping, cut into the parts of its [`Shards`]. Clones share its descriptors.
#[derive(Clone)]
pub struct Trap {
    parts: Vec<PartTrap>,
    ledger: Ledger,
}

/// Who is told of a touch of a page that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultsTo {
    /// The pager's thread, which serves it while the toucher waits.
    Pager,
    /// The thread that touched it, by a signal (SIGBUS), or KVM, by an error; it serves the fault
    /// itself.
    Threads,
}

/// Who touches the guest mapping, and who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// Threads of this process, and the pager is told.
    Pager,
    /// Threads of this process, which are told themselves.
    Threads,
    /// Another process. It may discard pages.
    Theirs,
}

/// What the kernel tells of the guest mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TrapEvent {
    /// Somebody waits for a page.
    Fault {
        /// Which of the part's.
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
    /// Registers the guest mapping of `memory` for missing and minor faults, by a userfaultfd for each
    /// of so many shards.
    ///
    /// Errors: userfaultfd is refused (EPERM: who runs this may not), the kernel has no minor
    /// faults on shared memory (older than 5.14), or the registration fails.
    pub fn register(memory: &GuestMemory, told: FaultsTo, shards: Shards) -> Result<Self, PagerError> {
        let (features, whose) = match told {
            FaultsTo::Pager => (NEEDED, Whose::Pager),
            FaultsTo::Threads => (NEEDED | FeatureFlags::SIGBUS, Whose::Threads),
        };
        let pages = memory.layout().total_pages();
        let place = Places::one(memory.guest().base() as u64, memory.layout().total_bytes());
        let ledger = ledger_of(pages)?;
        let parts = shards.cut(pages).map(|part| {
            let uffd = UffdBuilder::new()
                .close_on_exec(true)
                .non_blocking(true)
                .user_mode_only(false)
                .require_features(features)
                .create()
                .map_err(refused)?;
            PartTrap::over(uffd, (part, &place), whose, &ledger)
        });
        Ok(Self { parts: parts.collect::<Result<_, _>>()?, ledger })
    }

    /// Registers the mappings of the guest's memory in another process, which are at `places` there,
    /// by userfaultfds that were made there and not set up, one for each shard. Nothing in the files is
    /// kept: what was there is given back first.
    ///
    /// Errors: none or too many descriptors, one that is no userfaultfd, places that are not all of the memory or cannot be
    /// registered, or its pages are larger than the engine's (hugetlbfs).
    pub fn adopt(
        descriptors: Vec<OwnedFd>,
        places: &Places,
        memory: &GuestMemory,
    ) -> Result<Self, PagerError> {
        memory.guest().files().try_for_each(|(file, _)| refuse_hugetlbfs(file))?;
        let failed = |source: io::Error| PagerError::System { operation: "taking guest memory over", source };
        let shards = shards_of(&descriptors)?;
        let (pages, bytes) = (memory.layout().total_pages(), memory.layout().total_bytes());
        let all = (places.bytes() == bytes).then_some(()).ok_or_else(not_all);
        all.and_then(|()| memory.guest().discard(0..bytes)).map_err(failed)?;
        // Memory may be too small for all of them.
        let (ledger, each) = (ledger_of(pages)?, shards.cut(pages).zip(descriptors));
        let parts = each.map(|(part, descriptor)| {
            set_up(&descriptor, NEEDED | FeatureFlags::EVENT_REMOVE)?;
            let uffd = owned(descriptor).map_err(not_made_nonblocking)?;
            PartTrap::over(uffd, (part, places), Whose::Theirs, &ledger)
        });
        Ok(Self { parts: parts.collect::<Result<_, _>>()?, ledger })
    }

    /// Registers memory of another process that has no file behind it: `pages` from `base` there, by
    /// userfaultfds that were made there, one for each shard. They may be set up already, as a Firecracker's
    /// is; what it gives back is heard of if they were asked for that (UFFD_FEATURE_EVENT_REMOVE), and is
    /// asked for if not. None of the memory may have been touched. What is read for it lands in a pool.
    ///
    /// Errors: none or too many descriptors, one that is no userfaultfd, or a range that cannot be registered.
    pub fn adopt_anonymous(descriptors: Vec<OwnedFd>, base: u64, pages: u64) -> Result<Self, PagerError> {
        let (shards, ledger) = (shards_of(&descriptors)?, ledger_of(pages)?);
        let place = Places::one(base, pages * PAGE_SIZE);
        let parts = shards.cut(pages).zip(descriptors).map(|(part, descriptor)| {
            match set_up(&descriptor, FeatureFlags::THREAD_ID | FeatureFlags::EVENT_REMOVE) {
                // It is set up.
                Err(PagerError::Userfault { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {}
                other => other?,
            }
            let uffd = owned(descriptor).map_err(not_made_nonblocking)?;
            PartTrap::over_anonymous(uffd, (part, &place), &ledger)
        });
        Ok(Self { parts: parts.collect::<Result<_, _>>()?, ledger })
    }

    /// The trap that a process has [adopted](Trap::adopt) which has ended since: by the same userfaultfds, in their order, and what
    /// it has left in its ledger.
    ///
    /// Errors: they are not as many as memory of so many pages was cut for, or one is no userfaultfd; or the places are for
    /// memory of another size.
    pub fn take_over(descriptors: Vec<OwnedFd>, places: &Places, ledger: Ledger) -> Result<Self, PagerError> {
        let failed = |source| PagerError::System { operation: "taking guest memory over", source };
        (places.pages() == ledger.pages()).then_some(()).ok_or_else(|| failed(not_all()))?;
        let (shards, count) = (shards_of(&descriptors)?, descriptors.len());
        let parts = shards.cut(ledger.pages()).zip(descriptors).map(|(part, descriptor)| {
            let uffd = owned(descriptor).map_err(not_made_nonblocking)?;
            Ok(PartTrap::registered_before(uffd, (part, places), &ledger))
        });
        let parts = parts.collect::<Result<Vec<_>, PagerError>>()?;
        let few = || io::Error::other("there is less memory than it was cut for");
        (parts.len() == count).then_some(Self { parts, ledger }).ok_or_else(|| failed(few()))
    }

    /// Keeps what is known of its pages in `ledger`, from which another process can go on. To be chosen before a pager has it.
    ///
    /// Errors: that is for memory of another size.
    pub fn noted_in(mut self, ledger: Ledger) -> Result<Self, PagerError> {
        if ledger.pages() != self.pages() {
            let source = io::Error::other("its ledger is for memory of another size");
            return Err(PagerError::System { operation: "trapping guest memory", source });
        }
        self.parts.iter_mut().for_each(|part| part.note_in(&ledger));
        self.ledger = ledger;
        Ok(self)
    }

    /// What is known of its pages.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The claims of each part, which `made` makes of the ledger.
    pub(super) fn claims(&self, made: impl Fn(&Ledger, usize, Part) -> Claims) -> Vec<Claims> {
        self.parts.iter().enumerate().map(|(shard, part)| made(&self.ledger, shard, part.part())).collect()
    }

    /// Whether this process may use userfaultfd as the pager needs it.
    ///
    /// Errors: as [`Trap::register`].
    pub fn check() -> Result<(), PagerError> {
        let layout = crate::memory::MemoryLayout::pc(PAGE_SIZE, PAGE_SIZE).expect("one page is a layout");
        let memory = GuestMemory::new(layout)
            .map_err(|source| PagerError::Userfault { operation: "memfd_create", source })?;
        Self::register(&memory, FaultsTo::Pager, Shards::ONE).map(drop)
    }

    /// Serves no fault, until [`Pager::source_stands_still`](super::Pager::source_stands_still): what the source's guest still writes must not
    /// be read.
    pub fn hold(&self) {
        self.parts.iter().for_each(|part| part.hold(true));
    }

    pub(super) fn let_go(&self) {
        self.parts.iter().for_each(|part| part.hold(false));
    }

    /// How many shards it is cut for: no more than asked for, and fewer for little memory.
    pub fn shards(&self) -> usize {
        self.parts.len()
    }

    /// Pages of all parts.
    pub(super) fn pages(&self) -> u64 {
        self.parts.iter().map(|part| part.part().pages).sum()
    }

    pub(super) fn parts(&self) -> &[PartTrap] {
        &self.parts
    }
}

/// For what is known of so many pages, while this process lives.
fn ledger_of(pages: u64) -> Result<Ledger, PagerError> {
    let operation = "making room for what is known of pages";
    Ledger::of_this_process(pages).map_err(|source| PagerError::System { operation, source })
}

fn not_all() -> io::Error {
    io::Error::other("it is not mapped where all of the guest's memory would be")
}

/// So many as there are descriptors.
fn shards_of(descriptors: &[OwnedFd]) -> Result<Shards, PagerError> {
    let none = || io::Error::other(format!("1 to {MAX_SHARDS} userfaultfds are needed"));
    let operation = "taking guest memory over";
    Shards::new(descriptors.len()).ok_or_else(|| PagerError::System { operation, source: none() })
}

fn not_made_nonblocking(source: io::Error) -> PagerError {
    PagerError::Userfault { operation: "FIONBIO", source }
}

/// A userfaultfd that another process has made, never to be waited on.
pub(crate) fn owned(descriptor: OwnedFd) -> io::Result<Uffd> {
    rustix::io::ioctl_fionbio(&descriptor, true)?;
    // SAFETY: the descriptor is owned and given up here, so the result is its only owner.
    Ok(unsafe { Uffd::from_raw_fd(descriptor.into_raw_fd()) })
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
    let failed = |source| PagerError::System { operation: "trapping guest memory", source };
    match hugetlbfs_page(file).map_err(failed)? {
        None => Ok(()),
        Some(_) => Err(failed(io::Error::other(
            "it is hugetlbfs, and a guest arrives in pages of 4 KiB; give it memory without hugetlb=on or a mem-path \
             on hugetlbfs",
        ))),
    }
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

#[cfg(test)]
mod tests;
