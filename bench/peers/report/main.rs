//! What `bench/peers/qemu` has measured, as a table, as JSON and as a page with plots.
//!
//! ```text
//!  runs.jsonl ─ runs ─▶ Summary ─┬─ table ─▶ stdout
//!                                ├─ serde ─▶ --json
//!                                └─ page ──▶ --html
//! ```
//!
//! It measures nothing: a line of its input is one move.

mod page;
mod runs;
mod table;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser as _;

/// Moves of guests by QEMU and by this engine, side by side.
#[derive(Debug, clap::Parser)]
#[command(name = "peers", version, max_term_width = 100)]
struct Args {
    /// A line of JSON for each move, as bench/peers/qemu writes them.
    runs: PathBuf,
    /// What was moved, for the heading.
    #[arg(long, value_name = "TEXT", default_value = "")]
    note: String,
    /// What ib_read_bw carries between the two sides, in bytes a second.
    #[arg(long, value_name = "N")]
    raw: Option<f64>,
    /// Write the medians and every move as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write one self-contained page with plots.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let text =
        std::fs::read_to_string(&args.runs).with_context(|| format!("reading {}", args.runs.display()))?;
    let summary = runs::Summary::of(&text, args.note, args.raw)
        .with_context(|| format!("reading {}", args.runs.display()))?;
    print!("{}", table::text(&summary));
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&summary)? + "\n";
        std::fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.html {
        std::fs::write(path, page::page(&summary)?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
