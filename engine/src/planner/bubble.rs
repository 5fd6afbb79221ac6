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
//!
//! Where pages lie, and which is next, is by their ranks (`ranks.rs`): by address, if nothing else is said.

use super::pages::Run;
use super::policy::Direction;
use super::ranks::{Ground, Passes, Up};

/// One side of a bubble.
#[derive(Clone, Copy, Debug)]
pub(super) struct Edge {
    up: bool,
    /// Up: the next rank to look at. Down: the rank above it.
    at: u64,
    /// Pages already sent are passed, or it stops at them.
    passes: Passes,
    stopped: bool,
}

impl Edge {
    pub(super) fn up(at: u64, passes: Passes) -> Self {
        Self { up: true, at, passes, stopped: false }
    }

    pub(super) fn down(at: u64, passes: Passes) -> Self {
        Self { up: false, at, passes, stopped: false }
    }

    /// Where it has got to.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The next run of at most `limit` pages that may be read; the edge moves past it.
    pub(super) fn next(&mut self, ground: Ground, limit: u32) -> Option<Run> {
        if self.stopped {
            return None;
        }
        if self.up { self.next_up(ground, limit) } else { self.next_down(ground, limit) }
    }

    fn next_up(&mut self, ground: Ground, limit: u32) -> Option<Run> {
        let first = match ground.up(self.at, self.passes) {
            Up::At(first) => first,
            // The map may grow, the memory does not.
            Up::Unknown(at) => {
                self.at = at;
                return None;
            }
            Up::End => {
                self.stopped = true;
                return None;
            }
        };
        let run = ground.run_up(first, limit);
        self.stopped = run.count == 0;
        self.at = first.rank + u64::from(run.count);
        (!self.stopped).then_some(run)
    }

    fn next_down(&mut self, ground: Ground, limit: u32) -> Option<Run> {
        // Below a pivot that the map has not reached: wait.
        if self.at > 0 && ground.spot(self.at - 1).is_none() {
            return None;
        }
        let last = ground.down(self.at, self.passes);
        let run = last.map(|last| (last, ground.run_down(last, limit))).filter(|(_, run)| run.count > 0);
        self.stopped = run.is_none();
        let (last, run) = run?;
        self.at = last.rank + 1 - u64::from(run.count);
        Some(run)
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

    /// A fault went to the network: its page's rank is the newest pivot, and has the next turn.
    pub(super) fn fault(&mut self, pivot: u64) {
        let each = self.edges_per_pivot();
        let passes = if self.pivots == 1 { Passes::Sent } else { Passes::Zero };
        let replaceable = self.pivots - usize::from(self.sticky());
        if self.edges.len() == replaceable * each {
            self.edges.drain(..each);
        }
        self.turn = self.edges.len();
        if self.direction != Direction::Backward {
            self.edges.push(Edge::up(pivot + 1, passes));
        }
        if self.direction != Direction::Forward {
            self.edges.push(Edge::down(pivot, passes));
        }
    }

    /// What comes next.
    pub(super) fn next(&mut self, ground: Ground, limit: u32) -> Turn {
        let turns = self.edges.len() + usize::from(self.sticky());
        for _ in 0..turns {
            let turn = self.turn % turns;
            self.turn = turn + 1;
            let Some(edge) = self.edges.get_mut(turn) else { return Turn::Sweep };
            if let Some(run) = edge.next(ground, limit) {
                return Turn::Bubble(run);
            }
        }
        Turn::Sweep
    }
}
