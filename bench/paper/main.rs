//! The paper's evaluation in virtual time; see `--help` and `bench/README.md`.
//!
//! args → suite → report: parsed flags choose traces, the suite runs each under every policy, and
//! the table, the JSON document, the figure and the page are derived from its results.

mod args;
mod figure;
mod report;
mod suite;

use anyhow::Context as _;
use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    let args = args::Args::parse();
    if let Some(path) = &args.record {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let trace = postcopy_bench::paper::recorded(&name, std::io::stdin().lock())?;
        eprintln!("{} touches of {} pages", trace.touches.len(), trace.pages);
        return std::fs::write(path, trace.to_bytes()).with_context(|| format!("writing {}", path.display()));
    }
    let mut results = suite::Results::default();
    if let Some(path) = &args.trace {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let trace = postcopy_bench::paper::Trace::from_bytes(&bytes)
            .with_context(|| format!("reading {}", path.display()))?;
        results.suite = suite::compare(&[trace], args.seed);
    } else {
        results = suite::run_all(args.seed, args.quick);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print!("{}", report::text(&results));
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, figure::svg(&results)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.report {
        std::fs::write(path, report::page(&results)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
