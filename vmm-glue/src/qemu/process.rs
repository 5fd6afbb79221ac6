//! A QEMU that this process has started as a destination, or has taken over from one that had: its command line, its life, its
//! last words.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::Permissions;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Signal, pidfd_send_signal};

use super::handover::{self, Handover};
use super::host::QemuCommand;
use super::qmp::Qmp;
use super::{QemuError, foreign, locked};

/// How long QEMU may take until its monitor answers.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to end when asked.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(10);
/// What the folder of its sockets is called first.
const PREFIX: &str = "pcvm-";
/// Lines of QEMU's that are kept for an error.
const KEPT_LINES: usize = 5;

/// The process. Dropping it leaves it alone: its guest may be somebody's.
pub(super) struct Process {
    life: Life,
    said: Arc<Mutex<VecDeque<String>>>,
    dir: Folder,
}

/// How it is heard of.
enum Life {
    /// It is a child of this process.
    Child(Mutex<Child>),
    /// It was another's.
    Other(OwnedFd),
}

/// How a QEMU has ended.
#[derive(Clone, Copy, Debug)]
pub enum Ended {
    /// It was started here.
    With(ExitStatus),
    /// It was started by another process, and nobody tells.
    Somehow,
}

impl Ended {
    /// Whether it says that nothing went wrong.
    pub fn in_order(self) -> bool {
        matches!(self, Self::With(status) if status.success())
    }

    /// Whether it says that something went wrong.
    pub fn failed(self) -> bool {
        matches!(self, Self::With(status) if !status.success())
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::With(status) => status.fmt(f),
            Self::Somehow => f.write_str("how, nobody tells"),
        }
    }
}

/// Where its sockets are, and only this user can look.
struct Folder(PathBuf);

impl Folder {
    fn handover(&self) -> PathBuf {
        self.0.join("handover")
    }

    fn monitor(&self) -> PathBuf {
        self.0.join("monitor")
    }

    fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    /// One that another process has made, if it can have been ours: nobody else may have a hand in it.
    fn left(path: PathBuf) -> Result<Self, QemuError> {
        let named = path.file_name().is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes()));
        let metadata = path.symlink_metadata().map_err(QemuError::system("finding QEMU's sockets"))?;
        let ours = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o077 == 0;
        let other = || QemuError::Unfit(format!("{} was not made by a pcvm of this user", path.display()));
        (named && metadata.is_dir() && ours).then_some(()).ok_or_else(other)?;
        Ok(Self(path))
    }

    fn remove(&self) {
        for socket in [self.handover(), self.monitor(), self.state()] {
            let _ = std::fs::remove_file(socket);
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Whoever takes over a QEMU that lives needs it.
        if self.ended().is_some() {
            self.dir.remove();
        }
    }
}

impl Process {
    /// Starts a QEMU that waits for a guest, and gives its monitor and what it has handed over.
    ///
    /// Errors: arguments that a destination cannot have, or QEMU ends; then with its last words.
    pub(super) fn start(command: &QemuCommand) -> Result<(Self, Qmp, Receiver<Handover>), QemuError> {
        check(&command.arguments)?;
        let dir =
            tempfile::Builder::new().prefix(PREFIX).permissions(Permissions::from_mode(0o700)).tempdir();
        let dir = dir.map_err(QemuError::system("making a directory for QEMU's sockets"))?;
        let dir = Folder(dir.keep());
        let (socket, monitor) = (dir.handover(), dir.monitor());
        let listener =
            UnixListener::bind(&socket).map_err(QemuError::system("making the handover's socket"))?;
        let mut preload = OsString::from(&command.library);
        if let Some(others) = std::env::var_os("LD_PRELOAD") {
            preload.push(":");
            preload.push(others);
        }
        let mut chardev = OsString::from("socket,id=postcopy,server=on,wait=off,path=");
        chardev.push(&monitor);
        let started = Command::new(&command.program)
            .args(&command.arguments)
            .args(["-S", "-incoming", "defer", "-mon", "chardev=postcopy,mode=control", "-chardev"])
            .arg(chardev)
            .env("LD_PRELOAD", preload)
            .env("POSTCOPY_HANDOVER", &socket)
            .env("POSTCOPY_SHARDS", command.shards.count().to_string())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let failed = QemuError::system(format!("starting {}", command.program.display()));
        let mut child = started.inspect_err(|_| dir.remove()).map_err(failed)?;
        let said = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(stderr) = child.stderr.take() {
            listen(stderr, said.clone());
        }
        let process = Self { life: Life::Child(Mutex::new(child)), said, dir };
        let handed = take_all(listener);
        match process.monitor(&monitor) {
            Ok(qmp) => Ok((process, qmp, handed)),
            Err(error) => {
                process.kill();
                Err(error)
            }
        }
    }

    /// One that another process has started, which has ended since, by its pidfd and the folder of its sockets.
    ///
    /// Errors: the folder is not this user's, or its handovers cannot be taken in that process's stead.
    pub(super) fn take_over(pidfd: OwnedFd, folder: PathBuf) -> Result<Self, QemuError> {
        let dir = Folder::left(folder)?;
        let socket = dir.handover();
        let failed = QemuError::system("making the handover's socket anew");
        let listener =
            std::fs::remove_file(&socket).and_then(|()| UnixListener::bind(&socket)).map_err(failed)?;
        // Its RAM was handed over.
        drop(take_all(listener));
        Ok(Self { life: Life::Other(pidfd), said: Arc::default(), dir })
    }

    /// Where its sockets are.
    pub(super) fn folder(&self) -> &Path {
        &self.dir.0
    }

    /// Its monitor, which is asked when it has to be.
    pub(super) fn monitor_later(&self) -> Qmp {
        Qmp::later(self.dir.monitor())
    }

    /// Where it takes the guest's state in.
    pub(super) fn state_socket(&self) -> PathBuf {
        self.dir.state()
    }

    /// Connects to the monitor as soon as there is one.
    fn monitor(&self, path: &Path) -> Result<Qmp, QemuError> {
        let end = Instant::now() + START_PATIENCE;
        loop {
            if self.ended().is_some() {
                return Err(self.last_words());
            }
            match Qmp::connect(path) {
                Ok(qmp) => return Ok(qmp),
                Err(QemuError::Ended { .. }) => {}
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => {}
            }
            std::thread::sleep(LOOK);
        }
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> Option<Ended> {
        match &self.life {
            Life::Child(child) => locked(child).try_wait().ok().flatten().map(Ended::With),
            Life::Other(pidfd) => {
                let mut end = [PollFd::new(pidfd, PollFlags::IN)];
                let over = poll(&mut end, Some(&Timespec::default())).is_ok_and(|ready| ready > 0);
                over.then_some(Ended::Somehow)
            }
        }
    }

    /// That it has ended, in its own words.
    pub(super) fn last_words(&self) -> QemuError {
        // What it wrote before it ended may still be on its way.
        std::thread::sleep(LOOK);
        let said = locked(&self.said);
        let said: Vec<&str> = said.iter().map(String::as_str).collect();
        let said = if said.is_empty() { String::new() } else { format!(": {}", said.join("; ")) };
        QemuError::Ended { said }
    }

    /// Waits for its end, and brings it about if it does not come.
    pub(super) fn wait(&self) {
        let end = Instant::now() + END_PATIENCE;
        while self.ended().is_none() && Instant::now() < end {
            std::thread::sleep(LOOK);
        }
        self.kill();
    }

    /// Ends it at once.
    pub(super) fn kill(&self) {
        match &self.life {
            Life::Child(child) => {
                let mut child = locked(child);
                if matches!(child.try_wait(), Ok(None)) {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
            Life::Other(pidfd) => {
                let _ = pidfd_send_signal(pidfd, Signal::KILL);
                let _ = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None);
            }
        }
    }
}

/// What a destination's command line cannot have.
fn check(arguments: &[OsString]) -> Result<(), QemuError> {
    let has =
        |name: &str| arguments.iter().any(|argument| argument == name || *argument == *format!("-{name}"));
    let wrong = |text: &str| Err(QemuError::Arguments(text.into()));
    if has("-incoming") {
        return wrong("leave -incoming out of QEMU's arguments: pcvm adds it");
    }
    if has("-daemonize") {
        return wrong("leave -daemonize out of QEMU's arguments: pcvm stays with the process that it starts");
    }
    if has("-loadvm") {
        return wrong("leave -loadvm out of QEMU's arguments: the guest's state comes from the source");
    }
    foreign::in_arguments(arguments)
}

/// Passes QEMU's messages on, and keeps the last.
fn listen(stderr: std::process::ChildStderr, said: Arc<Mutex<VecDeque<String>>>) {
    let pass_on = move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            eprintln!("{line}");
            let mut said = locked(&said);
            said.push_back(line);
            if said.len() > KEPT_LINES {
                said.pop_front();
            }
        }
    };
    drop(std::thread::Builder::new().name("qemu-says".into()).spawn(pass_on));
}

/// Takes what QEMU hands over, as long as this process lives: an unanswered handover ends QEMU, and
/// it may map more shared memory later. What nobody asks for is let go.
fn take_all(listener: UnixListener) -> Receiver<Handover> {
    let (sender, handed) = channel();
    let take = move || {
        loop {
            match handover::take(&listener) {
                Ok(handover) => drop(sender.send(handover)),
                Err(error) => {
                    tracing::warn!(%error, "a handover");
                    std::thread::sleep(LOOK);
                }
            }
        }
    };
    drop(std::thread::Builder::new().name("qemu-handover".into()).spawn(take));
    handed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_are_ours_are_refused() {
        let check = |text: &str| check(&text.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert!(check("-m 256M -machine q35").is_ok());
        for wrong in ["-m 1G -incoming defer", "--incoming tcp:0:1", "-daemonize", "-loadvm x"] {
            assert!(matches!(check(wrong), Err(QemuError::Arguments(_))), "{wrong}");
        }
    }

    #[test]
    fn a_folder_that_is_not_ours_is_not_taken_over() {
        let made =
            tempfile::Builder::new().prefix(PREFIX).permissions(Permissions::from_mode(0o700)).tempdir();
        let made = made.unwrap();
        assert!(Folder::left(made.path().to_owned()).is_ok());
        std::fs::set_permissions(made.path(), Permissions::from_mode(0o755)).unwrap();
        let other = tempfile::Builder::new().prefix("other-").tempdir().unwrap();
        for wrong in [made.path(), other.path(), Path::new("/"), Path::new("/nowhere/pcvm-x")] {
            assert!(Folder::left(wrong.to_owned()).is_err(), "{}", wrong.display());
        }
        // What is not ours in ours stays.
        std::fs::write(other.path().join("monitor"), "").unwrap();
        std::fs::write(other.path().join("letters"), "").unwrap();
        Folder(other.path().to_owned()).remove();
        assert!(other.path().join("letters").exists() && !other.path().join("monitor").exists());
    }
}
