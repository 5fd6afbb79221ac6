//! What a process that holds a guest is told at its start, and how memory travels.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use postcopy_engine::pager::{HugePages, Landing, PagerConfig, Shards};
use postcopy_engine::planner::Policy;
use postcopy_engine::session::{DestinationTls, PageOrder, ReceiveOptions, TlsError};
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::drain::DrainArgs;
use postcopy_tools::size;
use postcopy_transport::Transport;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SelfService {
    #[default]
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Huge {
    #[default]
    Auto,
    On,
    Off,
}

/// In which order pages lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    #[default]
    Address,
    Recency,
}

/// What a process that holds a guest needs.
#[derive(Clone, Debug, Args)]
pub(crate) struct HostArgs {
    /// Unix socket to be controlled by.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: PathBuf,
    /// The guest's serial console: a file to append to, `stdio`, or `none`.
    #[arg(long, default_value = "stdio", value_name = "FILE|stdio|none")]
    pub(crate) console: String,
    /// Where to serve metrics for Prometheus (GET /metrics), to anybody who reaches it; see
    /// docs/control.md.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics: Option<String>,
    /// Whether memory of a guest that has arrived is put together to huge pages of 2 MiB, in the
    /// background. It costs one copy of the memory, and huge pages that are free. `auto`: if most of it
    /// was on huge pages at the source.
    #[arg(long, value_enum, default_value_t = Huge::Auto)]
    pub(crate) huge_pages: Huge,
    /// Wait for another guest, instead of exiting, when this one has moved away.
    #[arg(long)]
    pub(crate) again: bool,
    /// Whether the vCPUs of a guest that arrives serve their own faults, each over a lane of its
    /// own, instead of the pager's thread. `on` needs to learn from KVM which page a vCPU missed
    /// (root, or CAP_BPF and CAP_PERFMON), and an idle guest then keeps its processors to itself.
    /// `auto`: on with four cores or more.
    #[arg(long, value_enum, default_value_t = SelfService::Auto)]
    pub(crate) self_service: SelfService,
    /// Which pages of a guest that arrives come next while nobody waits: `adaptive`, `linear`,
    /// `bubble[:DIRECTION]` or `bubble-multi[:PIVOTS][:DIRECTION]`, with forward, dual or backward.
    #[arg(long, default_value_t = Policy::Adaptive)]
    pub(crate) policy: Policy,
    /// In which order these pages lie: by `address`, or by `recency`, as the guest has used them at the source, what it
    /// used last first. The source watches the guest for one and a half seconds before the move for that; of a stock QEMU's
    /// guest it sees only what is written, unless the library of `pcvm receive --vmm qemu` is preloaded there.
    #[arg(long, value_enum, default_value_t = Order::Address)]
    pub(crate) order: Order,
    #[command(flatten)]
    pub(crate) background: DrainArgs,
    /// Threads that bring the memory of a guest that arrives, 1 to 16: each has a part of it, two
    /// lanes, and a processor to itself while it is busy. More pay where faults or the wire ask for more
    /// than one processor.
    #[arg(long, default_value = "1", value_name = "N")]
    pub(crate) shards: Shards,
    /// Where pages of a guest that arrives land: `in-place`, in its memory, which an RDMA device then
    /// has to know and pin as a whole; or in a `pool` of a few MiB, from which they are copied. Hybrid
    /// migrations need them in place. `auto`: in place for those and over verbs, else in a pool.
    #[arg(long, default_value_t, value_name = "auto|in-place|pool")]
    pub(crate) landing: Landing,
    /// Refuse guests with more memory than this. Default: more than this host has left, with its swap and within the limits
    /// of its cgroups.
    #[arg(long, value_parser = size::parse, value_name = "SIZE")]
    pub(crate) memory_limit: Option<u64>,
    /// Take guests in only from sources whose certificate one authority has signed, and speak with them under
    /// TLS: the folder of its `ca-cert.pem` and of this host's `server-cert.pem` and `server-key.pem`, as for QEMU. Pages
    /// are encrypted too over tcp, which is what is taken then if nothing else is said; over verbs they are not. See
    /// docs/tls.md.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) tls: Option<PathBuf>,
}

impl HostArgs {
    /// How a guest is taken in.
    ///
    /// Errors: the certificates cannot be used.
    pub(crate) fn receive(&self, wire: &WireArgs) -> Result<ReceiveOptions, TlsError> {
        Ok(ReceiveOptions {
            transports: wire.transports(),
            endpoint: wire.device.endpoint(None),
            pager: self.pager(),
            shards: self.shards,
            order: match self.order {
                Order::Address => PageOrder::Address,
                Order::Recency => PageOrder::Recency,
            },
            landing: self.landing,
            memory_limit: self.memory_limit,
            tls: self.tls.as_deref().map(DestinationTls::read).transpose()?,
        })
    }

    fn pager(&self) -> PagerConfig {
        let planner = self.background.planner(self.policy);
        let huge_pages = match self.huge_pages {
            Huge::Auto => HugePages::Auto,
            Huge::On => HugePages::On,
            Huge::Off => HugePages::Off,
        };
        PagerConfig { planner, huge_pages, ..PagerConfig::default() }
    }
}

/// How memory travels.
#[derive(Clone, Debug, Args)]
pub(crate) struct WireArgs {
    /// Transport: verbs where both sides have it, else tcp; under TLS tcp.
    #[arg(long, value_enum, default_value_t = Wire::Auto)]
    pub(crate) transport: Wire,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wire {
    Auto,
    Tcp,
    Verbs,
    Shm,
}

impl WireArgs {
    /// The transports asked for; empty for all.
    pub(crate) fn transports(&self) -> Vec<Transport> {
        match self.transport {
            Wire::Auto => Vec::new(),
            Wire::Tcp => vec![Transport::Tcp],
            Wire::Verbs => vec![Transport::Verbs],
            Wire::Shm => vec![Transport::Shm],
        }
    }
}
