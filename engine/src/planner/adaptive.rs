//! Streams found in the faults: the default policy.
//!
//! The paper's bubble knows one thing, where the last faults were. A stream also knows how the ones
//! before it led there, and from that how far and which way to run ahead:
//!
//! - **locality**: a fault within [`REACH`] pages of where a stream has been belongs to it, any other
//!   begins a stream. The stream of a fault has the next turn.
//! - **direction**: a stream grows both ways, as the paper's dual bubble, until its faults lean clearly to one.
//! - **window**: streams take turns, each until it is [`WINDOW`] pages ahead of its last fault. A page
//!   that nobody comes back to (the waste) costs no more than that.
//! - **stride**: two equal steps of more than a page, over pages that were not read ahead, make a stride, and
//!   the pages between are left out.
//!
//! When every stream has used up its window, the newest goes on beyond it, as the paper's bubble
//! does: around the last fault is a better guess than the start of memory. What no stream reaches is
//! left to the sweep.
//!
//! Of a page that is there before it is touched nobody hears: a stream that did all right looks like
//! one that the guest has left. That is why the window is short, and does not grow with success;
//! `docs/adr/0006-policies-and-windows.md` has what longer ones cost.

use super::bubble::{Edge, Turn};
use super::pages::{Pages, Run};
use crate::memory::PageIndex;

/// Streams that are followed; the one that has waited longest for a fault is forgotten first.
const STREAMS: usize = 16;
/// How far from where a stream has been a fault still belongs to it: 256 KiB.
const REACH: u64 = 64;
/// Pages that a stream may be ahead of its last fault while others have a turn: 16 KiB.
const WINDOW: u32 = 4;
/// How far a stream's faults lean when it grows one way only; they lean no further, so that older ones are soon
/// forgotten. One fault leans by chance.
const LEAN: i8 = 3;

/// Faults that seem to be of one walk.
#[derive(Debug)]
struct Stream {
    up: Edge,
    down: Edge,
    /// More than 0: its faults lean upwards; less: downwards.
    lean: i8,
    /// Which edge is next, while they lean neither way.
    up_next: bool,
    /// Pages read since its last fault.
    ahead: u32,
    last: u64,
    /// When it last faulted.
    used: u64,
    step: i64,
    /// The next page of a stride, where there is one; the stride is `step`.
    stride: Option<u64>,
}

impl Stream {
    fn new(page: u64) -> Self {
        Self {
            up: Edge::up(page + 1, true),
            down: Edge::down(page, true),
            lean: 0,
            up_next: true,
            ahead: 0,
            last: page,
            used: 0,
            step: 0,
            stride: None,
        }
    }

    fn expects(&self, page: u64) -> bool {
        let (from, end) = (self.down.at().saturating_sub(REACH), self.up.at() + REACH);
        (from..end).contains(&page) || self.stride.is_some_and(|next| next.abs_diff(page) <= REACH)
    }

    /// The guest waits for a page that this stream expected.
    fn confirm(&mut self, page: u64) {
        let step = page as i64 - self.last as i64;
        self.lean = (self.lean + step.signum() as i8).clamp(-LEAN, LEAN);
        let jumped = page > self.up.at() || page + 1 < self.down.at();
        // Of a stride in use, pages may have been there before they were touched.
        let kept = self.stride.is_some() && step.signum() == self.step.signum() && step % self.step == 0;
        if !kept {
            let strides = jumped && step == self.step;
            match step {
                // That is the edges' way, which read many at once.
                -1 | 1 if strides => (self.stride, self.lean) = (None, LEAN * step as i8),
                _ => self.stride = strides.then(|| page.checked_add_signed(step)).flatten(),
            }
            self.step = step;
        }
        if jumped {
            (self.up, self.down) = (Edge::up(page + 1, true), Edge::down(page, true));
        }
        (self.last, self.ahead) = (page, 0);
    }

    fn next(&mut self, pages: &Pages, limit: u32, known: u64) -> Option<Run> {
        if let Some(run) = self.next_of_stride(pages, known) {
            return Some(run);
        }
        let up_first = if self.lean.abs() < LEAN { self.up_next } else { self.lean > 0 };
        self.up_next = !up_first;
        let edges = if up_first { [&mut self.up, &mut self.down] } else { [&mut self.down, &mut self.up] };
        edges.into_iter().find_map(|edge| edge.next(pages, limit, known))
    }

    fn next_of_stride(&mut self, pages: &Pages, known: u64) -> Option<Run> {
        // Past what is there already, and no further than a stream reaches.
        for _ in 0..REACH {
            // Not past what is known yet: it would not come back.
            let page = self.stride.filter(|page| *page < known)?;
            self.stride = page.checked_add_signed(self.step).filter(|next| *next < pages.total());
            if pages.missing_up(page, page + 1).is_some() {
                return Some(Run::one(PageIndex(page)));
            }
        }
        None
    }
}

/// The streams, and whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    turn: usize,
    /// Faults so far: the clock by which streams age.
    faults: u64,
}

impl Streams {
    /// A fault went to the network: its stream has the next turn.
    pub(super) fn fault(&mut self, PageIndex(page): PageIndex) {
        self.turn = match self.confirm(page) {
            Some(at) => at,
            None if self.streams.len() < STREAMS => {
                self.streams.push(Stream::new(page));
                self.streams.len() - 1
            }
            None => {
                let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
                let at = oldest.map_or(0, |(at, _)| at);
                self.streams[at] = Stream::new(page);
                at
            }
        };
        self.streams[self.turn].used = self.faults;
    }

    /// The guest waits for a page in flight.
    pub(super) fn hit(&mut self, PageIndex(page): PageIndex) {
        self.confirm(page);
    }

    /// Tells the stream that expected this page, if one did. The newest is asked first.
    fn confirm(&mut self, page: u64) -> Option<usize> {
        self.faults += 1;
        let all = self.streams.iter().enumerate().filter(|(_, stream)| stream.expects(page));
        let (at, _) = all.max_by_key(|(_, stream)| stream.used)?;
        self.streams[at].confirm(page);
        self.streams[at].used = self.faults;
        Some(at)
    }

    /// What comes next.
    pub(super) fn next(&mut self, pages: &Pages, limit: u32, known: u64) -> Turn {
        let count = self.streams.len();
        for _ in 0..count {
            let stream = &mut self.streams[self.turn];
            self.turn = (self.turn + 1) % count;
            let left = WINDOW.saturating_sub(stream.ahead);
            let run = (left > 0).then(|| stream.next(pages, limit.min(left), known)).flatten();
            if let Some(run) = run {
                stream.ahead += run.count;
                return Turn::Bubble(run);
            }
        }
        let newest = self.streams.iter_mut().max_by_key(|stream| stream.used);
        match newest.and_then(|stream| stream.next(pages, limit, known)) {
            Some(run) => Turn::Bubble(run),
            None => Turn::Sweep,
        }
    }
}
