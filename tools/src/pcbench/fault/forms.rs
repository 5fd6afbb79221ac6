//! The report of `pcbench fault` for other programs, as plots, and as a page.

use std::fmt::Write as _;

use postcopy_tools::text::escape;

use super::report::{FaultReport, Faulted};
use super::table::{how, title};
use crate::report::Times;
use crate::report::formats::{CSV_TIMES, csv_times, osu_block, perftest_latencies};
use crate::report::page::{Frame, section};
use crate::report::plot::{Panel, Series, of_times};
use crate::report::table::time;

/// Bytes that a stall is for.
const PAGE: u32 = 4096;
/// Room right of a plot for the names of its lines.
const NAMES: i32 = 190;

const FIGURES: [&str; 17] = [
    "faults by",
    "drain",
    "stalls",
    "p50",
    "95 % CI",
    "× raw",
    "p90",
    "p99",
    "p99.9",
    "max",
    "resident, ms",
    "drain, MB/s",
    "touched",
    "fetched",
    "prepaged",
    "hits",
    "waste",
];

/// One line a case, with a header. No field needs quoting: names and numbers only.
pub(super) fn csv(report: &FaultReport) -> String {
    let mut out = format!(
        "transport,faults_by,drain,touched,stalled,{CSV_TIMES},times_raw,resident_ms,drain_mb_s,touched_pages,\
         fault_pages,prepage_pages,drain_pages,hit_pages,wasted_pages\n"
    );
    for case in &report.cases {
        let ([by, drain], pages) = (case.case.words(), &case.pager.pages);
        let _ = writeln!(
            out,
            "{},{by},{drain},{},{},{},{:.3},{:.3},{:.3},{},{},{},{},{},{}",
            report.transport,
            case.touched,
            case.stalled,
            csv_times(&case.times),
            case.times_raw,
            case.resident_ms,
            case.drain_mb_s,
            case.touched_pages,
            pages.fault_pages,
            pages.prepage_pages,
            pages.drain_pages,
            case.hit_pages,
            case.wasted_pages
        );
    }
    out
}

/// What was measured, by name: raw reads, and stalls of each case.
fn named(report: &FaultReport) -> impl Iterator<Item = (String, &Times)> {
    let cases = report.cases.iter().map(|case| (name(case), &case.times));
    std::iter::once(("raw read".to_owned(), &report.raw_read)).chain(cases)
}

fn name(case: &Faulted) -> String {
    let [by, drain] = case.case.words();
    if case.case.drain { format!("{by}, {drain}") } else { format!("{by}, no drain") }
}

/// What ib_read_lat prints, of raw reads and of stalls, a block each.
pub(super) fn perftest(report: &FaultReport) -> String {
    let mut out = String::new();
    for (name, times) in named(report) {
        let what = format!("{}, {name}", report.transport);
        perftest_latencies(&mut out, &what, 1, std::iter::once((PAGE, times)));
    }
    out
}

/// What osu_get_latency prints (the mean), of raw reads and of stalls, a block each.
pub(super) fn osu(report: &FaultReport) -> String {
    let mut out = String::new();
    for (name, times) in named(report) {
        let what = format!("stall over {}, {name}", report.transport);
        osu_block(&mut out, &what, "Latency (us)", std::iter::once((PAGE, times.mean_us)));
    }
    out
}

/// The plots.
pub(super) fn panels(report: &FaultReport) -> Vec<Panel<'_>> {
    let series = |(ink, (name, times))| Series { name, ink, times };
    let shown: Vec<_> = named(report).enumerate().map(series).collect();
    let percentiles = (
        "Percentiles of stalls".to_owned(),
        "How long the given part of all stalls took at most, beside raw reads of 4 KiB. Further right is rarer.",
    );
    let over_the_run = (
        "Median and maximum over the run".to_owned(),
        "Median (dot) and maximum (faint dot above it) of each short interval; gaps are the turns of other cases.",
    );
    of_times(&shown, NAMES, [percentiles, over_the_run]).into()
}

/// One HTML page.
///
/// Errors: a plot cannot be drawn.
pub(super) fn page(report: &FaultReport) -> anyhow::Result<String> {
    let (title, how) = (title(report), how(report));
    let frame = Frame { title, how, at: &report.at, verdict: &report.verdict, panels: panels(report) };
    frame.around(&(figures(report) + &stages(report)))
}

fn row(out: &mut String, cells: &[String]) {
    let (head, rest) =
        cells.split_first().map_or((String::new(), &[][..]), |(head, rest)| (escape(head), rest));
    let _ = write!(out, "<tr><th scope=\"row\">{head}</th>");
    rest.iter().for_each(|cell| {
        let _ = write!(out, "<td>{}</td>", escape(cell));
    });
    out.push_str("</tr>\n");
}

fn figures(report: &FaultReport) -> String {
    let mut rows = String::new();
    for case in &report.cases {
        let ([by, drain], l, pages) = (case.case.words(), &case.times.latency, &case.pager.pages);
        let ci = &case.times.median_ci;
        let counts =
            [case.touched_pages, pages.fault_pages, pages.prepage_pages, case.hit_pages, case.wasted_pages];
        let mut cells = vec![by, drain, case.stalled.to_string(), time(l.p50_us)];
        cells.push(format!("{}–{}", time(ci.low_us), time(ci.high_us)));
        cells.push(format!("{:.2}", case.times_raw));
        cells.extend([l.p90_us, l.p99_us, l.p999_us, l.max_us].map(time));
        cells.extend([case.resident_ms, case.drain_mb_s].map(|value| format!("{value:.0}")));
        cells.extend(counts.map(|count| count.to_string()));
        row(&mut rows, &cells);
    }
    let about = format!(
        "Stalls in µs; percentiles are medians over the rounds, the maximum is of all. A raw read of 4 KiB takes {} µs \
         (p50), {} (p99); raw bulk reads carry {:.0} MB/s.",
        time(report.raw_read.latency.p50_us),
        time(report.raw_read.latency.p99_us),
        report.raw_bulk_mb_s
    );
    section("Figures", &about, &FIGURES, &rows)
}

fn stages(report: &FaultReport) -> String {
    let mut rows = String::new();
    for case in &report.cases {
        let ([by, drain], stages) = (case.case.words(), &case.pager.stages);
        let each = [&stages.post, &stages.read, &stages.install, &stages.total];
        let cells = each.map(|stage| format!("{} / {}", time(stage.p50_us), time(stage.p99_us)));
        row(&mut rows, &[vec![by, drain], cells.to_vec()].concat());
    }
    let about = "Of the faults that went to the wire, as who served them saw them: µs, p50 / p99.";
    section("Stages of a fault", about, &["faults by", "drain", "post", "read", "install", "total"], &rows)
}
