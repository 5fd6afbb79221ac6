//! A lane over whatever transport.

use std::os::fd::BorrowedFd;

use crate::error::LaneError;
use crate::lane::{Completion, Lane, Read};
use crate::shm::ShmLane;
use crate::striped::Striped;
use crate::tcp::TcpLane;
#[cfg(feature = "rdma")]
use crate::verbs::VerbsLane;

/// A lane over any transport.
pub enum AnyLane {
    /// Over shared memory.
    Shm(ShmLane),
    /// Over TCP.
    Tcp(TcpLane),
    /// Over verbs.
    #[cfg(feature = "rdma")]
    Verbs(VerbsLane),
    /// Over several paths of one of those.
    Striped(Striped),
    /// A wire of the embedder's own.
    Other(Box<dyn Lane>),
}

macro_rules! each {
    ($self:expr, $lane:ident => $call:expr) => {
        match $self {
            AnyLane::Shm($lane) => $call,
            AnyLane::Tcp($lane) => $call,
            #[cfg(feature = "rdma")]
            AnyLane::Verbs($lane) => $call,
            AnyLane::Striped($lane) => $call,
            AnyLane::Other($lane) => $call,
        }
    };
}

impl Lane for AnyLane {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        each!(self, lane => lane.post(reads))
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        each!(self, lane => lane.poll(completions))
    }

    fn room(&self) -> usize {
        each!(self, lane => lane.room())
    }

    fn in_flight(&self) -> usize {
        each!(self, lane => lane.in_flight())
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        each!(self, lane => lane.arm())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        each!(self, lane => lane.descriptor())
    }
}
