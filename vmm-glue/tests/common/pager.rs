//! The simplest pager there is: one thread that copies each page that is asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use postcopy_engine::memory::GuestMemory;
use userfaultfd::{Event, FeatureFlags, Uffd, UffdBuilder};

/// The guest mapping of `memory`, all of it missing.
pub fn missing(memory: &GuestMemory) -> Uffd {
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::MISSING_SHMEM)
        .create()
        .unwrap();
    uffd.register(memory.guest().base().cast(), memory.guest().len()).unwrap();
    uffd
}

/// Waits for a fault; its address.
pub fn next_fault(uffd: &Uffd, patience: Duration) -> Option<u64> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        match uffd.read_event().unwrap() {
            Some(Event::Pagefault { addr, .. }) => return Some(addr as u64),
            Some(other) => panic!("{other:?}"),
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    }
    None
}

/// Brings one page from `source`.
pub fn serve(uffd: &Uffd, source: &GuestMemory, memory: &GuestMemory, fault: u64) {
    let offset = (fault - memory.guest().base() as u64) & !4095;
    let from = source.guest().at(offset, 4096).unwrap();
    let to = memory.guest().at(offset, 4096).unwrap();
    // SAFETY: both are whole pages of live mappings.
    match unsafe { uffd.copy(from.cast(), to.cast(), 4096, true) } {
        Ok(_) => {}
        Err(userfaultfd::Error::CopyFailed(errno)) if errno as i32 == 17 => {
            uffd.wake(to.cast(), 4096).unwrap();
        }
        Err(error) => panic!("{error}"),
    }
}

/// A thread that brings each page that is asked for.
pub struct Pager {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Pager {
    pub fn start(uffd: Uffd, source: GuestMemory, memory: GuestMemory) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), served.clone());
        let run = move || {
            while !stopped.load(Ordering::Acquire) {
                if let Some(fault) = next_fault(&uffd, Duration::from_millis(10)) {
                    serve(&uffd, &source, &memory, fault);
                    count.fetch_add(1, Ordering::Release);
                }
            }
        };
        Self { stop, served, thread: Some(std::thread::spawn(run)) }
    }

    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Acquire)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap();
    }
}
