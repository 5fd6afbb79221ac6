//! How a shard shows pages to the guest, and so ends its waits.

use super::Shard;
use crate::memory::PageIndex;
use crate::pager::PagerError;
use crate::pager::claims::Claim;
use crate::planner::Run;

impl Shard {
    /// Publishes what has landed. What another thread brought, it has published.
    pub(super) fn publish(&mut self, run: Run) -> Result<(), PagerError> {
        if !self.shared.claims.is_resident(run.first) {
            self.shared.claims.publish(run, || self.place.publish(&self.shared.trap, run))?;
        }
        self.timing.waits.end(run);
        Ok(())
    }

    pub(super) fn publish_zero(&mut self, page: PageIndex) -> Result<(), PagerError> {
        if self.shared.claims.claim(page) == Claim::Zero {
            let zeros = || self.shared.trap.publish_zero(page, self.shared.populated);
            self.shared.claims.publish(Run::one(page), zeros)?;
        }
        self.timing.waits.end(Run::one(page));
        Ok(())
    }

    /// Publishes what the round of pre-copy has left here. What another thread took, it publishes.
    pub(super) fn publish_kept(&mut self, run: Run) -> Result<(), PagerError> {
        self.shared.claims.claim_kept(run, &mut self.pieces);
        for piece in self.pieces.drain(..) {
            self.shared.claims.publish(piece, || self.shared.trap.publish(piece))?;
        }
        self.timing.waits.end(run);
        Ok(())
    }

    /// Shows a page that was published before to who was late to ask.
    ///
    /// Not if another thread is about to publish it, one that claimed a zero page: who asked waits for that
    /// thread.
    pub(super) fn show_again(&mut self, page: PageIndex) -> Result<(), PagerError> {
        if self.shared.claims.is_resident(page) {
            self.shared.trap.show_again(page)?;
        }
        self.timing.waits.end(Run::one(page));
        Ok(())
    }
}
