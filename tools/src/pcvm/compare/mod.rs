//! `pcvm compare`: migrations side by side, as a table, as JSON and as a page with plots.
//!
//! ```text
//!  LABEL=REPORT[,GUEST] … ─ input ─▶ Comparison ─┬─ table ─▶ stdout
//!                                                ├─ serde ─▶ --json
//!                                                └─ table, plot ─ page ─▶ --html
//! ```
//!
//! It measures nothing and speaks to no process. Labels, titles and report contents are text from
//! elsewhere: everything that goes into the page is escaped there.

mod input;
mod page;
mod plot;
mod table;

use std::path::Path;

use anyhow::Context;
use postcopy_tools::machine::Machine;
use serde::Serialize;

use crate::args::CompareArgs;
use input::Migration;

/// Version of the JSON document.
const COMPARISON_VERSION: u32 = 1;

/// All that is compared: the JSON document.
#[derive(Debug, Serialize)]
struct Comparison {
    version: u32,
    title: String,
    note: String,
    /// The machine that this runs on, which should be the one that measured.
    environment: Machine,
    migrations: Vec<Migration>,
}

pub(crate) fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let comparison = Comparison {
        version: COMPARISON_VERSION,
        title: args.title.clone(),
        note: args.note.clone(),
        environment: Machine::here(),
        migrations: input::load_all(&args.migrations)?,
    };
    if let Some(path) = &args.json {
        write(path, &format!("{}\n", serde_json::to_string_pretty(&comparison)?))?;
    }
    if let Some(path) = &args.html {
        write(path, &page::page(&comparison)?)?;
    }
    print!("{}", table::text(&comparison.migrations));
    Ok(())
}

fn write(path: &Path, contents: &str) -> anyhow::Result<()> {
    std::fs::write(path, contents).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests;
