//! Who brings a page: the one thing that a shard and the threads that serve their own faults share.
//!
//! ```text
//!  Missing ──claim──▶ Claimed ──▶ Landed ──published──▶ Resident
//!     ├──map: clean─▶ Kept ──claim──▶ Landed       ▲
//!     └──map: zero──▶ Zero ──claim──▶ Zeroed ──────┘
//! ```
//!
//! A page's landing place is written by whoever claimed it and by nobody else, so nothing is read
//! twice, and what the guest wrote is never overwritten. One byte a page; a claim is one
//! compare-and-swap.
//!
//! When a pager fails, claims are abandoned: nobody begins any more. In those that follow ([`Claims::following`]) what was
//! claimed is missing, unless it may have been published, and be the guest's by now: from just before that until it is known the
//! page is landed or zeroed, and is not read again.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::ledger::Ledger;
use super::shards::Part;
use crate::memory::PageIndex;
use crate::planner::{PageState, Pages, Run};

const MISSING: u8 = 0;
const CLAIMED: u8 = 1;
const ZERO: u8 = 2;
const RESIDENT: u8 = 3;
const KEPT: u8 = 4;
/// Being published, with its content.
const LANDED: u8 = 5;
/// Being published, as zeros.
const ZEROED: u8 = 6;

/// Whether faults may be served by these claims.
const OPEN: u8 = 0;
/// No more: every page is here.
const RELEASED: u8 = 1;
/// No more: pages are missing, and others will bring them.
const ABANDONED: u8 = 2;

/// What a claim found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The page is the caller's to read.
    Read,
    /// The page is the caller's, and known to be zero.
    Zero,
    /// The page is the caller's, and here since the round of pre-copy.
    Kept,
    /// Somebody else brings it.
    Taken,
    /// It is published.
    Resident,
}

/// The claims on the pages of one shard, as they stand in its part of a ledger.
pub(super) struct Claims {
    ledger: Ledger,
    shard: usize,
    part: Part,
    /// Pages that are neither published nor known by the map to need no read.
    outstanding: AtomicU64,
    /// How many [`Serving`] there are.
    serving: AtomicU32,
    closing: AtomicU8,
}

impl Claims {
    /// On pages of which nothing is known.
    pub(super) fn new(ledger: &Ledger, shard: usize, part: Part) -> Self {
        let (outstanding, serving) = (AtomicU64::new(part.pages), AtomicU32::new(0));
        Self { ledger: ledger.clone(), shard, part, outstanding, serving, closing: AtomicU8::new(OPEN) }
    }

    /// Those that follow on what stands in the ledger, by which nobody serves any more: pages that were claimed and not about
    /// to be published are missing, or zero if they were given back. What has landed in place is kept, as it may be the
    /// guest's; a copy out of a pool takes nothing from the guest and is made again. If the memory was let go before, all of
    /// it is the guest's.
    pub(super) fn following(ledger: &Ledger, shard: usize, part: Part) -> Self {
        let (mut outstanding, in_place) = (0, ledger.lands_in_place());
        let released = ledger.released(shard).load(Ordering::SeqCst) == 1;
        let given_back = ledger.given_back(part);
        for (page, state) in (0..).zip(ledger.claims(part)) {
            let next = match state.load(Ordering::Acquire) {
                _ if released => RESIDENT,
                LANDED if in_place => KEPT,
                MISSING | CLAIMED | LANDED if given_back.has(page) => ZERO,
                MISSING | CLAIMED | LANDED => MISSING,
                ZERO | ZEROED => ZERO,
                KEPT => KEPT,
                _ => RESIDENT,
            };
            state.store(next, Ordering::Release);
            outstanding += u64::from(next == MISSING);
        }
        Self { outstanding: AtomicU64::new(outstanding), ..Self::new(ledger, shard, part) }
    }

    fn states(&self) -> &[AtomicU8] {
        self.ledger.claims(self.part)
    }

    /// Pages that are still to be read.
    pub(super) fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Acquire)
    }

    /// What is known of the pages, for a planner.
    pub(super) fn pages(&self) -> Pages {
        let states = self.states();
        Pages::of(self.part.pages, |page| match states[page.0 as usize].load(Ordering::Acquire) {
            ZERO => PageState::Zero,
            KEPT => PageState::Kept,
            RESIDENT => PageState::Resident,
            _ => PageState::Missing,
        })
    }

    fn swap(&self, page: PageIndex, from: u8, to: u8) -> Result<u8, u8> {
        self.states()[page.0 as usize].compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
    }

    /// Whether there is such a page.
    pub(super) fn covers(&self, page: PageIndex) -> bool {
        page.0 < self.part.pages
    }

    /// Claims a page, which must exist.
    pub(super) fn claim(&self, page: PageIndex) -> Claim {
        match self.swap(page, MISSING, CLAIMED) {
            Ok(_) => Claim::Read,
            Err(ZERO) if self.claim_here(page, ZERO, ZEROED) => Claim::Zero,
            Err(KEPT) if self.claim_here(page, KEPT, LANDED) => Claim::Kept,
            Err(RESIDENT) => Claim::Resident,
            Err(_) => Claim::Taken,
        }
    }

    /// Claims a page that the map was enough for, to be published next.
    fn claim_here(&self, page: PageIndex, from: u8, to: u8) -> bool {
        let ours = self.swap(page, from, to).is_ok();
        // Counted as here when the map said so; published, it is counted again.
        self.outstanding.fetch_add(u64::from(ours), Ordering::AcqRel);
        ours
    }

    /// Claims those pages of `run` that are free to read: the pieces, and the pages that others
    /// have.
    pub(super) fn claim_run(&self, run: Run, pieces: &mut Vec<Run>, taken: &mut Vec<PageIndex>) {
        let mut piece: Option<Run> = None;
        for page in run.pages() {
            if self.swap(page, MISSING, CLAIMED).is_err() {
                taken.push(page);
                pieces.extend(piece.take());
            } else if let Some(piece) = &mut piece {
                piece.count += 1;
            } else {
                piece = Some(Run::one(page));
            }
        }
        pieces.extend(piece);
    }

    /// Claims those pages of `run` that are kept: the pieces.
    pub(super) fn claim_kept(&self, run: Run, pieces: &mut Vec<Run>) {
        for page in run.pages().filter(|page| self.claim_here(*page, KEPT, LANDED)) {
            match pieces.last_mut() {
                Some(piece) if piece.end() == page.0 => piece.count += 1,
                _ => pieces.push(Run::one(page)),
            }
        }
    }

    /// The source says that the page is zero. Says whether it is so from now on: not if somebody brings it.
    pub(super) fn zero(&self, page: PageIndex) -> bool {
        self.here(page, ZERO)
    }

    /// The source says that the page is what it was in the round of pre-copy. Says whether it is so from now
    /// on, as [`Claims::zero`] does.
    pub(super) fn keep(&self, page: PageIndex) -> bool {
        self.here(page, KEPT)
    }

    fn here(&self, page: PageIndex, how: u8) -> bool {
        let turned = self.swap(page, MISSING, how).is_ok();
        self.outstanding.fetch_sub(u64::from(turned), Ordering::AcqRel);
        turned
    }

    /// Publishes the claimed pages of `run`, which are here. Says whether they were the last.
    ///
    /// Errors: those of `publish`. Some pages may be the guest's then, and are not read again.
    pub(super) fn publish<E>(&self, run: Run, publish: impl FnOnce() -> Result<(), E>) -> Result<bool, E> {
        let states = &self.states()[run.first.0 as usize..run.end() as usize];
        for state in states {
            // Whoever claimed it alone changes it.
            if state.load(Ordering::Relaxed) == CLAIMED {
                state.store(LANDED, Ordering::Release);
            }
        }
        publish()?;
        for state in states {
            state.store(RESIDENT, Ordering::Release);
        }
        let count = u64::from(run.count);
        Ok(self.outstanding.fetch_sub(count, Ordering::AcqRel) == count)
    }

    /// Whether a page is published.
    pub(super) fn is_resident(&self, page: PageIndex) -> bool {
        self.states()[page.0 as usize].load(Ordering::Acquire) == RESIDENT
    }

    /// Begins to serve a fault, until what is returned is dropped. `None` once the memory is being let go, as every page is
    /// here, or they are [abandoned](Claims::is_abandoned).
    pub(super) fn enter(&self) -> Option<Serving<'_>> {
        self.serving.fetch_add(1, Ordering::SeqCst);
        let serving = Serving(self);
        (self.closing.load(Ordering::SeqCst) == OPEN).then_some(serving)
    }

    /// Lets nobody begin any more, and waits until nobody serves a fault: after it, no read of a
    /// serving thread is under way that could write over what the guest wrote since.
    pub(super) fn close(&self) {
        self.closing.store(RELEASED, Ordering::SeqCst);
        self.await_left();
        self.ledger.released(self.shard).store(1, Ordering::SeqCst);
    }

    /// Lets nobody begin any more, as others will bring what is missing.
    pub(super) fn abandon(&self) {
        // What is released stays so: nothing of it is missing.
        let _ = self.closing.compare_exchange(OPEN, ABANDONED, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Whether [`Claims::abandon`] was called.
    pub(super) fn is_abandoned(&self) -> bool {
        self.closing.load(Ordering::SeqCst) == ABANDONED
    }

    /// Waits until nobody serves a fault, after nobody may begin any more.
    pub(super) fn await_left(&self) {
        while self.serving.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }
}

/// A fault is being served.
pub(super) struct Serving<'a>(&'a Claims);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.serving.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(pages: u64) -> Claims {
        Claims::new(&Ledger::of_this_process(pages).unwrap(), 0, Part { first: 0, pages })
    }

    fn following(claims: &Claims) -> Claims {
        Claims::following(&claims.ledger, claims.shard, claims.part)
    }

    /// Whether that was the last page.
    fn published(claims: &Claims, run: Run) -> bool {
        claims.publish(run, || Ok::<_, ()>(())).unwrap()
    }

    #[test]
    fn a_page_has_one_owner() {
        let claims = claims(8);
        assert_eq!(claims.claim(PageIndex(3)), Claim::Read);
        assert_eq!(claims.claim(PageIndex(3)), Claim::Taken);
        let (mut pieces, mut taken) = (Vec::new(), Vec::new());
        claims.claim_run(Run { first: PageIndex(1), count: 5 }, &mut pieces, &mut taken);
        let run = |first, count| Run { first: PageIndex(first), count };
        assert_eq!((pieces, taken), (vec![run(1, 2), run(4, 2)], vec![PageIndex(3)]));
        assert!(!published(&claims, run(3, 1)));
        assert_eq!(claims.claim(PageIndex(3)), Claim::Resident);
    }

    #[test]
    fn what_was_claimed_is_missing_in_those_that_follow_unless_memory_was_let_go() {
        let claims = claims(6);
        let claim = |page| claims.claim(PageIndex(page));
        assert_eq!([claim(0), claim(1)], [Claim::Read; 2]);
        published(&claims, Run::one(PageIndex(1)));
        assert!(claims.zero(PageIndex(2)) && claims.keep(PageIndex(3)));
        assert!(!claims.zero(PageIndex(0)) && !claims.keep(PageIndex(0)), "whoever claimed it brings it");
        claims.abandon();
        assert!(claims.enter().is_none() && claims.is_abandoned());
        let next = following(&claims);
        assert!(next.enter().is_some() && !next.is_abandoned());
        let pages = next.pages();
        let of = |page| pages.get(PageIndex(page)).unwrap();
        use PageState::{Kept, Missing, Resident, Zero};
        assert_eq!([0, 1, 2, 3, 4, 5].map(of), [Missing, Resident, Zero, Kept, Missing, Missing]);
        assert_eq!(pages.outstanding(), 3);
        for page in [0, 4] {
            assert_eq!(next.claim(PageIndex(page)), Claim::Read);
            assert!(!published(&next, Run::one(PageIndex(page))));
        }
        assert_eq!(next.claim(PageIndex(5)), Claim::Read);
        assert!(published(&next, Run::one(PageIndex(5))), "that was the last");

        // What was zero or kept is shown by the kernel itself, without a trap to publish it in.
        next.close();
        next.abandon();
        assert!(!next.is_abandoned());
        let pages = following(&next).pages();
        assert!((0..6).all(|page| pages.get(PageIndex(page)) == Some(Resident)));
        assert_eq!(pages.outstanding(), 0);
    }

    #[test]
    fn what_may_be_the_guests_by_now_is_not_read_again() {
        use PageState::{Kept, Missing, Zero};
        for (in_place, landed) in [(true, Kept), (false, Missing)] {
            let claims = claims(6);
            claims.ledger.lands(in_place);
            assert!(claims.keep(PageIndex(2)) && claims.zero(PageIndex(3)));
            let run = Run { first: PageIndex(0), count: 4 };
            let all = [0, 1, 2, 3].map(|page| claims.claim(PageIndex(page)));
            assert_eq!(all, [Claim::Read, Claim::Read, Claim::Kept, Claim::Zero]);
            assert_eq!(claims.publish(run, || Err("the kernel refuses")), Err("the kernel refuses"));
            claims.ledger.give_back(claims.part, 5, 6);
            let pages = following(&claims).pages();
            let of = |page| pages.get(PageIndex(page)).unwrap();
            assert_eq!([0, 1, 2, 3, 4, 5].map(of), [landed, landed, landed, Zero, Missing, Zero]);
        }
    }

    #[test]
    fn the_last_page_is_told_and_zero_and_kept_pages_count_as_here() {
        let claims = claims(6);
        assert!(claims.keep(PageIndex(4)) && claims.keep(PageIndex(5)));
        assert_eq!(claims.claim(PageIndex(5)), Claim::Kept);
        assert!(!published(&claims, Run::one(PageIndex(5))));
        assert!(claims.zero(PageIndex(0)) && claims.zero(PageIndex(1)));
        assert_eq!(claims.claim(PageIndex(0)), Claim::Zero);
        assert_eq!(claims.claim(PageIndex(2)), Claim::Read);
        assert!(!claims.zero(PageIndex(2)));
        assert_eq!(claims.claim(PageIndex(3)), Claim::Read);
        assert!(!published(&claims, Run::one(PageIndex(0))));
        assert!(!published(&claims, Run::one(PageIndex(2))));
        assert!(published(&claims, Run::one(PageIndex(3))));
        drop(claims.enter().unwrap());
        claims.close();
        assert!(claims.enter().is_none());
    }
}
