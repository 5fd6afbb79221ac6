//! Who goes first: how a thread that somebody waits for displaces others at once, and how a thread that
//! does background work gives way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// How often threads that give way are looked at.
const PERIOD: Duration = Duration::from_millis(10);
/// A thread that is ready to run and ran for less than this in a period starves.
const STARVED_NS: u64 = 1_000_000;
/// Periods at the usual priority for one that starved.
const RELIEF: u32 = 2;
/// RLIMIT_NICE that permits the usual priority: 20 minus a nice value of 0.
const USUAL_NICE: u64 = 20;

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
    let Ok(mut attributes) = attributes(0) else { return };
    if attributes.sched_runtime == 0 || attributes.sched_policy != libc::SCHED_OTHER.cast_unsigned() {
        return;
    }
    attributes.sched_runtime = FIRST_SLICE_NS;
    // SAFETY: the structure is valid during the call, and says its size.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "a thread that serves faults keeps the usual slice");
    }
}

/// How a thread is scheduled; 0 is the calling one. A `sched_runtime` of 0: the kernel has no slices of threads.
fn attributes(thread: i32) -> io::Result<libc::sched_attr> {
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
    // SAFETY: the kernel writes at most `size` bytes to the structure, which is valid during the call; a
    // number of no thread is refused.
    match unsafe { libc::syscall(libc::SYS_sched_getattr, thread, &raw mut attributes, size, 0) } {
        0 => Ok(attributes),
        _ => Err(io::Error::last_os_error()),
    }
}

/// While it lives, the thread that made it gives way to all others (SCHED_IDLE, sched(7)): whoever
/// wakes up displaces it at once. Where the others leave it nothing it has the usual priority for
/// two periods of three, so that the background work ends: a thread of its own watches over that.
///
/// Does nothing where the thread could not come back from giving way (neither CAP_SYS_NICE nor an
/// RLIMIT_NICE of 20).
pub struct GiveWay(Option<Arc<AtomicBool>>);

impl GiveWay {
    /// From now on, and until it is dropped.
    pub fn begin() -> Self {
        let begun = may_come_back().then(Watched::this_thread).and_then(Result::ok);
        Self(begun.map(|(watched, ended)| {
            watch(watched);
            ended
        }))
    }
}

impl Drop for GiveWay {
    fn drop(&mut self) {
        if let Some(ended) = &self.0 {
            ended.store(true, Ordering::Release);
        }
    }
}

fn may_come_back() -> bool {
    let limit = getrlimit(Resource::Nice).current;
    let capable = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_NICE));
    capable || limit.is_none_or(|limit| limit >= USUAL_NICE)
}

/// A thread that gives way, as the watching thread sees it.
struct Watched {
    thread: i32,
    stat: File,
    schedstat: File,
    ended: Arc<AtomicBool>,
    ran_ns: u64,
    /// Periods left at the usual priority.
    relief: u32,
}

impl Watched {
    /// Has the calling thread give way.
    fn this_thread() -> io::Result<(Self, Arc<AtomicBool>)> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let open = |name: &str| File::open(format!("/proc/self/task/{thread}/{name}"));
        let ended = Arc::new(AtomicBool::new(false));
        let (stat, schedstat) = (open("stat")?, open("schedstat")?);
        set_policy(thread, libc::SCHED_IDLE)?;
        Ok((Self { thread, stat, schedstat, ended: ended.clone(), ran_ns: 0, relief: 0 }, ended))
    }

    /// Looks whether it starves. Errors: it is gone.
    fn look(&mut self) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let ran_ns = text(&self.schedstat, |text| text.split(' ').next()?.parse::<u64>().ok());
        let ran_ns = ran_ns?.ok_or_else(gone)?;
        // The state follows the name, which is in brackets and may hold anything.
        let ready = text(&self.stat, |text| Some(text.rsplit_once(") ")?.1.starts_with('R')));
        let starved = ready?.ok_or_else(gone)? && ran_ns - self.ran_ns.min(ran_ns) < STARVED_NS;
        self.ran_ns = ran_ns;
        if self.relief > 0 {
            self.relief -= 1;
            if self.relief == 0 {
                set_policy(self.thread, libc::SCHED_IDLE)?;
            }
        } else if starved {
            self.relief = RELIEF;
            set_policy(self.thread, libc::SCHED_OTHER)?;
        }
        Ok(())
    }
}

fn text<T>(file: &File, parse: impl FnOnce(&str) -> Option<T>) -> io::Result<Option<T>> {
    let mut bytes = [0; 512];
    let got = file.read_at(&mut bytes, 0)?;
    Ok(parse(&String::from_utf8_lossy(&bytes[..got])))
}

/// The threads that are watched over. The watching thread lives as long as there are any.
static WATCHED: Mutex<Vec<Watched>> = Mutex::new(Vec::new());

fn watch(watched: Watched) {
    let mut all = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    all.push(watched);
    if all.len() > 1 {
        return;
    }
    let spawned = std::thread::Builder::new().name("give-way".into()).spawn(|| {
        loop {
            std::thread::sleep(PERIOD);
            let mut all = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain_mut(|watched| !watched.ended.load(Ordering::Acquire) && watched.look().is_ok());
            if all.is_empty() {
                return;
            }
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "nobody watches over the background threads; they keep their priority");
        for watched in all.drain(..) {
            let _ = set_policy(watched.thread, libc::SCHED_OTHER);
        }
    }
}

fn set_policy(thread: i32, policy: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is valid during the call; a number of no thread is refused.
    match unsafe { libc::sched_setscheduler(thread, policy, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy_of(thread: i32) -> i32 {
        attributes(thread).unwrap().sched_policy.cast_signed()
    }

    #[test]
    fn who_goes_first_has_the_shortest_slice_where_the_kernel_has_slices() {
        let slices = std::thread::spawn(|| {
            let before = attributes(0).unwrap().sched_runtime;
            go_first();
            (before, attributes(0).unwrap().sched_runtime)
        });
        let (before, after) = slices.join().unwrap();
        assert_eq!(after, if before == 0 { 0 } else { FIRST_SLICE_NS });
    }

    #[test]
    fn who_gives_way_and_gets_nothing_has_its_priority_back_for_a_while() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let done = AtomicBool::new(false);
        let busy = || {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        std::thread::scope(|scope| {
            // Two busy threads for each core, at the usual priority.
            for _ in 0..2 * cores {
                scope.spawn(busy);
            }
            let (said, heard) = std::sync::mpsc::channel();
            scope.spawn(move || {
                let way = GiveWay::begin();
                let thread = rustix::thread::gettid().as_raw_nonzero().get();
                said.send((thread, way.0.is_some())).unwrap();
                busy();
            });
            let (thread, gives_way) = heard.recv().unwrap();
            let begun = std::time::Instant::now();
            let mut seen = [false; 2];
            while gives_way && seen != [true; 2] && begun.elapsed() < Duration::from_secs(20) {
                seen[usize::from(policy_of(thread) == libc::SCHED_OTHER)] = true;
                std::thread::sleep(Duration::from_millis(1));
            }
            done.store(true, Ordering::Relaxed);
            assert!(!gives_way || seen == [true; 2], "gave way and came back: {seen:?}");
        });
    }
}
