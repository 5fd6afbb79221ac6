//! `pcvm migrate --qmp`: moves a guest of a QEMU that runs by itself. This process is the source's
//! side, until the guest's memory is all there; `pcvm recover --qmp` takes the place of one that was killed.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use postcopy_engine::session::{
    self, MigrateOptions, MigrationError, MigrationReport, Mode, Owed, Owner, Phase, Progress, RecoverOptions,
};
use postcopy_tools::cli;
use postcopy_tools::drain::LimitArgs;
use postcopy_tools::trust::TrustArgs;
use postcopy_vmm::qemu::{Inflated, QemuGuest};
use tokio::sync::watch;

use crate::args::{MigrateArgs, RecoverArgs, ToldArgs, WireArgs, resolve};
use crate::client::Meter;
use crate::signals::Wanted;

/// How long a destination is tried before that is told, and the rest after it.
const ROUND: Duration = Duration::from_secs(60);
const REST: Duration = Duration::from_secs(1);
/// Why this process does not end when it is asked to.
const NEEDED: &str = "pcvm: the guest is on its way and needs this process; it ends by itself";

pub(crate) fn migrate(args: &MigrateArgs, monitor: &Path) -> anyhow::Result<MigrationReport> {
    let peer = resolve(&args.to)?;
    let options = options(&args.wire, args.limit, &args.trust, &args.told)?;
    let options = MigrateOptions { mode: args.mode.into(), ..options };
    let guest = Arc::new(QemuGuest::attach(monitor)?);
    let moved = control_plane()?.block_on(run(args, peer, options, &guest));
    if moved.is_err()
        && let Err(error) = guest.deflate()
    {
        tracing::warn!(%error, "the guest's balloon keeps what it took for the move");
    }
    moved
}

/// Has the destination of a guest, which the process that moved it has not served to the end, get the rest.
pub(crate) fn recover(args: &RecoverArgs, monitor: &Path) -> anyhow::Result<MigrationReport> {
    let to = args.to.as_deref().context("with --qmp say where the destination listens: --to HOST:PORT")?;
    let peer = resolve(to)?;
    let options = options(&args.wire, args.limit, &args.trust, &args.told)?;
    let guest = Arc::new(QemuGuest::attach(monitor)?);
    let name = guest.kept_name()?;
    control_plane()?.block_on(async {
        let progress = watch::Sender::new(Progress::default());
        let patience = options.patience;
        let owed = Owed::of(guest.clone(), &name, peer, options, &progress).await?;
        let recovering = session::recover(owed, RecoverOptions { patience, ..Default::default() });
        let unreached = |phase| {
            (phase != Phase::Draining).then_some("interrupted before the destination was reached; nothing has changed")
        };
        let mut wanted = Wanted::but_for_hangups()?;
        let recovered = attended(recovering, (&progress, args.told.quiet), &mut wanted, unreached).await?;
        let report = recovered.map_err(|(error, _)| {
            anyhow::anyhow!(
                "{error}; the guest stays stopped in its QEMU here, as it was: let it run on here (cont) only if it does \
                 not run there"
            )
        })?;
        ended(&guest).await?;
        Ok(report)
    })
}

fn options(
    wire: &WireArgs,
    limit: LimitArgs,
    trust: &TrustArgs,
    told: &ToldArgs,
) -> anyhow::Result<MigrateOptions> {
    Ok(MigrateOptions {
        transports: wire.transports(),
        endpoint: wire.device.endpoint(None),
        mode: Mode::default(),
        max_bandwidth: limit.max_bandwidth,
        patience: Duration::from_secs(told.patience),
        tls: trust.read()?,
        // An interrupt drops it, and this process ends.
        called_off: None,
    })
}

fn control_plane() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the control plane")
}

/// Ends the QEMU whose guest is elsewhere.
async fn ended(guest: &Arc<QemuGuest>) -> anyhow::Result<()> {
    let left = guest.clone();
    Ok(tokio::task::spawn_blocking(move || left.end()).await?)
}

async fn run(
    args: &MigrateArgs,
    peer: SocketAddr,
    options: MigrateOptions,
    guest: &Arc<QemuGuest>,
) -> anyhow::Result<MigrationReport> {
    let mut wanted = Wanted::but_for_hangups()?;
    if let Some(percent) = args.balloon {
        let taken = inflate(guest, percent, &mut wanted).await?.bytes() >> 20;
        if !args.told.quiet {
            cli::say(&format!("the guest's balloon took {taken} MiB of its free memory"));
        }
    }
    let progress = watch::Sender::new(Progress::default());
    let moving = session::migrate(guest.clone(), peer, options, &progress);
    let unstopped = |phase: Phase| {
        phase.is_before_stop().then_some("interrupted before anything was stopped; the guest runs on here")
    };
    let outcome = attended(moving, (&progress, args.told.quiet), &mut wanted, unstopped).await?;
    let report = match outcome {
        Ok(report) => report,
        Err(failed) => settle(failed, &mut wanted).await?,
    };
    ended(guest).await?;
    Ok(report)
}

/// Shows how far `work` is, until it is over. If this process is wanted to end, it goes on, unless `harmless` says in which words
/// it may be given up in this phase.
async fn attended<T>(
    work: impl Future<Output = T>,
    (progress, quiet): (&watch::Sender<Progress>, bool),
    wanted: &mut Wanted,
    harmless: impl Fn(Phase) -> Option<&'static str>,
) -> anyhow::Result<T> {
    let (mut watched, mut meter) = (progress.subscribe(), Meter::new(quiet));
    tokio::pin!(work);
    let outcome = loop {
        tokio::select! {
            outcome = &mut work => break outcome,
            _ = watched.changed() => meter.show(&watched.borrow_and_update()),
            () = wanted.end() => match harmless(progress.borrow().phase) {
                Some(words) => bail!("{words}"),
                None => cli::say(NEEDED),
            },
        }
    };
    meter.end();
    Ok(outcome)
}

/// Has the guest's balloon take what it calls free, unless somebody interrupts that.
async fn inflate(guest: &Arc<QemuGuest>, percent: u8, wanted: &mut Wanted) -> anyhow::Result<Inflated> {
    let (growing, stop) = (guest.clone(), Arc::new(AtomicBool::new(false)));
    let stopped = stop.clone();
    let mut inflating = tokio::task::spawn_blocking(move || growing.inflate(percent, &stopped));
    tokio::select! {
        inflated = &mut inflating => {
            let inflated = inflated?;
            inflated.map_err(|error| anyhow::anyhow!("{error}; leave --balloon out otherwise; the guest runs on here"))
        }
        () = wanted.end() => {
            stop.store(true, Ordering::Relaxed);
            let _ = inflating.await;
            bail!("interrupted before anything was stopped; the guest runs on here")
        }
    }
}

/// Who has the guest after a migration that failed. Where the destination still needs this side's
/// memory, it is kept on offer, and the destination tried again, until somebody ends this process.
async fn settle(failed: MigrationError, wanted: &mut Wanted) -> anyhow::Result<MigrationReport> {
    let MigrationError { error, owed } = failed;
    match owed {
        None => bail!("{error}; the guest runs on here"),
        Some(owed) if owed.owner() == Owner::InDoubt => bail!(
            "{error}; the handover is in doubt and the guest stays stopped in its QEMU here: `pcvm recover --qmp` finds \
             out whether it runs at the destination, when that can be reached; who knows it otherwise ends the QEMU \
             that does not have it (quit), or lets it run on here (cont)"
        ),
        Some(owed) => {
            cli::say(&format!(
                "pcvm: {error}; the guest is at the destination, and its memory is kept on offer here until this \
                 program is interrupted"
            ));
            tokio::select! {
                report = serve_on(owed) => Ok(report),
                () = wanted.end() => bail!(
                    "{error}; the guest is at the destination, and what it had not fetched is no longer on offer, until \
                     `pcvm recover --qmp`"
                ),
            }
        }
    }
}

/// Tries to reach the destination for as long as it takes. Ends with a report, or not at all.
async fn serve_on(mut owed: Box<Owed>) -> MigrationReport {
    loop {
        match session::recover(owed, RecoverOptions { patience: ROUND, ..Default::default() }).await {
            Ok(report) => return report,
            Err((error, kept)) => {
                tracing::warn!(%error, "the destination is not reached");
                owed = kept;
                tokio::time::sleep(REST).await;
            }
        }
    }
}
