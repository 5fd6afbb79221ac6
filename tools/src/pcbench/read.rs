//! The measurement: closed-loop reads of one size over one lane.

use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use postcopy_engine::stats::Percentiles;
use postcopy_transport::{
    AnyLane, Exporter, HostMemory, Importer, Lane, LaneClass, MAX_READ, Read, RemoteRegion, Token, Transport,
};
use serde::Serialize;

use crate::args::{PORT, Plan, REGION_BYTES};
use crate::{pattern, serve};

/// Reads before the measured ones, of each size.
const WARM_UP: u64 = 200;
/// A read that takes longer than this has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// Reads begin at multiples of this.
const ALIGNMENT: u64 = 4096;

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measurement {
    pub(crate) transport: &'static str,
    pub(crate) bytes: u32,
    pub(crate) latency: Percentiles,
    /// Mean, in microseconds.
    pub(crate) mean_us: f64,
    /// Standard deviation, in microseconds.
    pub(crate) stdev_us: f64,
    /// Bytes read, in MB (10^6) a second of reading, one read at a time.
    pub(crate) mb_per_s: f64,
}

/// A lane, and what it reads from and lands in.
struct Bench {
    transport: Transport,
    lane: AnyLane,
    region: RemoteRegion,
    landing: HostMemory,
    importer: Importer,
    next: u64,
    _held: Held,
}

/// What must live as long as the lane.
enum Held {
    Loopback { _exporter: Box<Exporter> },
    Remote { _control: TcpStream },
}

/// Measures everything in `plan`, against `host` or this process itself. Transports take turns at
/// each size, so that what disturbs one size disturbs all of them.
pub(crate) fn measure(plan: &Plan, host: Option<&str>) -> anyhow::Result<Vec<Measurement>> {
    let mut benches = Vec::new();
    for transport in &plan.transports {
        let bench = match host {
            Some(host) => Bench::remote(*transport, plan, host),
            None => Bench::loopback(*transport, plan),
        };
        benches.push(bench.with_context(|| format!("setting up {transport}"))?);
    }
    if host.is_some() {
        eprintln!("pcbench: connected");
    }
    let mut measured = Vec::new();
    for size in &plan.sizes {
        for bench in &mut benches {
            measured.push(bench.measure(*size, plan)?);
        }
    }
    Ok(measured)
}

fn importer(
    transport: Transport,
    plan: &Plan,
    local: Option<std::net::IpAddr>,
) -> anyhow::Result<(Importer, HostMemory)> {
    let landing = HostMemory::anonymous("pcbench-landing", MAX_READ as usize)?;
    let importer = Importer::new(transport, std::slice::from_ref(&landing), &plan.device.endpoint(local))?;
    Ok((importer, landing))
}

impl Bench {
    fn remote(transport: Transport, plan: &Plan, host: &str) -> anyhow::Result<Self> {
        let address = match host.to_socket_addrs() {
            Ok(mut found) => found.next(),
            Err(_) => (host, PORT).to_socket_addrs().ok().and_then(|mut found| found.next()),
        };
        let address = address.with_context(|| format!("`{host}` is no address; write HOST or HOST:PORT"))?;
        let control = TcpStream::connect(address)
            .with_context(|| format!("cannot reach {address}; is `pcbench serve` running there?"))?;
        let local = control.local_addr().ok().map(|address| address.ip());
        let (importer, landing) = importer(transport, plan, local)?;
        let serve::Remote { lane, region, control } = serve::connect(control, transport, &importer)?;
        let held = Held::Remote { _control: control };
        Ok(Self { transport, lane, region, landing, importer, next: 1, _held: held })
    }

    fn loopback(transport: Transport, plan: &Plan) -> anyhow::Result<Self> {
        let memory = HostMemory::anonymous("pcbench", REGION_BYTES as usize)?;
        pattern::fill(&memory);
        let mut exporter = Exporter::new(transport, &[memory], &plan.device.endpoint(None))?;
        let (importer, landing) = importer(transport, plan, None)?;
        let lane = importer.connect_local(&mut exporter, LaneClass::Urgent)?;
        let region = exporter.regions()[0];
        let held = Held::Loopback { _exporter: Box::new(exporter) };
        Ok(Self { transport, lane, region, landing, importer, next: 1, _held: held })
    }

    fn measure(&mut self, bytes: u32, plan: &Plan) -> anyhow::Result<Measurement> {
        ensure!(u64::from(bytes) < self.region.len(), "{bytes} bytes are more than the server offers");
        for _ in 0..WARM_UP.min(plan.iterations) {
            self.read(bytes)?;
        }
        let mut times = Histogram::<u64>::new_with_max(PATIENCE.as_nanos() as u64, 3)?;
        let begin = Instant::now();
        let mut last = 0;
        while times.len() < plan.iterations && begin.elapsed() < plan.limit {
            let (offset, time) = self.read(bytes)?;
            times.saturating_record(time.as_nanos() as u64);
            if plan.verify {
                self.verify(offset, bytes)?;
            }
            last = offset;
        }
        self.verify(last, bytes)?;
        let mean = times.mean();
        Ok(Measurement {
            transport: self.transport.name(),
            bytes,
            latency: Percentiles::from(&times),
            mean_us: mean / 1e3,
            stdev_us: times.stdev() / 1e3,
            mb_per_s: f64::from(bytes) * 1e3 / mean,
        })
    }

    fn verify(&self, offset: u64, bytes: u32) -> anyhow::Result<()> {
        ensure!(
            pattern::matches(&self.landing, offset, bytes),
            "{}: the {bytes} bytes from offset {offset} are not what the server has there",
            self.transport
        );
        Ok(())
    }

    /// One read from somewhere in the region; where, and how long it took.
    fn read(&mut self, bytes: u32) -> anyhow::Result<(u64, Duration)> {
        let offset = self.somewhere(bytes);
        let remote = self.region.slice(offset, bytes).context("the read does not fit the region")?;
        let local = self.importer.regions()[0].slice(0, bytes).context("the read does not fit")?;
        let read = Read::new(Token(self.next), local, remote).context("unlike lengths")?;
        let mut done = Vec::with_capacity(1);
        let begin = Instant::now();
        self.lane.post(&[read])?;
        while done.is_empty() {
            self.lane.poll(&mut done)?;
            if begin.elapsed() > PATIENCE {
                bail!("{}: a read of {bytes} bytes took longer than {PATIENCE:?}", self.transport);
            }
        }
        let time = begin.elapsed();
        done.remove(0).result?;
        Ok((offset, time))
    }

    /// Another aligned place each time, the same ones in each run.
    fn somewhere(&mut self, bytes: u32) -> u64 {
        self.next = self.next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let places = (self.region.len() - u64::from(bytes)) / ALIGNMENT;
        (self.next >> 16) % places.max(1) * ALIGNMENT
    }
}
