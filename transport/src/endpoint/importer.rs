//! The side that reads.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use super::handshake::{Envelope, MAX_PATHS};
use super::{AnyLane, EndpointOptions, Exporter, Transport};
use crate::error::SetupError;
use crate::lane::LaneClass;
use crate::memory::HostMemory;
use crate::region::LocalRegion;
use crate::shm::ShmLane;
use crate::striped::Striped;
use crate::tcp::{Stream, TcpLane};
#[cfg(feature = "rdma")]
use crate::verbs::{VerbsImporter, VerbsRequest};

/// The side that reads.
pub struct Importer {
    kind: Kind,
    memories: Vec<HostMemory>,
    paths: usize,
}

enum Kind {
    Shm,
    Tcp,
    #[cfg(feature = "rdma")]
    Verbs(VerbsImporter),
}

/// A lane that awaits its grant.
pub struct LaneRequest {
    class: LaneClass,
    paths: Vec<PathRequest>,
}

enum PathRequest {
    Shm,
    Tcp,
    #[cfg(feature = "rdma")]
    Verbs(Box<VerbsRequest>),
}

impl LaneRequest {
    /// How many connected streams [`Importer::connect`] needs.
    pub fn streams(&self) -> usize {
        self.paths.iter().filter(|path| matches!(path, PathRequest::Tcp)).count()
    }
}

impl Importer {
    /// Registers `memories` for reads to land in.
    ///
    /// Errors: the transport is not available, an option makes no sense, or the memory can not be
    /// registered.
    pub fn new(
        transport: Transport,
        memories: &[HostMemory],
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        let rails = if transport == Transport::Verbs { options.devices.len().max(1) } else { 1 };
        let paths = options.paths.unwrap_or(rails);
        if !(1..=MAX_PATHS).contains(&paths) {
            let reason = format!("a lane has 1 to {MAX_PATHS} paths, not {paths}");
            return Err(SetupError::Option { reason });
        }
        let kind = match transport {
            Transport::Shm => Kind::Shm,
            Transport::Tcp => Kind::Tcp,
            #[cfg(feature = "rdma")]
            Transport::Verbs => Kind::Verbs(VerbsImporter::new(memories, options)?),
            #[cfg(not(feature = "rdma"))]
            Transport::Verbs => return Err(super::built_without()),
        };
        // Shared memory has no wire whose paths could differ.
        let paths = if matches!(kind, Kind::Shm) { 1 } else { paths };
        Ok(Self { kind, memories: memories.to_vec(), paths })
    }

    /// The places to land in, in the order of the memories.
    pub fn regions(&self) -> Vec<LocalRegion> {
        let region = |(index, memory): (usize, &HostMemory)| LocalRegion {
            index: index as u16,
            len: memory.len() as u64,
        };
        self.memories.iter().enumerate().map(region).collect()
    }

    /// Starts a lane: what to keep, and what to send to the exporter.
    ///
    /// Errors: the device refuses.
    pub fn request(&self, class: LaneClass) -> Result<(LaneRequest, Vec<u8>), SetupError> {
        let (mut paths, mut blobs) = (Vec::new(), Vec::new());
        for _at in 0..self.paths {
            let (path, blob) = match &self.kind {
                Kind::Shm => (PathRequest::Shm, Vec::new()),
                Kind::Tcp => (PathRequest::Tcp, Vec::new()),
                #[cfg(feature = "rdma")]
                Kind::Verbs(importer) => {
                    let (request, blob) = importer.request(_at, class)?;
                    (PathRequest::Verbs(Box::new(request)), blob)
                }
            };
            paths.push(path);
            blobs.push(blob);
        }
        Ok((LaneRequest { class, paths }, Envelope { class, paths: blobs }.encode()))
    }

    /// Finishes a lane with the exporter's grant and as many connected streams as it needs
    /// ([`LaneRequest::streams`]), in any order.
    ///
    /// Errors: the grant is malformed, a stream is missing, or the system or device refuses.
    pub fn connect(
        &self,
        request: LaneRequest,
        grant: &[u8],
        streams: Vec<Stream>,
    ) -> Result<AnyLane, SetupError> {
        let malformed = || SetupError::Malformed { what: "lane grant" };
        let granted = Envelope::decode(grant, "lane grant")?;
        if granted.class != request.class || granted.paths.len() != request.paths.len() {
            return Err(malformed());
        }
        let mut streams = streams.into_iter();
        let mut lanes = Vec::new();
        for (path, grant) in request.paths.into_iter().zip(&granted.paths) {
            lanes.push(match path {
                PathRequest::Shm => AnyLane::Shm(ShmLane::connect(grant, self.memories.clone())?),
                PathRequest::Tcp => {
                    let stream = streams.next().ok_or_else(malformed)?;
                    let lane = TcpLane::new(stream, self.memories.clone());
                    AnyLane::Tcp(lane.map_err(SetupError::io("preparing a lane's stream"))?)
                }
                #[cfg(feature = "rdma")]
                PathRequest::Verbs(path) => match &self.kind {
                    Kind::Verbs(importer) => AnyLane::Verbs(importer.connect(*path, grant)?),
                    _ => return Err(malformed()),
                },
            });
        }
        match lanes.pop() {
            Some(only) if lanes.is_empty() => Ok(only),
            Some(last) => {
                lanes.push(last);
                let striped =
                    Striped::new(lanes).map_err(SetupError::io("preparing a lane of several paths"));
                Ok(AnyLane::Striped(striped?))
            }
            None => Err(malformed()),
        }
    }

    /// A lane to an exporter in this process; streams go over the loopback.
    ///
    /// Errors: as [`Importer::connect`] and [`Exporter::grant`].
    pub fn connect_local(&self, exporter: &mut Exporter, class: LaneClass) -> Result<AnyLane, SetupError> {
        let (request, blob) = self.request(class)?;
        let grant = exporter.grant(&blob)?;
        let failed = |error| SetupError::io("connecting over the loopback")(error);
        let mut streams = Vec::new();
        for _ in 0..request.streams() {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
            let stream = TcpStream::connect(listener.local_addr().map_err(failed)?).map_err(failed)?;
            streams.push(stream.into());
            exporter.attach(listener.accept().map_err(failed)?.0)?;
        }
        self.connect(request, &grant, streams)
    }
}
