//! The server's own reads from its reader, for `--bidirectional`.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use postcopy_transport::tcp::Stream;
use postcopy_transport::{
    EndpointOptions, HostMemory, Importer, LaneClass, LaneRequest, RemoteRegion, Transport,
};

use crate::exchange::{self, Answer, Mirrored, Order, hex, receive, send, unhex};
use crate::pattern;
use crate::plan::Limit;
use crate::run::driver::{Driver, Load};
use crate::run::recorder::Recorder;

/// Most memory for the mirror's reads to land in: what one reader may cost the server.
const LANDING: usize = 64 << 20;
/// A mirror gives up when nothing has arrived for so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Lanes from the server to its reader's memory.
pub(crate) struct Mirror {
    transport: Transport,
    importer: Importer,
    landing: HostMemory,
    pending: Vec<(LaneRequest, String)>,
    streams: Vec<Stream>,
    driver: Option<Driver>,
}

impl Mirror {
    /// Prepares `lanes` lanes.
    ///
    /// Errors: no memory, or the device refuses.
    pub(crate) fn new(
        transport: Transport,
        lanes: usize,
        endpoint: &EndpointOptions,
    ) -> anyhow::Result<Self> {
        let landing = HostMemory::anonymous("pcbench-mirror", LANDING)?;
        let importer = Importer::new(transport, std::slice::from_ref(&landing), endpoint)?;
        let request = |_| importer.request(LaneClass::Urgent).map(|(pending, blob)| (pending, hex(&blob)));
        let pending = (0..lanes).map(request).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { transport, importer, landing, pending, streams: Vec::new(), driver: None })
    }

    /// What to ask the reader for.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.pending.iter().map(|(_, blob)| blob.clone()).collect()
    }

    /// How many connections the lanes need.
    pub(crate) fn streams(&self) -> usize {
        self.pending.iter().map(|(pending, _)| pending.streams()).sum()
    }

    /// The connections of the lanes, where the transport needs them.
    pub(crate) fn give_streams(&mut self, streams: Vec<Stream>) {
        self.streams = streams;
    }

    /// Finishes the lanes with what the reader granted.
    ///
    /// Errors: it granted something else than was asked for.
    pub(crate) fn connect(&mut self, order: Order) -> anyhow::Result<()> {
        let Order::Mirror { region, grants } = order else { bail!("an order out of turn") };
        ensure!(grants.len() == self.pending.len(), "grants for another number of lanes");
        let mut streams = std::mem::take(&mut self.streams).into_iter();
        let mut lanes = Vec::new();
        for ((pending, _), grant) in std::mem::take(&mut self.pending).into_iter().zip(grants) {
            let paths = streams.by_ref().take(pending.streams()).collect();
            lanes.push(self.importer.connect(pending, &unhex(&grant)?, paths)?);
        }
        let region: [u8; 24] = unhex(&region)?.try_into().ok().context("a malformed region")?;
        let region = RemoteRegion::from_bytes(region);
        let local = self.importer.regions()[0];
        self.driver =
            Some(Driver::new(self.transport.name(), lanes, region, local, self.landing.clone(), PATIENCE)?);
        Ok(())
    }

    /// Follows the reader's orders until it closes the connection.
    ///
    /// Errors: an order that makes no sense, or the reads failed.
    pub(crate) fn obey(&mut self, stream: &mut TcpStream) -> anyhow::Result<()> {
        loop {
            let Ok(Some(line)) = receive(stream, None) else { return Ok(()) };
            match exchange::parse(&line)? {
                Order::Start { bytes, depth, span, completion } => {
                    let limit = Limit { reads: None, time: None };
                    let load = Load { bytes, depth, span, completion, limit, rate: None, verify: false };
                    self.read_until_told(stream, &load)?;
                }
                Order::Mirror { .. } | Order::Stop | Order::Describe => bail!("an order out of turn"),
            }
        }
    }

    fn read_until_told(&mut self, stream: &mut TcpStream, load: &Load) -> anyhow::Result<()> {
        let driver = self.driver.as_mut().context("an order before the lanes")?;
        driver.fits(load)?;
        let stop = Arc::new(AtomicBool::new(false));
        driver.stop_on(stop.clone());
        let mut recorder = Recorder::new(Instant::now())?;
        send(stream, &Answer::Started)?;
        let (read, told) = std::thread::scope(|scope| {
            let reading = scope.spawn(|| driver.run(load, Some(&mut recorder)));
            let told = receive(stream, None);
            stop.store(true, Ordering::Release);
            (reading.join(), told)
        });
        let Ok(Some(line)) = told else { return Ok(()) };
        ensure!(matches!(exchange::parse(&line)?, Order::Stop), "an order out of turn");
        let ran = read.ok().context("the mirror's reads panicked")??;
        let latency = recorder.latency();
        let per_s = |amount: f64| amount / ran.elapsed.as_secs_f64().max(1e-9);
        let reads = latency.count as f64;
        let (mb_per_s, reads_per_s) = (per_s(reads * f64::from(load.bytes) / 1e6), per_s(reads));
        send(stream, &Answer::Stopped(Mirrored { latency, mb_per_s, reads_per_s }))
    }
}

/// Memory of a reader for its server to read.
///
/// Errors: no memory.
pub(crate) fn memory(bytes: u64) -> anyhow::Result<HostMemory> {
    let memory = HostMemory::anonymous("pcbench", bytes as usize)?;
    pattern::fill(&memory);
    Ok(memory)
}
