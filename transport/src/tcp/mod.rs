//! One-sided reads over TCP: the peer's CPU answers, but nobody above the transport takes part.
//!
//! The lane is one connection. Who dials it is the session's business: an exporter and an importer
//! are each handed a connected stream, in clear or under TLS ([`Stream`]).

mod alive;
mod exports;
mod lane;
mod responder;
mod stream;
mod tls;
mod vectored;
mod wire;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

pub use alive::{LOST_AFTER, watch_over};
pub(crate) use exports::Exports;
pub use lane::TcpLane;
use responder::Responder;
#[cfg(feature = "fuzz")]
pub(crate) use responder::serve;
pub use stream::Stream;

use crate::endpoint::{DEFAULT_SPIN, EndpointOptions};
use crate::error::SetupError;
use crate::lane::LaneClass;
use crate::memory::HostMemory;
use crate::region::RemoteRegion;

/// Exports memory over TCP. Dropping it ends every lane.
pub struct TcpExporter {
    exports: Arc<Exports>,
    lanes: Vec<Responder>,
    /// Granted paths whose stream has not come yet.
    awaited: VecDeque<LaneClass>,
    spin: Duration,
}

impl TcpExporter {
    /// Exports `memories` under keys of 64 random bits each.
    ///
    /// Errors: the system has no randomness to give.
    pub fn new(memories: &[HostMemory], options: &EndpointOptions) -> Result<Self, SetupError> {
        let keyed = |memory: &HostMemory| Ok((random_key()?, memory.clone()));
        let regions = memories.iter().map(keyed).collect::<Result<_, SetupError>>()?;
        let spin = options.spin.unwrap_or(DEFAULT_SPIN);
        Ok(Self {
            exports: Arc::new(Exports::new(regions)),
            lanes: Vec::new(),
            awaited: VecDeque::new(),
            spin,
        })
    }

    /// The capabilities to give to the importer, in the order of the memories.
    pub fn regions(&self) -> Vec<RemoteRegion> {
        let region = |(key, memory): &(u64, HostMemory)| RemoteRegion::new(0, memory.len() as u64, *key);
        self.exports.regions().iter().map(region).collect()
    }

    /// Promises to serve a path of a lane, whose stream follows.
    pub(crate) fn grant(&mut self, class: LaneClass) -> Vec<u8> {
        self.awaited.push_back(class);
        Vec::new()
    }

    /// Granted paths whose stream has not come yet.
    pub(crate) fn awaited(&self) -> usize {
        self.awaited.len()
    }

    /// Serves the first path that awaits it on a connected stream. Urgent lanes spin for the next
    /// request, if processors are to be had; bulk lanes sleep.
    ///
    /// Errors: none awaits a stream, or the system refuses a socket option or a thread.
    pub fn attach(&mut self, stream: Stream) -> Result<(), SetupError> {
        let class = self.awaited.pop_front().ok_or(SetupError::Malformed { what: "lane stream" })?;
        let lane = self.lanes.len();
        let responder = Responder::start(stream, self.exports.clone(), lane, class, self.spin);
        self.lanes.push(responder.map_err(SetupError::io("starting a lane"))?);
        Ok(())
    }
}

fn random_key() -> Result<u64, SetupError> {
    getrandom::u64().map_err(|error| SetupError::io("getrandom")(error.into()))
}
