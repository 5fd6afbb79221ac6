//! Takes the guest's memory out of this process's mappings of it when `pcvm migrate` asks: what is mapped again
//! was touched (`engine/src/touched/`). The content is the file's, and stays there.
//!
//! Asked through a page that both sides map, a memfd by the name of `postcopy-away` that is left open here for ever:
//!
//! ```text
//!  offset 0, u32: how often it was asked. The asker adds one, and wakes who waits there (futex)
//!  offset 4, u32: the last request that was done. It is set here, and who waits there is woken
//!  offset 8, u32: what came of it: 0, or the system's number of what is wrong (EINVAL: memory is locked)
//! ```
//!
//! Who may open it is who may trace this process. Its length is sealed, so that nobody's reads of it can fault.

use std::ffi::c_void;
use std::fs::File;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::futex;

/// Bytes of the page.
const PAGE: usize = 4096;
/// What is taken out at once: whoever uses it waits for so much, as KVM has its guest do.
const AT_ONCE: usize = 2 << 20;
/// Mappings of guests' memory in this process. What finds no place is not watched. Nothing is allocated for it: an
/// allocator may come here from within an allocation.
static MEMORY: Mutex<[Range<usize>; 64]> = Mutex::new([const { 0..0 }; 64]);
/// Held while some memory is taken out, which may not become anything else meanwhile. The list is not held for so long:
/// QEMU unmaps other things all the time.
static AT_WORK: Mutex<()> = Mutex::new(());
/// One thread is enough for all of them.
static THREAD: Once = Once::new();

/// There is guest memory at these addresses now.
pub(crate) fn note(addresses: Range<usize>) {
    forget(&addresses);
    if let Some(free) = memory().iter_mut().find(|noted| noted.start == noted.end) {
        *free = addresses;
    }
    THREAD.call_once(|| {
        // Without it the guest's reads are not seen, and nothing else is missing.
        let _ = begin();
    });
}

/// There may be something else at these addresses from now on.
pub(crate) fn forget(addresses: &Range<usize>) {
    let mut any = false;
    for noted in memory().iter_mut() {
        if noted.start < addresses.end && addresses.start < noted.end {
            (*noted, any) = (0..0, true);
        }
    }
    if any {
        drop(at_work());
    }
}

fn memory() -> MutexGuard<'static, [Range<usize>; 64]> {
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn at_work() -> MutexGuard<'static, ()> {
    AT_WORK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn begin() -> std::io::Result<()> {
    let file = rustix::fs::memfd_create("postcopy-away", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(file);
    file.set_len(PAGE as u64)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let both = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let page = unsafe { rustix::mm::mmap(std::ptr::null_mut(), PAGE, both, MapFlags::SHARED, &file, 0) }?;
    let _open = file.into_raw_fd();
    let words = [0, 1, 2].map(|at| {
        // SAFETY: the page is mapped for ever, begins with three aligned words, and is reached by atomic access alone.
        unsafe { AtomicU32::from_ptr(page.cast::<u32>().wrapping_add(at)) }
    });
    // A thread gets the signals that its maker gets, and those for QEMU are for threads of its own.
    let before = keep_away(&all_signals());
    let thread = std::thread::Builder::new().name("postcopy-away".into()).spawn(move || serve(words));
    keep_away(&before);
    thread.map(drop)
}

fn all_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::uninit();
    // SAFETY: it fills what it is given.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: just filled.
    unsafe { all.assume_init() }
}

/// Keeps these signals from this thread, and no others. Returns those that were kept from it before.
fn keep_away(signals: &libc::sigset_t) -> libc::sigset_t {
    let mut before = *signals;
    // SAFETY: the sets are borrowed until it returns, and no signal is waited for here.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, signals, &raw mut before) };
    before
}

fn serve([asked, done, wrong]: [&AtomicU32; 3]) {
    let mut last = 0;
    loop {
        let now = asked.load(Ordering::Acquire);
        if now == last {
            // Woken for nothing, or at once: looked at again.
            let _ = futex::wait(asked, futex::Flags::empty(), last, None);
            continue;
        }
        let noted = memory().clone();
        let outcome = noted.iter().filter(|noted| noted.start < noted.end).try_for_each(take_out);
        let code = outcome.err().and_then(|error| error.raw_os_error()).unwrap_or(0);
        wrong.store(code as u32, Ordering::Relaxed);
        last = now;
        done.store(now, Ordering::Release);
        let _ = futex::wake(done, futex::Flags::empty(), u32::MAX);
    }
}

fn take_out(addresses: &Range<usize>) -> std::io::Result<()> {
    for first in addresses.clone().step_by(AT_ONCE) {
        let length = AT_ONCE.min(addresses.end - first);
        let at_work = at_work();
        if !memory().contains(addresses) {
            break;
        }
        // SAFETY: there is a mapping of guest memory, as whoever would make something else of it takes it off the list and
        // then waits: it is shared, so that its content is the file's.
        if unsafe { libc::madvise(first as *mut c_void, length, libc::MADV_DONTNEED) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        drop(at_work);
    }
    Ok(())
}
