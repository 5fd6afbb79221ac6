//! The reader's side of the set-up: lanes into the memory that a server offers.
//!
//! Whatever the server does or fails to do, this ends within `patience` a step, with a line that
//! says what it was.

use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use postcopy_engine::session::SourceTls;
use postcopy_tools::machine::Machine;
use postcopy_tools::text::printable;
use postcopy_transport::tcp::Stream;
use postcopy_transport::{
    EndpointOptions, Exporter, Importer, LaneClass, LaneRequest, RemoteRegion, SetupError, Transport,
};

use crate::args::PORT;
use crate::exchange::{
    self, Answer, Granted, Hello, LaneHello, MAX_TEXT, Mirrored, Order, Paging, ReadHello, VERSION, hex,
    send, unhex,
};
use crate::mirror;
use crate::pattern;
use crate::plan::Plan;
use crate::run::driver::{Driver, Load};
use crate::serve::MEMORY;

/// What to say to who wants another transport under TLS.
pub(crate) const TCP_ALONE: &str = "--tls is for tcp: over the others nothing is encrypted";
/// And to who wants lanes to this process itself under it.
pub(crate) const ALONE: &str =
    "--tls is for HOST, where `pcbench serve --tls` runs: within this process there is nobody to trust";

/// A connected reader over one transport.
pub(crate) struct Reader {
    pub(crate) transport: Transport,
    pub(crate) driver: Driver,
    pub(crate) machine: Machine,
    /// Where the server reads from, if it does.
    mirrored: Option<Exporter>,
    control: Control,
}

/// A connection to a server, by which lanes are asked for. The server closes them when it closes.
pub(crate) struct Control {
    stream: TcpStream,
    server: SocketAddr,
    patience: Duration,
    /// Of lanes.
    tls: Option<SourceTls>,
}

/// The server said no.
#[derive(Debug)]
struct Refused(String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// Whether `error` may be of one transport alone, such as shared memory with another host: neither
/// side could set it up. A server that cannot be reached, or hangs, is not.
pub(crate) fn is_of_one_transport(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<SetupError>() || cause.is::<Refused>())
}

/// The address of a server, from HOST or HOST:PORT.
///
/// Errors: it is no such thing, or has no address.
pub(crate) fn resolve(host: &str) -> anyhow::Result<SocketAddr> {
    let found = match host.to_socket_addrs() {
        Ok(mut found) => found.next(),
        Err(_) => (host, PORT).to_socket_addrs().ok().and_then(|mut found| found.next()),
    };
    found.with_context(|| format!("`{host}` is no address; write HOST or HOST:PORT"))
}

impl Reader {
    /// Connects the lanes of `plan` over `transport` to `server`.
    ///
    /// Errors: it is not there, refuses, hangs, or speaks another language.
    pub(crate) fn connect(server: SocketAddr, transport: Transport, plan: &Plan) -> anyhow::Result<Self> {
        let mut control = Control::open(server, plan.patience, plan.tls.clone())?;
        let endpoint = plan.device.endpoint(control.local());
        let landing = pattern::memory("pcbench-landing", landing_bytes(plan), plan.huge_pages)?;
        let importer = Importer::new(transport, std::slice::from_ref(&landing), &endpoint)?;
        let class = if plan.depth > 1 { LaneClass::Bulk } else { LaneClass::Urgent };
        let asked = (0..plan.lanes).map(|_| importer.request(class)).collect::<Result<Vec<_>, _>>()?;
        let (pending, requests): (Vec<LaneRequest>, Vec<Vec<u8>>) = asked.into_iter().unzip();
        let granted = control.ask(transport, &requests, plan.bidirectional, None)?;
        let mut offered = match plan.bidirectional {
            true => Some(Offered::new(transport, &endpoint, &granted)?),
            false => None,
        };
        let own: usize = pending.iter().map(LaneRequest::streams).sum();
        let mirrored = offered.as_ref().map_or(0, |offered| offered.exporter.awaited());
        let mut streams = control.dial_lanes(&granted, own + mirrored)?.into_iter();
        let mut lanes = Vec::new();
        for (pending, grant) in pending.into_iter().zip(&granted.grants) {
            let paths = streams.by_ref().take(pending.streams()).collect();
            lanes.push(importer.connect(pending, &unhex(grant)?, paths)?);
        }
        if let Some(offered) = &mut offered {
            streams.try_for_each(|stream| offered.exporter.attach(stream))?;
            control.order(&offered.order)?;
        }
        let mirrored = offered.map(|offered| offered.exporter);
        control.ready()?;
        let (region, local) = (parse_region(&granted.region)?, importer.regions()[0]);
        let driver = Driver::new(transport.name(), lanes, region, local, landing, plan.patience)?;
        let machine = granted.machine;
        Ok(Self { transport, driver, machine, mirrored, control })
    }

    /// Whether the server is to read too.
    pub(crate) fn mirrors(&self) -> bool {
        self.mirrored.is_some()
    }

    /// Has the server read too, until [`Reader::stop_mirror`].
    ///
    /// Errors: it refuses or hangs.
    pub(crate) fn start_mirror(&mut self, load: &Load) -> anyhow::Result<()> {
        let Load { bytes, depth, span, completion, .. } = *load;
        let order = Order::Start { bytes, depth, span, completion };
        self.control.order(&order)?;
        match self.control.answer()? {
            Answer::Started => Ok(()),
            _ => bail!("{} answered out of turn", self.control.server),
        }
    }

    /// Ends the server's reads; what they were like.
    ///
    /// Errors: they failed, or the server hangs.
    pub(crate) fn stop_mirror(&mut self) -> anyhow::Result<Mirrored> {
        self.control.order(&Order::Stop)?;
        match self.control.answer()? {
            Answer::Stopped(mirrored) => Ok(mirrored),
            _ => bail!("{} answered out of turn", self.control.server),
        }
    }
}

impl Control {
    /// Connects to `server`. Lanes are to be under TLS if `tls` says whom to trust.
    ///
    /// Errors: it is not there.
    pub(crate) fn open(
        server: SocketAddr,
        patience: Duration,
        tls: Option<SourceTls>,
    ) -> anyhow::Result<Self> {
        let stream = dial(server, patience)
            .with_context(|| format!("cannot reach {server}; is `pcbench serve` running there?"))?;
        Ok(Self { stream, server, patience, tls })
    }

    /// This host's address on the way to the server.
    pub(crate) fn local(&self) -> Option<IpAddr> {
        self.stream.local_addr().ok().map(|address| address.ip())
    }

    /// Asks for lanes: a grant for each of `requests`.
    ///
    /// Errors: it refuses, hangs, or speaks another language.
    pub(crate) fn ask(
        &mut self,
        transport: Transport,
        requests: &[Vec<u8>],
        mirror: bool,
        paging: Option<Paging>,
    ) -> anyhow::Result<Granted> {
        let server = self.server;
        let asked = requests.len();
        let requests = requests.iter().map(|blob| hex(blob)).collect();
        let transport = transport.name().into();
        let tls = self.tls.is_some();
        let hello = ReadHello { version: VERSION, transport, requests, mirror, tls, paging };
        send(&mut self.stream, &Hello::Read(hello))?;
        let Answer::Granted(granted) = self.answer()? else {
            bail!("{server} answered something else than a grant; it is no `pcbench serve` of this release");
        };
        ensure!(granted.grants.len() == asked, "{server} granted another number of lanes");
        Ok(Granted { machine: sanitised(granted.machine), ..*granted })
    }

    /// `count` connections for lanes, and for those of the mirror after them.
    ///
    /// Errors: it lets them not in.
    pub(crate) fn dial_lanes(&self, granted: &Granted, count: usize) -> anyhow::Result<Vec<Stream>> {
        let one = |index| {
            let mut stream = dial(self.server, self.patience).context("connecting a lane")?;
            send(&mut stream, &Hello::Lane(LaneHello { name: granted.name.clone(), index }))?;
            let lane = match &self.tls {
                None => stream.into(),
                Some(tls) => {
                    stream.set_read_timeout(Some(self.patience))?;
                    tls.dial_lane(stream, self.server.ip()).context("a lane under TLS (docs/tls.md)")?
                }
            };
            lane.set_timeouts(None)?;
            Ok(lane)
        };
        (0..count).map(one).collect()
    }

    /// Waits until the server has every lane.
    ///
    /// Errors: it has not.
    pub(crate) fn ready(&mut self) -> anyhow::Result<()> {
        match self.answer()? {
            Answer::Ready => Ok(()),
            _ => bail!("{} is not ready, and does not say why", self.server),
        }
    }

    /// Tells the server to do something.
    ///
    /// Errors: it is gone.
    pub(crate) fn order(&mut self, order: &Order) -> anyhow::Result<()> {
        send(&mut self.stream, order)
    }

    /// The server's next message, which may be a refusal.
    fn answer(&mut self) -> anyhow::Result<Answer> {
        let answer = exchange::expect(&mut self.stream, self.patience)
            .with_context(|| format!("{} does not answer as `pcbench serve` does", self.server))?;
        match answer {
            Answer::Refused(reason) => {
                Err(Refused(format!("{} refused: {}", self.server, printable(&reason, MAX_TEXT))).into())
            }
            answer => Ok(answer),
        }
    }
}

/// A capability as a server says it.
///
/// Errors: it is none.
pub(crate) fn parse_region(text: &str) -> anyhow::Result<RemoteRegion> {
    let bytes: [u8; 24] = unhex(text)?.try_into().ok().context("the server's region is malformed")?;
    Ok(RemoteRegion::from_bytes(bytes))
}

/// Memory for every read in flight to land in.
fn landing_bytes(plan: &Plan) -> usize {
    let largest = plan.sizes.iter().copied().max().unwrap_or(1) as usize;
    (largest * plan.depth as usize * plan.lanes as usize).next_multiple_of(4096)
}

fn dial(server: SocketAddr, patience: Duration) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, patience)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(patience))?;
    Ok(stream)
}

/// This side's memory, offered to the server.
struct Offered {
    exporter: Exporter,
    /// To be sent when the lanes have their connections.
    order: Order,
}

impl Offered {
    fn new(transport: Transport, endpoint: &EndpointOptions, granted: &Granted) -> anyhow::Result<Self> {
        ensure!(granted.mirror_requests.len() == granted.grants.len(), "the server asks for other lanes");
        let mut exporter = Exporter::new(transport, &[mirror::memory(MEMORY)?], endpoint)?;
        let grant = |request: &String| Ok(hex(&exporter.grant(&unhex(request)?)?));
        let grants = granted.mirror_requests.iter().map(grant).collect::<anyhow::Result<Vec<String>>>()?;
        let region = hex(&exporter.regions()[0].to_bytes());
        Ok(Self { exporter, order: Order::Mirror { region, grants } })
    }
}

/// A peer's description of itself, fit to be shown.
fn sanitised(mut machine: Machine) -> Machine {
    machine.cpu = printable(&machine.cpu, 100);
    machine.kernel = printable(&machine.kernel, 100);
    machine.rdma.truncate(16);
    for port in &mut machine.rdma {
        for text in [&mut port.device, &mut port.firmware, &mut port.state, &mut port.rate, &mut port.link] {
            *text = printable(text, 60);
        }
        port.interface = port.interface.take().map(|name| printable(&name, 60));
    }
    machine.governor = machine.governor.map(|text| printable(&text, 60));
    machine.shmem_huge_pages = machine.shmem_huge_pages.map(|text| printable(&text, 60));
    machine
}
