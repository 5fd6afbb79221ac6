//! pcvm: run a KVM guest, and move it by post-copy.
//!
//! `run` and `receive` are processes that hold a guest ([`host`]); the other commands speak to
//! them over their control socket ([`client`]); `compare` only reads their reports.

mod args;
mod client;
mod compare;
mod control;
mod host;
mod report;
mod server;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log();
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pcvm: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes on one line, without those that the line says already.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// Logs warnings to stderr, or what RUST_LOG says.
fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => host::run(&args),
        Command::Receive(args) => host::receive(&args),
        Command::Migrate(args) => client::migrate(&args),
        Command::Status(args) => client::status(&args),
        Command::Quit(args) => client::quit(&args),
        Command::Type(args) => client::type_text(&args),
        Command::Resolve(args) => client::resolve(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "pcvm", &mut std::io::stdout());
            Ok(())
        }
        Command::Man => Ok(clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?),
    }
}
