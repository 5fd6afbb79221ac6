//! Where shards tell how far they are, and the pager's status is put together of it.
//!
//! A shard comes here ten times a second and at its end, never on the way of a fault.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::watch;

use super::timing::Timing;
use super::waits::Waits;
use super::{Collapsed, PagerError, PagerState, PagerStatus, locked};
use crate::planner::Bandwidth;
use crate::stats::{PagerReport, StageReport, Stages};

/// What the shards have told.
pub(super) struct Board {
    told: Mutex<Told>,
    status: watch::Sender<PagerStatus>,
}

struct Told {
    /// What was done before, over lanes that were lost.
    before: PagerReport,
    reports: Vec<PagerReport>,
    /// What all of them together may have a second.
    max_bandwidth: Option<Bandwidth>,
    /// Of those shards that have ended.
    ended: usize,
    /// When the last of them had its last page.
    last_page: Option<Instant>,
    stopped: bool,
    failed: Option<Arc<PagerError>>,
    stages: Stages,
    waits: Waits,
}

impl Told {
    fn state(&self) -> PagerState {
        match &self.failed {
            Some(error) => PagerState::Failed(error.clone()),
            None if self.ended < self.reports.len() => PagerState::Running,
            None if self.stopped => PagerState::Stopped,
            None => PagerState::Resident,
        }
    }

    fn report(&self) -> PagerReport {
        let mut all = self.before;
        self.reports.iter().for_each(|report| all.add(report));
        all.max_bandwidth = self.max_bandwidth.map_or(0, Bandwidth::bytes);
        all
    }
}

/// What shards have done whose lanes were lost.
#[derive(Default)]
pub(super) struct Past {
    report: PagerReport,
    stages: Stages,
    waits: Waits,
}

/// How a shard ended.
pub(super) struct End {
    pub(super) state: PagerState,
    pub(super) report: PagerReport,
    pub(super) timing: Timing,
}

impl Board {
    /// For so many shards, which go on where others have ended and may have so much a second.
    pub(super) fn new(
        shards: usize,
        past: Past,
        max_bandwidth: Option<Bandwidth>,
    ) -> (Self, watch::Receiver<PagerStatus>) {
        let Past { report: before, stages, waits } = past;
        let reports = vec![PagerReport::default(); shards];
        let told = Told {
            before,
            reports,
            max_bandwidth,
            ended: 0,
            last_page: None,
            stopped: false,
            failed: None,
            stages,
            waits,
        };
        let (status, watched) = watch::channel(PagerStatus { report: told.report(), ..Default::default() });
        (Self { told: Mutex::new(told), status }, watched)
    }

    /// What there is to go on with, once all shards have ended.
    pub(super) fn past(&self) -> Past {
        let mut told = locked(&self.told);
        // How many pages there are, and how many are to come, the next shards tell themselves.
        let report = PagerReport { shards: 0, total_pages: 0, outstanding_pages: 0, ..told.report() };
        told.waits.interrupt();
        Past { report, stages: told.stages.clone(), waits: told.waits.clone() }
    }

    /// They may have so much a second.
    pub(super) fn limit(&self, max_bandwidth: Option<Bandwidth>) {
        let mut told = locked(&self.told);
        told.max_bandwidth = max_bandwidth;
        self.status.send_modify(|status| status.report = told.report());
    }

    pub(super) fn max_bandwidth(&self) -> Option<Bandwidth> {
        locked(&self.told).max_bandwidth
    }

    /// What each shard that is at work has of it.
    pub(super) fn share(&self) -> Option<Bandwidth> {
        let told = locked(&self.told);
        told.max_bandwidth.map(|limit| limit.shared_by(told.reports.len() - told.ended))
    }

    /// A shard has got so far.
    pub(super) fn tell(&self, shard: usize, report: PagerReport) {
        let mut told = locked(&self.told);
        told.reports[shard] = report;
        // Under the lock, so that nobody sees an earlier sum after a later one.
        self.status.send_modify(|status| status.report = told.report());
    }

    /// A shard has ended. The first that fails is the pager's failure: part of the guest's memory
    /// does not come, whatever the others do.
    pub(super) fn end(&self, shard: usize, mut end: End) {
        let mut told = locked(&self.told);
        told.reports[shard] = end.report;
        told.ended += 1;
        if !matches!(end.state, PagerState::Resident) {
            // Who waits here goes on to wait.
            told.waits.take_over(&mut end.timing.waits);
        }
        match end.state {
            PagerState::Failed(error) => drop(told.failed.get_or_insert(error)),
            PagerState::Stopped => told.stopped = true,
            PagerState::Resident | PagerState::Running => {}
        }
        told.last_page = told.last_page.max(end.timing.last_page);
        told.stages.add(&end.timing.stages);
        told.waits.add_all(&end.timing.waits);
        let (state, mut report) = (told.state(), told.report());
        report.stages = StageReport::from(&told.stages);
        let last_page = told.last_page.filter(|_| matches!(state, PagerState::Resident));
        self.status.send_replace(PagerStatus { state, report, last_page, waited: told.waits.sums() });
    }

    /// So much was put together to huge pages, after the end.
    pub(super) fn collapsed(&self, collapsed: Collapsed) {
        self.status.send_modify(|status| status.report.huge_pages = collapsed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_at_work_shares_what_may_cross() {
        let limit = Bandwidth::new;
        let (board, status) = Board::new(4, Past::default(), limit(120));
        assert_eq!((board.share(), status.borrow().report.max_bandwidth), (limit(30), 120));
        let end =
            || End { state: PagerState::Resident, report: PagerReport::default(), timing: Timing::default() };
        board.end(2, end());
        assert_eq!((board.share(), status.borrow().report.max_bandwidth), (limit(40), 120));
        board.limit(limit(60));
        board.end(0, end());
        assert_eq!((board.share(), status.borrow().report.max_bandwidth), (limit(30), 60));
        board.limit(None);
        assert_eq!((board.share(), status.borrow().report.max_bandwidth), (None, 0));
    }
}
