//! The results as text, and as one self-contained page.

use std::fmt::Write as _;

use super::figure;
use super::suite::{Comparison, FIGURE, PROCESSES, Results, TABLE, WORKING_SETS, best_fixed};

/// Tables for a terminal.
pub(crate) fn text(results: &Results) -> String {
    let mut out = String::new();
    if !results.table.is_empty() {
        sequential(&mut out, results);
        quicksort(&mut out, results);
    }
    suite(&mut out, &results.suite);
    out
}

fn line(out: &mut String, head: &str, cells: impl Iterator<Item = String>) {
    let cells: String = cells.map(|cell| format!("{cell:>9}")).collect();
    let _ = writeln!(out, "{head:<36}{cells}");
}

fn sequential(out: &mut String, results: &Results) {
    let sets = results.table[0].shares.len();
    out.push_str("Sequential stress: network faults among first touches, %, over 1 Gb/s\n");
    line(out, "working set, MiB", WORKING_SETS[..sets].iter().map(u64::to_string));
    for (name, policies, paper) in TABLE {
        line(out, &format!("{name} (the paper)"), paper[..sets].iter().map(|share| format!("{share:.0}")));
        for row in results.table.iter().filter(|row| policies.contains(&row.policy.as_str())) {
            line(out, &format!("  {}", row.policy), row.shares.iter().map(|share| format!("{share:.2}")));
        }
    }
}

fn quicksort(out: &mut String, results: &Results) {
    out.push_str("\nQuicksort in P processes: network faults, over 1 Gb/s\n");
    line(out, "P", PROCESSES.iter().map(u64::to_string));
    for (at, row) in results.figure.iter().enumerate() {
        line(out, &row.name, row.faults.iter().map(|faults| format!("{faults:.0}")));
        if let Some((_, _, _, paper)) = FIGURE.get(at) {
            line(out, "  the paper", paper.iter().map(u64::to_string));
        }
    }
}

fn suite(out: &mut String, suite: &[Comparison]) {
    out.push_str(
        "\nadaptive beside the fixed policy under which the guest waits least, and beside each best\n",
    );
    let head = ["faults", "stall ms", "best", "stall ms", "faults/", "stall/", "fewest"];
    line(out, "trace", head.map(str::to_owned).into_iter());
    let mut wire = "";
    for comparison in suite {
        if wire != comparison.wire {
            wire = comparison.wire;
            let _ = writeln!(out, "over {wire}");
        }
        let (name, best) = best_fixed(comparison);
        let (_, adaptive) = comparison.outcomes.last().expect("the default is run too");
        let fewest = comparison.outcomes.iter().map(|(_, outcome)| outcome.network_faults).min();
        let ms = |ns: u64| format!("{:.2}", ns as f64 / 1e6);
        let ratio = |of: u64, to: u64| format!("{:.2}", of as f64 / to.max(1) as f64);
        let cells = [
            adaptive.network_faults.to_string(),
            ms(adaptive.stall_ns),
            best.network_faults.to_string(),
            ms(best.stall_ns),
            ratio(adaptive.network_faults, best.network_faults),
            ratio(adaptive.stall_ns, best.stall_ns),
            fewest.unwrap_or(0).to_string(),
        ];
        line(out, &format!("  {}  ({name})", comparison.trace), cells.into_iter());
    }
}

/// A page with the tables and the figure.
pub(crate) fn page(results: &Results) -> anyhow::Result<String> {
    let drawing = if results.figure.is_empty() { String::new() } else { figure::svg(results)? };
    let tables = text(results).replace('&', "&amp;").replace('<', "&lt;");
    Ok(format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>The paper's evaluation</title>\
         <style>body{{font:16px sans-serif;max-width:60em;margin:2em auto}}pre{{overflow-x:auto}}</style>\
         <h1>The post-copy paper's evaluation, in virtual time</h1>{drawing}<pre>{tables}</pre></html>\n"
    ))
}
