//! A process that holds a guest: it boots one or waits for one, and ends when the guest ends or
//! has moved away.
//!
//! ```text
//!            boot                        migrate
//!  (start) ───────▶ Running ──────────────────────────▶ Gone ──▶ exit, or Waiting with --again
//!      │             ▲    ▲ failed before the handover ─┘ │
//!      │ receive     │    └───────────────────────────────┤ handover not confirmed
//!      │  --take-over┤                                    │
//!      ▼             │                                    ▼
//!   Waiting ─────────┘                                 InDoubt ── resolve ──▶ Running or Kept
//!                                                      Kept ───── recover ──▶ Gone
//! ```
//!
//! The loop is here, what it shares in [`crate::states`]; who asks for a transition is in [`crate::server`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use postcopy_engine::pager::Trap;
use postcopy_engine::session::{self, Arrived, Parted, ReceiveOptions, SessionError};
use postcopy_tools::cli;
use postcopy_vmm::qemu::TakenOver;
use postcopy_vmm::{BootSource, Console, DEFAULT_CMDLINE, MovableVm, VmConfig, VmHost};
use tokio::net::TcpListener;

use crate::args::{HostArgs, ReceiveArgs, RunArgs, SelfService, Vmm, resolve};
use crate::arrival::{Arrival, follow, follow_again};
use crate::held::{End, HeldGuest, OwnRoom, QemuRoom, Room, qemu_command};
use crate::signals::Wanted;
use crate::states::{Host, State};
use crate::{metrics, server};

/// How often a host looks whether its guest has ended.
const GUEST_CHECK: Duration = Duration::from_millis(50);

/// How long a source may take to hear that its guest has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);

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
        hold(desk, &args.host, room, Door { open: None, address: listen, options }, First::Here(guest)).await
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
        let open = bind(address).await?;
        let desk = Desk::open(&args.host).await?;
        if let Some(pid) = args.take_over {
            let left = First::Left(TakenOver::of(pid)?);
            // Who has a guest does not listen, but for its source.
            drop(open);
            let door = Door { open: None, address: Some(address), options };
            return hold(desk, &args.host, QemuRoom(command), door, left).await;
        }
        let door = Door { open: Some(open), address: Some(address), options };
        if args.vmm == Vmm::Qemu {
            return hold(desk, &args.host, QemuRoom(command), door, First::Awaited).await;
        }
        postcopy_vmm::check_kvm()?;
        hold(desk, &args.host, OwnRoom(factory(&args.host)?), door, First::Awaited).await
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

/// The guest that a process holds first.
enum First {
    /// One that comes.
    Awaited,
    /// One that was booted here.
    Here(Arc<dyn HeldGuest>),
    /// One that another process has left.
    Left(TakenOver),
}

/// Holds guests, one after another.
async fn hold<R: Room>(
    desk: Desk,
    args: &HostArgs,
    room: R,
    mut door: Door,
    mut first: First,
) -> anyhow::Result<()> {
    let Desk { host, control } = desk;
    let server = tokio::spawn(server::serve(control, host.clone()));
    let room = Arc::new(room);
    let mut wanted = Wanted::new().context("listening to signals")?;
    let outcome = loop {
        let held = match std::mem::replace(&mut first, First::Awaited) {
            First::Here(guest) => {
                host.set(State::Running(guest.clone()));
                hold_one(&host, guest, &mut wanted).await
            }
            First::Left(left) => {
                let address = door.address.context("there is nowhere for its source to come back to")?;
                take_over(&host, left, (address, &door.options), &mut wanted).await
            }
            First::Awaited => {
                let address = door.address.context("there is nowhere to wait for a guest")?;
                match await_guest(&host, (&mut door, address, &room), &mut wanted).await? {
                    Ok(arrived) => take_in(&host, arrived, address, &mut wanted).await,
                    Err(next) => next,
                }
            }
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
    (door, address, room): (&mut Door, SocketAddr, &Arc<R>),
    wanted: &mut Wanted,
) -> anyhow::Result<Result<Arrived<R::Guest>, Next>> {
    let room = room.clone();
    let made = tokio::task::spawn_blocking(move || room.make()).await??;
    let listener = match door.open.take() {
        Some(listener) => listener,
        None => bind(address).await?,
    };
    Ok(tokio::select! {
        arrived = session::receive(&listener, made, door.options.clone()) => {
            arrived.map_err(|error| Next::Fail(format!("no guest was taken in: {error}")))
        }
        () = quit(host) => Err(Next::Exit),
        () = wanted.end() => Err(Next::Exit),
    })
}

/// Holds a guest that has arrived, while its memory follows.
async fn take_in<G: HeldGuest>(
    host: &Arc<Host>,
    arrived: Arrived<G>,
    address: SocketAddr,
    wanted: &mut Wanted,
) -> Next {
    let Arrived { guest, drain, .. } = arrived;
    host.set_arrival(Arrival::draining(&drain));
    hold_followed(host, guest, follow(host.clone(), drain, address), wanted).await
}

/// Holds a guest that another process has taken in, while what is missing of its memory is waited for.
async fn take_over(
    host: &Arc<Host>,
    TakenOver { guest, memory, trap }: TakenOver,
    (address, options): (SocketAddr, &ReceiveOptions),
    wanted: &mut Wanted,
) -> Next {
    let Some(trap) = trap else {
        host.set(State::Running(guest.clone()));
        return hold_one(host, guest, wanted).await;
    };
    let parted = Parted::of_another(trap, (guest.clone(), memory), options.clone());
    hold_followed(host, guest, follow_again(host.clone(), parted, address), wanted).await
}

/// Holds a guest whose memory is followed meanwhile.
async fn hold_followed(
    host: &Arc<Host>,
    guest: Arc<dyn HeldGuest>,
    follow: impl Future<Output = ()> + Send + 'static,
    wanted: &mut Wanted,
) -> Next {
    host.set(State::Running(guest.clone()));
    let mut following = tokio::spawn(follow);
    let next = hold_one(host, guest, wanted).await;
    // The source hears that its guest has ended.
    if host.is_draining() && tokio::time::timeout(LAST_WORDS, &mut following).await.is_ok() {
        return next;
    }
    // It may hold the port.
    following.abort();
    let _ = following.await;
    next
}

/// Holds a guest until it ends, has moved away, or the user has had enough.
async fn hold_one(host: &Arc<Host>, guest: Arc<dyn HeldGuest>, wanted: &mut Wanted) -> Next {
    let next = tokio::select! {
        End { how, failed } = ended(host, &*guest) => {
            if failed {
                Next::Fail(format!("the guest ended: {how}"))
            } else {
                cli::say(&format!("pcvm: the guest ended: {how}"));
                Next::Exit
            }
        },
        () = gone(host) => Next::WaitForAnother,
        () = quit(host) => Next::Exit,
        () = let_go(host, wanted) => Next::Exit,
    };
    // Ends the vCPU threads, which may take as long as a page that does not come.
    let _ = tokio::task::spawn_blocking(move || guest.end()).await;
    next
}

/// Waits for the end of a guest that runs here. One that has left, or is about to, may end here: what it leaves is for the
/// migration to say.
async fn ended(host: &Host, guest: &dyn HeldGuest) -> End {
    loop {
        if host.runs_here()
            && let Some(end) = guest.ended()
        {
            return end;
        }
        tokio::time::sleep(GUEST_CHECK).await;
    }
}

async fn gone(host: &Host) {
    host.reached(|state| matches!(state, State::Gone)).await;
}

async fn quit(host: &Host) {
    host.reached(|state| matches!(state, State::Quit)).await;
}

/// Somebody wants this process to end, and no guest that has left needs it.
async fn let_go(host: &Host, wanted: &mut Wanted) {
    loop {
        wanted.end().await;
        if !host.is_needed() {
            return;
        }
        cli::say(
            "pcvm: the guest that has left needs its memory from here; `pcvm quit` ends this process all the same",
        );
    }
}
