//! The memory of a guest that has arrived here: it follows, and when its source is lost, that is waited for.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use postcopy_engine::pager::PagerStatus;
use postcopy_engine::session::{Drain, Limiter, Parted, Rejoined};
use postcopy_tools::cli;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::host::bind;
use crate::states::Host;

/// The rest before a port is tried again that could not be listened on.
const RETRY: Duration = Duration::from_secs(1);

/// Where the memory of a guest that arrived here is.
pub(crate) enum Arrival {
    /// No guest has arrived.
    None,
    /// On its way.
    Draining { status: watch::Receiver<PagerStatus>, limiter: Limiter },
    /// All of it is here.
    Resident(watch::Receiver<PagerStatus>),
    /// The pager failed; it stays, so that the guest waits instead of reading zeros.
    Stranded {
        /// Why, and what is done about it.
        reason: String,
        /// Where the pager stood.
        status: watch::Receiver<PagerStatus>,
        limiter: Limiter,
    },
}

impl Arrival {
    /// That of memory which is on its way.
    pub(crate) fn draining(drain: &Drain) -> Self {
        Self::Draining { status: drain.status(), limiter: drain.limiter() }
    }
}

/// Follows the memory, of which the host knows that it drains, until all of it is here and its source knows. Must not be dropped while the guest runs: it
/// has what keeps the guest from reading zeros. A source that is lost comes back to `door`.
pub(crate) async fn follow(host: Arc<Host>, mut drain: Drain, door: SocketAddr) {
    loop {
        let status = drain.status();
        let Err(parted) = drain.finish().await else {
            return host.set_arrival(Arrival::Resident(status));
        };
        match again(&host, parted, door).await {
            Some(next) => drain = next,
            None => return,
        }
    }
}

/// As [`follow`], of memory whose source is lost.
pub(crate) async fn follow_again(host: Arc<Host>, parted: Parted, door: SocketAddr) {
    if let Some(drain) = again(&host, parted, door).await {
        follow(host, drain, door).await;
    }
}

/// Waits for a source that is lost. What comes then, if anything was missing.
async fn again(host: &Host, parted: Parted, door: SocketAddr) -> Option<Drain> {
    let status = parted.status();
    host.set_arrival(match parted.is_resident() {
        true => Arrival::Resident(status),
        false => stranded(&parted, door, status),
    });
    let Rejoined::Draining(drain) = await_source(parted, door).await else { return None };
    host.set_arrival(Arrival::draining(&drain));
    cli::say("pcvm: the source is back; the guest's memory follows");
    Some(*drain)
}

fn stranded(parted: &Parted, door: SocketAddr, status: watch::Receiver<PagerStatus>) -> Arrival {
    let reason = format!("{}; its source is waited for at {door}", parted.reason());
    cli::say(&format!("pcvm: {reason}"));
    Arrival::Stranded { reason, status, limiter: parted.limiter() }
}

/// Listens until the source has come back.
async fn await_source(mut parted: Parted, door: SocketAddr) -> Rejoined {
    let listener = listen(door).await;
    loop {
        match parted.rejoin(&listener).await {
            Ok(rejoined) => return rejoined,
            Err((error, again)) => {
                tracing::warn!(%error, "the source came back and was lost again");
                parted = again;
                // Of a port that fails too.
                tokio::time::sleep(RETRY / 10).await;
            }
        }
    }
}

async fn listen(door: SocketAddr) -> TcpListener {
    loop {
        match bind(door).await {
            Ok(listener) => return listener,
            Err(error) => tracing::warn!(%error, "the source cannot come back yet"),
        }
        tokio::time::sleep(RETRY).await;
    }
}
