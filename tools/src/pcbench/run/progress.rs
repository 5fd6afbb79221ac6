//! A line on stderr that says how far a run is, where stderr is a terminal.

use std::fmt::Display;
use std::io::{IsTerminal, Write, stderr};

/// Erases the line that the cursor is on.
const ERASE: &str = "\r\x1b[K";

/// Shows how far a run is; the line is gone when this is.
pub(crate) struct Progress {
    shown: bool,
    total: usize,
    done: usize,
}

impl Progress {
    pub(crate) fn new(quiet: bool, total: usize) -> Self {
        Self { shown: !quiet && stderr().is_terminal(), total, done: 0 }
    }

    /// Says what comes next.
    pub(crate) fn next(&mut self, round: u32, what: impl Display) {
        self.done += 1;
        if self.shown {
            let (done, total) = (self.done, self.total);
            let _ = write!(stderr(), "{ERASE}pcbench: {done}/{total}: round {}, {what}", round + 1);
        }
    }

    /// Everything is measured.
    pub(crate) fn end(self) {}
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(stderr(), "{ERASE}");
        }
    }
}
