//! The gate between the embedder and the vCPU threads: who may run, and who has stopped.
//!
//! ```text
//!            start                 kicked
//!   Parked ─────────▶ Running ───────────────▶ (gate) ── order Park ──▶ Parked
//!     │                                          └────── order End ───▶ thread ends
//!     └── order End ──▶ thread ends
//! ```
//!
//! The order is written before a vCPU is kicked, and a vCPU reads it after each kick, so that no
//! order is lost.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Park,
    Run,
    End,
}

#[derive(Debug)]
struct State {
    order: Order,
    parked: u32,
    ended: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    threads: u32,
}

impl Gate {
    /// A gate for `threads` vCPU threads, all to be parked at first.
    pub(crate) fn new(threads: u32) -> Self {
        let state = State { order: Order::Park, parked: 0, ended: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), threads }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an order. `End` is final.
    pub(crate) fn order(&self, order: Order) {
        let mut state = self.lock();
        if state.order != Order::End {
            state.order = order;
        }
        self.changed.notify_all();
    }

    /// For a vCPU thread that is outside KVM_RUN: waits while parked; false if it is to end.
    pub(crate) fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.order == Order::Park {
            state.parked += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.order == Order::Park)
                .unwrap_or_else(PoisonError::into_inner);
            state.parked -= 1;
        }
        state.order == Order::Run
    }

    /// For a vCPU thread, at its end.
    pub(crate) fn leave(&self) {
        self.lock().ended += 1;
        self.changed.notify_all();
    }

    /// True if every vCPU thread is parked and to stay so.
    pub(crate) fn all_parked(&self) -> bool {
        let state = self.lock();
        state.order == Order::Park && state.parked == self.threads
    }

    /// Waits until all vCPU threads are parked. Errors: how many are not, after `timeout`.
    pub(crate) fn wait_parked(&self, timeout: Duration) -> Result<(), u32> {
        self.wait(timeout, |state| state.parked)
    }

    /// Waits until all vCPU threads have ended. Errors: how many have not, after `timeout`.
    pub(crate) fn wait_ended(&self, timeout: Duration) -> Result<(), u32> {
        self.wait(timeout, |state| state.ended)
    }

    fn wait(&self, timeout: Duration, count: impl Fn(&State) -> u32) -> Result<(), u32> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while count(&state) < self.threads {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.threads - count(&state));
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}
