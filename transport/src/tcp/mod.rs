//! One-sided reads over TCP: the peer's CPU answers, but nobody above the transport takes part.
//!
//! The lane is one connection. Who dials it is the session's business: an exporter and an importer
//! are each handed a connected stream.

mod lane;
mod responder;
mod vectored;
mod wire;

use std::net::TcpStream;
use std::sync::Arc;

pub use lane::TcpLane;
use responder::{Exports, Responder};

use crate::error::SetupError;
use crate::memory::HostMemory;
use crate::region::RemoteRegion;

/// Exports memory over TCP. Dropping it ends every lane.
pub struct TcpExporter {
    exports: Arc<Exports>,
    lanes: Vec<Responder>,
}

impl TcpExporter {
    /// Exports `memories` under keys of 64 random bits each.
    ///
    /// Errors: the system has no randomness to give.
    pub fn new(memories: &[HostMemory]) -> Result<Self, SetupError> {
        let keyed = |memory: &HostMemory| Ok((random_key()?, memory.clone()));
        let regions = memories.iter().map(keyed).collect::<Result<_, SetupError>>()?;
        Ok(Self { exports: Arc::new(Exports { regions }), lanes: Vec::new() })
    }

    /// The capabilities to give to the importer, in the order of the memories.
    pub fn regions(&self) -> Vec<RemoteRegion> {
        let region = |(key, memory): &(u64, HostMemory)| RemoteRegion::new(0, memory.len() as u64, *key);
        self.exports.regions.iter().map(region).collect()
    }

    /// Serves a lane on a connected stream.
    ///
    /// Errors: the system refuses a socket option or a thread.
    pub fn attach(&mut self, stream: TcpStream) -> Result<(), SetupError> {
        let lane = self.lanes.len();
        let responder = Responder::start(stream, self.exports.clone(), lane);
        self.lanes.push(responder.map_err(SetupError::io("starting a lane"))?);
        Ok(())
    }
}

fn random_key() -> Result<u64, SetupError> {
    getrandom::u64().map_err(|error| SetupError::io("getrandom")(error.into()))
}
