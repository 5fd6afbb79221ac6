//! A lane that breaks at its Nth call: it fails, or panics as a defect would.

use std::os::fd::BorrowedFd;

use crate::error::LaneError;
use crate::lane::{Completion, Lane, Read};

/// Passes calls on to a lane until the Nth of `post`, `poll` and `arm`; that one fails, and all
/// after it do.
pub struct Countdown<L> {
    inner: L,
    left: u64,
    panics: bool,
}

impl<L: Lane> Countdown<L> {
    /// Fails the `nth` call, from 1.
    pub fn new(inner: L, nth: u64) -> Self {
        Self { inner, left: nth, panics: false }
    }

    /// Panics in the `nth` call, from 1.
    pub fn panicking(inner: L, nth: u64) -> Self {
        Self { inner, left: nth, panics: true }
    }

    fn count(&mut self) -> Result<(), LaneError> {
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            assert!(!self.panics, "the countdown has run out");
            return Err(std::io::Error::other("the countdown has run out").into());
        }
        Ok(())
    }
}

impl<L: Lane> Lane for Countdown<L> {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        self.count()?;
        self.inner.post(reads)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        self.count()?;
        self.inner.poll(completions)
    }

    fn room(&self) -> usize {
        self.inner.room()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        self.count()?;
        self.inner.arm()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.inner.descriptor()
    }
}
