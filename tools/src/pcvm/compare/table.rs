//! The table: metrics as rows, migrations as columns. The page shows the same one.

use std::fmt::Write;

use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::stats::Percentiles;

use super::input::{GuestReport, Migration};
use crate::report::wire;

/// In place of what a migration has no number for.
const NOTHING: &str = "-";

/// Rows that belong together.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) title: &'static str,
    pub(super) rows: Vec<Row>,
}

/// One metric of every migration.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) cells: Vec<String>,
}

/// Bytes as MiB.
pub(super) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Microseconds as milliseconds.
pub(super) fn milliseconds(micros: u64) -> f64 {
    micros as f64 / 1e3
}

/// The table of these migrations, section by section.
pub(super) fn sections(migrations: &[Migration]) -> Vec<Section> {
    let mut all = vec![times(migrations), pages(migrations), faults(migrations)];
    if migrations.iter().any(|migration| migration.guest.is_some()) {
        all.push(guest(migrations));
    }
    all
}

fn row(migrations: &[Migration], name: impl Into<String>, cell: impl Fn(&Migration) -> String) -> Row {
    Row { name: name.into(), cells: migrations.iter().map(cell).collect() }
}

fn times(of: &[Migration]) -> Section {
    let ms = |micros: u64| format!("{:.2}", milliseconds(micros));
    let rows = vec![
        row(of, "transport", |m| wire(&m.report)),
        row(of, "guest memory, MiB", |m| format!("{:.0}", mebibytes(m.report.memory_bytes))),
        row(of, "downtime, ms", |m| ms(m.report.downtime_us)),
        row(of, "  of that freeze, ms", |m| ms(m.report.freeze_us)),
        row(of, "  of that load, ms", |m| ms(m.report.load_us)),
        row(of, "resume to all resident, ms", |m| ms(m.report.resident_us)),
        row(of, "setup, guest running, ms", |m| ms(m.report.setup_us)),
        row(of, "total, ms", |m| ms(m.report.total_us)),
    ];
    Section { title: "Times", rows }
}

fn pages(of: &[Migration]) -> Section {
    let cell = |pages: u64, bytes: u64| format!("{pages} ({:.1} MiB)", mebibytes(bytes));
    let rows = vec![
        row(of, "by fault", |m| cell(m.report.pager.pages.fault_pages, m.report.pager.fault_bytes)),
        row(of, "by prepaging", |m| {
            let pages = m.report.pager.pages.prepage_pages;
            cell(pages, pages * PAGE_SIZE)
        }),
        row(of, "by drain", |m| cell(m.report.pager.pages.drain_pages, m.report.pager.bulk_bytes)),
        row(of, "zero, never sent", |m| m.report.pager.pages.zero_pages.to_string()),
    ];
    Section { title: "Pages", rows }
}

fn faults(of: &[Migration]) -> Section {
    let mut rows = vec![
        row(of, "network faults", |m| m.report.pager.pages.network_faults.to_string()),
        row(of, "minor faults", |m| m.report.pager.pages.minor_faults.to_string()),
        row(of, "faults on zero pages", |m| m.report.pager.pages.zero_faults.to_string()),
    ];
    type Stage = fn(&Migration) -> &Percentiles;
    let stages: [(&str, Stage); 4] = [
        ("post", |m| &m.report.pager.stages.post),
        ("read", |m| &m.report.pager.stages.read),
        ("install", |m| &m.report.pager.stages.install),
        ("whole fault", |m| &m.report.pager.stages.total),
    ];
    for (name, stage) in stages {
        rows.push(row(of, format!("{name}, p50 / p99 / max, µs"), |m| {
            let Percentiles { count, p50_us, p99_us, max_us, .. } = stage(m);
            if *count == 0 { NOTHING.into() } else { triple(*p50_us, *p99_us, *max_us) }
        }));
    }
    Section { title: "Faults", rows }
}

fn triple(p50: f64, p99: f64, max: f64) -> String {
    format!("{p50:.1} / {p99:.1} / {max:.1}")
}

fn guest(of: &[Migration]) -> Section {
    let from = |cell: fn(&GuestReport) -> String| {
        move |m: &Migration| m.guest.as_ref().map_or_else(|| NOTHING.into(), cell)
    };
    let rows = vec![
        row(of, "accesses measured", from(|g| g.stall_us.count.to_string())),
        row(
            of,
            "access, p50 / p99 / max, µs",
            from(|g| triple(g.stall_us.p50, g.stall_us.p99, g.stall_us.max)),
        ),
        row(of, "access, p99.9, µs", from(|g| format!("{:.1}", g.stall_us.p999))),
        row(of, "longest pause, ms", from(|g| format!("{:.2}", g.longest_pause_ms))),
        row(of, "pages verified", from(|g| g.pages.to_string())),
        row(of, "pages wrong", from(|g| g.bad.to_string())),
    ];
    Section { title: "As the guest saw it", rows }
}

/// The table as text.
pub(super) fn text(migrations: &[Migration]) -> String {
    let sections = sections(migrations);
    let rows = || sections.iter().flat_map(|section| &section.rows);
    let name_width = rows().map(|row| width(&row.name)).max().unwrap_or(0);
    let columns = migrations.iter().enumerate().map(|(column, migration)| {
        rows().map(|row| width(&row.cells[column])).chain([width(&migration.label)]).max().unwrap_or(0)
    });
    let widths: Vec<usize> = columns.collect();
    let mut out = String::new();
    line(&mut out, name_width, &widths, "", migrations.iter().map(|migration| &migration.label));
    for section in &sections {
        let _ = writeln!(out, "\n{}", section.title);
        for row in &section.rows {
            line(&mut out, name_width, &widths, &row.name, row.cells.iter());
        }
    }
    out
}

fn width(text: &str) -> usize {
    text.chars().count()
}

fn line<'a>(
    out: &mut String,
    name_width: usize,
    widths: &[usize],
    name: &str,
    cells: impl Iterator<Item = &'a String>,
) {
    let _ = write!(out, "  {name:<name_width$}");
    for (cell, width) in cells.zip(widths) {
        let _ = write!(out, "  {cell:>width$}");
    }
    out.push('\n');
}
