//! A process that holds a guest: it boots one or waits for one, and ends when the guest ends or
//! has moved away.
//!
//! ```text
//!            boot                        migrate
//!  (start) ───────▶ Running ──────────────────────────▶ Gone ──▶ exit, or Waiting with --again
//!      │             ▲    ▲ failed before the handover ─┘ │
//!      │ receive     │    └───────────────────────────────┤ handover not confirmed
//!      ▼             │                                    ▼
//!   Waiting ─────────┘                                 InDoubt ── resolve ──▶ Running or Kept
//!                                                      Kept ───── recover ──▶ Gone
//! ```
//!
//! The state and its transitions are here; who asks for them is in [`crate::server`].

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use postcopy_engine::pager::Trap;
use postcopy_engine::session::{self, Arrived, Owed, Progress, ReceiveOptions, SessionError};
use postcopy_tools::cli;
use postcopy_vmm::{BootSource, Console, DEFAULT_CMDLINE, MovableVm, VmConfig, VmHost};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::args::{HostArgs, ReceiveArgs, RunArgs, SelfService, resolve};
use crate::arrival::{Arrival, follow};
use crate::control::Status;
use crate::held::{End, HeldGuest, OwnRoom, QemuRoom, Room, qemu_command};
use crate::{metrics, server};

/// How often a host looks whether its guest has ended.
const GUEST_CHECK: Duration = Duration::from_millis(50);

/// Where the guest is.
pub(crate) enum State {
    /// There is none yet.
    Waiting,
    /// It runs here.
    Running(Arc<dyn HeldGuest>),
    /// It is being moved away.
    Migrating(Arc<dyn HeldGuest>),
    /// The handover was not confirmed. Guest and exported memory are kept until a person decides.
    InDoubt { guest: Arc<dyn HeldGuest>, owed: Box<Owed> },
    /// It runs at the destination, which still needs this memory and cannot be heard.
    Kept { owed: Box<Owed>, reason: String },
    /// The same, and the destination is being reached again.
    Recovering,
    /// It has moved away, or ended.
    Gone,
    /// The user asked for the end.
    Quit,
}

/// A guest whose handover was not confirmed, and its memory on offer.
type Doubtful = (Arc<dyn HeldGuest>, Box<Owed>);

/// What the control server and the main loop share.
pub(crate) struct Host {
    state: Mutex<State>,
    arrival: Mutex<Arrival>,
    changed: tokio::sync::Notify,
    pub(crate) progress: watch::Sender<Progress>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Waiting),
            arrival: Mutex::new(Arrival::None),
            changed: tokio::sync::Notify::new(),
            progress: watch::Sender::new(Progress::default()),
        })
    }

    pub(crate) fn set(&self, state: State) -> State {
        let before = std::mem::replace(&mut *lock(&self.state), state);
        self.changed.notify_waiters();
        before
    }

    /// Takes the guest for a migration, if it runs here and may be moved.
    pub(crate) fn begin_migration(&self) -> Result<Arc<dyn HeldGuest>, String> {
        if let Arrival::Stranded { reason, .. } = &*lock(&self.arrival) {
            return Err(format!("the guest's memory has not all arrived here: {reason}"));
        }
        let mut state = lock(&self.state);
        match &*state {
            State::Running(guest) => {
                let guest = guest.clone();
                *state = State::Migrating(guest.clone());
                Ok(guest)
            }
            State::Migrating(_) | State::Recovering => Err("the guest is being moved already".into()),
            State::Waiting => Err("there is no guest here yet".into()),
            State::InDoubt { .. } => {
                Err("the last handover is in doubt; end that with `pcvm resolve`".into())
            }
            State::Kept { .. } | State::Gone | State::Quit => Err("the guest is not here any more".into()),
        }
    }

    /// Takes guest and export out of doubt.
    pub(crate) fn take_doubt(&self) -> Option<Doubtful> {
        let mut state = lock(&self.state);
        if !matches!(&*state, State::InDoubt { .. }) {
            return None;
        }
        match std::mem::replace(&mut *state, State::Waiting) {
            State::InDoubt { guest, owed } => Some((guest, owed)),
            _ => None,
        }
    }

    /// Takes the memory that is kept on offer, to reach the destination again.
    pub(crate) fn take_kept(&self) -> Result<Box<Owed>, String> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, State::Recovering) {
            State::Kept { owed, .. } => Ok(owed),
            other => {
                let reason = match &other {
                    State::InDoubt { .. } => {
                        "the handover is in doubt: end that with `pcvm resolve --guest there` first"
                    }
                    State::Recovering | State::Migrating(_) => "that is under way already",
                    _ => "no guest has left that could need its memory from here",
                };
                *state = other;
                Err(reason.into())
            }
        }
    }

    pub(crate) fn guest(&self) -> Option<Arc<dyn HeldGuest>> {
        match &*lock(&self.state) {
            State::Running(guest) | State::Migrating(guest) => Some(guest.clone()),
            _ => None,
        }
    }

    /// Waits until the memory of a guest that arrived here is all here.
    pub(crate) async fn resident(&self) {
        loop {
            let changed = self.changed.notified();
            if !matches!(&*lock(&self.arrival), Arrival::Draining(_)) {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn set_arrival(&self, arrival: Arrival) {
        *lock(&self.arrival) = arrival;
        self.changed.notify_waiters();
    }

    pub(crate) fn status(&self) -> Status {
        let (arrival, stranded) = match &*lock(&self.arrival) {
            Arrival::None => (None, None),
            Arrival::Draining(status) | Arrival::Resident(status) => (Some(status.borrow().report), None),
            Arrival::Stranded { reason, status } => (Some(status.borrow().report), Some(reason.clone())),
        };
        let mut migration = None;
        let (state, detail) = match &*lock(&self.state) {
            State::Waiting => ("waiting", "no guest has arrived yet".into()),
            State::Running(_) if stranded.is_some() => ("stranded", stranded.unwrap_or_default()),
            State::Running(_) => ("running", "the guest runs here".into()),
            State::Migrating(_) => {
                migration = Some(*self.progress.borrow());
                ("migrating", "the guest is being moved".into())
            }
            State::InDoubt { .. } => (
                "in-doubt",
                "the destination did not confirm the handover; find out whether the guest runs there, then \
                 `pcvm resolve`"
                    .into(),
            ),
            State::Kept { reason, .. } => {
                let held = "its memory is kept on offer here, see `pcvm recover`";
                ("kept", format!("the guest is at the destination; {held}: {reason}"))
            }
            State::Recovering => {
                migration = Some(*self.progress.borrow());
                ("migrating", "the guest is at the destination, which is being reached again".into())
            }
            State::Gone | State::Quit => ("gone", "the guest is not here any more".into()),
        };
        Status { state: state.into(), detail, migration, arrival }
    }
}

/// What the main loop does next.
enum Next {
    Exit,
    WaitForAnother,
    Fail(String),
}

pub(crate) fn run(args: &RunArgs) -> anyhow::Result<()> {
    let source = BootSource {
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        cmdline: format!("{DEFAULT_CMDLINE} {}", args.cmdline),
    };
    let config = VmConfig { cpus: args.cpus, memory_bytes: args.memory };
    let listen = args.listen.as_deref().map(resolve).transpose()?;
    if args.host.again {
        anyhow::ensure!(listen.is_some(), "--again needs --listen HOST:PORT to wait for a guest at");
    }
    let options = args.host.receive(&args.wire)?;
    runtime()?.block_on(async {
        // Tried now, so that a wrong address is said now.
        if let Some(address) = listen {
            drop(bind(address).await?);
        }
        let desk = Desk::open(&args.host).await?;
        let guest = Arc::new(MovableVm::boot(config, &source, console(&args.host.console))?);
        let room = OwnRoom(factory(&args.host)?);
        hold(desk, &args.host, room, Door { open: None, address: listen, options }, Some(guest)).await
    })
}

pub(crate) fn receive(args: &ReceiveArgs) -> anyhow::Result<()> {
    let address = resolve(&args.listen)?;
    // What cannot work is said now, not when a guest stands at the door.
    Trap::check()?;
    for transport in args.wire.transports() {
        transport.available()?;
    }
    let options = args.host.receive(&args.wire)?;
    let command = qemu_command(args)?;
    runtime()?.block_on(async {
        let door = Door { open: Some(bind(address).await?), address: Some(address), options };
        let desk = Desk::open(&args.host).await?;
        match command {
            Some(command) => hold(desk, &args.host, QemuRoom(command), door, None).await,
            None => {
                postcopy_vmm::check_kvm()?;
                hold(desk, &args.host, OwnRoom(factory(&args.host)?), door, None).await
            }
        }
    })
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the control plane")
}

pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    Ok(TcpListener::bind(address).await.map_err(|source| SessionError::Listen { address, source })?)
}

fn console(name: &str) -> Console {
    match name {
        "stdio" => Console::Stdio,
        "none" => Console::Discard,
        path => Console::File(path.into()),
    }
}

/// What takes guests in.
fn factory(args: &HostArgs) -> anyhow::Result<Arc<VmHost>> {
    let console_name = args.console.clone();
    let host = VmHost::new(move || console(&console_name));
    Ok(Arc::new(match args.self_service {
        SelfService::Off => host,
        SelfService::On => host.with_self_service()?,
        SelfService::Auto => host.with_self_service_if_possible(),
    }))
}

/// Where a process is spoken to.
struct Desk {
    host: Arc<Host>,
    control: server::ControlSocket,
}

impl Desk {
    /// Who finds the control socket finds the metrics too.
    async fn open(args: &HostArgs) -> anyhow::Result<Self> {
        let host = Host::new();
        metrics::serve(args.metrics.as_deref(), &host).await?;
        Ok(Self { host, control: server::bind(&args.control)? })
    }
}

/// Where guests come in.
struct Door {
    /// Who has a guest does not listen: a second source is refused at once.
    open: Option<TcpListener>,
    address: Option<SocketAddr>,
    options: ReceiveOptions,
}

/// Holds guests, one after another.
async fn hold<R: Room>(
    desk: Desk,
    args: &HostArgs,
    room: R,
    mut door: Door,
    mut guest: Option<Arc<dyn HeldGuest>>,
) -> anyhow::Result<()> {
    let Desk { host, control } = desk;
    let server = tokio::spawn(server::serve(control, host.clone()));
    let room = Arc::new(room);
    let outcome = loop {
        let held = match guest.take() {
            Some(guest) => {
                host.set(State::Running(guest.clone()));
                hold_one(&host, guest).await
            }
            None => match await_guest(&host, &mut door, &room).await? {
                Ok(arrived) => take_in(&host, arrived, door.address).await,
                Err(next) => next,
            },
        };
        match held {
            Next::WaitForAnother if args.again => {
                host.set(State::Waiting);
                host.set_arrival(Arrival::None);
            }
            Next::Fail(reason) if args.again => {
                tracing::error!(reason, "waiting for another guest");
                host.set(State::Waiting);
            }
            Next::Fail(reason) => break Err(anyhow::anyhow!(reason)),
            Next::Exit | Next::WaitForAnother => break Ok(()),
        }
    };
    server.abort();
    if let Some(guest) = host.guest() {
        tokio::task::spawn_blocking(move || guest.end()).await?;
    }
    outcome
}

/// Waits for a guest to arrive.
async fn await_guest<R: Room>(
    host: &Arc<Host>,
    door: &mut Door,
    room: &Arc<R>,
) -> anyhow::Result<Result<Arrived<R::Guest>, Next>> {
    let room = room.clone();
    let made = tokio::task::spawn_blocking(move || room.make()).await??;
    let listener = match door.open.take() {
        Some(listener) => listener,
        None => bind(door.address.context("there is nowhere to wait for a guest")?).await?,
    };
    Ok(tokio::select! {
        arrived = session::receive(&listener, made, door.options.clone()) => {
            arrived.map_err(|error| Next::Fail(format!("no guest was taken in: {error}")))
        }
        () = quit(host) => Err(Next::Exit),
        () = interrupted() => Err(Next::Exit),
    })
}

/// Holds a guest that has arrived, while its memory follows.
async fn take_in<G: HeldGuest>(host: &Arc<Host>, arrived: Arrived<G>, address: Option<SocketAddr>) -> Next {
    let Arrived { guest, drain, .. } = arrived;
    let guest: Arc<dyn HeldGuest> = guest;
    host.set_arrival(Arrival::Draining(drain.status()));
    host.set(State::Running(guest.clone()));
    let following = tokio::spawn(follow(host.clone(), drain, address));
    let next = hold_one(host, guest).await;
    // It may hold the port.
    following.abort();
    let _ = following.await;
    next
}

/// Holds a guest until it ends, has moved away, or the user has had enough.
async fn hold_one(host: &Arc<Host>, guest: Arc<dyn HeldGuest>) -> Next {
    let next = tokio::select! {
        End { how, failed } = ended(&*guest) => {
            if failed {
                Next::Fail(format!("the guest ended: {how}"))
            } else {
                cli::say(&format!("pcvm: the guest ended: {how}"));
                Next::Exit
            }
        },
        () = gone(host) => Next::WaitForAnother,
        () = quit(host) => Next::Exit,
        () = interrupted() => Next::Exit,
    };
    // Ends the vCPU threads, which may take as long as a page that does not come.
    let _ = tokio::task::spawn_blocking(move || guest.end()).await;
    next
}

async fn ended(guest: &dyn HeldGuest) -> End {
    loop {
        if let Some(end) = guest.ended() {
            return end;
        }
        tokio::time::sleep(GUEST_CHECK).await;
    }
}

async fn reached(host: &Host, wanted: impl Fn(&State) -> bool) {
    loop {
        let changed = host.changed.notified();
        if wanted(&lock(&host.state)) {
            return;
        }
        changed.await;
    }
}

async fn gone(host: &Host) {
    reached(host, |state| matches!(state, State::Gone)).await;
}

async fn quit(host: &Host) {
    reached(host, |state| matches!(state, State::Quit)).await;
}

/// Somebody wants this process to end.
pub(crate) async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
