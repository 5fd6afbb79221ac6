//! The commands that speak to a process which holds a guest.

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use postcopy_engine::session::{MigrationReport, Phase, Progress};
use postcopy_tools::cli;

use crate::args::{ControlArgs, LimitNowArgs, MigrateArgs, RecoverArgs, ResolveArgs, TypeArgs, WireArgs};
use crate::control::{Answer, Request, Status};
use crate::report;

/// Sends a request and hands every answer but the last to `progress`.
fn ask(control: &Path, request: &Request, mut progress: impl FnMut(&Progress)) -> anyhow::Result<Answer> {
    let mut stream = UnixStream::connect(control).with_context(|| {
        format!(
            "cannot reach {}; is a `pcvm run` or `pcvm receive` with this --control alive?",
            control.display()
        )
    })?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    for line in BufReader::new(stream).lines() {
        match serde_json::from_str(&line?)? {
            Answer::Progress(now) => progress(&now),
            Answer::Error(reason) => bail!(reason),
            last => return Ok(last),
        }
    }
    bail!("the process ended before it answered; see its log")
}

pub(crate) fn migrate(args: &MigrateArgs) -> anyhow::Result<()> {
    let migration = match (&args.from.control, &args.from.qmp) {
        (Some(control), _) => migrate_held(args, control)?,
        (None, Some(monitor)) => crate::qemu::migrate(args, monitor)?,
        (None, None) => bail!("say where the guest is: --control SOCK or --qmp SOCK"),
    };
    print_report(&migration, args.told.json)
}

/// Has the process that holds the guest move it.
fn migrate_held(args: &MigrateArgs, control: &Path) -> anyhow::Result<MigrationReport> {
    let request = Request::Migrate {
        to: args.to.clone(),
        transports: names(&args.wire),
        lanes: args.wire.device.clone(),
        mode: args.mode.into(),
        patience: args.told.patience,
        max_bandwidth: args.limit.max_bandwidth,
        trust: args.trust.absolute().context("the working folder")?,
    };
    reported(control, &request, args.told.quiet)
}

fn names(wire: &WireArgs) -> Vec<String> {
    wire.transports().iter().map(|transport| transport.name().to_owned()).collect()
}

pub(crate) fn recover(args: &RecoverArgs) -> anyhow::Result<()> {
    let migration = match (&args.from.control, &args.from.qmp) {
        (Some(control), _) => recover_held(args, control)?,
        (None, Some(monitor)) => crate::qemu::recover(args, monitor)?,
        (None, None) => bail!("say where the memory is: --control SOCK or --qmp SOCK"),
    };
    print_report(&migration, args.told.json)
}

/// Has the process that keeps the memory serve it.
fn recover_held(args: &RecoverArgs, control: &Path) -> anyhow::Result<MigrationReport> {
    ensure!(args.trust.tls.is_none(), "--tls is for --qmp: a pcvm process speaks as it did before");
    let request = Request::Recover {
        to: args.to.clone(),
        transports: names(&args.wire),
        lanes: args.wire.device.clone(),
        max_bandwidth: args.limit.max_bandwidth,
        patience: args.told.patience,
    };
    reported(control, &request, args.told.quiet)
}

/// Asks for what ends with a report.
fn reported(control: &Path, request: &Request, quiet: bool) -> anyhow::Result<MigrationReport> {
    let mut meter = Meter::new(quiet);
    let answer = ask(control, request, |progress| meter.show(progress))?;
    meter.end();
    match answer {
        Answer::Report(migration) => Ok(*migration),
        _ => bail!("the process answered something else than a report"),
    }
}

fn print_report(migration: &MigrationReport, json: bool) -> anyhow::Result<()> {
    let text = match json {
        true => serde_json::to_string_pretty(migration)? + "\n",
        false => report::table(migration),
    };
    Ok(cli::print(&text)?)
}

/// Progress on stderr: one line that changes on a terminal, a line a phase elsewhere.
pub(crate) struct Meter {
    quiet: bool,
    terminal: bool,
    phase: Option<Phase>,
    /// When the phase was entered, and how much was to come then.
    entered: (Instant, u64),
}

impl Meter {
    pub(crate) fn new(quiet: bool) -> Self {
        Self { quiet, terminal: std::io::stderr().is_terminal(), phase: None, entered: (Instant::now(), 0) }
    }

    pub(crate) fn show(&mut self, progress: &Progress) {
        let entered = self.phase.replace(progress.phase) != Some(progress.phase);
        let outstanding = progress.pager.outstanding_pages;
        // Of a phase that has just begun it is not known yet.
        if entered || self.entered.1 == 0 {
            self.entered = (Instant::now(), outstanding);
        }
        if self.quiet || !(entered || self.terminal) {
            return;
        }
        let (since, at_first) = self.entered;
        let pace = report::pace(at_first.saturating_sub(outstanding), outstanding, since.elapsed());
        let line = report::progress_line(progress) + &pace;
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K{line}");
        } else {
            cli::say(&line);
        }
    }

    pub(crate) fn end(&self) {
        if self.terminal && !self.quiet {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

pub(crate) fn status(args: &ControlArgs) -> anyhow::Result<()> {
    let Answer::Status(status) = ask(&args.control, &Request::Status, |_| {})? else {
        bail!("the process answered something else than its status");
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(());
    }
    let Status { state, detail, migration, arrival } = *status;
    println!("{state}: {detail}");
    if let Some(progress) = migration {
        println!("  {}", report::progress_line(&progress));
    }
    if let Some(pager) = arrival {
        println!("  {}", report::pager_line(&pager));
    }
    Ok(())
}

fn simple(control: &Path, request: &Request) -> anyhow::Result<()> {
    ask(control, request, |_| {}).map(drop)
}

pub(crate) fn cancel(args: &ControlArgs) -> anyhow::Result<()> {
    done(args, &Request::Cancel)
}

pub(crate) fn quit(args: &ControlArgs) -> anyhow::Result<()> {
    done(args, &Request::Quit)
}

fn done(args: &ControlArgs, request: &Request) -> anyhow::Result<()> {
    simple(&args.control, request)?;
    if args.json {
        println!("{}", serde_json::to_string(&Answer::Done)?);
    }
    Ok(())
}

pub(crate) fn limit(args: &LimitNowArgs) -> anyhow::Result<()> {
    simple(&args.control, &Request::Limit { max_bandwidth: args.max_bandwidth.0 })
}

pub(crate) fn type_text(args: &TypeArgs) -> anyhow::Result<()> {
    simple(&args.control, &Request::Type { text: format!("{}\n", args.text) })
}

pub(crate) fn resolve(args: &ResolveArgs) -> anyhow::Result<()> {
    simple(&args.control, &Request::Resolve { guest: args.guest })
}
