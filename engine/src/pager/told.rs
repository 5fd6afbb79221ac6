//! What the pager is told while it works: what comes first, how pages lie, how much may cross.

use std::sync::Arc;

use super::board::Board;
use super::server::{Note, Shared};
use super::{Pager, PagerError, locked};
use crate::planner::{Bandwidth, Ranks, Run};

/// An order of the guest's pages: what each shard has of it.
#[derive(Clone, Default)]
pub struct LaidOut(Vec<Arc<Ranks>>);

/// Tells each shard what it has of the bandwidth, where that is limited or was.
pub(super) fn share_out(board: &Board, shards: &[Arc<Shared>]) {
    let each = board.share();
    for shared in shards {
        shared.note(Note::Limit(each));
        shared.stop.rouse();
    }
}

impl Pager {
    /// Lays the guest's pages out in an order: those of these runs one after the other, then the others by address. Takes a
    /// while, so it is to be done before the source's guest stands still.
    ///
    /// Errors: they are no pages of the guest.
    pub fn lay_out(&self, runs: &[Run]) -> Result<LaidOut, PagerError> {
        let parts = self.shards.iter().map(|shared| {
            let part = shared.part;
            let here: Vec<Run> = runs.iter().filter_map(|run| part.local_run(*run)).collect();
            Ranks::listed(part.pages, &here).map(Arc::new)
        });
        let ranks = parts.collect::<Option<_>>().filter(|_| runs.iter().all(|run| run.end() <= self.pages()));
        ranks.map(LaidOut).ok_or(PagerError::Peer("it orders pages that are not there"))
    }

    /// The source's guest stands still: faults of a trap that [holds](super::Trap::hold) them are served from now on, and
    /// `recent` is read before others, the first first, as the guest touched it last. They must be pages of
    /// the guest. For the policy and the sweep pages lie in this order from now on, or by address.
    pub fn source_stands_still(&self, recent: &[Run], order: Option<LaidOut>) {
        self.trap.let_go();
        self.set_order(order.unwrap_or_default());
        for shared in &*self.shards {
            let here = recent.iter().filter_map(|run| shared.part.local_run(*run)).collect();
            shared.note(Note::Prefer(here));
            shared.stop.rouse();
        }
    }

    /// How much may cross a second from now on where nobody waits for it, also when it [goes on](Pager::go_on).
    pub fn limit(&self, max_bandwidth: Option<Bandwidth>) {
        self.board.limit(max_bandwidth);
        share_out(&self.board, &self.shards);
    }

    /// The same, if less may cross already.
    pub(crate) fn limit_further(&self, max_bandwidth: Option<Bandwidth>) {
        self.limit(Bandwidth::least(self.board.max_bandwidth(), max_bandwidth));
    }

    /// Each shard hears of its part, and a pager that [goes on](Pager::go_on) has it again.
    pub(super) fn set_order(&self, order: LaidOut) {
        for (shared, ranks) in self.shards.iter().zip(&order.0) {
            shared.note(Note::Order(ranks.clone()));
        }
        *locked(&self.order) = order;
    }
}
