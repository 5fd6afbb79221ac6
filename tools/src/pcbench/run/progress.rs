//! A line on stderr that says how far a run is, where stderr is a terminal.

use std::io::{IsTerminal, Write, stderr};

use postcopy_tools::size;
use postcopy_transport::Transport;

/// Erases the line that the cursor is on.
const ERASE: &str = "\r\x1b[K";

/// Shows how far a run is; the line is gone when this is.
pub(super) struct Progress {
    shown: bool,
    total: usize,
    done: usize,
}

impl Progress {
    pub(super) fn new(quiet: bool, total: usize) -> Self {
        Self { shown: !quiet && stderr().is_terminal(), total, done: 0 }
    }

    /// Says what comes next.
    pub(super) fn next(&mut self, round: u32, transport: Transport, bytes: u32) {
        self.done += 1;
        if self.shown {
            let (done, total, bytes) = (self.done, self.total, size::short(bytes.into()));
            let _ =
                write!(stderr(), "{ERASE}pcbench: {done}/{total}: round {}, {transport}, {bytes}", round + 1);
        }
    }

    /// Everything is measured.
    pub(super) fn end(self) {}
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(stderr(), "{ERASE}");
        }
    }
}
