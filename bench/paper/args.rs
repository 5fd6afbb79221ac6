//! The command line.

use std::path::PathBuf;

use clap::Parser;

/// The evaluation of the post-copy paper (Hines, Deshpande, Gopalan, 2009), reproduced in virtual
/// time with this engine's planner, beside the paper's own figures.
#[derive(Debug, Parser)]
#[command(name = "paper", version, max_term_width = 100)]
pub(crate) struct Args {
    /// Of every generated trace; the same seed gives the same figures.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Fewer seeds and smaller memories: seconds instead of a minute.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Run this recorded trace under every policy, instead of the paper's tables.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "svg"])]
    pub(crate) trace: Option<PathBuf>,
    /// Make a trace file of what valgrind's lackey prints of a program (--tool=lackey --trace-mem=yes), or of a
    /// guest's faults (bench/peers/programs --kinds record), read from standard input, and do nothing else.
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub(crate) record: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the paper's quicksort figure.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Write one self-contained page with the tables and the figure.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,
}
