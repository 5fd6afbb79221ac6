//! Giving way: how a thread that does background work leaves the processor to those who wait.

use std::io;

/// True where cores are too few for threads that spin: fewer than four. A migration has up to four
/// busy threads on a host.
pub fn is_crowded() -> bool {
    std::thread::available_parallelism().map_or(1, usize::from) < 4
}

/// Has the calling thread run only when nobody else wants its processor (SCHED_IDLE, sched(7)):
/// whoever wakes up displaces it at once.
///
/// Errors: the system refuses.
pub fn give_way() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is valid during the call, and 0 names the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
