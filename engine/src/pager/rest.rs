//! When to spin and when to sleep.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use postcopy_transport::{AnyLane, Lane, LaneError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Counts idle turns of the loop and says when to sleep.
pub(super) struct Rest {
    spin: Duration,
    idle_since: Option<Instant>,
}

impl Rest {
    pub(super) fn new(spin: Duration) -> Self {
        Self { spin, idle_since: None }
    }

    /// The turn did something.
    pub(super) fn busy(&mut self) {
        self.idle_since = None;
    }

    /// The turn did nothing: spin for a while, then sleep until a descriptor or the end of `limit`
    /// says otherwise.
    pub(super) fn idle(
        &mut self,
        now: Instant,
        lanes: &mut [AnyLane; 2],
        others: [BorrowedFd<'_>; 2],
        limit: Option<Duration>,
    ) -> Result<(), (usize, LaneError)> {
        let since = *self.idle_since.get_or_insert(now);
        if now.duration_since(since) < self.spin {
            std::hint::spin_loop();
            return Ok(());
        }
        for (which, lane) in lanes.iter_mut().enumerate() {
            if !lane.arm().map_err(|error| (which, error))? {
                return Ok(());
            }
        }
        sleep(lanes, others, limit);
        Ok(())
    }
}

/// As the kernel takes it: with an odd one it would not sleep at all. What is longer than it counts is for ever.
pub(super) fn timeout(limit: Duration) -> Option<Timespec> {
    Timespec::try_from(limit).ok()
}

/// Sleeps. The second of `others` is an eventfd, which is taken back.
fn sleep(lanes: &[AnyLane; 2], others: [BorrowedFd<'_>; 2], limit: Option<Duration>) {
    let [urgent, bulk] = lanes;
    let [first, second] = others;
    let waited = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
    let mut descriptors = [
        waited(first.as_fd()),
        waited(second.as_fd()),
        waited(urgent.descriptor()),
        waited(bulk.descriptor()),
    ];
    let limit = limit.and_then(timeout);
    // An error (a signal) is a wake-up like any other: the loop looks at everything again.
    let _ = poll(&mut descriptors, limit.as_ref());
    if descriptors[1].revents().contains(PollFlags::IN) {
        let _ = rustix::io::read(second, &mut [0; 8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_sleep_is_one_that_the_kernel_takes() {
        for (limit, seconds, nanos) in [(50, 0, 50_000_000), (1500, 1, 500_000_000), (7_200_000, 7200, 0)] {
            let timeout = timeout(Duration::from_millis(limit)).unwrap();
            assert_eq!((timeout.tv_sec, timeout.tv_nsec), (seconds, nanos));
            assert!(poll(&mut [], Some(&Timespec { tv_sec: 0, ..timeout })).is_ok());
        }
        assert!(timeout(Duration::MAX).is_none());
    }
}
