//! The destination's side of a session, up to the guest's resume. [`receive`] reads as the protocol.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use postcopy_transport::{EndpointOptions, Transport};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;

use super::channel::{Channel, unexpected};
use super::course::micros;
use super::dock::Dock;
use super::door::{Caller, await_call};
use super::drain::Drain;
use super::message::{GuestDescription, MAX_STATE, Message, Mode, PageOrder};
use super::preamble::{Preamble, Purpose};
use super::round::{Connected, pre_copy};
use super::state::{Came, incoming};
use super::tls::DestinationTls;
use super::unpack::{Listed, Offered, offered, runs_of};
use super::{GuestError, STEP_PATIENCE, SessionError, WORK_PATIENCE, blocking};
use crate::export::MAX_SERVERS;
use crate::import::Lanes;
use crate::memory::GuestMemory;
use crate::pager::{FaultServer, FaultsTo, Landing, Ledger, Pager, PagerConfig, Shards, Stage, Trap};
use crate::planner::Bandwidth;
use crate::room::{self, Lacking};

/// Makes guests for what arrives. Called from a blocking thread.
pub trait DestinationHost: Send + Sync + 'static {
    /// What it makes.
    type Guest: DestinationGuest;

    /// How many threads of the guest will serve their own faults, at most 64: each gets a lane of its
    /// own, and [`DestinationGuest::serve_faults`] its server. None, if not said otherwise: the
    /// pager's thread serves all.
    fn serving_threads(&self, _description: &GuestDescription) -> usize {
        0
    }

    /// Makes memory for such a guest, empty, with the trap under it: of this process, if not said
    /// otherwise, and told to the threads themselves where `served` says that some serve their own
    /// faults. The trap may be cut for fewer `shards`.
    ///
    /// Errors: there is no room for it, or userfaultfd is refused.
    fn memory(
        &self,
        description: &GuestDescription,
        served: bool,
        shards: Shards,
    ) -> Result<(GuestMemory, Trap), GuestError> {
        let (layout, bytes) = (description.layout.clone(), description.layout.total_bytes());
        let memory = GuestMemory::new(layout).map_err(|source| SessionError::Memory { bytes, source })?;
        let told = if served { FaultsTo::Threads } else { FaultsTo::Pager };
        let trap = Trap::register(&memory, told, shards).map_err(SessionError::from)?;
        Ok((memory, trap))
    }

    /// Checks whether such a guest can run here, and prepares for it. Its memory holds nothing yet
    /// and is trapped: nothing may touch it before the state is loaded.
    fn prepare(
        &self,
        description: &GuestDescription,
        memory: &GuestMemory,
    ) -> Result<Self::Guest, GuestError>;
}

/// A guest on its way in. Called from a blocking thread.
pub trait DestinationGuest: Send + Sync + 'static {
    /// Loads the state of vCPUs and devices, all that can be read of it, as it comes. Memory that this touches is
    /// fetched on demand.
    fn load(&self, state: &mut dyn Read) -> Result<(), GuestError>;

    /// It will not run here: the rest of its state, or memory that its loading waits for, does not come. Called while it is
    /// loaded, or after that failed; touches of its memory do not wait for long afterwards.
    fn give_up(&self) {}

    /// Takes the servers of the threads that will serve their own faults, after the state is loaded
    /// and before the guest runs. Only called where [`DestinationHost::serving_threads`] said so.
    fn serve_faults(&self, _servers: Vec<FaultServer>) -> Result<(), GuestError> {
        Err("no thread of this guest serves its own faults".into())
    }

    /// Lets the guest run.
    fn resume(&self) -> Result<(), GuestError>;

    /// All of its memory is here: nothing faults any more, and servers of faults can go.
    fn memory_arrived(&self) {}

    /// Whether it has ended here and nothing more of it is needed, which its source is told then. Not if it failed: somebody may
    /// want what the source still has. Must not block.
    fn has_ended(&self) -> bool {
        false
    }

    /// How many of its pages it has touched since it runs here, whether they had come or not. `None`, if not said
    /// otherwise: the engine sees only touches of pages that were missing.
    fn touched_pages(&self) -> Option<u64> {
        None
    }

    /// The threads of its vCPUs in their order, as gettid(2) gives them, so that it can be told how long
    /// each waited. None, if not said otherwise.
    fn vcpu_threads(&self) -> Vec<i32> {
        Vec::new()
    }
}

/// How to receive a guest.
#[derive(Clone, Debug, Default)]
pub struct ReceiveOptions {
    /// Transports to accept. Empty: whatever the source offers first and this machine has.
    pub transports: Vec<Transport>,
    /// RDMA device and addresses. `local` is found from the control connection.
    pub endpoint: EndpointOptions,
    /// How the pager behaves.
    pub pager: PagerConfig,
    /// How many threads it has. A stock QEMU's are as many as it was started for.
    pub shards: Shards,
    /// In which order pages come that nobody has asked for, and which are near a fault.
    pub order: PageOrder,
    /// Where pages land. A hybrid migration needs it in place.
    pub landing: Landing,
    /// The most guest memory to accept, in bytes. `None`: what there is [room](crate::room) for.
    pub memory_limit: Option<u64>,
    /// Whom to speak with. `None`: anybody, in clear.
    pub tls: Option<DestinationTls>,
}

/// A guest that runs here now. Its memory follows: see [`Drain::finish`].
pub struct Arrived<G> {
    /// The guest.
    pub guest: Arc<G>,
    /// Its memory.
    pub memory: GuestMemory,
    /// The rest of the session.
    pub drain: Drain,
}

/// Waits for a source on `listener` and takes its guest in, up to its resume here.
///
/// Connections that are not a source of ours, or of one that is gone before it has said what it brings, are logged and ignored.
///
/// Errors: anything on the way to the resume; the guest runs on at the source, and this side has
/// let go of everything.
pub async fn receive<H: DestinationHost>(
    listener: &TcpListener,
    host: Arc<H>,
    options: ReceiveOptions,
) -> Result<Arrived<H::Guest>, SessionError> {
    let is_source = |theirs: &Preamble| theirs.purpose == Purpose::Control;
    let else_told = "its guest is not here: this side waits for another";
    let Caller { mut channel, session, said } =
        await_call(listener, options.tls.as_ref(), is_source, else_told).await?;
    let begun = Instant::now();
    let dock = Dock::of(listener, &channel, session, options);
    let mut destination = Destination { dock, host, begun };
    match destination.take_in(&mut channel, said).await {
        Ok((guest, memory, pager)) => {
            let options = destination.dock.options;
            let drain =
                Drain::new(Some(channel), pager, (guest.clone(), memory.clone()), (session, options), begun);
            Ok(Arrived { guest, memory, drain })
        }
        Err(error) => {
            // Before the commit this tells the source to run on; if it is gone, nobody needs it.
            let _ = channel.send(&Message::Refuse(error.to_string())).await;
            Err(error)
        }
    }
}

struct Destination<'a, H> {
    dock: Dock<'a>,
    host: Arc<H>,
    begun: Instant,
}

/// Tells how far an arrival is, and when it got there.
pub(super) fn passed(phase: &'static str, begun: Instant) {
    tracing::info!(phase, elapsed_us = micros(begun.elapsed()), "arrival");
}

impl<H: DestinationHost> Destination<'_, H> {
    async fn take_in(
        &mut self,
        channel: &mut Channel,
        said: Message,
    ) -> Result<(Arc<H::Guest>, GuestMemory, Pager), SessionError> {
        let Offered { guest: description, transports: offered, mode, max_bandwidth } = offered(said)?;
        passed("Offer", self.begun);
        self.check_size(&description)?;
        let huge_pages = &mut self.dock.options.pager.huge_pages;
        *huge_pages = huge_pages.resolved(description.huge_pages);
        let ours = &mut self.dock.options.pager.planner.max_bandwidth;
        *ours = Bandwidth::least(*ours, max_bandwidth);
        let threads = self.host.serving_threads(&description).min(MAX_SERVERS);
        let (guest, memory, trap) = self.prepare(description, threads > 0).await?;
        let dock = &self.dock;
        let landing = |transport| dock.options.landing.resolved(transport, mode == Mode::Hybrid);
        let (transport, import) = dock.import(&offered, &memory, (trap.shards(), landing)).await?;
        passed("Prepared", self.begun);
        let mut connected = dock.connect(channel, transport, import, (trap.shards(), threads)).await?;
        if mode == Mode::Hybrid {
            passed("Connected", self.begun);
            let limit = dock.options.pager.planner.max_bandwidth;
            connected = pre_copy(channel, connected, limit).await?;
        }
        let (pager, servers) = self.start(connected, trap).await?;
        channel.send(&Message::LanesReady).await?;
        passed("LanesReady", self.begun);
        self.load(channel, &guest, &pager, servers).await?;
        passed("StateLoaded", self.begun);
        self.resume(channel, &guest, pager.ledger().clone()).await?;
        passed("Resumed", self.begun);
        Ok((guest, memory, pager))
    }

    /// Refuses what is more than is allowed.
    fn check_size(&self, description: &GuestDescription) -> Result<(), SessionError> {
        let bytes = description.layout.total_bytes();
        match self.dock.options.memory_limit {
            Some(limit) if bytes > limit => {
                Err(too_much(bytes, format!("this side accepts at most {limit} bytes (--memory-limit)")))
            }
            _ => Ok(()),
        }
    }

    async fn prepare(
        &self,
        description: GuestDescription,
        served: bool,
    ) -> Result<(Arc<H::Guest>, GuestMemory, Trap), SessionError> {
        let (host, shards) = (self.host.clone(), self.dock.options.shards);
        let limited = self.dock.options.memory_limit.is_some();
        let prepared = blocking(move || {
            let (memory, trap) = host.memory(&description, served, shards)?;
            has_room(&memory, limited)?;
            Ok((Arc::new(host.prepare(&description, &memory)?), memory, trap))
        });
        prepared.await.map_err(|source: GuestError| match source.downcast::<SessionError>() {
            Ok(ours) => *ours,
            Err(source) => SessionError::Guest { operation: "preparing for the guest", source },
        })
    }

    /// Starts the pager over connected lanes.
    async fn start(
        &self,
        connected: Connected,
        trap: Trap,
    ) -> Result<(Pager, Vec<FaultServer>), SessionError> {
        let Connected { import, lanes: Lanes { shards, servers }, regions, round } = connected;
        let config = self.dock.options.pager;
        trap.hold();
        trap.ledger().arrives(self.dock.session);
        let started = blocking(move || import.start(trap, shards, regions, round, config)).await?;
        let servers = servers.into_iter().map(|lane| started.server(lane)).collect::<Result<_, _>>()?;
        Ok((started, servers))
    }

    /// Loads the state while it comes. Memory that this touches comes from when the source's guest stands still.
    async fn load(
        &self,
        channel: &mut Channel,
        guest: &Arc<H::Guest>,
        pager: &Pager,
        servers: Vec<FaultServer>,
    ) -> Result<(), SessionError> {
        let (pieces, mut state) = incoming();
        let (guest, given_up) = (guest.clone(), guest);
        let loading = blocking(move || {
            guest.load(&mut state)?;
            if servers.is_empty() { Ok(()) } else { guest.serve_faults(servers) }
        });
        let loaded = async {
            let frozen = self.take_state(channel, &pieces, pager).await?;
            let loaded = tokio::select! {
                loaded = loading => loaded,
                // The trap, which would have it wait for ever, ends with the pager.
                reason = cut_off(channel, pager) => Err(reason),
            };
            loaded
                .map_err(|source| SessionError::Guest { operation: "loading the guest's state", source })?;
            Ok(frozen)
        };
        let frozen = loaded.await.inspect_err(|_: &SessionError| given_up.give_up())?;
        channel.send(&Message::StateLoaded { load_us: micros(frozen.elapsed()) }).await
    }

    /// Hands the state over to who loads it; what it touches comes from when the source's guest stands still, which is
    /// returned. Who loads may have ended, and says why.
    async fn take_state(
        &self,
        channel: &mut Channel,
        pieces: &UnboundedSender<Came>,
        pager: &Pager,
    ) -> Result<Instant, SessionError> {
        let (mut length, mut frozen, mut listed, mut order) = (0, None, Listed::default(), None);
        loop {
            match channel.receive("the guest's state", WORK_PATIENCE).await? {
                Message::State(piece) if length + piece.len() <= MAX_STATE => {
                    length += piece.len();
                    drop(pieces.send(Came::Piece(piece)));
                }
                Message::State(_) => {
                    return Err(SessionError::Protocol("its device state is longer than 256 MiB"));
                }
                Message::Order { runs, more } if length == 0 && order.is_none() => {
                    if let Some(runs) = listed.take(&runs, more, pager.pages())? {
                        order = Some(pager.lay_out(&runs)?);
                        passed("Ordered", self.begun);
                    }
                }
                Message::Recent(runs) if frozen.is_none() => {
                    pager.source_stands_still(&runs_of(&runs, pager.pages())?, order.take());
                    frozen = Some(Instant::now());
                    passed("Frozen", self.begun);
                }
                // Each piece has had its checksum.
                Message::StateEnd { length: whole } => {
                    if whole != length as u64 {
                        return Err(SessionError::Protocol("its device state is damaged"));
                    }
                    drop(pieces.send(Came::End));
                    return frozen
                        .ok_or(SessionError::Protocol("it did not say that its guest stands still"));
                }
                other => return Err(unexpected(&other, "State")),
            }
        }
    }

    async fn resume(
        &self,
        channel: &mut Channel,
        guest: &Arc<H::Guest>,
        ledger: Ledger,
    ) -> Result<(), SessionError> {
        match channel.receive("Commit", STEP_PATIENCE).await? {
            Message::Commit => {}
            other => return Err(unexpected(&other, "Commit")),
        }
        let guest = guest.clone();
        let resumed = blocking(move || {
            ledger.is_at(Stage::Draining);
            guest.resume()
        });
        let resumed = resumed.await;
        resumed.map_err(|source| SessionError::Guest { operation: "resuming the guest", source })?;
        // The guest runs, whether or not this message arrives.
        if let Err(error) = channel.send(&Message::Resumed).await {
            tracing::warn!(%error, "the source could not be told that its guest runs here");
        }
        Ok(())
    }
}

fn too_much(bytes: u64, why: String) -> SessionError {
    SessionError::Memory { bytes, source: std::io::Error::other(why) }
}

/// Refuses memory, which is empty, that there is no room for: that would be found out when the guest runs here. What is
/// `limited` by a person may be more than the machine has left.
fn has_room(memory: &GuestMemory, limited: bool) -> Result<(), SessionError> {
    let bytes = memory.layout().total_bytes();
    if let Some(Lacking { needed, room }) = room::lacking(memory.guest()) {
        return Err(too_much(
            needed,
            format!(
                "the file system of its RAM has room for {room}; make that larger (mount -o remount,size=SIZE), or use a \
                 memory-backend-memfd"
            ),
        ));
    }
    match room::of_machine() {
        Some(room) if room < bytes && !limited => Err(too_much(
            bytes,
            format!(
                "this host has {room} bytes left, with its swap and within its cgroups; make room, or allow more with \
                 --memory-limit"
            ),
        )),
        _ => Ok(()),
    }
}

/// Why the memory that a guest's loading may wait for does not come any more. Pending as long as it does.
async fn cut_off(channel: &mut Channel, pager: &Pager) -> GuestError {
    const AWAITED: &str = "the state to be loaded";
    tokio::select! {
        error = channel.broken_into(AWAITED) => error.into(),
        Some(error) = pager.failed() => error.into(),
    }
}
