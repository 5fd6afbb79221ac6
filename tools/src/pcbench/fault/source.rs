//! Where the memory is that is faulted in: in this process, or at `pcbench serve` on another host.
//!
//! Both are reached by the same lanes. What this process has is exported as a guest's memory is; a
//! server exports the same two regions, and is told over its control connection when to fill the
//! page map.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use postcopy_engine::export::Export;
use postcopy_engine::import::{Import, Lanes};
use postcopy_engine::memory::GuestMemory;
use postcopy_engine::session::SourceTls;
use postcopy_transport::{
    AnyLane, Exporter, HostMemory, Importer, LaneClass, LaneRequest, LocalRegion, RemoteRegion,
};

use super::{FaultArgs, guest_memory};
use crate::connect::{Control, parse_region};
use crate::exchange::{Order, Paging, unhex};
use crate::pattern;
use crate::report::Server;

/// Where the memory is.
pub(super) enum Source {
    /// In this process.
    Here(GuestMemory),
    /// At a server.
    There { server: SocketAddr, patience: Duration, tls: Option<SourceTls> },
}

/// A source's memory and page map over connected lanes.
pub(super) struct Opened {
    pub(super) import: Import,
    pub(super) lanes: Lanes,
    pub(super) regions: [RemoteRegion; 2],
    pub(super) hold: Hold,
}

/// Keeps memory open, and tells the source when to describe it.
pub(super) enum Hold {
    Here(Box<Export>),
    There(Control),
}

impl Hold {
    /// Has the page map filled: the drain follows it.
    ///
    /// Errors: no thread for it, or the server is gone.
    pub(super) fn describe_pages(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Here(export) => Ok(export.describe_pages(None)?),
            Self::There(control) => control.order(&Order::Describe),
        }
    }
}

/// A source's memory over bare lanes, without a pager.
pub(super) struct Bare {
    pub(super) bulk: AnyLane,
    pub(super) urgent: AnyLane,
    pub(super) remote: RemoteRegion,
    pub(super) local: LocalRegion,
    /// Who it is, if it is not this process.
    pub(super) server: Option<Server>,
    _exporter: Option<Exporter>,
    _control: Option<Control>,
}

impl Source {
    /// Memory with the pattern, in this process.
    ///
    /// Errors: no memory.
    pub(super) fn here(bytes: u64) -> anyhow::Result<Self> {
        let memory = guest_memory(bytes)?;
        pattern::fill(memory.guest());
        Ok(Self::Here(memory))
    }

    /// Opens the memory for a pager of so many shards, and for `servers` threads that serve their own faults.
    ///
    /// Errors: a side cannot set lanes up; the server is not there, refuses, hangs, or speaks another
    /// language.
    pub(super) fn open(
        &self,
        args: &FaultArgs,
        memory: &GuestMemory,
        shards: usize,
        servers: usize,
    ) -> anyhow::Result<Opened> {
        match self {
            Self::Here(source) => {
                let endpoint = args.endpoint(None);
                let mut export = Export::new(args.transport, source, &endpoint)?;
                let import = Import::new(args.transport, memory, (args.landing, shards), &endpoint)?;
                let shards = import.connect_local(&mut export, shards)?;
                let servers = (0..servers).map(|_| import.connect_one_local(&mut export));
                let lanes = Lanes { shards, servers: servers.collect::<Result<_, _>>()? };
                let regions = export.regions();
                Ok(Opened { import, lanes, regions, hold: Hold::Here(Box::new(export)) })
            }
            Self::There { server, patience, tls } => {
                let mut control = Control::open(*server, *patience, tls.clone())?;
                let endpoint = args.endpoint(control.local());
                let import = Import::new(args.transport, memory, (args.landing, shards), &endpoint)?;
                let (requests, blobs) = import.request(shards, servers)?;
                let spin_us = args.spin.map(|spin| u32::try_from(spin).unwrap_or(u32::MAX));
                let paging = Paging { memory: args.bytes(), spin_us };
                let granted = control.ask(args.transport, &blobs, false, Some(paging))?;
                let streams = requests.iter().map(LaneRequest::streams);
                let mut dialed = control.dial_lanes(&granted, streams.clone().sum())?.into_iter();
                let streams = streams.map(|count| dialed.by_ref().take(count).collect()).collect();
                let grants =
                    granted.grants.iter().map(|grant| unhex(grant)).collect::<Result<Vec<_>, _>>()?;
                let lanes = import.connect(shards, requests, &grants, streams)?;
                control.ready()?;
                let map = granted.map.as_deref().context("the server gave no page map")?;
                let regions = [whole(&granted.region, args.bytes())?, parse_region(map)?];
                Ok(Opened { import, lanes, regions, hold: Hold::There(control) })
            }
        }
    }

    /// Opens the memory for bare reads into `landing`.
    ///
    /// Errors: as [`Source::open`].
    pub(super) fn open_bare(&self, args: &FaultArgs, landing: &HostMemory) -> anyhow::Result<Bare> {
        let landing = std::slice::from_ref(landing);
        match self {
            Self::Here(source) => {
                let endpoint = args.endpoint(None);
                let mut exporter =
                    Exporter::new(args.transport, std::slice::from_ref(source.landing()), &endpoint)?;
                let importer = Importer::new(args.transport, landing, &endpoint)?;
                let bulk = importer.connect_local(&mut exporter, LaneClass::Bulk)?;
                let urgent = importer.connect_local(&mut exporter, LaneClass::Urgent)?;
                let (remote, local) = (exporter.regions()[0], importer.regions()[0]);
                let (server, _exporter, _control) = (None, Some(exporter), None);
                Ok(Bare { bulk, urgent, remote, local, server, _exporter, _control })
            }
            Self::There { server, patience, tls } => {
                let mut control = Control::open(*server, *patience, tls.clone())?;
                let importer = Importer::new(args.transport, landing, &args.endpoint(control.local()))?;
                let (bulk, bulk_blob) = importer.request(LaneClass::Bulk)?;
                let (urgent, urgent_blob) = importer.request(LaneClass::Urgent)?;
                let granted = control.ask(args.transport, &[bulk_blob, urgent_blob], false, None)?;
                let mut streams =
                    control.dial_lanes(&granted, bulk.streams() + urgent.streams())?.into_iter();
                let mut connect = |request: LaneRequest, grant: &str| {
                    let paths = streams.by_ref().take(request.streams()).collect();
                    anyhow::Ok(importer.connect(request, &unhex(grant)?, paths)?)
                };
                ensure!(granted.grants.len() == 2, "the server granted another number of lanes");
                let bulk = connect(bulk, &granted.grants[0])?;
                let urgent = connect(urgent, &granted.grants[1])?;
                control.ready()?;
                let (remote, local) = (whole(&granted.region, args.bytes())?, importer.regions()[0]);
                let server = Some(Server { address: server.to_string(), machine: granted.machine });
                Ok(Bare { bulk, urgent, remote, local, server, _exporter: None, _control: Some(control) })
            }
        }
    }
}

/// The first `bytes` of a server's memory.
fn whole(region: &str, bytes: u64) -> anyhow::Result<RemoteRegion> {
    let region = parse_region(region)?;
    region.first(bytes).with_context(|| {
        format!(
            "{} of memory is more than the {} that the server offers; ask for less with --memory, or raise it \
             there with `pcbench serve --memory`",
            postcopy_tools::size::short(bytes),
            postcopy_tools::size::short(region.len())
        )
    })
}
