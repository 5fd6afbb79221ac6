//! One type for each side, whatever the transport: the cold path of setting lanes up.
//!
//! The hot path is the [`Lane`] trait; [`AnyLane`] dispatches to it by a match.

use std::fmt;
use std::net::{IpAddr, TcpStream};
use std::os::fd::BorrowedFd;
use std::str::FromStr;

use crate::error::{LaneError, SetupError};
use crate::lane::{Completion, Lane, Read};
use crate::memory::HostMemory;
use crate::region::{LocalRegion, RemoteRegion};
use crate::shm::{ShmExporter, ShmLane};
use crate::tcp::{TcpExporter, TcpLane};
#[cfg(feature = "rdma")]
use crate::verbs::{VerbsExporter, VerbsImporter, VerbsLane, VerbsRequest};

/// The wires there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// Shared memory, on one host.
    Shm,
    /// TCP.
    Tcp,
    /// RDMA verbs: InfiniBand, RoCE, Soft-RoCE.
    Verbs,
}

impl Transport {
    /// Every transport, fastest first where all are available between two hosts.
    pub const ALL: [Transport; 3] = [Transport::Verbs, Transport::Tcp, Transport::Shm];

    /// Its name, as flags and reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Shm => "shm",
            Transport::Tcp => "tcp",
            Transport::Verbs => "verbs",
        }
    }

    /// True if each lane needs a connected stream of its own.
    pub fn needs_stream(self) -> bool {
        self == Transport::Tcp
    }

    /// Whether this build and this machine have it; if not, why, and what to do.
    pub fn available(self) -> Result<(), SetupError> {
        if self != Transport::Verbs {
            return Ok(());
        }
        #[cfg(feature = "rdma")]
        return match crate::verbs::device_names()?.is_empty() {
            false => Ok(()),
            true => Err(SetupError::Unavailable {
                transport: "verbs",
                reason: "this machine has no RDMA device; scripts/soft-roce/setup makes a software one"
                    .into(),
            }),
        };
        #[cfg(not(feature = "rdma"))]
        Err(built_without())
    }
}

#[cfg(not(feature = "rdma"))]
fn built_without() -> SetupError {
    SetupError::Unavailable {
        transport: "verbs",
        reason: "this program was built without the feature `rdma`; build it with default features".into(),
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|transport| transport.name() == name);
        found.ok_or_else(|| format!("there is no transport `{name}`; use shm, tcp or verbs"))
    }
}

/// Which RDMA device, port and address to use. Everything is found where nothing is said.
#[derive(Clone, Debug, Default)]
pub struct EndpointOptions {
    /// Device name, such as `mlx5_0` or `rxe0`. Default: the one that owns `local`, else the first
    /// with an active port.
    pub device: Option<String>,
    /// Port number, from 1. Default: the first active one.
    pub port: Option<u8>,
    /// GID index, on RoCE. Default: the RoCE v2 entry of `local`, else the best of the port.
    pub gid_index: Option<u32>,
    /// This host's address on the network that the peer is reached by.
    pub local: Option<IpAddr>,
}

/// The side whose memory is read. Dropping it closes every lane and takes the memory back.
pub enum Exporter {
    /// Over shared memory.
    Shm(ShmExporter),
    /// Over TCP.
    Tcp(TcpExporter),
    /// Over verbs.
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
        #[cfg(not(feature = "rdma"))]
        let _ = options;
        Ok(match transport {
            Transport::Shm => Self::Shm(ShmExporter::new(memories)?),
            Transport::Tcp => Self::Tcp(TcpExporter::new(memories)?),
            #[cfg(feature = "rdma")]
            Transport::Verbs => Self::Verbs(VerbsExporter::new(memories, options)?),
            #[cfg(not(feature = "rdma"))]
            Transport::Verbs => return Err(built_without()),
        })
    }

    /// The capabilities to give to the importer, in the order of the memories.
    pub fn regions(&self) -> Vec<RemoteRegion> {
        match self {
            Self::Shm(exporter) => exporter.regions(),
            Self::Tcp(exporter) => exporter.regions(),
            #[cfg(feature = "rdma")]
            Self::Verbs(exporter) => exporter.regions(),
        }
    }

    /// Answers an importer's request for a lane. Over TCP, [`Exporter::attach`] follows.
    ///
    /// Errors: the request is malformed, or the device refuses.
    pub fn grant(&mut self, request: &[u8]) -> Result<Vec<u8>, SetupError> {
        match self {
            Self::Shm(exporter) => Ok(exporter.grant()),
            Self::Tcp(_) if request.is_empty() => Ok(Vec::new()),
            Self::Tcp(_) => Err(SetupError::Malformed { what: "lane request" }),
            #[cfg(feature = "rdma")]
            Self::Verbs(exporter) => exporter.grant(request),
        }
    }

    /// Gives the next lane its stream, where [`Transport::needs_stream`].
    ///
    /// Errors: the transport uses no streams, or the system refuses.
    pub fn attach(&mut self, stream: TcpStream) -> Result<(), SetupError> {
        match self {
            Self::Tcp(exporter) => exporter.attach(stream),
            _ => Err(SetupError::Malformed { what: "lane stream" }),
        }
    }
}

/// The side that reads.
pub struct Importer {
    kind: ImporterKind,
    memories: Vec<HostMemory>,
}

enum ImporterKind {
    Shm,
    Tcp,
    #[cfg(feature = "rdma")]
    Verbs(VerbsImporter),
}

/// A lane that awaits its grant.
pub struct LaneRequest(LaneRequestKind);

enum LaneRequestKind {
    Shm,
    Tcp,
    #[cfg(feature = "rdma")]
    Verbs(Box<VerbsRequest>),
}

impl Importer {
    /// Registers `memories` for reads to land in.
    ///
    /// Errors: the transport is not available, or the memory can not be registered.
    pub fn new(
        transport: Transport,
        memories: &[HostMemory],
        options: &EndpointOptions,
    ) -> Result<Self, SetupError> {
        #[cfg(not(feature = "rdma"))]
        let _ = options;
        let kind = match transport {
            Transport::Shm => ImporterKind::Shm,
            Transport::Tcp => ImporterKind::Tcp,
            #[cfg(feature = "rdma")]
            Transport::Verbs => ImporterKind::Verbs(VerbsImporter::new(memories, options)?),
            #[cfg(not(feature = "rdma"))]
            Transport::Verbs => return Err(built_without()),
        };
        Ok(Self { kind, memories: memories.to_vec() })
    }

    /// The places to land in, in the order of the memories.
    pub fn regions(&self) -> Vec<LocalRegion> {
        let region = |(index, memory): (usize, &HostMemory)| LocalRegion {
            index: index as u16,
            len: memory.len() as u64,
        };
        self.memories.iter().enumerate().map(region).collect()
    }

    /// True if landing memory was populated and pinned by its registration.
    pub fn pins_memory(&self) -> bool {
        match self.kind {
            ImporterKind::Shm | ImporterKind::Tcp => false,
            #[cfg(feature = "rdma")]
            ImporterKind::Verbs(_) => true,
        }
    }

    /// Starts a lane: what to keep, and what to send to the exporter.
    ///
    /// Errors: the device refuses.
    pub fn request(&self) -> Result<(LaneRequest, Vec<u8>), SetupError> {
        let (kind, blob) = match &self.kind {
            ImporterKind::Shm => (LaneRequestKind::Shm, Vec::new()),
            ImporterKind::Tcp => (LaneRequestKind::Tcp, Vec::new()),
            #[cfg(feature = "rdma")]
            ImporterKind::Verbs(importer) => {
                let (request, blob) = importer.request()?;
                (LaneRequestKind::Verbs(Box::new(request)), blob)
            }
        };
        Ok((LaneRequest(kind), blob))
    }

    /// Finishes a lane with the exporter's grant and, where [`Transport::needs_stream`], a
    /// connected stream.
    ///
    /// Errors: the grant is malformed, a stream is missing, or the system or device refuses.
    pub fn connect(
        &self,
        request: LaneRequest,
        grant: &[u8],
        stream: Option<TcpStream>,
    ) -> Result<AnyLane, SetupError> {
        match request.0 {
            LaneRequestKind::Shm => ShmLane::connect(grant, self.memories.clone()).map(AnyLane::Shm),
            LaneRequestKind::Tcp => {
                let stream = stream.ok_or(SetupError::Malformed { what: "lane grant" })?;
                let lane = TcpLane::new(stream, self.memories.clone());
                lane.map(AnyLane::Tcp).map_err(SetupError::io("preparing a lane's stream"))
            }
            #[cfg(feature = "rdma")]
            LaneRequestKind::Verbs(request) => match &self.kind {
                ImporterKind::Verbs(importer) => importer.connect(*request, grant).map(AnyLane::Verbs),
                _ => Err(SetupError::Malformed { what: "lane grant" }),
            },
        }
    }
}

/// A lane over any transport.
pub enum AnyLane {
    /// Over shared memory.
    Shm(ShmLane),
    /// Over TCP.
    Tcp(TcpLane),
    /// Over verbs.
    #[cfg(feature = "rdma")]
    Verbs(VerbsLane),
}

macro_rules! each {
    ($self:expr, $lane:ident => $call:expr) => {
        match $self {
            AnyLane::Shm($lane) => $call,
            AnyLane::Tcp($lane) => $call,
            #[cfg(feature = "rdma")]
            AnyLane::Verbs($lane) => $call,
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
