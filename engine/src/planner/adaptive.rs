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
use super::pages::Run;
use super::ranks::{Ground, Passes};

/// Streams that are followed; the one that has waited longest for a fault is forgotten first.
const STREAMS: usize = 16;
/// How far from where a stream has been a fault still belongs to it: 256 KiB.
const REACH: u64 = 64;
/// Pages that a stream may be ahead of its last fault while others have a turn: 16 KiB.
const WINDOW: u32 = 4;
/// How far a stream's faults lean when it grows one way only; they lean no further, so that older ones are soon
/// forgotten. One fault leans by chance.
const LEAN: i8 = 3;

/// Faults that seem to be of one walk. Places are ranks.
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
    /// The next place of a stride, where there is one; the stride is `step`.
    stride: Option<u64>,
}

impl Stream {
    fn new(at: u64) -> Self {
        Self {
            up: Edge::up(at + 1, Passes::Sent),
            down: Edge::down(at, Passes::Sent),
            lean: 0,
            up_next: true,
            ahead: 0,
            last: at,
            used: 0,
            step: 0,
            stride: None,
        }
    }

    fn expects(&self, at: u64) -> bool {
        let (from, end) = (self.down.at().saturating_sub(REACH), self.up.at() + REACH);
        (from..end).contains(&at) || self.stride.is_some_and(|next| next.abs_diff(at) <= REACH)
    }

    /// The guest waits for a page that this stream expected.
    fn confirm(&mut self, at: u64) {
        let step = at as i64 - self.last as i64;
        self.lean = (self.lean + step.signum() as i8).clamp(-LEAN, LEAN);
        let jumped = at > self.up.at() || at + 1 < self.down.at();
        // Of a stride in use, pages may have been there before they were touched.
        let kept = self.stride.is_some() && step.signum() == self.step.signum() && step % self.step == 0;
        if !kept {
            let strides = jumped && step == self.step;
            match step {
                // That is the edges' way, which read many at once.
                -1 | 1 if strides => (self.stride, self.lean) = (None, LEAN * step as i8),
                _ => self.stride = strides.then(|| at.checked_add_signed(step)).flatten(),
            }
            self.step = step;
        }
        if jumped {
            (self.up, self.down) = (Edge::up(at + 1, Passes::Sent), Edge::down(at, Passes::Sent));
        }
        (self.last, self.ahead) = (at, 0);
    }

    fn next(&mut self, ground: Ground, limit: u32) -> Option<Run> {
        if let Some(run) = self.next_of_stride(ground) {
            return Some(run);
        }
        let up_first = if self.lean.abs() < LEAN { self.up_next } else { self.lean > 0 };
        self.up_next = !up_first;
        let edges = if up_first { [&mut self.up, &mut self.down] } else { [&mut self.down, &mut self.up] };
        edges.into_iter().find_map(|edge| edge.next(ground, limit))
    }

    fn next_of_stride(&mut self, ground: Ground) -> Option<Run> {
        // Past what is there already, and no further than a stream reaches.
        for _ in 0..REACH {
            let at = self.stride?;
            // Not past what is known yet: it would not come back.
            let spot = ground.spot(at)?;
            self.stride = at.checked_add_signed(self.step).filter(|next| *next < ground.pages.total());
            let run = ground.run_up(spot, 1);
            if run.count == 1 {
                return Some(run);
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
    /// A fault went to the network, on the page of this rank: its stream has the next turn.
    pub(super) fn fault(&mut self, place: u64) {
        self.turn = match self.confirm(place) {
            Some(at) => at,
            None if self.streams.len() < STREAMS => {
                self.streams.push(Stream::new(place));
                self.streams.len() - 1
            }
            None => {
                let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
                let at = oldest.map_or(0, |(at, _)| at);
                self.streams[at] = Stream::new(place);
                at
            }
        };
        self.streams[self.turn].used = self.faults;
    }

    /// The guest waits for a page in flight.
    pub(super) fn hit(&mut self, place: u64) {
        self.confirm(place);
    }

    /// Tells the stream that expected this page, if one did. The newest is asked first.
    fn confirm(&mut self, place: u64) -> Option<usize> {
        self.faults += 1;
        let all = self.streams.iter().enumerate().filter(|(_, stream)| stream.expects(place));
        let (at, _) = all.max_by_key(|(_, stream)| stream.used)?;
        self.streams[at].confirm(place);
        self.streams[at].used = self.faults;
        Some(at)
    }

    /// What comes next.
    pub(super) fn next(&mut self, ground: Ground, limit: u32) -> Turn {
        let count = self.streams.len();
        for _ in 0..count {
            let stream = &mut self.streams[self.turn];
            self.turn = (self.turn + 1) % count;
            let left = WINDOW.saturating_sub(stream.ahead);
            let run = (left > 0).then(|| stream.next(ground, limit.min(left))).flatten();
            if let Some(run) = run {
                stream.ahead += run.count;
                return Turn::Bubble(run);
            }
        }
        let newest = self.streams.iter_mut().max_by_key(|stream| stream.used);
        match newest.and_then(|stream| stream.next(ground, limit)) {
            Some(run) => Turn::Bubble(run),
            None => Turn::Sweep,
        }
    }
}
