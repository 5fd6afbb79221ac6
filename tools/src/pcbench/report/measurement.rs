//! The figures of one size over one transport, from its rounds.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::times::{Times, median, over_rounds};
use crate::run::recorder::{Latency, latency, pooled};
use crate::run::{Measured, Round};

/// Shortest stretch of a round whose bandwidth counts as a peak.
const PEAK_OVER: Duration = Duration::from_millis(200);

/// One size over one transport.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Measurement {
    pub(crate) transport: String,
    pub(crate) bytes: u32,
    /// Of its reads.
    #[serde(flatten)]
    pub(crate) times: Times,
    /// Median over the rounds.
    pub(crate) mb_per_s: f64,
    /// Best stretch of at least 0.2 s; the median where rounds are shorter.
    pub(crate) peak_mb_per_s: f64,
    /// Median over the rounds.
    pub(crate) reads_per_s: f64,
    pub(crate) rounds: Vec<RoundFigures>,
    /// What the server's reads from here were like, median over the rounds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) reverse: Option<Reverse>,
}

/// One round.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct RoundFigures {
    /// Since the first round began, in seconds.
    pub(crate) start_s: f64,
    pub(crate) seconds: f64,
    pub(crate) latency: Latency,
    pub(crate) mean_us: f64,
    pub(crate) mb_per_s: f64,
    pub(crate) reads_per_s: f64,
}

/// The server's own reads.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Reverse {
    pub(crate) latency: Latency,
    pub(crate) mb_per_s: f64,
    pub(crate) reads_per_s: f64,
}

impl Measurement {
    /// The figures of what was measured.
    ///
    /// Errors: a histogram that cannot be written down.
    pub(super) fn new(measured: &Measured) -> anyhow::Result<Self> {
        let rounds: Vec<RoundFigures> =
            measured.rounds.iter().map(|round| figures(round, measured.bytes)).collect();
        let intervals: Vec<_> = measured.rounds.iter().map(|round| &round.intervals[..]).collect();
        let mb_per_s = median(rounds.iter().map(|round| round.mb_per_s));
        let peaks = measured.rounds.iter().map(|round| peak(round, measured.bytes));
        let mirrored = measured.rounds.iter().filter_map(|round| {
            let m = round.mirrored.as_ref()?;
            Some(Reverse { latency: m.latency, mb_per_s: m.mb_per_s, reads_per_s: m.reads_per_s })
        });
        Ok(Self {
            transport: measured.transport.name().into(),
            bytes: measured.bytes,
            times: Times::new(&intervals)?,
            mb_per_s,
            peak_mb_per_s: peaks.fold(mb_per_s, f64::max),
            reads_per_s: median(rounds.iter().map(|round| round.reads_per_s)),
            rounds,
            reverse: reverse(&mirrored.collect::<Vec<_>>()),
        })
    }

    /// Its name in files and logs: `tcp-4096`.
    pub(crate) fn tag(&self) -> String {
        format!("{}-{}", self.transport, self.bytes)
    }
}

fn figures(round: &Round, bytes: u32) -> RoundFigures {
    let (histogram, moments) = pooled(&round.intervals);
    let seconds = round.elapsed.as_secs_f64();
    let per_s = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
    RoundFigures {
        start_s: round.intervals.first().map_or(0.0, |interval| interval.start.as_secs_f64()),
        seconds,
        latency: latency(&histogram, &moments),
        mean_us: moments.mean_us(),
        mb_per_s: per_s(round.reads as f64 * f64::from(bytes) / 1e6),
        reads_per_s: per_s(round.reads as f64),
    }
}

/// The best bandwidth of a round over whole intervals that take long enough together. Time in which
/// nothing completed counts to the interval that follows, so a burst after a stall is no peak.
fn peak(round: &Round, bytes: u32) -> f64 {
    let mut best: f64 = 0.0;
    for (index, first) in round.intervals.iter().enumerate() {
        let begin = first.start + first.length;
        let mut reads = 0;
        for interval in &round.intervals[index + 1..] {
            reads += interval.moments.count;
            let took = (interval.start + interval.length).saturating_sub(begin);
            if took >= PEAK_OVER {
                best = best.max(reads as f64 * f64::from(bytes) / 1e6 / took.as_secs_f64());
                break;
            }
        }
    }
    best
}

fn reverse(rounds: &[Reverse]) -> Option<Reverse> {
    (!rounds.is_empty()).then(|| Reverse {
        latency: over_rounds(rounds.iter().map(|round| round.latency)),
        mb_per_s: median(rounds.iter().map(|round| round.mb_per_s)),
        reads_per_s: median(rounds.iter().map(|round| round.reads_per_s)),
    })
}
