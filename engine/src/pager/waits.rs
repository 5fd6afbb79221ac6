//! How long each of the guest's threads has waited for its pages.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::memory::PageIndex;
use crate::planner::Run;

/// What one thread has waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waited {
    /// Its number, as gettid(2) gives it in its own PID namespace.
    pub thread: i32,
    /// How often it waited.
    pub times: u64,
    /// How long in all: each time from when its fault was seen until it was served.
    pub total: Duration,
}

/// A thread that waits.
#[derive(Clone)]
struct Wait {
    thread: i32,
    page: PageIndex,
    since: Instant,
}

/// The waits that are under way, and the sums of those that are over.
#[derive(Clone, Default)]
pub(super) struct Waits {
    under_way: Vec<Wait>,
    over: BTreeMap<i32, (u64, Duration)>,
}

impl Waits {
    /// A thread waits for a page.
    pub(super) fn begin(&mut self, thread: i32, page: PageIndex, since: Instant) {
        self.under_way.push(Wait { thread, page, since });
    }

    /// The pages of `run` are there. Nearly always nobody waits, or one for one of them.
    pub(super) fn end(&mut self, run: Run) {
        while let Some(at) = self.under_way.iter().position(|wait| run.contains(wait.page)) {
            let Wait { thread, since, .. } = self.under_way.swap_remove(at);
            self.add(thread, since.elapsed());
        }
    }

    /// Takes those of another that are under way.
    pub(super) fn take_over(&mut self, other: &mut Self) {
        self.under_way.append(&mut other.under_way);
    }

    /// Those that wait begin to wait again, elsewhere: what they have waited is counted.
    pub(super) fn interrupt(&mut self) {
        for Wait { thread, since, .. } in std::mem::take(&mut self.under_way) {
            self.add(thread, since.elapsed());
        }
    }

    /// A thread has waited once.
    pub(super) fn add(&mut self, thread: i32, time: Duration) {
        let (times, total) = self.over.entry(thread).or_default();
        *times += 1;
        *total += time;
    }

    /// Adds those of another that are over.
    pub(super) fn add_all(&mut self, other: &Self) {
        for (thread, (more_times, more)) in &other.over {
            let (times, total) = self.over.entry(*thread).or_default();
            *times += more_times;
            *total += *more;
        }
    }

    /// By thread, in ascending order.
    pub(super) fn sums(&self) -> Vec<Waited> {
        let each = self.over.iter();
        each.map(|(thread, (times, total))| Waited { thread: *thread, times: *times, total: *total })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_its_page_and_is_its_threads() {
        let mut waits = Waits::default();
        let ago = |ms| Instant::now().checked_sub(Duration::from_millis(ms)).expect("the clock has run");
        waits.begin(7, PageIndex(3), ago(20));
        waits.begin(5, PageIndex(4), ago(10));
        waits.begin(9, PageIndex(40), ago(10));
        waits.end(Run { first: PageIndex(2), count: 3 });
        waits.end(Run { first: PageIndex(2), count: 3 });
        waits.add(7, Duration::from_millis(5));
        let sums = waits.sums();
        let counted: Vec<_> = sums.iter().map(|waited| (waited.thread, waited.times)).collect();
        assert_eq!(counted, [(5, 1), (7, 2)], "thread 9 waits still");
        assert!(sums[0].total >= Duration::from_millis(10) && sums[1].total >= Duration::from_millis(25));
    }
}
