//! The command line of pcbench: as typed, and as a validated plan.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::{Args, Parser, Subcommand};
use postcopy_transport::{EndpointOptions, MAX_READ, Transport};

/// Where `serve` listens and `read` connects unless told otherwise.
pub(crate) const PORT: u16 = 7171;
/// Memory that is read from: larger than the caches of most machines.
pub(crate) const REGION_BYTES: u64 = 64 << 20;
const _: () = assert!(REGION_BYTES >= 2 * MAX_READ as u64);

/// Most reads of one size.
const ITERATIONS: u64 = 10_000;
/// Most time for one size, in seconds.
const SECONDS: f64 = 1.5;

/// Measures one-sided reads: what a page fault costs before the guest's kernel adds its share.
///
/// Without a command: every transport that this machine has, over the loopback.
#[derive(Debug, Parser)]
#[command(name = "pcbench", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Offer memory for `pcbench read` on another host.
    Serve(ServeArgs),
    /// Read from a host where `pcbench serve` runs, or over the loopback.
    Read {
        /// HOST or HOST:PORT. Default: this process itself.
        host: Option<String>,
        #[command(flatten)]
        read: ReadArgs,
    },
    /// Measure what a thread waits when it touches memory that is still at the source.
    Fault(crate::fault::FaultArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff.
    Man,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen.
    #[arg(long, default_value_t = format!("0.0.0.0:{PORT}"), value_name = "HOST:PORT")]
    pub(crate) listen: String,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// Which RDMA device.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceArgs {
    /// RDMA device. Default: the one that owns the connection's address.
    #[arg(long, value_name = "NAME")]
    pub(crate) device: Option<String>,
    /// RDMA port, from 1. Default: the first active one.
    #[arg(long, value_name = "N")]
    pub(crate) ib_port: Option<u8>,
    /// GID index on RoCE. Default: the RoCE v2 entry of the connection's address.
    #[arg(long, value_name = "N")]
    pub(crate) gid_index: Option<u32>,
}

impl DeviceArgs {
    pub(crate) fn endpoint(&self, local: Option<IpAddr>) -> EndpointOptions {
        let devices = self.device.iter().cloned().collect();
        let (port, gid_index) = (self.ib_port, self.gid_index);
        EndpointOptions { devices, port, gid_index, local, ..EndpointOptions::default() }
    }
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ReadArgs {
    /// Transports, interleaved by size. Default: all that this machine has.
    #[arg(long, value_delimiter = ',', value_name = "shm,tcp,verbs")]
    transport: Vec<Transport>,
    /// Sizes: a list such as 8,4K,1M, or a range of powers of two such as 8..8M.
    #[arg(long, default_value = "64,4K,64K,1M", value_name = "SIZES")]
    sizes: String,
    /// Most reads of each size.
    #[arg(long, default_value_t = ITERATIONS, value_name = "N")]
    iterations: u64,
    /// Most seconds for each size.
    #[arg(long, default_value_t = SECONDS, value_name = "S")]
    duration: f64,
    /// Check every byte of every read (not only of the last of each size). Not part of the time.
    #[arg(long)]
    verify: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What will be measured, checked.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) transports: Vec<Transport>,
    pub(crate) sizes: Vec<u32>,
    pub(crate) iterations: u64,
    pub(crate) limit: Duration,
    pub(crate) verify: bool,
    pub(crate) json: bool,
    pub(crate) device: DeviceArgs,
}

impl TryFrom<&ReadArgs> for Plan {
    type Error = anyhow::Error;

    fn try_from(args: &ReadArgs) -> anyhow::Result<Self> {
        ensure!(args.iterations > 0, "--iterations 0 measures nothing; ask for at least 1");
        let limit = Duration::try_from_secs_f64(args.duration).ok().filter(|limit| !limit.is_zero());
        let Some(limit) = limit else {
            bail!("--duration {} is no time; ask for more than 0 s", args.duration)
        };
        for transport in &args.transport {
            transport.available()?;
        }
        let available = |transport: &Transport| {
            let found = transport.available();
            found.inspect_err(|error| eprintln!("pcbench: going on without it: {error}")).is_ok()
        };
        let transports = match args.transport.is_empty() {
            true => {
                [Transport::Shm, Transport::Tcp, Transport::Verbs].into_iter().filter(available).collect()
            }
            false => args.transport.clone(),
        };
        Ok(Self {
            transports,
            sizes: parse_sizes(&args.sizes)?,
            iterations: args.iterations,
            limit,
            verify: args.verify,
            json: args.json,
            device: args.device.clone(),
        })
    }
}

fn parse_sizes(text: &str) -> anyhow::Result<Vec<u32>> {
    if let Some((from, to)) = text.split_once("..") {
        let (from, to) = (parse_size(from)?, parse_size(to)?);
        ensure!(from <= to, "--sizes {text} goes backwards");
        let doubled = std::iter::successors(Some(from), |size| size.checked_mul(2));
        return Ok(doubled.take_while(|size| *size <= to).collect());
    }
    text.split(',').map(parse_size).collect()
}

fn parse_size(text: &str) -> anyhow::Result<u32> {
    let digits = text.trim_end_matches(['K', 'k', 'M', 'm']);
    let unit: u32 = match &text[digits.len()..] {
        "" => 1,
        "K" | "k" => 1 << 10,
        "M" | "m" => 1 << 20,
        _ => bail!("`{text}` is no size; write something like 64, 4K or 1M"),
    };
    let size = digits.parse::<u32>().ok().and_then(|number| number.checked_mul(unit));
    match size {
        Some(0) => bail!("a read of 0 bytes measures nothing"),
        Some(size) if size <= MAX_READ => Ok(size),
        Some(_) => bail!("{text} is more than one read carries; the most is {}M", MAX_READ >> 20),
        None => bail!("`{text}` is no size; write something like 64, 4K or 1M"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_sizes("8,4K,1M").unwrap(), [8, 4096, 1 << 20]);
        assert_eq!(parse_sizes("1K..8K").unwrap(), [1024, 2048, 4096, 8192]);
        assert_eq!(parse_sizes("8..8M").unwrap().len(), 21);
        for bad in ["", "0", "9M", "4K..1K", "x", "4KK", "99999999999"] {
            assert!(parse_sizes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
