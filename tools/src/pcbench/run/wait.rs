//! How to wait when nothing has completed: spin, sleep, or first one and then the other.

use std::time::{Duration, Instant};

use postcopy_transport::{AnyLane, Lane, LaneError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::Completion;

/// How long `adaptive` spins before it sleeps: about what a sleep costs.
const SPIN: Duration = Duration::from_micros(50);
/// Empty polls between two looks at the clock.
const CLOCK_EVERY: u32 = 256;
/// Longest sleep: how late a stalled lane or an order to stop is seen.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);
/// A sleep until a moment ends this much before it; the rest is spun.
const SLACK: Duration = Duration::from_micros(100);

/// Waits between polls, and says when nothing has happened for too long.
pub(crate) struct Waiter {
    completion: Completion,
    patience: Duration,
    since: Option<Instant>,
    empty: u32,
}

impl Waiter {
    pub(crate) fn new(completion: Completion, patience: Duration) -> Self {
        Self { completion, patience, since: None, empty: 0 }
    }

    /// Something was done.
    pub(crate) fn busy(&mut self) {
        self.since = None;
        self.empty = 0;
    }

    /// Nothing was done; `until` is when the next read is due. Returns false if nothing has been
    /// done for longer than patience lasts.
    ///
    /// Errors: a lane died.
    pub(crate) fn idle(&mut self, lanes: &mut [AnyLane], until: Option<Instant>) -> Result<bool, LaneError> {
        self.empty += 1;
        // Polling looks at the clock only now and then: it costs as much as a poll. Nor is there a
        // PAUSE: a poll of a lane is many instructions anyway, and each would delay what it finds.
        if self.completion == Completion::Poll && !self.empty.is_multiple_of(CLOCK_EVERY) {
            return Ok(true);
        }
        let now = Instant::now();
        let idle = now.duration_since(*self.since.get_or_insert(now));
        let asleep = match self.completion {
            Completion::Poll => false,
            Completion::Event => true,
            Completion::Adaptive => idle >= SPIN,
        };
        if asleep {
            sleep(lanes, until.map(|until| until.saturating_duration_since(now)))?;
        }
        Ok(idle < self.patience)
    }
}

/// Sleeps until a lane has something, or for a time.
fn sleep(lanes: &mut [AnyLane], limit: Option<Duration>) -> Result<(), LaneError> {
    let limit = limit.map_or(LONGEST_SLEEP, |limit| limit.saturating_sub(SLACK).min(LONGEST_SLEEP));
    if limit.is_zero() {
        return Ok(());
    }
    for lane in lanes.iter_mut() {
        if lane.in_flight() > 0 && !lane.arm()? {
            return Ok(());
        }
    }
    let busy = lanes.iter().filter(|lane| lane.in_flight() > 0);
    let mut descriptors: Vec<PollFd<'_>> =
        busy.map(|lane| PollFd::from_borrowed_fd(lane.descriptor(), PollFlags::IN)).collect();
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    // An error (a signal) is a wake-up like any other: everything is looked at again.
    let _ = poll(&mut descriptors, Some(&limit));
    Ok(())
}
