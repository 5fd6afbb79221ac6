//! The side whose memory is read.

use super::handshake::Envelope;
use super::{EndpointOptions, Transport};
use crate::error::SetupError;
use crate::memory::HostMemory;
use crate::region::RemoteRegion;
use crate::shm::ShmExporter;
use crate::tcp::{Stream, TcpExporter};
#[cfg(feature = "rdma")]
use crate::verbs::VerbsExporter;

/// The side whose memory is read. Dropping it closes every lane and takes the memory back.
pub struct Exporter(Kind);

enum Kind {
    Shm(ShmExporter),
    Tcp(TcpExporter),
    #[cfg(feature = "rdma")]
    Verbs(VerbsExporter),
}

impl Exporter {
    /// Exports `memories` for reading.
    ///
    /// Errors: the transport is not available, or the memory can not be registered.
    pub fn new(
        transport: Transport,
        memories: &[HostMemory],
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        Ok(Self(match transport {
            Transport::Shm => Kind::Shm(ShmExporter::new(memories)?),
            Transport::Tcp => Kind::Tcp(TcpExporter::new(memories, options)?),
            #[cfg(feature = "rdma")]
            Transport::Verbs => Kind::Verbs(VerbsExporter::new(memories, options)?),
            #[cfg(not(feature = "rdma"))]
            Transport::Verbs => return Err(super::built_without()),
        }))
    }

    /// The capabilities to give to the importer, in the order of the memories.
    pub fn regions(&self) -> Vec<RemoteRegion> {
        match &self.0 {
            Kind::Shm(exporter) => exporter.regions(),
            Kind::Tcp(exporter) => exporter.regions(),
            #[cfg(feature = "rdma")]
            Kind::Verbs(exporter) => exporter.regions(),
        }
    }

    /// Answers an importer's request for a lane. Then [`Exporter::attach`] follows for each stream
    /// that the lane needs: [`Exporter::awaited`].
    ///
    /// Errors: the request is malformed, or the device refuses.
    pub fn grant(&mut self, request: &[u8]) -> Result<Vec<u8>, SetupError> {
        let Envelope { class, mut paths } = Envelope::decode(request, "lane request")?;
        for path in &mut paths {
            *path = match &mut self.0 {
                Kind::Shm(exporter) if path.is_empty() => exporter.grant(),
                Kind::Tcp(exporter) if path.is_empty() => exporter.grant(class),
                #[cfg(feature = "rdma")]
                Kind::Verbs(exporter) => exporter.grant(path)?,
                _ => return Err(SetupError::Malformed { what: "lane request" }),
            };
        }
        Ok(Envelope { class, paths }.encode())
    }

    /// How many connected streams the granted lanes still need.
    pub fn awaited(&self) -> usize {
        match &self.0 {
            Kind::Tcp(exporter) => exporter.awaited(),
            _ => 0,
        }
    }

    /// Gives the first lane that awaits one a connected stream. Lanes are served in the order of
    /// their grants.
    ///
    /// Errors: no lane awaits a stream, or the system refuses.
    pub fn attach(&mut self, stream: impl Into<Stream>) -> Result<(), SetupError> {
        match &mut self.0 {
            Kind::Tcp(exporter) => exporter.attach(stream.into()),
            _ => Err(SetupError::Malformed { what: "lane stream" }),
        }
    }
}
