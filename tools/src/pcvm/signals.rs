//! Signals by which somebody wants a process of pcvm to end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Whether somebody wants this process to end.
pub(crate) struct Wanted {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

impl Wanted {
    /// By SIGINT, SIGTERM, or a terminal that hangs up, unless hang-ups are ignored (nohup).
    ///
    /// Errors: the system refuses.
    pub(crate) fn new() -> io::Result<Self> {
        let hangup = if hangups_are_ignored() { None } else { Some(signal(SignalKind::hangup())?) };
        Self::with(hangup)
    }

    /// By SIGINT or SIGTERM: what is under way goes on without its terminal.
    ///
    /// Errors: the system refuses.
    pub(crate) fn but_for_hangups() -> io::Result<Self> {
        // From here on a hang-up does nothing, whether or not anybody listens.
        drop(signal(SignalKind::hangup())?);
        Self::with(None)
    }

    fn with(hangup: Option<Signal>) -> io::Result<Self> {
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        Ok(Self { interrupt, terminate, hangup })
    }

    /// Waits until somebody does.
    pub(crate) async fn end(&mut self) {
        let hung_up = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hung_up => {}
        }
    }
}

/// As this process was started.
fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 << (SignalKind::hangup().as_raw_value() - 1) != 0)
}
