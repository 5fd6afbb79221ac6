//! Self-service for any thread of this process: the signal of a touch is its fault.
//!
//! With UFFD_FEATURE_SIGBUS a touch of a page that is not published raises SIGBUS in the thread
//! that touched it. The handler finds the memory by the address and has the page brought: by the
//! thread's own [`FaultServer`], if it has one, else by the shard. Then the touch is tried again. If
//! the page does not come, the handler does not return: the thread waits, as it would without
//! signals.
//!
//! What the handler does (locks of the allocator, system calls) is allowed because the signal is
//! synchronous: the interrupted code is a touch of guest memory, and nothing touches guest memory
//! while it holds such a lock.
//!
//! Not for memory that the kernel touches for the thread: read(2) into it fails with EFAULT.

use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use super::server::{FaultServer, Shared};
use super::{MAX_SHARDS, locked};
use crate::memory::PageIndex;

/// Shards whose memory can be served at a time.
const SLOTS: usize = 4 * MAX_SHARDS;

/// A shard's memory whose faults are served, for the handler to find without a lock.
struct Slot {
    base: AtomicUsize,
    len: AtomicUsize,
    shared: AtomicPtr<Shared>,
    /// Handlers that look at, or use, what `shared` points to.
    users: AtomicU32,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        shared: AtomicPtr::new(null_mut()),
        users: AtomicU32::new(0),
    }
}; SLOTS];

/// Serialises registrations.
static REGISTER: Mutex<()> = Mutex::new(());
/// What was done about SIGBUS before, or why the handler could not be installed.
static PREVIOUS: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

thread_local! {
    /// This thread's server. No destructor, so that a handler may look at it at any time.
    static SERVER: Cell<*mut FaultServer> = const { Cell::new(null_mut()) };
}

/// A registered memory. Dropping it ends the service: touches of what is not published then end the
/// process.
pub(super) struct Registration(&'static Slot);

/// Has the touches of `shared`'s memory served.
///
/// Errors: too many memories at a time, or the system refuses the handler.
pub(super) fn register(shared: Arc<Shared>) -> io::Result<Registration> {
    let _guard = locked(&REGISTER);
    install()?;
    let free = TABLE.iter().find(|slot| slot.shared.load(Ordering::SeqCst).is_null());
    let slot = free.ok_or_else(|| io::Error::other("too many memories are served at a time"))?;
    slot.base.store(shared.trap.base() as usize, Ordering::SeqCst);
    slot.len.store(shared.part.bytes() as usize, Ordering::SeqCst);
    slot.shared.store(Arc::into_raw(shared).cast_mut(), Ordering::SeqCst);
    Ok(Registration(slot))
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _guard = locked(&REGISTER);
        let shared = self.0.shared.swap(null_mut(), Ordering::SeqCst);
        // A handler that waits for a page that never comes keeps what it looks at for ever.
        if self.0.users.load(Ordering::SeqCst) == 0 {
            // SAFETY: the pointer came from Arc::into_raw in `register` and is taken back once; no
            // handler uses it, and none will find it any more.
            drop(unsafe { Arc::from_raw(shared) });
        }
    }
}

/// While it lives, this thread serves its own faults.
pub struct SelfService {
    server: *mut FaultServer,
}

impl SelfService {
    /// Serves this thread's faults by `server`.
    pub fn of_this_thread(server: FaultServer) -> Self {
        let server = Box::into_raw(Box::new(server));
        SERVER.set(server);
        Self { server }
    }
}

impl Drop for SelfService {
    fn drop(&mut self) {
        SERVER.set(null_mut());
        // SAFETY: the pointer came from Box::into_raw, and only this thread's handler used it, which
        // does not run now. (A raw pointer is not Send, so this is that thread.)
        drop(unsafe { Box::from_raw(self.server) });
    }
}

fn install() -> io::Result<()> {
    let installed = PREVIOUS.get_or_init(|| {
        // SAFETY: all zeros is a valid sigaction: no flags, an empty mask, the default action.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as usize;
        // Not on the alternate stack, which is too small for what serving a fault calls.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_RESTART;
        // SAFETY: as above.
        let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both structures are valid, and the handler lives for ever.
        match unsafe { libc::sigaction(libc::SIGBUS, &action, &mut previous) } {
            0 => Ok(previous),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
        }
    });
    installed.as_ref().map(drop).map_err(|code| io::Error::from_raw_os_error(*code))
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo_t.
    let info_here = unsafe { &*info };
    // SAFETY: a SIGBUS of the kernel's has an address in it; of others it is no address of ours.
    let address = unsafe { info_here.si_addr() } as usize;
    // SAFETY: errno is this thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    if !serve(address) {
        pass_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Serves a touch of `address`. False if it is in no memory of ours.
fn serve(address: usize) -> bool {
    for slot in &TABLE {
        slot.users.fetch_add(1, Ordering::SeqCst);
        let shared = slot.shared.load(Ordering::SeqCst);
        let offset = address.wrapping_sub(slot.base.load(Ordering::SeqCst));
        let ours = !shared.is_null() && offset < slot.len.load(Ordering::SeqCst);
        if ours {
            let page = PageIndex::containing(offset as u64);
            // SAFETY: `shared` is not freed while `users` counts this handler.
            bring(unsafe { &*shared }, page);
        }
        slot.users.fetch_sub(1, Ordering::SeqCst);
        if ours {
            return true;
        }
    }
    false
}

fn bring(shared: &Shared, page: PageIndex) {
    let server = SERVER.get();
    // SAFETY: set by `of_this_thread` for this thread and valid until it is unset; the interrupted
    // code is a touch of guest memory, which is never inside the server, so this is the only use.
    let server = (!server.is_null()).then(|| unsafe { &mut *server });
    match server.and_then(|server| server.is_of(shared).then_some(server)) {
        None => shared.ask(page),
        Some(server) => {
            if server.serve(shared.part.global(page)).is_err() {
                // Fail closed: the touch must not go on, and there is nothing to go back to.
                loop {
                    std::thread::sleep(Duration::from_secs(3600));
                }
            }
        }
    }
}

/// Not our memory: what would have happened without us.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(Ok(previous)) = PREVIOUS.get() else { return };
    let handler = previous.sa_sigaction;
    if handler != libc::SIG_DFL && handler != libc::SIG_IGN && previous.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: with SA_SIGINFO the kernel would call it with these arguments and this type.
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(handler) };
        handler(signal, info, context);
        return;
    }
    // The touch is tried again, and ends the process as it would have.
    // SAFETY: setting the default action has no preconditions.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
