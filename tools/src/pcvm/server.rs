//! The control socket: takes requests and carries them out on the [`Host`].

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use postcopy_engine::planner::Bandwidth;
use postcopy_engine::session::{
    self, MigrateOptions, MigrationError, MigrationReport, Owed, Owner, RecoverOptions, SessionError,
    SourceGuest,
};
use postcopy_tools::device::DeviceArgs;
use postcopy_transport::Transport;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};

use crate::args::{Resolution, resolve};
use crate::control::{Answer, MAX_REQUEST, Request};
use crate::held::HeldGuest;
use crate::states::{Host, State};

/// A bound control socket. Its file is removed when it is dropped.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Binds the control socket for its owner only. One that a dead process left behind is replaced.
pub(crate) fn bind(path: &Path) -> anyhow::Result<ControlSocket> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!("another process is controlled by {}; choose another --control", path.display());
    }
    if path.exists() {
        std::fs::remove_file(path)
            .with_context(|| format!("removing the stale socket {}", path.display()))?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("making the control socket {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(ControlSocket { listener, path: path.to_owned() })
}

pub(crate) async fn serve(socket: ControlSocket, host: Arc<Host>) {
    loop {
        match socket.listener.accept().await {
            Ok((stream, _)) => {
                let host = host.clone();
                tokio::spawn(async move {
                    if let Err(error) = attend(stream, &host).await {
                        tracing::debug!(%error, "a control connection ended early");
                    }
                });
            }
            Err(error) => tracing::warn!(%error, "control socket"),
        }
    }
}

async fn attend(stream: UnixStream, host: &Arc<Host>) -> anyhow::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(MAX_REQUEST)).read_line(&mut line).await?;
    let (answer, then) = match serde_json::from_str(&line) {
        Ok(request) => carry_out(request, host, &mut writer).await,
        Err(error) => refuse(format!("no request of ours: {error}; see docs/control.md")),
    };
    // The state may end the process, so the answer goes first.
    let said = say(&mut writer, &answer).await;
    if let Some(state) = then {
        host.set(state);
    }
    said
}

/// What to answer, and the state that the host enters after that.
type Outcome = (Answer, Option<State>);

fn refuse(reason: impl Into<String>) -> Outcome {
    (Answer::Error(reason.into()), None)
}

async fn say(writer: &mut OwnedWriteHalf, answer: &Answer) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(answer)?;
    line.push('\n');
    Ok(writer.write_all(line.as_bytes()).await?)
}

async fn carry_out(request: Request, host: &Arc<Host>, writer: &mut OwnedWriteHalf) -> Outcome {
    match request {
        Request::Status => (Answer::Status(Box::new(host.status())), None),
        Request::Type { text } => (type_text(host, &text), None),
        Request::Resolve { guest } => end_doubt(host, guest).await,
        Request::Cancel => (cancel(host).await, None),
        Request::Limit { max_bandwidth } => (limit(host, max_bandwidth).await, None),
        Request::Quit => (Answer::Done, Some(State::Quit)),
        Request::Migrate { to, transports, lanes, mode, patience, max_bandwidth, trust } => {
            let (endpoint, patience) = (lanes.endpoint(None), Duration::from_secs(patience));
            let tls = trust.read().map_err(|error| error.to_string());
            match parsed(&transports).and_then(|transports| Ok((transports, tls?))) {
                Ok((transports, tls)) => {
                    let options = MigrateOptions {
                        transports,
                        endpoint,
                        mode,
                        max_bandwidth,
                        patience,
                        tls,
                        called_off: Some(host.called_off()),
                    };
                    migrate(host, &to, options, writer).await
                }
                Err(reason) => refuse(reason),
            }
        }
        Request::Recover { to, transports, lanes, max_bandwidth, patience } => match parsed(&transports) {
            Ok(transports) => {
                let as_before = transports.is_empty() && lanes == DeviceArgs::default();
                let wire = (!as_before).then(|| (transports, lanes.endpoint(None)));
                let patience = Duration::from_secs(patience);
                recover(host, to, RecoverOptions { peer: None, wire, max_bandwidth, patience }, writer).await
            }
            Err(reason) => refuse(reason),
        },
    }
}

fn parsed(transports: &[String]) -> Result<Vec<Transport>, String> {
    transports.iter().map(|name| name.parse()).collect()
}

fn type_text(host: &Host, text: &str) -> Answer {
    match host.guest() {
        None => Answer::Error("there is no guest here".into()),
        Some(guest) => match guest.console_input(text.as_bytes()) {
            Some(taken) if taken == text.len() => Answer::Done,
            Some(_) => Answer::Error("the guest does not read its console; its input is full".into()),
            None => Answer::Error("the guest's console is QEMU's; see its -serial".into()),
        },
    }
}

/// Moves the guest, in a task of its own: a client that goes away does not stop it.
async fn migrate(
    host: &Arc<Host>,
    to: &str,
    options: MigrateOptions,
    writer: &mut OwnedWriteHalf,
) -> Outcome {
    let peer = match resolve(to) {
        Ok(peer) => peer,
        Err(error) => return refuse(error.to_string()),
    };
    host.resident().await;
    let guest = match host.begin_migration() {
        Ok(guest) => guest,
        Err(reason) => return refuse(reason),
    };
    let moving = host.clone();
    let task = async move {
        let source: Arc<dyn SourceGuest> = guest.clone();
        match session::migrate(source, peer, options, &moving.progress).await {
            Ok(report) => {
                let _ = tokio::task::spawn_blocking(move || guest.end()).await;
                gone(report)
            }
            Err(failed) => settle(failed, guest),
        }
    };
    watched(host, task, writer).await
}

/// Calls off the migration that is under way, and waits until the guest can be moved again.
async fn cancel(host: &Host) -> Answer {
    if let Err(reason) = host.call_off() {
        return Answer::Error(reason);
    }
    host.reached(|state| !matches!(state, State::Migrating(_))).await;
    Answer::Done
}

/// Changes how much of the memory of a guest that arrives here may cross.
async fn limit(host: &Host, max_bandwidth: Option<Bandwidth>) -> Answer {
    let Some(limiter) = host.limiter() else {
        let reason =
            "no guest's memory is on its way here; who receives a guest decides how much of it may cross";
        return Answer::Error(reason.into());
    };
    match tokio::task::spawn_blocking(move || limiter.set(max_bandwidth)).await {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Error(error.to_string()),
    }
}

/// Reaches the destination again, likewise in a task of its own.
async fn recover(
    host: &Arc<Host>,
    to: Option<String>,
    options: RecoverOptions,
    writer: &mut OwnedWriteHalf,
) -> Outcome {
    let peer = match to.as_deref().map(resolve).transpose() {
        Ok(peer) => peer,
        Err(error) => return refuse(error.to_string()),
    };
    let owed = match host.take_kept() {
        Ok(owed) => owed,
        Err(reason) => return refuse(reason),
    };
    let task = async move {
        match session::recover(owed, RecoverOptions { peer, ..options }).await {
            Ok(report) => gone(report),
            Err((error, owed)) => kept(&error, owed),
        }
    };
    watched(host, task, writer).await
}

fn gone(report: MigrationReport) -> (Answer, State) {
    (Answer::Report(Box::new(report)), State::Gone)
}

/// Has a task go on by itself, and tells the client how far it is.
async fn watched(
    host: &Arc<Host>,
    task: impl Future<Output = (Answer, State)> + Send + 'static,
    writer: &mut OwnedWriteHalf,
) -> Outcome {
    let mut progress = host.progress.subscribe();
    let mut task = tokio::spawn(task);
    loop {
        tokio::select! {
            ended = &mut task => {
                return match ended {
                    Ok((answer, state)) => (answer, Some(state)),
                    Err(error) => refuse(format!("the migration's task failed: {error}")),
                };
            }
            changed = progress.changed() => {
                let now = *progress.borrow_and_update();
                if changed.is_ok() {
                    let _ = say(writer, &Answer::Progress(Box::new(now))).await;
                }
            }
        }
    }
}

/// Who has the guest after a migration that failed, in words and as a state.
fn settle(failed: MigrationError, guest: Arc<dyn HeldGuest>) -> (Answer, State) {
    let MigrationError { error, owed } = failed;
    match owed {
        None => (Answer::Error(format!("{error}; the guest runs on here")), State::Running(guest)),
        Some(owed) if owed.owner() == Owner::InDoubt => {
            let doubt = format!(
                "{error}; the handover is in doubt and the guest stays stopped here: find out whether it runs at \
                 the destination, then `pcvm resolve --guest there` or `--guest here`"
            );
            (Answer::Error(doubt), State::InDoubt { guest, owed })
        }
        Some(owed) => kept(&error, owed),
    }
}

/// The destination has the guest, and is lost.
fn kept(error: &SessionError, owed: Box<Owed>) -> (Answer, State) {
    let reason = error.to_string();
    let kept = format!(
        "{reason}; the guest is at the destination, its memory is kept on offer here until quit: see `pcvm recover`"
    );
    (Answer::Error(kept), State::Kept { owed, reason })
}

async fn end_doubt(host: &Arc<Host>, guest: Resolution) -> Outcome {
    let Some((held, mut owed)) = host.take_doubt() else {
        return refuse("nothing is in doubt here");
    };
    match guest {
        Resolution::There => {
            let reason = "resolved by hand".to_owned();
            owed.resolve();
            (Answer::Done, Some(State::Kept { owed, reason }))
        }
        Resolution::Here => {
            drop(owed);
            let thawed = held.clone();
            let thawed =
                tokio::task::spawn_blocking(move || thawed.thaw().map_err(|error| error.to_string())).await;
            let answer = match thawed {
                Ok(Ok(())) => Answer::Done,
                Ok(Err(error)) => Answer::Error(error),
                Err(error) => Answer::Error(error.to_string()),
            };
            (answer, Some(State::Running(held)))
        }
    }
}
