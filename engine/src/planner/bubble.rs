//! Prepaging by bubbling: one pivot or several, as in the paper.
//!
//! Hines, Deshpande and Gopalan, "Post-copy live migration of virtual machines", SIGOPS OSR 43(3),
//! 2009, section 4.2 (prepaging by bubbling) and its multi-pivot form. A bubble grows around a
//! *pivot*, the last page that faulted over the network; its *edges* move outwards by turns.
//!
//! - An edge that reaches the end of memory stops, the other goes on.
//! - With one pivot, pages already sent are skipped. With several, an edge that meets a page already
//!   sent stops: another bubble has been there.
//! - The oldest of k pivots is replaced. In one direction the first, at the start of memory, is
//!   never replaced, and its edge skips, so that the push does not run dry. Here that first pivot
//!   is the planner's sweep, which every policy falls back on when its edges have stopped.
//!
//! A page known to be zero is not sent, so an edge passes over it in every case.

use super::pages::{Pages, Run};
use super::policy::Direction;
use crate::memory::PageIndex;

/// One side of a bubble.
#[derive(Clone, Copy, Debug)]
pub(super) struct Edge {
    up: bool,
    /// Up: the next page to look at. Down: the page above it.
    at: u64,
    /// Skip pages already sent, instead of stopping at them.
    skips: bool,
    stopped: bool,
}

impl Edge {
    pub(super) fn up(at: u64, skips: bool) -> Self {
        Self { up: true, at, skips, stopped: false }
    }

    pub(super) fn down(at: u64, skips: bool) -> Self {
        Self { up: false, at, skips, stopped: false }
    }

    /// Where it has got to.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The next run of at most `limit` pages below `known`; the edge moves past it.
    pub(super) fn next(&mut self, pages: &Pages, limit: u32, known: u64) -> Option<Run> {
        if self.stopped {
            return None;
        }
        let run =
            if self.up { self.next_up(pages, limit, known) } else { self.next_down(pages, limit, known) };
        if let Some(run) = run {
            self.at = if self.up { run.end() } else { run.first.0 };
        }
        run
    }

    fn next_up(&mut self, pages: &Pages, limit: u32, known: u64) -> Option<Run> {
        let found = match self.skips {
            true => pages.missing_up(self.at, known),
            false => pages.content_up(self.at, known),
        };
        // Nothing up to what is known: the map may grow, the memory does not.
        let Some(first) = found else {
            self.stopped = known == pages.total();
            self.at = self.at.max(known);
            return None;
        };
        self.at = first;
        let run = pages.run_up(first, limit, known);
        self.stopped = run.count == 0;
        (!self.stopped).then_some(run)
    }

    fn next_down(&mut self, pages: &Pages, limit: u32, known: u64) -> Option<Run> {
        // Below a pivot that the map has not reached: wait.
        if self.at > known {
            return None;
        }
        let found = match self.skips {
            true => pages.missing_down(self.at),
            false => pages.content_down(self.at),
        };
        let run = found.map(|last| pages.run_down(last, limit)).filter(|run| run.count > 0);
        self.stopped = run.is_none();
        run
    }
}

/// The bubbles of the last few network faults.
#[derive(Debug)]
pub(super) struct Bubbles {
    pivots: usize,
    direction: Direction,
    /// Of each pivot one edge or two, oldest first.
    edges: Vec<Edge>,
    /// Whose turn it is. One past the last edge is the sticky first pivot, where there is one.
    turn: usize,
}

/// Whose turn it was.
pub(super) enum Turn {
    /// A bubble's edge: it brings this.
    Bubble(Run),
    /// The sweep's.
    Sweep,
}

impl Bubbles {
    pub(super) fn new(pivots: usize, direction: Direction) -> Self {
        Self { pivots, direction, edges: Vec::new(), turn: 0 }
    }

    fn edges_per_pivot(&self) -> usize {
        if self.direction == Direction::Dual { 2 } else { 1 }
    }

    /// Whether the sweep takes turns with the edges, as the first pivot.
    fn sticky(&self) -> bool {
        self.pivots > 1 && self.direction != Direction::Dual
    }

    /// A fault went to the network: its page is the newest pivot, and has the next turn.
    pub(super) fn fault(&mut self, PageIndex(pivot): PageIndex) {
        let (each, skips) = (self.edges_per_pivot(), self.pivots == 1);
        let replaceable = self.pivots - usize::from(self.sticky());
        if self.edges.len() == replaceable * each {
            self.edges.drain(..each);
        }
        self.turn = self.edges.len();
        if self.direction != Direction::Backward {
            self.edges.push(Edge::up(pivot + 1, skips));
        }
        if self.direction != Direction::Forward {
            self.edges.push(Edge::down(pivot, skips));
        }
    }

    /// What comes next.
    pub(super) fn next(&mut self, pages: &Pages, limit: u32, known: u64) -> Turn {
        let turns = self.edges.len() + usize::from(self.sticky());
        for _ in 0..turns {
            let turn = self.turn % turns;
            self.turn = turn + 1;
            let Some(edge) = self.edges.get_mut(turn) else { return Turn::Sweep };
            if let Some(run) = edge.next(pages, limit, known) {
                return Turn::Bubble(run);
            }
        }
        Turn::Sweep
    }
}
