//! The page: one HTML file that needs nothing else, light or dark as the reader has it.

use std::fmt::Write;

use postcopy_engine::memory::PAGE_SIZE;
use postcopy_tools::ink;
use postcopy_tools::machine::Machine;
use postcopy_tools::text::escape;

use super::Comparison;
use super::input::Migration;
use super::plot::{self, Bar, Part, Series};
use super::table::{self, mebibytes, milliseconds};

/// Where pages came from.
const ORIGINS: [Part; 4] = [
    ("by fault", ink::VERMILION),
    ("by prepaging", ink::AMBER),
    ("by drain", ink::BLUE),
    ("zero, never sent", ink::GREY),
];
/// What downtime is made of.
const DOWNTIME: [Part; 3] =
    [("freeze and save", ink::BLUE), ("load", ink::AMBER), ("state on the way, handover", ink::GREY)];
const RESIDENT: [Part; 1] = [("resume to all resident", ink::GREEN)];

/// The whole page.
///
/// Errors: a plot cannot be drawn.
pub(super) fn page(comparison: &Comparison) -> anyhow::Result<String> {
    let Comparison { title, note, environment, migrations, .. } = comparison;
    let mut out = String::new();
    head(&mut out, title, note, environment);
    latency(&mut out, migrations)?;
    origins(&mut out, migrations)?;
    times(&mut out, migrations)?;
    numbers(&mut out, migrations);
    out.push_str("</main>\n</body>\n</html>\n");
    Ok(out)
}

fn head(out: &mut String, title: &str, note: &str, environment: &Machine) {
    let (note, environment) = (escape(note), escape(&environment.line()));
    out.push_str(&ink::page_head(title));
    if !note.is_empty() {
        let _ = writeln!(out, "<p>{note}</p>");
    }
    let _ = writeln!(out, "<p class=\"machine\">Measured on: {environment}</p>");
}

fn figure(out: &mut String, title: &str, about: &str, parts: &[Part], svg: &str) {
    let _ = writeln!(out, "<section>\n<h2>{title}</h2>\n<p>{about}</p>\n<figure>");
    if parts.len() > 1 {
        out.push_str("<figcaption>");
        for (name, color) in parts {
            let _ = write!(
                out,
                "<span class=\"key\"><svg width=\"14\" height=\"14\" aria-hidden=\"true\"><rect width=\"14\" \
                 height=\"14\" rx=\"3\" fill=\"{}\"/></svg>{name}</span>",
                color.css()
            );
        }
        out.push_str("</figcaption>\n");
    }
    let _ = writeln!(out, "{svg}</figure>\n</section>");
}

fn latency(out: &mut String, migrations: &[Migration]) -> anyhow::Result<()> {
    let faults = migrations.iter().filter(|m| m.report.pager.stages.total.count > 0).map(|m| {
        let stage = &m.report.pager.stages.total;
        let percentiles = [stage.p50_us, stage.p90_us, stage.p99_us, stage.p999_us, stage.max_us];
        Series { label: m.label.clone(), percentiles }
    });
    let about =
        "From the fault seen to the page published, for faults that went to the wire. Logarithmic axis.";
    curves(out, "Fault latency", about, faults.collect())?;
    let stalls = migrations.iter().filter_map(|m| {
        let stall = m.guest.as_ref()?.stall_us;
        let percentiles = [stall.p50, stall.p90, stall.p99, stall.p999, stall.max];
        Some(Series { label: m.label.clone(), percentiles })
    });
    let about = "Every access that the guest's program timed, from its last reset to its report: before, \
                 during and after the move, pages that were there already among them. A long setup brings many \
                 of those: compare curves only where the numbers of accesses, below, are alike.";
    curves(out, "Accesses as the guest saw them", about, stalls.collect())
}

fn curves(out: &mut String, title: &str, about: &str, series: Vec<Series>) -> anyhow::Result<()> {
    if !series.is_empty() {
        figure(out, title, about, &[], &plot::percentiles(title, &series)?);
    }
    Ok(())
}

fn origins(out: &mut String, migrations: &[Migration]) -> anyhow::Result<()> {
    let bar = |m: &Migration| {
        let pages = &m.report.pager.pages;
        let counts = [pages.fault_pages, pages.prepage_pages, pages.drain_pages, pages.zero_pages];
        Bar {
            label: m.label.clone(),
            parts: counts.map(|pages| mebibytes(pages.saturating_mul(PAGE_SIZE))).to_vec(),
        }
    };
    let bars: Vec<Bar> = migrations.iter().map(bar).collect();
    let title = "Where pages came from";
    let svg = plot::bars(title, "MiB", &ORIGINS, &bars)?;
    figure(out, title, "The guest's memory by what brought each page.", &ORIGINS, &svg);
    Ok(())
}

fn times(out: &mut String, migrations: &[Migration]) -> anyhow::Result<()> {
    let downtime = |m: &Migration| {
        let report = &m.report;
        let rest = report.downtime_us.saturating_sub(report.freeze_us.saturating_add(report.load_us));
        Bar {
            label: m.label.clone(),
            parts: [report.freeze_us, report.load_us, rest].map(milliseconds).to_vec(),
        }
    };
    let bars: Vec<Bar> = migrations.iter().map(downtime).collect();
    let svg = plot::bars("Downtime", "ms", &DOWNTIME, &bars)?;
    let about = "From the freeze at the source to the news that the guest runs at the destination.";
    figure(out, "Downtime", about, &DOWNTIME, &svg);
    let resident =
        |m: &Migration| Bar { label: m.label.clone(), parts: vec![milliseconds(m.report.resident_us)] };
    let bars: Vec<Bar> = migrations.iter().map(resident).collect();
    let svg = plot::bars("Time to resident", "ms", &RESIDENT, &bars)?;
    let about = "From the guest's resume to its last page there, the guest running.";
    figure(out, "Time to resident", about, &RESIDENT, &svg);
    Ok(())
}

fn numbers(out: &mut String, migrations: &[Migration]) {
    out.push_str("<section>\n<h2>Numbers</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th></th>");
    for migration in migrations {
        let _ = write!(out, "<th scope=\"col\">{}</th>", escape(&migration.label));
    }
    out.push_str("</tr></thead>\n");
    for section in table::sections(migrations) {
        let columns = migrations.len() + 1;
        let _ = writeln!(
            out,
            "<tbody>\n<tr class=\"group\"><th scope=\"rowgroup\" colspan=\"{columns}\">{}</th></tr>",
            section.title
        );
        for row in &section.rows {
            let class = if row.name.starts_with(' ') { " class=\"part\"" } else { "" };
            let _ = write!(out, "<tr><th scope=\"row\"{class}>{}</th>", escape(row.name.trim()));
            for cell in &row.cells {
                let _ = write!(out, "<td>{}</td>", escape(cell));
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody>\n");
    }
    out.push_str("</table></div>\n</section>\n");
}
