//! How much may be in flight: the bandwidth-delay product of the link, as measured, and no more
//! than keeps a fault waiting for a stated time.
//!
//! With `window` bytes of bulk in flight, what is behind them waits `window / rate - rtt` for the
//! wire once the pipe is full. The window that keeps the wire busy and a fault within `wait` of it
//! is therefore
//!
//! ```text
//! window = rate × (rtt + wait)
//! ```
//!
//! `rate` is the highest of the recent delivery rates and `rtt` the shortest read, both as BBR takes
//! them (Cardwell et al., "BBR: congestion-based congestion control", 2016): a rate sample is what
//! was delivered between the posting of a read and its landing. While the window is what limits the
//! rate, the window grows by `wait / rtt` a round trip, so that no probing is needed.
//!
//! Unless most reads take many times the shortest, as where the ends of a link share processors with
//! a busy guest: there a small window makes a small rate, and that a smaller window. So there is a
//! least window, [`Floor`], which is found by trying whether a larger one is faster.

use crate::memory::PAGE_SIZE;

/// A moment in nanoseconds, from whatever start the caller counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nanos(pub u64);

impl Nanos {
    /// Time since `earlier`, or 0.
    pub fn since(self, earlier: Nanos) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Least window, and the one before anything is known of the link: 64 KiB, which is 50 µs of 10 Gb/s.
const MIN_WINDOW: u32 = 16;
/// The least window grows to this at most: 512 KiB.
const MAX_FLOOR: u32 = 128;
/// Most: 8 MiB, which is 200 Gb/s for 335 µs.
const MAX_WINDOW: u32 = 2048;
/// Most pages of a bulk read where the link is what limits it: 64 KiB.
const USUAL_READ_PAGES: u32 = 16;
/// Most pages of a bulk read, where a read costs more than its bytes: 128 KiB.
pub const MAX_READ_PAGES: u32 = 32;
/// Pages of a bulk read just after a fault: 16 KiB, or a quarter of the least window if that is more.
const FAULT_READ_PAGES: u32 = 4;
/// The highest rate fades by this part of itself with every sample.
const FADE: f64 = 1.0 / 64.0;

/// Windows' worth of pages in an epoch, the time for which a rate is measured.
const EPOCH_WINDOWS: u32 = 8;
/// Epochs between trials, and before the first.
const REST_EPOCHS: u32 = 16;
const FIRST_REST: u32 = 1;
/// Twice the least window must be so much faster, and half of it may be so much slower.
const PAYS: f64 = 1.15;
const COSTS: f64 = 0.95;

const _: () = assert!(MIN_WINDOW <= MAX_FLOOR && 2 * MAX_FLOOR <= MAX_WINDOW);
const _: () = assert!(2 <= MIN_WINDOW && MIN_WINDOW <= MAX_WINDOW);
const _: () = assert!(FAULT_READ_PAGES <= USUAL_READ_PAGES && USUAL_READ_PAGES <= MAX_READ_PAGES);
const _: () = assert!(MAX_READ_PAGES <= MAX_FLOOR);

/// What was so when a read was posted, for the samples when it lands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Posted {
    at: Nanos,
    delivered: u64,
}

/// What the present epoch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    /// Nothing is tried for so many epochs.
    Rest(u32),
    Larger,
    Smaller,
}

/// The least window.
#[derive(Debug)]
struct Floor {
    pages: u32,
    /// Pages a nanosecond with it; 0 before the first epoch is over.
    rate: f64,
    trial: Trial,
    larger_next: bool,
}

impl Floor {
    fn new() -> Self {
        Self { pages: MIN_WINDOW, rate: 0.0, trial: Trial::Rest(FIRST_REST), larger_next: true }
    }

    /// The least window of this epoch.
    fn now(&self) -> u32 {
        match self.trial {
            Trial::Rest(_) => self.pages,
            Trial::Larger => self.pages * 2,
            Trial::Smaller => self.pages / 2,
        }
    }

    /// An epoch is over, which had this rate.
    fn epoch_over(&mut self, rate: f64) {
        match self.trial {
            Trial::Larger if rate > PAYS * self.rate => (self.pages, self.rate) = (self.pages * 2, rate),
            Trial::Smaller if rate > COSTS * self.rate => (self.pages, self.rate) = (self.pages / 2, rate),
            Trial::Larger | Trial::Smaller => self.trial = Trial::Rest(REST_EPOCHS),
            Trial::Rest(left) => {
                self.rate = if self.rate == 0.0 { rate } else { (3.0 * self.rate + rate) / 4.0 };
                self.trial = match (left.saturating_sub(1), self.larger_next) {
                    (0, true) => Trial::Larger,
                    (0, false) => Trial::Smaller,
                    (left, _) => Trial::Rest(left),
                };
                self.larger_next ^= !matches!(self.trial, Trial::Rest(_));
            }
        }
        if !(MIN_WINDOW..=MAX_FLOOR).contains(&self.now()) {
            self.trial = Trial::Rest(REST_EPOCHS);
        }
    }
}

/// The link, as its reads show it.
#[derive(Debug)]
pub(super) struct Link {
    wait_ns: u64,
    delivered: u64,
    /// Bytes a nanosecond; 0 before the first read has landed.
    rate: f64,
    rtt_ns: u64,
    /// Of `rate` and `rtt_ns`, kept because every read asks for them.
    floor: Floor,
    epoch_began: Nanos,
    epoch_pages: u32,
    window: u32,
    carried: u32,
    read_pages: u32,
    /// Nothing has faulted since the last read landed.
    quiet: bool,
}

impl Link {
    pub(super) fn new(wait_ns: u64) -> Self {
        Self {
            wait_ns,
            delivered: 0,
            rate: 0.0,
            rtt_ns: u64::MAX,
            floor: Floor::new(),
            epoch_began: Nanos(0),
            epoch_pages: 0,
            window: MIN_WINDOW,
            carried: FAULT_READ_PAGES,
            read_pages: FAULT_READ_PAGES,
            quiet: true,
        }
    }

    pub(super) fn posted(&self, now: Nanos) -> Posted {
        Posted { at: now, delivered: self.delivered }
    }

    /// A read of so many pages has landed.
    pub(super) fn landed(&mut self, posted: Posted, pages: u32, now: Nanos) {
        let took = now.since(posted.at).max(1);
        self.delivered += u64::from(pages) * PAGE_SIZE;
        let sample = (self.delivered - posted.delivered) as f64 / took as f64;
        self.rate = sample.max(self.rate - self.rate * FADE);
        self.rtt_ns = self.rtt_ns.min(took);
        let pages_in = |ns: u64| ((self.rate * ns as f64) as u64).div_ceil(PAGE_SIZE);
        let window = pages_in(self.rtt_ns + self.wait_ns).min(MAX_WINDOW.into()) as u32;
        self.carried = pages_in(self.wait_ns).min(USUAL_READ_PAGES.into()) as u32;
        self.epoch_pages += pages;
        if self.epoch_pages >= EPOCH_WINDOWS * self.window {
            let rate = f64::from(self.epoch_pages) / now.since(self.epoch_began).max(1) as f64;
            if window < self.floor.now() {
                self.floor.epoch_over(rate);
            }
            (self.epoch_began, self.epoch_pages) = (now, 0);
        }
        self.window = window.max(self.floor.now());
        if self.quiet {
            self.read_pages = (self.read_pages * 2).min(USUAL_READ_PAGES);
        }
        self.quiet = true;
    }

    /// Something faulted: smaller reads, so that its neighbours have their turn sooner.
    pub(super) fn faulted(&mut self) {
        self.read_pages = (self.read_pages / 2).max(FAULT_READ_PAGES);
        self.quiet = false;
    }

    /// Bulk pages that may be in flight.
    pub(super) fn window(&self) -> u32 {
        self.window
    }

    /// Pages that the next bulk read may have: what the wire carries in the time that a fault may
    /// wait, fewer just after a fault, and at least a quarter of the least window, which is large
    /// where a read costs more than its bytes.
    pub(super) fn read_limit(&self) -> u32 {
        self.read_pages.min(self.carried).max(self.least())
    }

    /// Pages that there must be room for before a bulk read is posted, so that what a small one leaves
    /// does not make small reads for ever where they cost more than their bytes. Where large ones were found
    /// to pay, that is a whole one.
    pub(super) fn read_least(&self) -> u32 {
        let least = self.least();
        if least >= USUAL_READ_PAGES { least } else { self.floor.now() / 16 }
    }

    fn least(&self) -> u32 {
        (self.floor.now() / 4).min(MAX_READ_PAGES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_large_reads_pay_none_is_posted_for_what_a_small_one_left() {
        let mut link = Link::new(50_000);
        assert_eq!(link.read_least(), 1, "at first a single page is worth a read");
        link.faulted();
        for (floor, least, limit) in
            [(32, 2, 8), (64, USUAL_READ_PAGES, USUAL_READ_PAGES), (128, MAX_READ_PAGES, MAX_READ_PAGES)]
        {
            link.floor.pages = floor;
            assert_eq!((link.read_least(), link.read_limit()), (least, limit), "least window {floor}");
        }
    }
}
