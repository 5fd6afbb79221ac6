//! The medians as text.

use std::fmt::Write as _;

use super::runs::{METRICS, PEER, Summary};

/// A column a kind, a row a metric; under it how many times less than the peer's it is.
pub(crate) fn text(summary: &Summary) -> String {
    let mut out = String::new();
    let moves: Vec<usize> = summary.kinds.iter().map(|kind| kind.runs.len()).collect();
    let fewest = moves.iter().min().copied().unwrap_or(0);
    let _ = writeln!(out, "medians of {fewest} moves each. {}", summary.note);
    let widest = summary.kinds.iter().map(|kind| kind.name.len()).max().unwrap_or(0);
    let width = (widest + 1).max(19);
    row(&mut out, width, "", summary.kinds.iter().map(|kind| kind.name.clone()));
    for (at, metric) in METRICS.iter().enumerate() {
        let cells = summary.kinds.iter().map(|kind| kind.medians[at].1.map_or("".into(), number));
        row(&mut out, width, &format!("{}, {}", metric.name, metric.unit), cells);
        let less: Vec<_> = summary.kinds.iter().map(|kind| summary.times_less(kind, at)).collect();
        if metric.compared && less.iter().any(Option::is_some) {
            let cells = less.into_iter().map(|less| less.map_or("".into(), |less| format!("{less:.1} ×")));
            row(&mut out, width, &format!("  less than {PEER}"), cells);
        }
    }
    if let Some(raw) = summary.raw_bytes_s {
        let cells = summary.kinds.iter().map(|kind| kind.of_raw.map_or("".into(), |of| format!("{of:.2}")));
        row(&mut out, width, &format!("of ib_read_bw's {:.0} MB/s", raw / 1e6), cells);
    }
    out
}

fn row(out: &mut String, width: usize, head: &str, cells: impl Iterator<Item = String>) {
    let cells: String = cells.map(|cell| format!("{cell:>width$}")).collect();
    let _ = writeln!(out, "{head:<34}{cells}");
}

/// With three digits that matter.
pub(crate) fn number(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 1.0 => format!("{value:.1}"),
        value => format!("{value:.3}"),
    }
}
