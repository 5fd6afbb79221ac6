//! pcvm: run a KVM guest, and move it by post-copy.
//!
//! `run` and `receive` are processes that hold a guest ([`host`]); the other commands speak to
//! them over their control socket ([`client`]); `compare` only reads their reports, and [`balloon`] speaks to
//! QEMU alone.

mod args;
mod arrival;
mod balloon;
mod client;
mod compare;
mod control;
mod held;
mod host;
mod metrics;
mod qemu;
mod report;
mod server;
mod signals;
mod states;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use postcopy_tools::cli;
use postcopy_tools::text::one_line;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log();
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::say(&format!("pcvm: {}", one_line(&error)));
            ExitCode::FAILURE
        }
    }
}

/// Logs warnings to stderr, or what RUST_LOG says.
fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    // What cannot be logged, as a terminal has hung up, ends nothing.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.log_internal_errors(false).init();
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => host::run(&args),
        Command::Receive(args) => host::receive(&args),
        Command::Migrate(args) => client::migrate(&args),
        Command::Cancel(args) => client::cancel(&args),
        Command::Limit(args) => client::limit(&args),
        Command::Status(args) => client::status(&args),
        Command::Quit(args) => client::quit(&args),
        Command::Type(args) => client::type_text(&args),
        Command::Resolve(args) => client::resolve(&args),
        Command::Recover(args) => client::recover(&args),
        Command::Balloon(args) => balloon::keep(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Completions { shell } => {
            cli::completions(shell, Cli::command());
            Ok(())
        }
        Command::Man { dir } => Ok(cli::manual(Cli::command(), dir.as_deref())?),
    }
}
