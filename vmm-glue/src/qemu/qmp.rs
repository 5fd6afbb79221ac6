//! QEMU's monitor: JSON lines over a Unix socket.
//!
//! Untyped on purpose: a client made for one version's schema fails at another's answers, and the
//! two sides of a migration may be of different versions. What is asked for here has been there,
//! with these names, since QEMU 6.

use std::io::{BufRead, BufReader, ErrorKind, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::QemuError;

/// How long an answer may take. Stopping devices and taking disks' locks can be slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most that one line may have.
const LONGEST_LINE: usize = 16 << 20;

/// A connection to a monitor, which nobody else has.
pub(super) struct Qmp {
    path: PathBuf,
    /// Once it was needed.
    stream: Option<BufReader<UnixStream>>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects, and leaves the greeting behind.
    pub(super) fn connect(path: &Path) -> Result<Self, QemuError> {
        let mut qmp = Self::later(path.to_owned());
        qmp.reach()?;
        Ok(qmp)
    }

    /// Connects when something is first asked: a QEMU whose main loop waits for its guest's memory answers nobody.
    pub(super) fn later(path: PathBuf) -> Self {
        Self { path, stream: None, events: Vec::new() }
    }

    fn reach(&mut self) -> Result<(), QemuError> {
        let path = self.path.display().to_string();
        let refused = |source| QemuError::Monitor { path: path.clone(), source };
        let stream = UnixStream::connect(&self.path).map_err(refused)?;
        // A monitor that has a client lets others connect and says nothing.
        stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(refused)?;
        let mut stream = BufReader::new(stream);
        let Some(greeting) = line(&mut stream).map_err(refused)? else {
            return Err(QemuError::Ended { said: String::new() });
        };
        if greeting.get("QMP").is_none() {
            return Err(refused(std::io::Error::other("what answers is no QEMU monitor")));
        }
        stream.get_ref().set_read_timeout(Some(PATIENCE)).map_err(refused)?;
        self.stream = Some(stream);
        self.execute("qmp_capabilities", &json!({})).map(drop)
    }

    fn stream(&mut self) -> Result<&mut BufReader<UnixStream>, QemuError> {
        if self.stream.is_none() {
            self.reach()?;
        }
        self.stream.as_mut().ok_or(QemuError::Ended { said: String::new() })
    }

    /// The process that made the monitor's socket.
    pub(super) fn peer(&mut self) -> Result<i32, QemuError> {
        let peer = rustix::net::sockopt::socket_peercred(self.stream()?.get_ref());
        let peer =
            peer.map_err(|errno| QemuError::system("asking who listens at the monitor")(errno.into()))?;
        Ok(peer.pid.as_raw_nonzero().get())
    }

    /// Carries out a command and gives its answer.
    ///
    /// Errors: QEMU refuses it, with its reason, or has ended.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QemuError> {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        let sent = self.stream()?.get_mut().write_all(line.as_bytes());
        sent.map_err(|_| QemuError::Ended { said: String::new() })?;
        self.answer(command)
    }

    /// Gives QEMU an open file, which later commands call `name`. It need not be able to open it itself.
    pub(super) fn give(&mut self, name: &str, file: BorrowedFd<'_>) -> Result<(), QemuError> {
        let line = json!({"execute": "getfd", "arguments": {"fdname": name}}).to_string() + "\n";
        let files = [file];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        let bytes = [IoSlice::new(line.as_bytes())];
        let sent = sendmsg(self.stream()?.get_ref(), &bytes, &mut control, SendFlags::NOSIGNAL);
        // So short a line goes in one piece: the socket's buffer is empty, as the last command was answered.
        if sent != Ok(line.len()) {
            return Err(QemuError::Ended { said: String::new() });
        }
        self.answer("getfd").map(drop)
    }

    /// The answer to the command that was sent last.
    fn answer(&mut self, command: &str) -> Result<Value, QemuError> {
        loop {
            let mut message = match line(self.stream()?) {
                Ok(Some(message)) => message,
                Ok(None) => return Err(QemuError::Ended { said: String::new() }),
                Err(source) => return Err(self.lost(source)),
            };
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                let reason = error["desc"].as_str().unwrap_or("it does not say why").to_owned();
                return Err(QemuError::Command { command: command.into(), reason });
            }
            self.events.push(message);
        }
    }

    /// Waits for an event of this name for which `wanted` holds; others are kept for later calls.
    pub(super) fn event(
        &mut self,
        name: &str,
        patience: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, QemuError> {
        let end = Instant::now() + patience;
        let fits = |event: &Value| event["event"] == name && wanted(&event["data"]);
        loop {
            if let Some(at) = self.events.iter().position(fits) {
                return Ok(self.events.remove(at));
            }
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let stream = self.stream()?;
            let timed = stream.get_ref().set_read_timeout(Some(left));
            timed.map_err(QemuError::system("waiting for QEMU"))?;
            let line = line(stream);
            let timed = stream.get_ref().set_read_timeout(Some(PATIENCE));
            timed.map_err(QemuError::system("waiting for QEMU"))?;
            match line {
                Ok(Some(event)) => self.events.push(event),
                Ok(None) => return Err(QemuError::Ended { said: String::new() }),
                Err(source) => return Err(self.lost(source)),
            }
        }
    }

    /// Forgets the events that have come so far.
    pub(super) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn lost(&self, source: std::io::Error) -> QemuError {
        match source.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                let silent = std::io::Error::new(ErrorKind::TimedOut, "it says nothing");
                QemuError::Monitor { path: self.path.display().to_string(), source: silent }
            }
            _ => QemuError::Ended { said: String::new() },
        }
    }
}

/// The next line, or `None` at the end.
fn line(stream: &mut BufReader<UnixStream>) -> std::io::Result<Option<Value>> {
    let mut line = Vec::new();
    loop {
        let piece = stream.fill_buf()?;
        if piece.is_empty() {
            return Ok(None);
        }
        let end = piece.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(piece.len(), |end| end + 1);
        line.extend_from_slice(&piece[..taken]);
        stream.consume(taken);
        if line.len() > LONGEST_LINE {
            return Err(std::io::Error::other("a line without end"));
        }
        if end.is_some() {
            return serde_json::from_slice(&line).map(Some).map_err(std::io::Error::other);
        }
    }
}
