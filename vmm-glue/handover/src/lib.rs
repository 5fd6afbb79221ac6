//! Preloaded into a stock QEMU (`LD_PRELOAD`): where QEMU maps a guest's memory, this makes the
//! userfaultfds that only QEMU's own process can make.
//!
//! It stands in front of mmap(2) and munmap(2) and does nothing but pass them on, unless the mapping is a guest's memory
//! by all signs: shared, writable, of 1 MiB or more, of a file in memory (a memfd, or one on tmpfs; of hugetlbfs at a
//! source only, to see what QEMU writes).
//!
//! **At a source** one userfaultfd for write protection is left open, asynchronous where the kernel has that (Linux 6.7):
//! by it `pcvm migrate` sees what QEMU writes (`engine/src/written/`). Nothing is registered with it here. And a thread
//! waits to be asked to take the memory out of the mapping (`away.rs`), by which `pcvm migrate` sees what QEMU touches.
//!
//! **At a destination** `POSTCOPY_HANDOVER` names the pager's Unix socket. The pager is sent, before mmap
//! returns, one message in the form that Firecracker uses, and the descriptors with it:
//!
//! ```text
//!  [{"base_host_virt_addr":…,"size":…,"offset":…,"page_size":4096,"userfaultfds":[…]}]
//!      + userfaultfd, memory file, ledger
//! ```
//!
//! Where `POSTCOPY_SHARDS` asks for several userfaultfds, 16 at most, one for each thread of the pager,
//! all of them come before the memory's file; `userfaultfds` has their numbers here. The ledger is an empty memfd by the
//! name of `postcopy-ledger`, for the pager to keep what it knows of the memory where it outlives it: it stays open here for
//! ever, as the userfaultfds do. All of these are made once: memory of several files (NUMA nodes) is handed over by a
//! message for each, with the same descriptors in all of them.
//!
//! The pager answers with one byte. Without that answer this process ends: a guest whose faults
//! nobody serves would read zeros in place of its memory. For the same reason the userfaultfd stays
//! open here for ever: if the pager dies, the guest waits.

mod away;

use std::ffi::{c_int, c_void};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Most userfaultfds of one mapping: the engine has as many shards at most.
const MOST: usize = 16;
/// What is smaller is no guest's memory.
const LEAST: usize = 1 << 20;
/// How long the pager may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// USERFAULTFD_IOC_NEW of linux/userfaultfd.h, a request to /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = libc::_IO(0xaa, 0x00);
/// UFFDIO_API and its argument, of linux/userfaultfd.h.
const UFFDIO_API: libc::Ioctl = libc::_IOWR::<[u64; 3]>(0xaa, 0x3f);
const UFFD_API: u64 = 0xaa;
/// UFFD_USER_MODE_ONLY: no privilege is needed for it.
const USER_MODE_ONLY: c_int = 1;
/// UFFD_FEATURE_WP_ASYNC (Linux 6.7), and UFFD_FEATURE_WP_HUGETLBFS_SHMEM (5.19).
const WP: [u64; 2] = [1 << 15, 1 << 12];
/// One is enough for all memory of this process.
static TRACKER: Once = Once::new();

/// mmap(2), as programs call it.
///
/// # Safety
///
/// As mmap(2): with MAP_FIXED it replaces what is mapped at `address`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: libc::off64_t,
) -> *mut c_void {
    // SAFETY: the arguments are the caller's, who knows what they do.
    let mapped = unsafe { libc::syscall(libc::SYS_mmap, address, length, protection, flags, file, offset) };
    let mapped = mapped as *mut c_void;
    if mapped == libc::MAP_FAILED {
        return mapped;
    }
    let addresses = mapped as usize..(mapped as usize).saturating_add(length);
    let memory = guest_memory(length, protection, flags, file);
    if memory.is_some() {
        TRACKER.call_once(make_tracker);
    }
    if memory == Some(Pages::Small) {
        hand_over(mapped, length, file, offset);
        away::note(addresses);
    } else if flags & libc::MAP_FIXED != 0 {
        away::forget(&addresses);
    }
    mapped
}

/// munmap(2), as programs call it.
///
/// # Safety
///
/// As munmap(2): nobody may use what was mapped there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(address: *mut c_void, length: usize) -> c_int {
    away::forget(&(address as usize..(address as usize).saturating_add(length)));
    // SAFETY: the arguments are the caller's, who knows what they do.
    unsafe { libc::syscall(libc::SYS_munmap, address, length) as c_int }
}

/// The name of [`mmap`] for programs with 64-bit file offsets, such as QEMU.
///
/// # Safety
///
/// As [`mmap`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: libc::off64_t,
) -> *mut c_void {
    // SAFETY: as the caller answers for.
    unsafe { mmap(address, length, protection, flags, file, offset) }
}

/// Kinds of guest memory, by their pages.
#[derive(PartialEq, Eq)]
enum Pages {
    Small,
    /// Of hugetlbfs.
    Huge,
}

fn guest_memory(length: usize, protection: c_int, flags: c_int, file: c_int) -> Option<Pages> {
    let shared =
        flags & libc::MAP_TYPE == libc::MAP_SHARED || flags & libc::MAP_TYPE == libc::MAP_SHARED_VALIDATE;
    if !shared || protection & libc::PROT_WRITE == 0 || file < 0 || length < LEAST {
        return None;
    }
    // SAFETY: a mapping of this descriptor has just succeeded, so it is open; the borrow ends here.
    let file = unsafe { BorrowedFd::borrow_raw(file) };
    match rustix::fs::fstatfs(file).ok()?.f_type {
        libc::TMPFS_MAGIC => Some(Pages::Small),
        libc::HUGETLBFS_MAGIC => Some(Pages::Huge),
        _ => None,
    }
}

/// Makes the userfaultfd for write protection, and leaves it open for ever. Does without where the kernel has no such
/// thing.
fn make_tracker() {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    for feature in WP {
        // SAFETY: a system call without pointers.
        let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if opened < 0 {
            return;
        }
        // SAFETY: the descriptor is new and nobody else's.
        let tracker = unsafe { OwnedFd::from_raw_fd(opened as RawFd) };
        let mut api = [UFFD_API, feature, 0];
        // SAFETY: the descriptor is open, and the argument is what this request reads and writes.
        let answer = unsafe { libc::ioctl(tracker.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        if answer == 0 {
            let _open = tracker.into_raw_fd();
            return;
        }
    }
}

/// What is made once and never closed: the userfaultfds and the ledger.
static MADE: Mutex<Option<(Vec<RawFd>, RawFd)>> = Mutex::new(None);

/// Hands the mapping to the pager, if there is to be one.
fn hand_over(at: *mut c_void, length: usize, file: RawFd, offset: i64) {
    let Some(pager) = std::env::var_os("POSTCOPY_HANDOVER") else { return };
    let handed = made().and_then(|(userfaultfds, ledger)| {
        let mut pager = UnixStream::connect(&pager)?;
        pager.set_read_timeout(Some(PATIENCE))?;
        let layout = format!(
            "[{{\"base_host_virt_addr\":{},\"size\":{length},\"offset\":{offset},\"page_size\":4096,\
             \"userfaultfds\":{userfaultfds:?}}}]",
            at as u64
        );
        let all = userfaultfds.iter().chain([&file, &ledger]);
        // SAFETY: the memory's is open and stays so until mmap returns to its caller; the others are never closed.
        let all: Vec<_> = all.map(|open| unsafe { BorrowedFd::borrow_raw(*open) }).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST + 2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&all));
        sendmsg(&pager, &[IoSlice::new(layout.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        pager.read_exact(&mut [0])
    });
    if let Err(error) = handed {
        eprintln!(
            "postcopy-handover: no pager takes this guest's memory ({error}; asked at {}): start QEMU with \
             `pcvm receive --vmm qemu`, or without this library",
            pager.display()
        );
        // SAFETY: ends the process at once; QEMU has no guest yet, and its exit handlers may expect one.
        unsafe { libc::_exit(1) };
    }
}

/// The userfaultfds and the ledger, made if they are not yet.
fn made() -> std::io::Result<(Vec<RawFd>, RawFd)> {
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = &*made {
        return Ok(made.clone());
    }
    let userfaultfds = (0..shards()?).map(|_| userfaultfd()).collect::<Result<Vec<_>, _>>()?;
    let ledger = memfd_create("postcopy-ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    Ok(made.insert((userfaultfds, ledger.into_raw_fd())).clone())
}

/// How many userfaultfds the pager wants.
fn shards() -> std::io::Result<usize> {
    let Some(asked) = std::env::var_os("POSTCOPY_SHARDS") else { return Ok(1) };
    let count = asked.to_str().and_then(|text| text.parse().ok()).filter(|count| (1..=MOST).contains(count));
    count
        .ok_or_else(|| std::io::Error::other(format!("POSTCOPY_SHARDS={}: not 1 to {MOST}", asked.display())))
}

/// A userfaultfd of this process that is never closed and not set up yet. Faults that the kernel
/// takes on the guest's behalf (KVM, vhost) are included, so this needs CAP_SYS_PTRACE, the sysctl
/// vm.unprivileged_userfaultfd, or access to /dev/userfaultfd.
fn userfaultfd() -> std::io::Result<RawFd> {
    // SAFETY: a system call without pointers.
    let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if opened >= 0 {
        return Ok(opened as RawFd);
    }
    let refused = std::io::Error::last_os_error();
    let Ok(device) = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd") else {
        return Err(std::io::Error::new(refused.kind(), format!("userfaultfd is refused: {refused}")));
    };
    // SAFETY: the request takes flags by value and gives a new descriptor.
    let opened =
        unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    match opened {
        ..0 => Err(std::io::Error::last_os_error()),
        // SAFETY: the descriptor is new and nobody else's.
        opened => Ok(unsafe { OwnedFd::from_raw_fd(opened) }.into_raw_fd()),
    }
}
