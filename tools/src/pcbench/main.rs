//! pcbench: what a one-sided read costs, over every transport that this machine has.
//!
//! Parsed flags ([`args`]) become a validated plan, the plan runs ([`read`], against [`serve`] or
//! this process itself), and the result is a [`report`]: JSON, or a table of the same values.

mod args;
mod fault;
mod pattern;
mod read;
mod report;
mod serve;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command, Plan, ReadArgs};
use report::Report;

fn main() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pcbench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        None => measure(&cli.read, None),
        Some(Command::Read { host, read }) => measure(&read, host.as_deref()),
        Some(Command::Fault(args)) => fault::fault(&args),
        Some(Command::Serve(args)) => serve::serve(&args),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "pcbench", &mut std::io::stdout());
            Ok(())
        }
        Some(Command::Man) => Ok(clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?),
    }
}

fn measure(args: &ReadArgs, host: Option<&str>) -> anyhow::Result<()> {
    let plan = Plan::try_from(args)?;
    let report = Report::new(read::measure(&plan, host)?);
    match plan.json {
        true => println!("{}", report.json()?),
        false => print!("{}", report.table()),
    }
    Ok(())
}
