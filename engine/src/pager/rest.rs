//! When to spin and when to sleep.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use postcopy_transport::{Lane, LaneError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a sleep lasts while the source's page map grows: it tells nobody when it does.
const MAP_PATIENCE: Duration = Duration::from_micros(500);

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

    /// The turn did nothing: spin for a while, then sleep until a descriptor or (with
    /// `map_pending`) a short time says otherwise.
    pub(super) fn idle<L: Lane>(
        &mut self,
        now: Instant,
        lanes: &mut [L; 2],
        others: [BorrowedFd<'_>; 2],
        map_pending: bool,
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
        sleep(lanes, others, map_pending.then_some(MAP_PATIENCE));
        Ok(())
    }
}

fn sleep<L: Lane>(lanes: &[L; 2], others: [BorrowedFd<'_>; 2], limit: Option<Duration>) {
    let [urgent, bulk] = lanes;
    let [first, second] = others;
    let waited = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
    let mut descriptors = [
        waited(first.as_fd()),
        waited(second.as_fd()),
        waited(urgent.descriptor()),
        waited(bulk.descriptor()),
    ];
    let limit = limit.map(|limit| Timespec { tv_sec: 0, tv_nsec: limit.as_nanos() as i64 });
    // An error (a signal) is a wake-up like any other: the loop looks at everything again.
    let _ = poll(&mut descriptors, limit.as_ref());
}
