//! `pcbench doctor`: what this machine can do for post-copy, what is in the way, and the remedy.
//!
//! It changes nothing. Exit status 0 unless something is missing that the engine cannot do
//! without; what only costs speed is a note.

mod checks;
mod kernel;
mod rdma;

use std::fmt::Write;
use std::process::ExitCode;

use postcopy_tools::cli;
use postcopy_tools::machine::Machine;
use postcopy_tools::text::printable;
use serde::Serialize;

/// Version of the JSON.
const VERSION: u32 = 1;

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Status {
    /// As it should be.
    Ok,
    /// Works, but something would be better or is missing that not everybody needs.
    Note,
    /// The engine cannot do without.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), remedy: None }
    }

    fn note(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Note, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn problem(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Problem, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Everything that was looked at: the JSON.
#[derive(Debug, Serialize)]
struct Examination {
    version: u32,
    /// True if nothing is missing that the engine cannot do without.
    ready: bool,
    machine: Machine,
    checks: Vec<Check>,
}

/// Runs `pcbench doctor`.
///
/// Errors: the result cannot be printed.
pub(crate) fn doctor(json: bool) -> anyhow::Result<ExitCode> {
    let machine = Machine::here();
    let mut checks = kernel::checks(&machine);
    checks.extend(checks::checks(&machine));
    checks.extend(rdma::checks(&machine));
    let ready = checks.iter().all(|check| check.status != Status::Problem);
    let examination = Examination { version: VERSION, ready, machine, checks };
    let text = match json {
        true => serde_json::to_string_pretty(&examination)? + "\n",
        false => examination.text(),
    };
    cli::print(&text)?;
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Examination {
    fn text(&self) -> String {
        let mut out = format!("{}\n\n", self.machine.line());
        for check in &self.checks {
            let mark = match check.status {
                Status::Ok => "ok     ",
                Status::Note => "note   ",
                Status::Problem => "PROBLEM",
            };
            let _ = writeln!(out, "{mark}  {:<22} {}", check.name, printable(&check.found, 400));
            if let Some(remedy) = &check.remedy {
                let _ = writeln!(out, "{:>33} {remedy}", "→");
            }
        }
        let problems = self.checks.iter().filter(|check| check.status == Status::Problem).count();
        let _ = match problems {
            0 => writeln!(out, "\nNothing is missing that the engine needs."),
            1 => writeln!(out, "\nOne problem: the engine cannot run here as it is."),
            count => writeln!(out, "\n{count} problems: the engine cannot run here as it is."),
        };
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_ok_has_a_remedy() {
        let machine = Machine::here();
        let all = [kernel::checks(&machine), checks::checks(&machine), rdma::checks(&machine)].concat();
        assert!(all.len() >= 15, "{all:?}");
        for check in all {
            assert_eq!(check.status == Status::Ok, check.remedy.is_none(), "{check:?}");
        }
    }
}
