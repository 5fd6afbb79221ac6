//! The command line of pcbench, as typed. What it means is decided in [`crate::plan`].

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::size;
use postcopy_tools::trust::TrustArgs;
use postcopy_transport::Transport;
use serde::{Deserialize, Serialize};

/// Where `serve` listens and `read` connects unless told otherwise.
pub(crate) const PORT: u16 = 7171;

const EXAMPLES: &str = "\
Examples:
  pcbench                                      every transport of this machine, a table and a verdict
  pcbench serve                                on one host …
  pcbench read HOST --transport tcp,verbs      … and from another
  pcbench read HOST --sizes 8..8M --json       the whole range, as JSON
  pcbench read HOST --rate 20000 --depth 16    open loop: 20,000 reads a second, whatever happens
  pcbench read HOST --report run.html          one page with plots
  pcbench fault HOST                           what a fault costs, its memory at that host
  pcbench fault --report faults.html           the same over the loopback, with plots
  pcbench compare old.json new.json --fail-above 5%
  pcbench doctor                               what is in the way on this machine";

const READ_EXAMPLES: &str = "\
Examples:
  pcbench read 192.0.2.7                                   4 sizes over every transport that both have
  pcbench read 192.0.2.7 --transport verbs --sizes 4K --iterations 100000 --hgrm 4k.hgrm
  pcbench read 192.0.2.7 --sizes 64K --depth 32 --duration 5 --format perftest
  pcbench read 192.0.2.7 --transport tcp,verbs --rounds 9 --json > new.json";

/// Measures one-sided reads: what a page fault costs before the guest's kernel adds its share.
///
/// Without a command: every transport that this machine has, over the loopback.
#[derive(Debug, Parser)]
#[command(name = "pcbench", version, max_term_width = 100, after_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Offer memory for `pcbench read` and `pcbench fault` on another host.
    Serve(ServeArgs),
    /// Read from a host where `pcbench serve` runs, or over the loopback.
    #[command(after_help = READ_EXAMPLES)]
    Read {
        /// HOST or HOST:PORT. Default: this process itself.
        host: Option<String>,
        #[command(flatten)]
        read: Box<ReadArgs>,
    },
    /// Measure what a thread waits when it touches memory that is still at the source.
    Fault(crate::fault::FaultArgs),
    /// Compare two reports. Exit status 0: no worse than allowed; 1: worse; 2: not comparable.
    Compare(CompareArgs),
    /// Say what this machine can do, what is in the way, and how to remedy it.
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff.
    Man {
        /// Write it and one page for each command into this folder instead.
        #[arg(long, value_name = "FOLDER")]
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen. All connections come to this port.
    #[arg(long, default_value_t = format!("0.0.0.0:{PORT}"), value_name = "HOST:PORT")]
    pub(crate) listen: String,
    /// Memory to read from, 4K to 1G. No read is larger than it.
    #[arg(long, default_value = "64M", value_parser = size::parse, value_name = "SIZE")]
    pub(crate) memory: u64,
    /// Offer huge pages of 2 MiB, which the system must have reserved.
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Most readers at the same time; others are refused.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) max_clients: u32,
    /// Serve over tcp alone, under TLS, and only readers whose certificate one authority has signed: the folder of its
    /// `ca-cert.pem` and of this host's `server-cert.pem` and `server-key.pem`, as for QEMU. Only lanes are under it; it is
    /// there to be measured. See docs/tls.md.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) tls: Option<PathBuf>,
    /// Processors to serve on: a list such as 0,2-5; `auto`, those near the RDMA device; `none`.
    #[arg(long, default_value = "auto", value_name = "LIST|auto|none")]
    pub(crate) cpu: String,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// How completions are awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Completion {
    /// Ask again and again: the shortest latency, a whole processor.
    Poll,
    /// Sleep until the lane says so.
    Event,
    /// Poll for 50 µs, then sleep.
    Adaptive,
}

/// How the report is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table and a verdict, for people.
    #[default]
    Table,
    /// Everything; docs/pcbench.md has the schema.
    Json,
    /// One line a measurement.
    Csv,
    /// The columns of ib_read_lat, or of ib_read_bw if more than one read is in flight.
    Perftest,
    /// The columns of osu_get_latency, or of osu_get_bw if more than one read is in flight.
    Osu,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ReadArgs {
    /// Transports, interleaved. Default: all that this machine has.
    #[arg(long, value_delimiter = ',', value_name = "shm,tcp,verbs", help_heading = "What")]
    pub(crate) transport: Vec<Transport>,
    /// Sizes: a list such as 8,4K,1M, or a range of doublings such as 8..8M.
    #[arg(long, default_value = "64,4K,64K,1M", value_name = "SIZES", help_heading = "What")]
    pub(crate) sizes: String,
    /// Read from the first SIZE bytes of the server's memory only: 4K is always the same page, as
    /// ib_read_lat does it. Default: all of it, in random order.
    #[arg(long, value_parser = size::parse, value_name = "SIZE", help_heading = "What")]
    pub(crate) span: Option<u64>,
    /// Reads of each size in each round. Default: up to 20,000 in up to half a second.
    #[arg(long, value_name = "N", conflicts_with = "duration", help_heading = "What")]
    pub(crate) iterations: Option<u64>,
    /// Seconds for each size in each round.
    #[arg(long, value_name = "S", help_heading = "What")]
    pub(crate) duration: Option<f64>,
    /// Rounds; in each, every transport and size has its turn. Figures are medians over rounds.
    #[arg(long, default_value_t = 5, value_name = "N", help_heading = "What")]
    pub(crate) rounds: u32,
    /// Reads before the measured ones, in each round. 0 for none.
    #[arg(long, default_value_t = 200, value_name = "N", help_heading = "What")]
    pub(crate) warm_up: u64,
    /// Reads in flight on each lane. Default: 1; with --rate, 16.
    #[arg(long, value_name = "N", help_heading = "How")]
    pub(crate) depth: Option<u32>,
    /// Let reads land in huge pages of 2 MiB, which the system must have reserved.
    #[arg(long, help_heading = "How")]
    pub(crate) huge_pages: bool,
    /// Lanes of each transport, all driven by one thread.
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "How")]
    pub(crate) lanes: u32,
    /// Open loop: so many reads a second. Latency counts from the moment when each was due.
    #[arg(long, value_name = "READS/S", help_heading = "How")]
    pub(crate) rate: Option<f64>,
    /// How completions are awaited. Default: poll; adaptive on a single processor.
    #[arg(long, value_enum, value_name = "HOW", help_heading = "How")]
    pub(crate) completion: Option<Completion>,
    /// Processors to read on: a list such as 2 or 2,4-6; `auto`, those near the RDMA device; `none`.
    #[arg(long, default_value = "auto", value_name = "LIST|auto|none", help_heading = "How")]
    pub(crate) cpu: String,
    /// The server reads from here at the same time, in the same way.
    #[arg(long, help_heading = "How")]
    pub(crate) bidirectional: bool,
    /// Check every byte of every read, not only of the last of each round. Not part of the time.
    #[arg(long, help_heading = "How")]
    pub(crate) verify: bool,
    /// Give up when nothing has arrived for so many seconds.
    #[arg(long, default_value_t = 10.0, value_name = "S", help_heading = "How")]
    pub(crate) give_up_after: f64,
    #[command(flatten, next_help_heading = "TLS")]
    pub(crate) trust: TrustArgs,
    #[command(flatten, next_help_heading = "RDMA")]
    pub(crate) device: DeviceArgs,
    #[command(flatten, next_help_heading = "Report")]
    pub(crate) output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct OutputArgs {
    /// How the report is printed.
    #[arg(long, value_enum, value_name = "HOW", conflicts_with = "json")]
    pub(crate) format: Option<Format>,
    /// Short for --format json.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write one self-contained HTML page with plots.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,
    /// Write the plots as one picture.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Write percentile distributions for HdrHistogram plotters; of several measurements, each into
    /// a file of its own, such as FILE-tcp-4096.hgrm.
    #[arg(long, value_name = "FILE.hgrm")]
    pub(crate) hgrm: Option<PathBuf>,
    /// Write an HdrHistogram interval log (V2, compressed), tagged such as tcp-4096.
    #[arg(long, value_name = "FILE.hlog")]
    pub(crate) hlog: Option<PathBuf>,
    /// No progress on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
}

impl OutputArgs {
    /// How the report is to be printed.
    pub(crate) fn format(&self) -> Format {
        self.format.unwrap_or(if self.json { Format::Json } else { Format::Table })
    }
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The earlier report: what `pcbench --json` printed.
    #[arg(value_name = "A.json")]
    pub(crate) before: PathBuf,
    /// The later report.
    #[arg(value_name = "B.json")]
    pub(crate) after: PathBuf,
    /// Fail (exit status 1) where a median got worse by more than this and the confidence
    /// intervals do not overlap.
    #[arg(long, value_name = "PERCENT")]
    pub(crate) fail_above: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
