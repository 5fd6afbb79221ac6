//! One type for each side, whatever the transport: the cold path of setting lanes up.
//!
//! The hot path is the [`Lane`](crate::Lane) trait; [`AnyLane`] dispatches to it by a match.

mod any_lane;
mod exporter;
mod handshake;
mod importer;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

pub use any_lane::AnyLane;
pub use exporter::Exporter;
pub use handshake::MAX_PATHS;
pub use importer::{Importer, LaneRequest};

use crate::error::SetupError;

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

/// How lanes are made. Everything is found, or has its usual value, where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointOptions {
    /// RDMA devices by name, such as `mlx5_0` or `rxe0`; several are *rails*, over which a lane's
    /// paths are spread in turn. Default: the one that owns `local`, else the first with an active
    /// port. Both sides need as many rails, in the same order.
    pub devices: Vec<String>,
    /// Port number, from 1. Default: the first active one.
    pub port: Option<u8>,
    /// GID index, on RoCE. Default: the RoCE v2 entry of `local`, else the best of the port.
    pub gid_index: Option<u32>,
    /// This host's address on the network that the peer is reached by.
    pub local: Option<IpAddr>,
    /// Paths of a lane, at most [`MAX_PATHS`]: queue pairs, or TCP connections. The importer's
    /// choice. Default: one, or one a rail.
    pub paths: Option<usize>,
    /// Path MTU in bytes: 256, 512, 1024, 2048 or 4096. Default: the port's active one.
    pub mtu: Option<u16>,
    /// Local ACK timeout of a queue pair as the verbs code, 4.096 µs × 2^code, 1 to 31. Default: 14
    /// (67 ms), perftest's.
    pub ack_timeout: Option<u8>,
    /// Times that a queue pair sends again before it fails, 0 to 7. Default: 7.
    pub retries: Option<u8>,
    /// Registers memory for on-demand paging: nothing is pinned or populated, and the device takes
    /// page faults. Default: pinned, whose first access is not slower than the others.
    pub on_demand: bool,
    /// How long the responder of an urgent TCP lane polls its socket for the next request before it
    /// sleeps. Default: [`DEFAULT_SPIN`].
    pub spin: Option<Duration>,
}

impl EndpointOptions {
    /// True if registering memory for `transport` populates and pins it.
    pub fn pins_memory(&self, transport: Transport) -> bool {
        transport == Transport::Verbs && !self.on_demand
    }
}

/// Feeds any bytes to the decoder of requests and grants.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_envelope(bytes: &[u8]) {
    if let Ok(envelope) = handshake::Envelope::decode(bytes, "fuzzed") {
        assert_eq!(envelope.encode(), bytes, "what is understood has one form");
    }
}

/// How long a thread polls before it sleeps, where nothing else is said. It must outlast what the
/// other side needs until its next request: with less than that the fault path sleeps twice a fault
/// (docs/adr/0007-who-spins.md has the figures).
pub const DEFAULT_SPIN: Duration = Duration::from_micros(100);
