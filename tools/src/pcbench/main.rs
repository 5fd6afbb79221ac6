//! pcbench: what a one-sided read costs, over every transport that this machine has.
//!
//! ```text
//!  flags (args) ─▶ Plan ─▶ run ─▶ Report ─▶ table, JSON, CSV, perftest, OSU, HTML, SVG, hgrm, hlog
//!                   │       │        └────▶ compare
//!                   │       └ connect ◀─ exchange ─▶ serve      (serve runs in this process for
//!                   └ checked: whatever is wrong with a command   the loopback)
//!                     line is said before anything is opened
//! ```
//!
//! Exit status: 0; 1 for what went wrong while it ran, or a comparison that is worse than allowed;
//! 2 for a command line that cannot be followed.

mod args;
mod compare;
mod connect;
mod doctor;
mod exchange;
mod fault;
mod mirror;
mod pattern;
mod pin;
mod plan;
mod report;
mod run;
mod serve;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use postcopy_tools::cli::{self, USAGE};
use postcopy_tools::text::one_line;

use args::{Cli, Command, ReadArgs};
use plan::Plan;
use report::{Outputs, Report};

/// How a command ends: its exit status, or what went wrong.
type Ended = Result<ExitCode, Failure>;

/// What went wrong, by exit status.
enum Failure {
    /// The command line cannot be followed.
    Usage(anyhow::Error),
    /// It failed while it ran.
    Run(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Run(error)
    }
}

fn main() -> ExitCode {
    start_log();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let Some(line) = cli::refusal(&error) else { error.exit() };
            eprintln!("pcbench: {line}");
            return ExitCode::from(USAGE);
        }
    };
    let (error, status) = match dispatch(cli) {
        Ok(status) => return status,
        Err(Failure::Usage(error)) => (error, ExitCode::from(USAGE)),
        Err(Failure::Run(error)) => (error, ExitCode::FAILURE),
    };
    eprintln!("pcbench: {}", one_line(&error));
    status
}

/// Logs to stderr what RUST_LOG says; without it, nothing: errors come by another way.
fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

fn dispatch(cli: Cli) -> Ended {
    match cli.command {
        None => measure(&cli.read, None),
        Some(Command::Read { host, read }) => measure(&read, host.as_deref()),
        Some(Command::Serve(args)) => {
            serve::check(&args).map_err(Failure::Usage)?;
            serve::serve(&args)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Fault(args)) => fault::fault(&args),
        Some(Command::Compare(args)) => compare::compare(&args),
        Some(Command::Doctor { json }) => Ok(doctor::doctor(json)?),
        Some(Command::Completions { shell }) => {
            cli::completions(shell, Cli::command());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Man { dir }) => {
            cli::manual(Cli::command(), dir.as_deref()).map_err(anyhow::Error::from)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn measure(args: &ReadArgs, host: Option<&str>) -> Ended {
    let plan = Plan::try_from(args).map_err(Failure::Usage)?;
    plan.pin.check().map_err(Failure::Usage)?;
    let tag = |transport| plan.sizes.iter().map(move |bytes| format!("{transport}-{bytes}"));
    let tags = plan.transports.iter().flat_map(tag).collect();
    let outputs = Outputs::open(&plan.output, tags).map_err(Failure::Usage)?;
    let report = Report::new(&plan, run::run(&plan, host)?)?;
    outputs.write(&report)?;
    cli::print(&report.text(plan.format)?).map_err(anyhow::Error::from)?;
    Ok(ExitCode::SUCCESS)
}
