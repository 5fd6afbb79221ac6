//! The course of a move as its source keeps it, guest and memory aside: whom it speaks to, what was agreed, and
//! what is to be reported.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use postcopy_transport::Transport;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::channel::{Channel, unexpected};
use super::message::{Message, PageOrder};
use super::preamble::{self, Preamble, Purpose, SessionId};
use super::query_migrate::QueryMigrate;
use super::report::{ArrivalReport, MigrationReport, Phase, Progress, REPORT_VERSION};
use super::source::MigrateOptions;
use super::tls::taken_unasked;
use super::{DRAIN_PATIENCE, STEP_PATIENCE, SessionError, track};
use crate::export::{Export, LANES, MAX_LANES};
use crate::memory::GuestMemory;
use crate::stats::PagerReport;

/// See the module.
pub(super) struct Course {
    pub(super) peer: SocketAddr,
    pub(super) options: MigrateOptions,
    pub(super) session: SessionId,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) begun: Instant,
    /// Since when the guest stands still, once it does.
    pub(super) frozen: Instant,
    pub(super) report: MigrationReport,
}

/// What a destination has chosen.
pub(super) struct Accepted {
    pub(super) transport: Transport,
    /// Its lane requests.
    pub(super) lanes: Vec<Vec<u8>>,
    pub(super) order: PageOrder,
}

impl Course {
    /// That of the guest with this memory.
    pub(super) fn new(
        memory: &GuestMemory,
        peer: SocketAddr,
        options: MigrateOptions,
        session: SessionId,
        progress: &watch::Sender<Progress>,
    ) -> Self {
        let (version, mode, memory_bytes) = (REPORT_VERSION, options.mode, memory.layout().total_bytes());
        let report = MigrationReport { version, mode, memory_bytes, ..Default::default() };
        let begun = Instant::now();
        Self { peer, options, session, progress: progress.clone(), begun, frozen: begun, report }
    }

    pub(super) fn enter(&self, phase: Phase) {
        let elapsed_us = micros(self.begun.elapsed());
        tracing::info!(?phase, elapsed_us, "migration");
        self.progress.send_modify(|progress| {
            progress.phase = phase;
            progress.setup_us = self.report.setup_us;
            progress.downtime_us = self.report.downtime_us;
            progress.total_us = elapsed_us;
        });
    }

    /// What the destination said of its pager.
    pub(super) fn show(&self, pager: PagerReport) {
        self.progress.send_modify(|progress| {
            progress.pager = pager;
            progress.total_us = micros(self.begun.elapsed());
        });
    }

    /// The names of what to offer: what was asked for, if this machine has it, else all that it has.
    pub(super) fn transports(&self) -> Result<Vec<String>, SessionError> {
        let name = |transport: &Transport| transport.name().to_owned();
        for transport in &self.options.transports {
            transport.available()?;
        }
        if !self.options.transports.is_empty() {
            return Ok(self.options.transports.iter().map(name).collect());
        }
        let usable = |transport: &Transport| match transport.available() {
            Ok(()) => true,
            Err(error) => {
                tracing::info!(%error, "going on without it");
                false
            }
        };
        let all = [Transport::Verbs, Transport::Tcp].into_iter();
        let taken = all.filter(|one| taken_unasked(*one, self.options.tls.is_some()) && usable(one));
        Ok(taken.map(|one| name(&one)).collect())
    }

    /// Connects to the destination and says what for. Whoever will speak there is answered; TLS is yet to follow.
    pub(super) async fn dial(&self, purpose: Purpose) -> Result<TcpStream, SessionError> {
        let unreachable =
            |source: std::io::Error| SessionError::Unreachable { peer: self.peer.to_string(), source };
        let dialed = tokio::time::timeout(STEP_PATIENCE, TcpStream::connect(self.peer)).await;
        let timed_out = || std::io::Error::from(std::io::ErrorKind::TimedOut);
        let mut stream = dialed.map_err(|_| unreachable(timed_out()))?.map_err(unreachable)?;
        let tls = self.options.tls.is_some();
        preamble::write(&mut stream, Preamble { session: self.session, purpose, tls }).await?;
        if !matches!(purpose, Purpose::Lane(_)) {
            preamble::read(&mut stream, STEP_PATIENCE).await?.agrees(tls)?;
        }
        Ok(stream)
    }

    /// Dials a connection to speak over.
    pub(super) async fn call(&mut self, purpose: Purpose) -> Result<Channel, SessionError> {
        let stream = self.dial(purpose).await?;
        let channel = Channel::dialed(stream, self.peer.ip(), self.options.tls.as_ref()).await?;
        self.options.endpoint.local = channel.addresses().local;
        Ok(channel)
    }

    /// What the destination accepted, checked.
    pub(super) fn accepted(&mut self, message: Message) -> Result<Accepted, SessionError> {
        match message {
            Message::Accept { lanes, .. } if !(LANES..=MAX_LANES).contains(&lanes.len()) => {
                Err(SessionError::Protocol("it asked for an impossible number of lanes"))
            }
            Message::Accept { transport, lanes, order } => {
                let known =
                    transport.parse().map_err(|_| SessionError::Protocol("it accepted an unknown transport"));
                let known: Transport = known?;
                // Of one that goes on over another transport, all pages or none are said to have been encrypted.
                let first = self.report.transport.is_empty();
                self.report.pages_encrypted = (first || self.report.pages_encrypted)
                    && known == Transport::Tcp
                    && self.options.tls.is_some();
                self.report.transport = known.name().into();
                Ok(Accepted { transport: known, lanes, order })
            }
            other => Err(unexpected(&other, "Accept")),
        }
    }

    /// Grants the lanes that the destination asked for, and connects those that need it.
    pub(super) async fn connect(
        &mut self,
        export: &mut Export,
        requests: &[Vec<u8>],
        channel: &mut Channel,
    ) -> Result<(), SessionError> {
        let (mut lanes, mut streams) = (Vec::new(), Vec::new());
        for request in requests {
            let before = export.awaited();
            lanes.push(export.grant(request)?);
            streams.push(export.awaited() - before);
        }
        let regions = export.regions().map(|region| region.to_bytes());
        channel.send(&Message::Granted { lanes, regions }).await?;
        for (lane, streams) in streams.into_iter().enumerate() {
            for _ in 0..streams {
                let stream = self.dial(Purpose::Lane(lane as u32)).await?;
                export.attach(track::dialed(stream, self.peer.ip(), self.options.tls.as_ref()).await?)?;
            }
        }
        Ok(())
    }

    /// Keeps the memory on offer until the destination has all of it.
    pub(super) async fn serve(&mut self, channel: &mut Channel) -> Result<ArrivalReport, SessionError> {
        let before = processor_time();
        let served = loop {
            match channel.receive("progress of the drain", DRAIN_PATIENCE).await {
                Ok(Message::Progress(pager)) => self.show(pager),
                Ok(Message::Resident(arrival)) => break Ok(arrival),
                Ok(other) => break Err(unexpected(&other, "Progress or Resident")),
                Err(error) => break Err(error),
            }
        };
        self.report.source_cpu_us += micros(processor_time().saturating_sub(before));
        served
    }

    pub(super) fn finish(mut self, arrival: &ArrivalReport) -> MigrationReport {
        self.report.resident_us = arrival.resident_us;
        self.report.pager = arrival.pager;
        self.report.total_us = micros(self.begun.elapsed());
        self.progress.send_modify(|progress| progress.pager = arrival.pager);
        self.enter(Phase::Resident);
        self.report.query_migrate = QueryMigrate {
            postcopy_vcpu_blocktime: arrival.vcpu_blocktime_us.iter().map(|us| us / 1000).collect(),
            ..QueryMigrate::from(&*self.progress.borrow())
        };
        self.report.vcpu_blocktime_us.clone_from(&arrival.vcpu_blocktime_us);
        self.report.touched_pages = arrival.touched_pages;
        self.report.guest_ended = arrival.guest_ended;
        tracing::info!(phase = "Released", elapsed_us = micros(self.begun.elapsed()), "migration");
        self.report
    }
}

/// Processor time of this process so far, in all its threads.
fn processor_time() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
