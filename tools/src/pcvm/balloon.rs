//! `pcvm balloon`: keeps what a QEMU's guest does not use in its balloon.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use postcopy_tools::cli;
use postcopy_vmm::qemu::{SelfBalloon, Share, Turn};
use tokio::task::spawn_blocking;

use crate::args::BalloonArgs;
use crate::signals::Wanted;

pub(crate) fn keep(args: &BalloonArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("starting the control plane")?.block_on(run(args))
}

async fn run(args: &BalloonArgs) -> anyhow::Result<()> {
    let interval = Duration::from_secs(args.interval);
    let (monitor, percent) = (args.qmp.clone(), args.percent);
    let mut balloon = spawn_blocking(move || SelfBalloon::attach(&monitor, percent, interval)).await??;
    let mut wanted = Wanted::new()?;
    let (stop, mut busy) = (Arc::new(AtomicBool::new(false)), false);
    loop {
        let stopped = stop.clone();
        let mut turning = spawn_blocking(move || {
            let turn = balloon.turn(&stopped);
            (balloon, turn)
        });
        let (back, turn) = tokio::select! {
            turned = &mut turning => turned?,
            () = wanted.end() => {
                stop.store(true, Ordering::Relaxed);
                return release(turning.await?.0).await;
            }
        };
        balloon = back;
        let turn = turn?;
        match turn {
            Turn::Changed(share) => tell(args, &share)?,
            Turn::Ended => {
                if !args.quiet {
                    cli::say("QEMU has ended, or its guest has moved away");
                }
                return Ok(());
            }
            Turn::Busy if !busy => {
                tracing::warn!("QEMU's monitor has another client; the balloon stays as it is meanwhile");
            }
            Turn::Busy | Turn::Same => {}
        }
        busy = turn == Turn::Busy;
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = wanted.end() => return release(balloon).await,
        }
    }
}

async fn release(balloon: SelfBalloon) -> anyhow::Result<()> {
    let released = spawn_blocking(move || balloon.release()).await?;
    released.context("the balloon keeps what it has")
}

fn tell(args: &BalloonArgs, share: &Share) -> anyhow::Result<()> {
    if args.json {
        println!("{}", serde_json::to_string(share)?);
    }
    if !args.quiet {
        let [has, whole, free] =
            [share.has_bytes, share.whole_bytes, share.free_bytes].map(|bytes| bytes >> 20);
        let why =
            if share.pressed { "was pressed for memory" } else { &format!("said that {free} are free") };
        cli::say(&format!("the guest {why}; it has {has} of {whole} MiB"));
    }
    Ok(())
}
