//! Watches the clocks for jumps that a migration must not make.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// How far CLOCK_REALTIME may go back (it is corrected by whoever keeps the time).
const REALTIME_SLACK_NS: u64 = 1_000_000_000;

fn now(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    now(ClockId::Monotonic)
}

/// CLOCK_BOOTTIME in nanoseconds.
pub fn boottime_ns() -> u64 {
    now(ClockId::Boottime)
}

/// The latest time seen on each clock, by any thread.
#[derive(Debug, Default)]
pub struct ClockWatch {
    latest: [AtomicU64; 3],
    went_back: AtomicBool,
}

impl ClockWatch {
    /// Looks at all clocks.
    pub fn look(&self) {
        let clocks =
            [(ClockId::Monotonic, 0), (ClockId::Boottime, 0), (ClockId::Realtime, REALTIME_SLACK_NS)];
        for ((clock, slack), latest) in clocks.into_iter().zip(&self.latest) {
            // The latest is read before the clock, so that another thread's later look cannot
            // make this one seem to have gone back.
            let before = latest.load(Ordering::Acquire);
            let time = now(clock);
            if time.saturating_add(slack) < before {
                self.went_back.store(true, Ordering::Release);
            }
            latest.fetch_max(time, Ordering::AcqRel);
        }
    }

    /// True if no clock ever went back.
    pub fn ok(&self) -> bool {
        !self.went_back.load(Ordering::Acquire)
    }
}
