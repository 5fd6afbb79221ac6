//! The side that offers memory: a thread for each connection, an exporter for each reader.
//!
//! A reader's lanes live as long as its control connection, which the kernel closes when the
//! reader is killed and keep-alive closes when its host vanishes.

mod faults;

use std::collections::HashMap;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use postcopy_engine::export;
use postcopy_engine::pagemap::PageMap;
use postcopy_engine::session::DestinationTls;
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::machine::Machine;
use postcopy_tools::text::{one_line, printable};
use postcopy_transport::tcp::Stream;
use postcopy_transport::{Exporter, HostMemory, Transport};

use crate::args::ServeArgs;
use crate::exchange::{
    self, Answer, Granted, Hello, LaneHello, MAX_TEXT, ReadHello, hex, receive, send, unhex,
};
use crate::mirror::Mirror;
use crate::pattern;
use crate::pin::Pin;
use crate::plan::MAX_LANES;

/// How long a peer may take for one step of the set-up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Memory that a server offers, in bytes.
pub(crate) const MEMORY: u64 = 64 << 20;
/// Least and most of it.
const MEMORY_BOUNDS: std::ops::RangeInclusive<u64> = 4096..=1 << 30;
/// Connections that have not said yet what they want: bounds what strangers cost.
const MAX_STRANGERS: u32 = 256;
/// After so long without a sign of life, a silent peer is asked, so often, before it is given up.
const KEEP_ALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(5), 4);

/// Lanes that are awaited, by name.
type Awaited = Mutex<HashMap<String, Sender<(usize, Stream)>>>;

/// What connections share.
pub(crate) struct Server {
    memory: HostMemory,
    device: DeviceArgs,
    machine: Machine,
    awaited: Awaited,
    strangers: AtomicU32,
    clients: AtomicU32,
    max_clients: u32,
    /// Whom lanes are served to. `None`: anybody, in clear.
    tls: Option<DestinationTls>,
    /// Say on stderr who comes and goes.
    talks: bool,
}

/// What is open to one reader. Closed when dropped, the lanes before the map that they read.
struct Opened {
    mirror: Option<Mirror>,
    _exporter: Exporter,
    map: Option<PageMap>,
}

/// One of a bounded number; given back when dropped.
struct Permit<'a>(&'a AtomicU32);

impl<'a> Permit<'a> {
    fn take(count: &'a AtomicU32, most: u32) -> Option<Self> {
        let more = |now: u32| (now < most).then_some(now + 1);
        count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Self(count))
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Runs `pcbench serve`.
///
/// Errors: a flag that makes no sense, an address in use, no memory.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let listener = TcpListener::bind(&args.listen)
        .with_context(|| format!("cannot listen on {}; choose another address with --listen", args.listen))?;
    let pin: Pin = args.cpu.parse()?;
    pin.apply_to_all(args.device.device.first().map(String::as_str));
    pin.apply()?;
    let tls = args.tls.as_deref().map(DestinationTls::read).transpose()?;
    let server = Server::new(args.memory, args.huge_pages, args.max_clients, args.device.clone())?;
    let server = Arc::new(Server { tls, talks: true, ..server });
    eprintln!("pcbench: serving {} KiB on {}", args.memory >> 10, listener.local_addr()?);
    server.run(&listener);
    Ok(())
}

/// Checks the flags of `serve`.
///
/// Errors: one line that says what to write instead.
pub(crate) fn check(args: &ServeArgs) -> anyhow::Result<()> {
    ensure!(MEMORY_BOUNDS.contains(&args.memory), "--memory takes 4K to 1G, not {} bytes", args.memory);
    ensure!(args.memory.is_multiple_of(4096), "--memory takes whole pages of 4K, not {} bytes", args.memory);
    ensure!(args.max_clients > 0, "--max-clients 0 serves nobody; ask for at least 1");
    args.cpu.parse::<Pin>()?.check()
}

/// Starts a server inside this process, for the loopback; it lives as long as the process.
///
/// Errors: no memory, no address.
pub(crate) fn loopback(device: &DeviceArgs, huge_pages: bool) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listening on the loopback")?;
    let address = listener.local_addr()?;
    let server = Arc::new(Server::new(MEMORY, huge_pages, MAX_STRANGERS, device.clone())?);
    std::thread::Builder::new().name("serve".into()).spawn(move || server.run(&listener))?;
    Ok(address)
}

impl Server {
    /// In clear, and silent.
    fn new(memory: u64, huge_pages: bool, max_clients: u32, device: DeviceArgs) -> anyhow::Result<Self> {
        let memory =
            pattern::memory("pcbench", memory as usize, huge_pages).context("making memory to read")?;
        pattern::fill(&memory);
        let (strangers, clients) = (AtomicU32::new(0), AtomicU32::new(0));
        let (machine, awaited) = (Machine::here(), Awaited::default());
        let (tls, talks) = (None, false);
        Ok(Self { memory, device, machine, awaited, strangers, clients, max_clients, tls, talks })
    }

    /// Serves until the process ends.
    fn run(self: Arc<Self>, listener: &TcpListener) {
        loop {
            let (stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: those who are served go on.
                    self.say(format_args!("cannot accept a connection: {error}"));
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let server = self.clone();
            let thread = std::thread::Builder::new().name("client".into()).spawn(move || {
                if let Err(error) = server.attend(stream, peer) {
                    server.say(format_args!("{peer}: {}", one_line(&error)));
                }
            });
            if let Err(error) = thread {
                self.say(format_args!("{peer}: cannot start a thread: {error}"));
            }
        }
    }

    fn say(&self, what: std::fmt::Arguments<'_>) {
        if self.talks {
            // Nobody may be listening any more; those who are served go on.
            let _ = writeln!(std::io::stderr(), "pcbench: {what}");
        }
    }

    fn attend(&self, mut stream: TcpStream, peer: SocketAddr) -> anyhow::Result<()> {
        let stranger =
            Permit::take(&self.strangers, MAX_STRANGERS).context("too many connections at once")?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        keep_alive(&stream)?;
        let Some(line) = receive(&mut stream, Some(PATIENCE))? else { return Ok(()) };
        drop(stranger);
        match exchange::parse_hello(&line) {
            Ok(Hello::Lane(hello)) => self.give(hello, stream),
            Ok(Hello::Read(hello)) => {
                let ended = self.attend_reader(&mut stream, peer, &hello);
                if let Err(error) = &ended {
                    // It may be gone; then nobody needs the reason.
                    let _ = send(&mut stream, &Answer::Refused(one_line(error)));
                }
                ended
            }
            Err(error) => {
                let _ = send(&mut stream, &Answer::Refused(one_line(&error)));
                Err(error)
            }
        }
    }

    /// Gives a lane's connection to the reader that awaits it.
    fn give(&self, LaneHello { name, index }: LaneHello, stream: TcpStream) -> anyhow::Result<()> {
        let reader = self.reader_of(&name).context("a lane that nobody awaits")?;
        let lane = match &self.tls {
            None => stream.into(),
            Some(tls) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                tls.accept_lane(stream).context("a lane under TLS (docs/tls.md)")?
            }
        };
        lane.set_timeouts(None)?;
        reader.send((index, lane)).ok().context("a lane that nobody awaits any more")
    }

    /// Who awaits lanes by that name.
    fn reader_of(&self, name: &str) -> Option<Sender<(usize, Stream)>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Opens the memory to one reader, until its connection closes.
    fn attend_reader(
        &self,
        stream: &mut TcpStream,
        peer: SocketAddr,
        hello: &ReadHello,
    ) -> anyhow::Result<()> {
        let _permit = Permit::take(&self.clients, self.max_clients).with_context(|| {
            format!(
                "{} readers are served already, the most that this server takes; come back later",
                self.max_clients
            )
        })?;
        match (&self.tls, hello.tls) {
            (None, true) => bail!("this server has no certificates; start it with --tls"),
            (Some(_), false) => bail!("the lanes of this server are under TLS; read with --tls"),
            _ => {}
        }
        let lanes = hello.requests.len();
        let most = if hello.paging.is_some() { export::MAX_LANES } else { MAX_LANES as usize };
        ensure!((1..=most).contains(&lanes), "{lanes} lanes; ask for 1 to {most}");
        let transport: Transport =
            printable(&hello.transport, MAX_TEXT).parse().map_err(|error: String| anyhow!(error))?;
        ensure!(
            !hello.tls || transport == Transport::Tcp,
            "--tls is for tcp: over {transport} nothing is encrypted"
        );
        let mut opened = self.open(stream, transport, hello)?;
        let what = if opened.map.is_some() { "faults" } else { "reads" };
        self.say(format_args!("{peer}: {what} over {transport}, lanes: {lanes}, readers: {}", self.count()));
        let ended = match (&mut opened.mirror, &mut opened.map) {
            (Some(mirror), _) => mirror.obey(stream),
            (None, Some(map)) => faults::obey(stream, map, &self.memory),
            (None, None) => wait_for_the_end(stream),
        };
        drop(opened);
        self.say(format_args!("{peer}: gone, its lanes are free"));
        ended
    }

    /// Makes a reader's lanes, those of the mirror if it wants one, and a page map if it faults.
    fn open(
        &self,
        stream: &mut TcpStream,
        transport: Transport,
        hello: &ReadHello,
    ) -> anyhow::Result<Opened> {
        ensure!(!hello.mirror || hello.paging.is_none(), "a mirror of memory that is faulted in");
        let lanes = hello.requests.len();
        let mut endpoint = self.device.endpoint(stream.local_addr().ok().map(|address| address.ip()));
        let map = hello.paging.map(|paging| faults::page_map(paging, &self.memory)).transpose()?;
        endpoint.spin = hello.paging.and_then(faults::spin);
        let memories: Vec<HostMemory> =
            [Some(&self.memory), map.as_ref().map(PageMap::memory)].into_iter().flatten().cloned().collect();
        let mut exporter = Exporter::new(transport, &memories, &endpoint)?;
        let grant = |request: &String| Ok(hex(&exporter.grant(&unhex(request)?)?));
        let grants = hello.requests.iter().map(grant).collect::<anyhow::Result<Vec<String>>>()?;
        let mut regions = exporter.regions().into_iter().map(|region| hex(&region.to_bytes()));
        let (region, map_region) = (regions.next().unwrap_or_default(), regions.next());
        let mut mirror = match hello.mirror {
            true => Some(Mirror::new(transport, lanes, &endpoint)?),
            false => None,
        };
        let mirror_requests = mirror.as_ref().map(Mirror::requests).unwrap_or_default();
        let awaiting = Awaiting::new(&self.awaited)?;
        let (name, machine) = (awaiting.name.clone(), self.machine.clone());
        let granted = Granted { region, map: map_region, grants, name, mirror_requests, machine };
        send(stream, &Answer::Granted(Box::new(granted)))?;
        let own = exporter.awaited();
        let mut streams = awaiting.streams(own + mirror.as_ref().map_or(0, Mirror::streams))?;
        let mirrored = streams.split_off(own);
        streams.into_iter().try_for_each(|stream| exporter.attach(stream))?;
        if let Some(mirror) = &mut mirror {
            mirror.give_streams(mirrored);
        }
        drop(awaiting);
        if let Some(mirror) = &mut mirror {
            mirror.connect(exchange::expect(stream, PATIENCE)?)?;
        }
        send(stream, &Answer::Ready)?;
        Ok(Opened { mirror, _exporter: exporter, map })
    }

    fn count(&self) -> u32 {
        self.clients.load(Ordering::Acquire)
    }
}

/// Reads until the peer closes. A reset is an end like another: the reader was killed.
fn wait_for_the_end(stream: &mut TcpStream) -> anyhow::Result<()> {
    match receive(stream, None) {
        Ok(Some(_)) => bail!("a message where none belongs"),
        Ok(None) | Err(_) => Ok(()),
    }
}

fn keep_alive(stream: &TcpStream) -> std::io::Result<()> {
    use rustix::net::sockopt;
    let (idle, interval, count) = KEEP_ALIVE;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, idle)?;
    sockopt::set_tcp_keepintvl(stream, interval)?;
    Ok(sockopt::set_tcp_keepcnt(stream, count)?)
}

/// A name under which lanes come in, as long as this lives.
struct Awaiting<'a> {
    awaited: &'a Awaited,
    name: String,
    lanes: Receiver<(usize, Stream)>,
}

impl<'a> Awaiting<'a> {
    fn new(awaited: &'a Awaited) -> anyhow::Result<Self> {
        let name = format!("{:016x}{:016x}", getrandom::u64()?, getrandom::u64()?);
        let (sender, lanes) = channel();
        awaited.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), sender);
        Ok(Self { awaited, name, lanes })
    }

    /// `count` connections in the order of their indices.
    fn streams(&self, count: usize) -> anyhow::Result<Vec<Stream>> {
        let deadline = Instant::now() + PATIENCE;
        let mut streams: Vec<Option<Stream>> = (0..count).map(|_| None).collect();
        for _ in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            let (index, stream) = self.lanes.recv_timeout(left).ok().context("its lanes did not come")?;
            let place = streams.get_mut(index).context("a lane of a number that was not granted")?;
            ensure!(place.replace(stream).is_none(), "a lane that came twice");
        }
        Ok(streams.into_iter().flatten().collect())
    }
}

impl Drop for Awaiting<'_> {
    fn drop(&mut self) {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}
