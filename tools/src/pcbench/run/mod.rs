//! The measurement: every transport and size has its turn in every round.
//!
//! What disturbs the machine for a while disturbs every transport alike, and medians over rounds
//! leave it out. The readers of all transports are connected before the first round.

pub(crate) mod driver;
pub(crate) mod progress;
pub(crate) mod recorder;
mod wait;

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use postcopy_tools::machine::Machine;
use postcopy_tools::size;
use postcopy_tools::text::one_line;
use postcopy_transport::Transport;

use crate::connect::{ALONE, Reader, is_of_one_transport, resolve};
use crate::exchange::Mirrored;
use crate::plan::{Limit, Plan};
use crate::serve;
use driver::{Driver, Load};
use progress::Progress;
use recorder::{Interval, Recorder};

/// Longest warm-up of one size: enough for caches, connections and processors to wake.
const WARM_UP: Duration = Duration::from_millis(200);

/// One round of one size over one transport.
pub(crate) struct Round {
    pub(crate) intervals: Vec<Interval>,
    pub(crate) reads: u64,
    pub(crate) elapsed: Duration,
    pub(crate) mirrored: Option<Mirrored>,
}

/// Everything measured of one size over one transport.
pub(crate) struct Measured {
    pub(crate) transport: Transport,
    pub(crate) bytes: u32,
    pub(crate) rounds: Vec<Round>,
}

/// A whole run.
pub(crate) struct Run {
    pub(crate) begun: SystemTime,
    pub(crate) took: Duration,
    /// This machine, before anything was measured.
    pub(crate) environment: Machine,
    /// The server, if it is not this process.
    pub(crate) server: Option<(SocketAddr, Machine)>,
    /// Processors that the reader was pinned to.
    pub(crate) cpus: Option<Vec<usize>>,
    pub(crate) measured: Vec<Measured>,
    /// Transports that the two sides do not share, and why.
    pub(crate) left_out: Vec<String>,
}

/// Measures what `plan` says, against `host` or this process itself.
///
/// Errors: whatever stands in the way of a measurement; none is made up.
pub(crate) fn run(plan: &Plan, host: Option<&str>) -> anyhow::Result<Run> {
    let environment = Machine::here();
    let near = plan.pin.apply_to_all(plan.device.device.first().map(String::as_str));
    let address = match host {
        Some(host) => resolve(host)?,
        None if plan.tls.is_some() => bail!("{ALONE}"),
        None => serve::loopback(&plan.device, plan.huge_pages)?,
    };
    let cpus = plan.pin.apply()?.or(near);
    let (mut readers, left_out) = connect_all(plan, address)?;
    for reader in &readers {
        plan.sizes.iter().try_for_each(|bytes| reader.driver.fits(&load(plan, *bytes)))?;
    }
    if host.is_some() && !plan.output.quiet {
        eprintln!("pcbench: connected");
    }
    let (begun, epoch) = (SystemTime::now(), Instant::now());
    let measured = rounds(plan, &mut readers, epoch)?;
    let server = host.and(readers.first()).map(|reader| (address, reader.machine.clone()));
    Ok(Run { begun, took: epoch.elapsed(), environment, server, cpus, measured, left_out })
}

/// A reader for each transport; and, where nobody asked for them by name, the transports that the
/// two sides do not share, with the reasons.
fn connect_all(plan: &Plan, address: SocketAddr) -> anyhow::Result<(Vec<Reader>, Vec<String>)> {
    let (mut readers, mut left_out) = (Vec::new(), Vec::new());
    for transport in &plan.transports {
        let reader = Reader::connect(address, *transport, plan);
        match reader.with_context(|| format!("setting up {transport}")) {
            Ok(reader) => readers.push(reader),
            Err(error) if plan.lenient && is_of_one_transport(&error) => left_out.push(error),
            Err(error) => return Err(error),
        }
    }
    if readers.is_empty() && !left_out.is_empty() {
        return Err(left_out.remove(0));
    }
    Ok((readers, left_out.iter().map(one_line).collect()))
}

fn load(plan: &Plan, bytes: u32) -> Load {
    let Plan { depth, span, completion, limit, rate, verify, .. } = *plan;
    Load { bytes, depth, span, completion, limit, rate, verify }
}

fn rounds(plan: &Plan, readers: &mut [Reader], epoch: Instant) -> anyhow::Result<Vec<Measured>> {
    let mut measured: Vec<Measured> = Vec::new();
    for reader in readers.iter() {
        for bytes in &plan.sizes {
            measured.push(Measured { transport: reader.transport, bytes: *bytes, rounds: Vec::new() });
        }
    }
    let mut progress = Progress::new(plan.output.quiet, measured.len() * plan.rounds as usize);
    for round in 0..plan.rounds {
        for (which, bytes) in plan.sizes.iter().enumerate() {
            for (turn, reader) in readers.iter_mut().enumerate() {
                progress.next(round, format_args!("{}, {}", reader.transport, size::short((*bytes).into())));
                let done = one(reader, &load(plan, *bytes), plan.warm_up, epoch)?;
                measured[turn * plan.sizes.len() + which].rounds.push(done);
            }
        }
    }
    progress.end();
    Ok(measured)
}

/// One round of one size over one transport.
fn one(reader: &mut Reader, load: &Load, warm_up: u64, epoch: Instant) -> anyhow::Result<Round> {
    warm(&mut reader.driver, load, warm_up)?;
    let mut recorder = Recorder::new(epoch)?;
    let mirror = reader.mirrors();
    if mirror {
        reader.start_mirror(load)?;
    }
    let ran = reader.driver.run(load, Some(&mut recorder))?;
    let mirrored = if mirror { Some(reader.stop_mirror()?) } else { None };
    Ok(Round { intervals: recorder.into_intervals(), reads: ran.reads, elapsed: ran.elapsed, mirrored })
}

fn warm(driver: &mut Driver, load: &Load, reads: u64) -> anyhow::Result<()> {
    if reads > 0 {
        let limit = Limit { reads: Some(reads), time: Some(WARM_UP) };
        driver.run(&Load { limit, rate: None, verify: false, ..load.clone() }, None)?;
    }
    Ok(())
}
