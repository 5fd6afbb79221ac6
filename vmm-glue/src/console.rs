//! Where the guest's serial console goes, and where its input comes from.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::terminal::Terminal;

use crate::error::{SystemContext, VmError};
use crate::exit::ExitReason;
use crate::machine::{Machine, Output};

/// The guest's console at this side. Whichever it is, [`crate::Vm::console_input`] adds input.
pub enum Console {
    /// Output to stdout, input from stdin. If stdin is a terminal it is put in raw mode until the
    /// VM is dropped; Ctrl-A x there ends the guest, Ctrl-A twice sends one.
    Stdio,
    /// Output appended to a file, which is made if it is not there.
    File(PathBuf),
    /// Output to a writer of the embedder's, which should not block: the guest waits for it.
    Writer(Box<dyn Write + Send>),
    /// No output.
    Discard,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stdio => f.write_str("Stdio"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Writer(_) => f.write_str("Writer"),
            Self::Discard => f.write_str("Discard"),
        }
    }
}

impl Console {
    /// The output, and whether stdin is the input.
    pub(crate) fn open(self) -> Result<(Output, bool), VmError> {
        Ok(match self {
            Self::Stdio => (Box::new(io::stdout()), true),
            Self::File(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                (Box::new(file.system("opening the console's file")?), false)
            }
            Self::Writer(writer) => (writer, false),
            Self::Discard => (Box::new(io::sink()), false),
        })
    }
}

/// What a byte typed at a terminal means.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Byte(u8),
    Nothing,
    Quit,
}

/// Finds the escape sequences in what is typed.
#[derive(Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    const PREFIX: u8 = 1;

    fn typed(&mut self, byte: u8) -> Typed {
        match (std::mem::take(&mut self.pending), byte) {
            (false, Self::PREFIX) => {
                self.pending = true;
                Typed::Nothing
            }
            (true, b'x') => Typed::Quit,
            (_, byte) => Typed::Byte(byte),
        }
    }
}

/// A thread that feeds stdin to the guest, and the terminal's raw mode. Dropping it ends both.
pub(crate) struct StdinFeed {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    raw: bool,
}

impl StdinFeed {
    pub(crate) fn start(machine: Arc<Machine>) -> Result<Self, VmError> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).system("eventfd")?;
        let stopped = stop.try_clone().system("dup of an eventfd")?;
        let stdin = io::stdin().lock();
        let raw = stdin.is_terminal();
        if raw {
            stdin.set_raw_mode().map_err(io::Error::from).system("setting the terminal to raw mode")?;
        }
        drop(stdin);
        let run = move || feed(&machine, &stopped, raw);
        let thread = std::thread::Builder::new().name("console-input".into()).spawn(run);
        let thread = Some(thread.system("spawning the console's thread")?);
        Ok(Self { stop, thread, raw })
    }
}

impl Drop for StdinFeed {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
        if self.raw
            && let Err(error) = io::stdin().lock().set_canon_mode()
        {
            tracing::warn!(%error, "the terminal stays in raw mode; type `reset`");
        }
    }
}

/// Waits for stdin or for `stopped`; true if stdin is to be read.
fn readable(stopped: &EventFd) -> bool {
    let stdin = io::stdin();
    let mut fds =
        [PollFd::new(&stdin, PollFlags::IN), PollFd::from_borrowed_fd(borrow(stopped), PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return fds[1].revents().is_empty() && !fds[0].revents().is_empty(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn borrow(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn feed(machine: &Machine, stopped: &EventFd, terminal: bool) {
    let mut escape = Escape::default();
    let mut buffer = [0; 256];
    while readable(stopped) {
        let Ok(count @ 1..) = io::stdin().lock().read(&mut buffer) else { return };
        let mut bytes = Vec::with_capacity(count);
        for byte in &buffer[..count] {
            match if terminal { escape.typed(*byte) } else { Typed::Byte(*byte) } {
                Typed::Byte(byte) => bytes.push(byte),
                Typed::Nothing => {}
                Typed::Quit => return machine.end(ExitReason::ConsoleQuit),
            }
        }
        if machine.devices.serial().input(&bytes) < bytes.len() {
            tracing::warn!("console input dropped: the guest does not read it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_quits_and_its_prefix_can_be_sent() {
        let mut escape = Escape::default();
        let typed: Vec<Typed> = b"a\x01\x01b\x01x".iter().map(|byte| escape.typed(*byte)).collect();
        use Typed::{Byte, Nothing, Quit};
        assert_eq!(typed, [Byte(b'a'), Nothing, Byte(1), Byte(b'b'), Nothing, Quit]);
    }
}
