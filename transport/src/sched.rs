//! Who goes first: how a thread that somebody waits for displaces others at once.

use std::io;

/// True where cores are too few for threads that spin: fewer than four. A migration has up to four
/// busy threads on a host.
pub fn is_crowded() -> bool {
    std::thread::available_parallelism().map_or(1, usize::from) < 4
}

/// The slice of a thread that goes first: the least that Linux permits.
const FIRST_SLICE_NS: u64 = 100_000;

/// From now on the calling thread, where it wakes up, displaces at once a thread that has the usual
/// priority and the usual slice (1.4 ms with two processors), which the scheduler would otherwise let
/// run to the end of its slice (EEVDF; `sched_setattr(2)`, `sched_runtime`). Its share of the processor is unchanged.
///
/// Does nothing on kernels whose threads have no slices of their own (before Linux 6.12).
pub fn go_first() {
    let Ok(mut attributes) = attributes() else { return };
    if attributes.sched_runtime == 0 || attributes.sched_policy != libc::SCHED_OTHER.cast_unsigned() {
        return;
    }
    attributes.sched_runtime = FIRST_SLICE_NS;
    // SAFETY: the structure is valid during the call, and says its size.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "a thread that serves faults keeps the usual slice");
    }
}

/// How the calling thread is scheduled. A `sched_runtime` of 0: the kernel has no slices of threads.
fn attributes() -> io::Result<libc::sched_attr> {
    let size = size_of::<libc::sched_attr>() as u32;
    let mut attributes = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel writes at most `size` bytes to the structure, which is valid during the call.
    match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } {
        0 => Ok(attributes),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_goes_first_has_the_shortest_slice_where_the_kernel_has_slices() {
        let slices = std::thread::spawn(|| {
            let before = attributes().unwrap().sched_runtime;
            go_first();
            (before, attributes().unwrap().sched_runtime)
        });
        let (before, after) = slices.join().unwrap();
        assert_eq!(after, if before == 0 { 0 } else { FIRST_SLICE_NS });
    }
}
