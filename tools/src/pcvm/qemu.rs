//! `pcvm migrate --qmp`: moves a guest of a QEMU that runs by itself. This process is the source's
//! side: it must live until the guest's memory is all there.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use postcopy_engine::session::{
    self, MigrateOptions, MigrationError, MigrationReport, Owner, Phase, Progress,
};
use postcopy_vmm::qemu::QemuGuest;
use tokio::sync::watch;

use crate::args::{MigrateArgs, resolve};
use crate::client::Meter;

pub(crate) fn migrate(args: &MigrateArgs, monitor: &Path) -> anyhow::Result<MigrationReport> {
    let peer = resolve(&args.to)?;
    let options = MigrateOptions {
        transports: args.wire.transports(),
        endpoint: args.wire.device.endpoint(None),
        mode: args.mode.into(),
    };
    let guest = Arc::new(QemuGuest::attach(monitor)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("starting the control plane")?.block_on(async {
        let (progress, mut watched) = watch::channel(Progress::default());
        let mut meter = Meter::new(args.quiet);
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
        match outcome {
            Ok(report) => {
                let left = guest.clone();
                tokio::task::spawn_blocking(move || left.end()).await?;
                Ok(report)
            }
            Err(failed) => Err(settle(failed).await),
        }
    })
}

/// Who has the guest after a migration that failed. Where the destination still needs this side's
/// memory, it is kept on offer until somebody ends this process.
async fn settle(failed: MigrationError) -> anyhow::Error {
    let MigrationError { error, owner, export } = failed;
    match owner {
        Owner::Source => anyhow::anyhow!("{error}; the guest runs on here"),
        Owner::InDoubt => anyhow::anyhow!(
            "{error}; the handover is in doubt and the guest stays stopped in its QEMU here: find out whether it runs \
             at the destination, then end the QEMU that does not have it (quit), or let it run on here (cont)"
        ),
        Owner::Destination => {
            eprintln!(
                "pcvm: {error}; the guest is at the destination, and its memory is kept on offer here until this \
                 program is interrupted"
            );
            let _ = tokio::signal::ctrl_c().await;
            drop(export);
            anyhow::anyhow!(
                "{error}; the guest is at the destination, and what it had not fetched is no longer on offer"
            )
        }
    }
}
