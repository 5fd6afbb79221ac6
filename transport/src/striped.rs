//! One lane over several paths: queue pairs, rails, or TCP connections.
//!
//! A batch is cut into one piece a path, so that each path still gets its piece with one doorbell
//! or one send. A path that fails fails the lane.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;

use crate::endpoint::AnyLane;
use crate::error::LaneError;
use crate::lane::{Completion, Lane, Read};

/// Several lanes that are used as one.
pub struct Striped {
    paths: Vec<AnyLane>,
    /// The path that the next batch begins with.
    next: usize,
    /// Readable when any path's descriptor is.
    ready: OwnedFd,
}

impl Striped {
    pub(crate) fn new(paths: Vec<AnyLane>) -> io::Result<Self> {
        let ready = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (at, path) in paths.iter().enumerate() {
            let data = epoll::EventData::new_u64(at as u64);
            epoll::add(&ready, path.descriptor(), data, epoll::EventFlags::IN)?;
        }
        Ok(Self { paths, next: 0, ready })
    }
}

impl Lane for Striped {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        let share = reads.len().div_ceil(self.paths.len());
        let mut posted = 0;
        // The second round gives what a full path left over to those with room.
        for piece in [share, reads.len()] {
            for _ in 0..self.paths.len() {
                if posted == reads.len() {
                    return Ok(posted);
                }
                let end = reads.len().min(posted + piece);
                posted += self.paths[self.next].post(&reads[posted..end])?;
                self.next = (self.next + 1) % self.paths.len();
            }
        }
        Ok(posted)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        self.paths.iter_mut().try_for_each(|path| path.poll(completions))
    }

    fn room(&self) -> usize {
        self.paths.iter().map(Lane::room).sum()
    }

    fn in_flight(&self) -> usize {
        self.paths.iter().map(Lane::in_flight).sum()
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        let mut all = true;
        for path in &mut self.paths {
            all &= path.arm()?;
        }
        Ok(all)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}
