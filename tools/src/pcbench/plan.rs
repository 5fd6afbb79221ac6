//! What will be measured: the command line, checked, and the certificates that it names. Nothing is connected here.

use std::time::Duration;

use anyhow::{anyhow, bail, ensure};
use postcopy_engine::session::SourceTls;
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::size;
use postcopy_transport::{MAX_READ, Transport};

use crate::args::{Completion, Format, OutputArgs, ReadArgs};
use crate::connect::TCP_ALONE;
use crate::pin::Pin;

/// Most reads in flight on one lane that can be asked for; a lane may hold fewer.
pub(crate) const MAX_DEPTH: u32 = 4096;
/// Most lanes of one reader.
pub(crate) const MAX_LANES: u32 = 64;
/// Most memory for reads to land in, in bytes: verbs pins all of it.
const MAX_LANDING: u64 = 1 << 30;
/// Reads in flight on a lane, open loop, unless told otherwise.
const OPEN_LOOP_DEPTH: u32 = 16;
/// Reads and time of a round unless told otherwise: whichever is over first.
const DEFAULT_READS: u64 = 20_000;
const DEFAULT_TIME: Duration = Duration::from_millis(500);
/// Most rounds.
const MAX_ROUNDS: u32 = 1000;

/// When a round of one size is over: at the first of these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Limit {
    pub(crate) reads: Option<u64>,
    pub(crate) time: Option<Duration>,
}

/// What will be measured.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) transports: Vec<Transport>,
    pub(crate) sizes: Vec<u32>,
    /// How much of the server's memory is read, in bytes.
    pub(crate) span: Option<u64>,
    pub(crate) limit: Limit,
    pub(crate) rounds: u32,
    pub(crate) warm_up: u64,
    pub(crate) depth: u32,
    pub(crate) lanes: u32,
    /// Reads land in huge pages.
    pub(crate) huge_pages: bool,
    pub(crate) rate: Option<f64>,
    pub(crate) completion: Completion,
    pub(crate) pin: Pin,
    pub(crate) bidirectional: bool,
    pub(crate) verify: bool,
    pub(crate) patience: Duration,
    /// Whom lanes go to. `None`: to anybody, in clear.
    pub(crate) tls: Option<SourceTls>,
    pub(crate) device: DeviceArgs,
    pub(crate) format: Format,
    pub(crate) output: OutputArgs,
    /// Transports left out, each with the reason.
    pub(crate) missing: Vec<String>,
    /// Nobody asked for these transports: leave out those that the two sides do not share.
    pub(crate) lenient: bool,
}

impl TryFrom<&ReadArgs> for Plan {
    type Error = anyhow::Error;

    fn try_from(args: &ReadArgs) -> anyhow::Result<Self> {
        let (transports, missing) = transports(args)?;
        let depth = args.depth.unwrap_or(if args.rate.is_some() { OPEN_LOOP_DEPTH } else { 1 });
        ensure!(depth > 0, "--depth 0 reads nothing; ask for at least 1");
        ensure!(depth <= MAX_DEPTH, "--depth {depth} is too much; at most {MAX_DEPTH}");
        ensure!((1..=MAX_LANES).contains(&args.lanes), "--lanes takes 1 to {MAX_LANES}, not {}", args.lanes);
        ensure!((1..=MAX_ROUNDS).contains(&args.rounds), "--rounds takes 1 to {MAX_ROUNDS}");
        ensure!(args.iterations != Some(0), "--iterations 0 measures nothing; ask for at least 1");
        let rate = args.rate.is_none_or(|rate| rate.is_finite() && rate > 0.0 && rate <= 1e9);
        ensure!(rate, "--rate takes reads a second, more than 0 and at most 1e9");
        let sizes = parse_sizes(&args.sizes)?;
        let largest = sizes.iter().copied().max().unwrap_or(1);
        ensure!(
            args.span.is_none_or(|span| span >= u64::from(largest)),
            "--span is less than {}, the largest of --sizes",
            size::short(largest.into())
        );
        let landing = u64::from(depth) * u64::from(args.lanes) * u64::from(largest);
        ensure!(
            landing <= MAX_LANDING,
            "{} reads of {} in flight need {} MiB to land in, more than {} MiB; lower --depth, --lanes or --sizes",
            u64::from(depth) * u64::from(args.lanes),
            size::short(largest.into()),
            landing >> 20,
            MAX_LANDING >> 20
        );
        Ok(Self {
            transports,
            missing,
            lenient: args.transport.is_empty() && !args.device.is_chosen(),
            sizes,
            span: args.span,
            limit: limit(args)?,
            rounds: args.rounds,
            warm_up: args.warm_up,
            depth,
            lanes: args.lanes,
            huge_pages: args.huge_pages,
            rate: args.rate,
            completion: args.completion.unwrap_or_else(default_completion),
            pin: args.cpu.parse()?,
            bidirectional: args.bidirectional,
            verify: args.verify,
            patience: seconds("--give-up-after", args.give_up_after)?,
            tls: args.trust.read()?,
            device: args.device.clone(),
            format: args.output.format(),
            output: args.output.clone(),
        })
    }
}

/// What to measure, and what is left out and why.
fn transports(args: &ReadArgs) -> anyhow::Result<(Vec<Transport>, Vec<String>)> {
    let asked = &args.transport;
    for (index, transport) in asked.iter().enumerate() {
        ensure!(!asked[..index].contains(transport), "--transport names {transport} twice");
    }
    if args.trust.tls.is_some() {
        ensure!(asked.is_empty() || *asked == [Transport::Tcp], "{TCP_ALONE}");
        ensure!(
            !args.device.is_chosen(),
            "--device and what else tunes RDMA are for verbs, and --tls is for tcp"
        );
        return Ok((vec![Transport::Tcp], Vec::new()));
    }
    if args.device.is_chosen() {
        ensure!(
            asked.is_empty() || asked.contains(&Transport::Verbs),
            "--device and what else tunes RDMA are for verbs; add it to --transport"
        );
        Transport::Verbs.available()?;
    }
    if !asked.is_empty() {
        asked.iter().try_for_each(|transport| transport.available())?;
        return Ok((asked.clone(), Vec::new()));
    }
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for transport in [Transport::Shm, Transport::Tcp, Transport::Verbs] {
        match transport.available() {
            Ok(()) => found.push(transport),
            Err(error) => missing.push(error.to_string()),
        }
    }
    Ok((found, missing))
}

fn limit(args: &ReadArgs) -> anyhow::Result<Limit> {
    Ok(match (args.iterations, args.duration) {
        (None, None) => Limit { reads: Some(DEFAULT_READS), time: Some(DEFAULT_TIME) },
        (reads, time) => Limit { reads, time: time.map(|time| seconds("--duration", time)).transpose()? },
    })
}

fn default_completion() -> Completion {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        1 => Completion::Adaptive,
        _ => Completion::Poll,
    }
}

pub(crate) fn seconds(flag: &str, value: f64) -> anyhow::Result<Duration> {
    let time = Duration::try_from_secs_f64(value).ok();
    let sane = time.filter(|time| !time.is_zero() && *time <= Duration::from_secs(7 * 24 * 3600));
    sane.ok_or_else(|| anyhow!("{flag} {value} makes no sense; ask for more than 0 s and at most a week"))
}

fn parse_sizes(text: &str) -> anyhow::Result<Vec<u32>> {
    if let Some((from, to)) = text.split_once("..") {
        let (from, to) = (parse_size(from)?, parse_size(to)?);
        ensure!(from <= to, "--sizes {text} goes backwards");
        let doubled = std::iter::successors(Some(from), |size| size.checked_mul(2));
        return Ok(doubled.take_while(|size| *size <= to).collect());
    }
    let sizes: Vec<u32> = text.split(',').map(parse_size).collect::<anyhow::Result<_>>()?;
    for (index, size) in sizes.iter().enumerate() {
        ensure!(!sizes[..index].contains(size), "--sizes {text} has {} twice", size::short((*size).into()));
    }
    Ok(sizes)
}

fn parse_size(text: &str) -> anyhow::Result<u32> {
    match size::parse(text).map_err(|error| anyhow!("--sizes: {error}"))? {
        0 => bail!("--sizes: a read of 0 bytes measures nothing"),
        bytes if bytes <= u64::from(MAX_READ) => Ok(bytes as u32),
        _ => bail!("--sizes: {text} is more than one read carries; the most is {}M", MAX_READ >> 20),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    fn plan(args: &[&str]) -> anyhow::Result<Plan> {
        let line = ["pcbench", "--transport", "shm"].iter().chain(args);
        Plan::try_from(&Cli::try_parse_from(line)?.read)
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_sizes("8,4K,1M").unwrap(), [8, 4096, 1 << 20]);
        assert_eq!(parse_sizes("1K..8K").unwrap(), [1024, 2048, 4096, 8192]);
        assert_eq!(parse_sizes("8..8M").unwrap().len(), 21);
        for bad in ["", "0", "9M", "4K..1K", "x", "4KK", "99999999999", "4K,4096"] {
            assert!(parse_sizes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn defaults() {
        let plan = plan(&[]).unwrap();
        assert_eq!((plan.depth, plan.lanes, plan.rounds), (1, 1, 5));
        assert_eq!(plan.limit, Limit { reads: Some(DEFAULT_READS), time: Some(DEFAULT_TIME) });
        assert_eq!(self::plan(&["--rate", "100"]).unwrap().depth, OPEN_LOOP_DEPTH);
        let counted = self::plan(&["--iterations", "7"]).unwrap();
        assert_eq!(counted.limit, Limit { reads: Some(7), time: None });
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            &["--depth", "0"][..],
            &["--depth", "5000"],
            &["--lanes", "0"],
            &["--lanes", "65"],
            &["--rounds", "0"],
            &["--iterations", "0"],
            &["--iterations", "5", "--duration", "1"],
            &["--duration", "0"],
            &["--duration", "nan"],
            &["--rate", "0"],
            &["--rate", "inf"],
            &["--give-up-after", "-1"],
            &["--json", "--format", "csv"],
            &["--sizes", "8M", "--depth", "64", "--lanes", "4"],
            &["--device", "rxe0"],
            &["--span", "4K"],
            &["--cpu", "x"],
        ] {
            assert!(plan(bad).is_err(), "{bad:?}");
        }
    }
}
