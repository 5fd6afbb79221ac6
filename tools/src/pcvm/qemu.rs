//! `pcvm migrate --qmp`: moves a guest of a QEMU that runs by itself. This process is the source's
//! side: it must live until the guest's memory is all there.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use postcopy_engine::session::{
    self, MigrateOptions, MigrationError, MigrationReport, Owed, Owner, Phase, Progress, RecoverOptions,
};
use postcopy_vmm::qemu::{Inflated, QemuGuest};
use tokio::sync::watch;

use crate::args::{MigrateArgs, resolve};
use crate::client::Meter;

/// How long a destination is tried before that is told, and the rest after it.
const ROUND: Duration = Duration::from_secs(60);
const REST: Duration = Duration::from_secs(1);

pub(crate) fn migrate(args: &MigrateArgs, monitor: &Path) -> anyhow::Result<MigrationReport> {
    let peer = resolve(&args.to)?;
    let options = MigrateOptions {
        transports: args.wire.transports(),
        endpoint: args.wire.device.endpoint(None),
        mode: args.mode.into(),
        patience: Duration::from_secs(args.told.patience),
        tls: args.trust.read()?,
    };
    let guest = Arc::new(QemuGuest::attach(monitor)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let moved = runtime.context("starting the control plane")?.block_on(run(args, peer, options, &guest));
    if moved.is_err()
        && let Err(error) = guest.deflate()
    {
        tracing::warn!(%error, "the guest's balloon keeps what it took for the move");
    }
    moved
}

async fn run(
    args: &MigrateArgs,
    peer: SocketAddr,
    options: MigrateOptions,
    guest: &Arc<QemuGuest>,
) -> anyhow::Result<MigrationReport> {
    if let Some(percent) = args.balloon {
        let taken = inflate(guest, percent).await?.bytes() >> 20;
        if !args.told.quiet {
            eprintln!("the guest's balloon took {taken} MiB of its free memory");
        }
    }
    let (progress, mut watched) = watch::channel(Progress::default());
    let mut meter = Meter::new(args.told.quiet);
    let moving = session::migrate(guest.clone(), peer, options, &progress);
    tokio::pin!(moving);
    let outcome = loop {
        tokio::select! {
            outcome = &mut moving => break outcome,
            _ = watched.changed() => meter.show(&watched.borrow_and_update()),
            _ = tokio::signal::ctrl_c() => match progress.borrow().phase {
                Phase::Setup | Phase::PreCopy => bail!("interrupted before anything was stopped; the guest runs on here"),
                _ => eprintln!("pcvm: the guest is on its way and needs this process; it ends by itself"),
            },
        }
    };
    meter.end();
    let report = match outcome {
        Ok(report) => report,
        Err(failed) => settle(failed).await?,
    };
    let left = guest.clone();
    tokio::task::spawn_blocking(move || left.end()).await?;
    Ok(report)
}

/// Has the guest's balloon take what it calls free, unless somebody interrupts that.
async fn inflate(guest: &Arc<QemuGuest>, percent: u8) -> anyhow::Result<Inflated> {
    let (growing, stop) = (guest.clone(), Arc::new(AtomicBool::new(false)));
    let stopped = stop.clone();
    let mut inflating = tokio::task::spawn_blocking(move || growing.inflate(percent, &stopped));
    tokio::select! {
        inflated = &mut inflating => {
            let inflated = inflated?;
            inflated.map_err(|error| anyhow::anyhow!("{error}; leave --balloon out otherwise; the guest runs on here"))
        }
        _ = tokio::signal::ctrl_c() => {
            stop.store(true, Ordering::Relaxed);
            let _ = inflating.await;
            bail!("interrupted before anything was stopped; the guest runs on here")
        }
    }
}

/// Who has the guest after a migration that failed. Where the destination still needs this side's
/// memory, it is kept on offer, and the destination tried again, until somebody ends this process.
async fn settle(failed: MigrationError) -> anyhow::Result<MigrationReport> {
    let MigrationError { error, owed } = failed;
    match owed {
        None => bail!("{error}; the guest runs on here"),
        Some(owed) if owed.owner() == Owner::InDoubt => bail!(
            "{error}; the handover is in doubt and the guest stays stopped in its QEMU here: find out whether it runs \
             at the destination, then end the QEMU that does not have it (quit), or let it run on here (cont)"
        ),
        Some(owed) => {
            eprintln!(
                "pcvm: {error}; the guest is at the destination, and its memory is kept on offer here until this \
                 program is interrupted"
            );
            tokio::select! {
                report = serve_on(owed) => Ok(report),
                _ = tokio::signal::ctrl_c() => bail!(
                    "{error}; the guest is at the destination, and what it had not fetched is no longer on offer"
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
