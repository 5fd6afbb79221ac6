//! Moves as they were measured, and their medians.

use anyhow::{Context as _, ensure};
use postcopy_tools::machine::Machine;
use serde::{Deserialize, Serialize};

/// Version of the JSON document.
const VERSION: u32 = 1;
/// Who the others are compared with.
pub(crate) const PEER: &str = "qemu-preempt";

/// One move of one guest.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Run {
    pub(crate) kind: String,
    pub(crate) downtime_ms: f64,
    /// From the command to the end, all that was prepared before the stop in it.
    pub(crate) total_ms: f64,
    /// From the stop to the last page; QEMU's post-copy begins at once, so that its total is meant.
    pub(crate) resident_ms: Option<f64>,
    /// That crossed, after the stop where `resident_ms` is told.
    pub(crate) bytes: f64,
    pub(crate) cpu_ms: Cpu,
    pub(crate) guest: Guest,
}

/// Processor time that the two processes used, without their guests'.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Cpu {
    pub(crate) source: f64,
    pub(crate) destination: f64,
}

/// What the guest has seen of its move.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Guest {
    pub(crate) stall_us: Stalls,
    pub(crate) longest_pause_ms: f64,
    /// What its turns took longer than half of them, in total: pauses, stalls, and waiting for a processor.
    #[serde(default)]
    pub(crate) stood_still_ms: Option<f64>,
    /// What its accesses took longer than `first_touch_us`, in total.
    pub(crate) lost_ms: f64,
    /// Median of the very first touches of pages, while the guest filled its own memory. It depends on
    /// what backs that: look at it before comparing what was lost.
    pub(crate) first_touch_us: f64,
}

/// Percentiles of its accesses.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Stalls {
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// Something that is measured of each move. Less is better.
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    /// Whether others are compared with the peer by it, and it is drawn.
    pub(crate) compared: bool,
    pub(crate) of: fn(&Run) -> Option<f64>,
}

/// All of them, in the table's order.
pub(crate) const METRICS: [Metric; 13] = [
    metric("longest pause of the guest", "ms", true, |run| Some(run.guest.longest_pause_ms)),
    metric("stood still, in total", "ms", true, |run| run.guest.stood_still_ms),
    metric("lost to stalls, in total", "ms", true, |run| Some(run.guest.lost_ms)),
    metric("access p99.9", "ms", true, |run| Some(run.guest.stall_us.p999 / 1e3)),
    metric("downtime", "ms", true, |run| Some(run.downtime_ms)),
    metric("stop to all resident", "ms", true, |run| run.resident_ms),
    metric("total", "ms", true, |run| Some(run.total_ms)),
    metric("access p99", "ms", false, |run| Some(run.guest.stall_us.p99 / 1e3)),
    metric("longest access", "ms", false, |run| Some(run.guest.stall_us.max / 1e3)),
    metric("first touch of its own page", "ms", false, |run| Some(run.guest.first_touch_us / 1e3)),
    metric("bytes", "MiB", false, |run| Some(run.bytes / f64::from(1 << 20))),
    metric("processor time, source", "ms", false, |run| Some(run.cpu_ms.source)),
    metric("processor time, destination", "ms", false, |run| Some(run.cpu_ms.destination)),
];

const fn metric(
    name: &'static str,
    unit: &'static str,
    compared: bool,
    of: fn(&Run) -> Option<f64>,
) -> Metric {
    Metric { name, unit, compared, of }
}

/// The moves of one kind.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Kind {
    pub(crate) name: String,
    /// Of each of [`METRICS`], by its name.
    pub(crate) medians: Vec<(&'static str, Option<f64>)>,
    /// The time that its bytes take at ib_read_bw's rate, of the time from the stop to the last page.
    pub(crate) of_raw: Option<f64>,
    pub(crate) runs: Vec<Run>,
}

impl Kind {
    fn of(name: String, runs: Vec<Run>, raw: Option<f64>) -> Self {
        let medians = METRICS.iter().map(|metric| (metric.name, median(&runs, metric.of))).collect();
        let of_raw = raw.and_then(|raw| {
            median(&runs, |run| run.resident_ms.map(|ms| run.bytes / ms)).map(|per_ms| per_ms * 1e3 / raw)
        });
        // The rate is one of verbs.
        let of_raw = of_raw.filter(|_| name.contains("verbs"));
        Self { name, medians, of_raw, runs }
    }
}

/// All that was measured: the JSON document.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    version: u32,
    pub(crate) note: String,
    /// The machine that this runs on, which should be the one that measured.
    pub(crate) environment: Machine,
    pub(crate) raw_bytes_s: Option<f64>,
    /// In the order of their first moves.
    pub(crate) kinds: Vec<Kind>,
}

impl Summary {
    /// Of lines of JSON, one a move.
    ///
    /// Errors: a line that is none, or no line.
    pub(crate) fn of(text: &str, note: String, raw_bytes_s: Option<f64>) -> anyhow::Result<Self> {
        let mut kinds: Vec<(String, Vec<Run>)> = Vec::new();
        for (at, line) in (1..).zip(text.lines()) {
            let run: Run = serde_json::from_str(line).with_context(|| format!("line {at} is no move"))?;
            match kinds.iter_mut().find(|(name, _)| *name == run.kind) {
                Some((_, runs)) => runs.push(run),
                None => kinds.push((run.kind.clone(), vec![run])),
            }
        }
        ensure!(!kinds.is_empty(), "no moves are in it");
        let kinds = kinds.into_iter().map(|(name, runs)| Kind::of(name, runs, raw_bytes_s)).collect();
        Ok(Self { version: VERSION, note, environment: Machine::here(), raw_bytes_s, kinds })
    }

    /// How many times less than the peer's a kind's median of a metric is.
    pub(crate) fn times_less(&self, kind: &Kind, metric: usize) -> Option<f64> {
        let peer = self.kinds.iter().find(|kind| kind.name == PEER)?;
        let (theirs, ours) = (peer.medians[metric].1?, kind.medians[metric].1?);
        (kind.name != PEER && ours > 0.0).then(|| theirs / ours)
    }
}

/// The lower of two in the middle.
fn median(runs: &[Run], of: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
    let mut values: Vec<f64> = runs.iter().filter_map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: &str, pause: f64, resident: Option<f64>) -> String {
        let run = Run {
            kind: kind.into(),
            downtime_ms: 40.0,
            total_ms: 4000.0,
            resident_ms: resident,
            bytes: 1e8,
            cpu_ms: Cpu { source: 1.0, destination: 2.0 },
            guest: Guest {
                stall_us: Stalls { p99: 1.0, p999: 2.0, max: 3.0 },
                longest_pause_ms: pause,
                stood_still_ms: Some(10.0 + pause),
                lost_ms: 10.0,
                first_touch_us: 5.0,
            },
        };
        serde_json::to_string(&run).expect("plain numbers") + "\n"
    }

    #[test]
    fn medians_are_compared_with_the_peers() {
        let text = [
            line(PEER, 1000.0, None),
            line("pcvm-verbs", 90.0, Some(2000.0)),
            line("pcvm-verbs", 100.0, Some(2000.0)),
            line("pcvm-verbs", 700.0, Some(2000.0)),
        ];
        let summary = Summary::of(&text.concat(), String::new(), Some(1e8)).expect("four moves");
        let (peer, ours) = (&summary.kinds[0], &summary.kinds[1]);
        assert_eq!(summary.times_less(ours, 0), Some(10.0));
        assert_eq!(summary.times_less(peer, 0), None);
        assert_eq!((ours.of_raw, peer.of_raw), (Some(0.5), None));
    }

    #[test]
    fn what_is_no_move_is_refused() {
        assert!(Summary::of("", String::new(), None).is_err());
        let error = Summary::of(&(line("a", 1.0, None) + "{}\n"), String::new(), None).expect_err("line 2");
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
