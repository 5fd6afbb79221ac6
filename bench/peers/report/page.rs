//! The page: one HTML file that needs nothing else, light or dark as the reader has it.

use std::fmt::Write as _;

use anyhow::anyhow;
use plotters::prelude::*;
use postcopy_tools::ink::{self, TEXT, labelled, quiet, text_style};
use postcopy_tools::text::escape;

use super::runs::{Kind, METRICS, Metric, Summary};
use super::table;

const WIDTH: u32 = 960;
const LABELS: u32 = 170;

/// A plot for each metric that is compared, and the table.
///
/// Errors: a plot cannot be drawn.
pub(crate) fn page(summary: &Summary) -> anyhow::Result<String> {
    let mut out = ink::page_head("Moves by QEMU and by this engine, side by side");
    let (note, environment) = (escape(&summary.note), escape(&summary.environment.line()));
    let _ = writeln!(out, "<p>{note}</p>\n<p class=\"machine\">Measured on: {environment}</p>");
    for (at, metric) in METRICS.iter().enumerate().filter(|(_, metric)| metric.compared) {
        let title = format!("{}, {}", metric.name, metric.unit);
        let svg = plot(summary, at, metric).map_err(|error| anyhow!("drawing a plot: {error}"))?;
        let svg = labelled(&svg, &title);
        let _ = writeln!(out, "<section>\n<h2>{title}</h2>\n<figure>{svg}</figure>\n</section>");
    }
    let table = escape(&table::text(summary));
    let _ = writeln!(
        out,
        "<section>\n<h2>All of it</h2>\n<pre style=\"overflow-x:auto\">{table}</pre>\n</section>"
    );
    out.push_str("</main>\n</body>\n</html>\n");
    Ok(out)
}

/// A bar to each kind's median, a dot for each move.
fn plot(summary: &Summary, at: usize, metric: &Metric) -> Result<String, Box<dyn std::error::Error>> {
    let values = |kind: &Kind| kind.runs.iter().filter_map(metric.of).collect::<Vec<f64>>();
    let kinds: Vec<&Kind> = summary.kinds.iter().filter(|kind| kind.medians[at].1.is_some()).collect();
    let widest = kinds.iter().flat_map(|kind| values(kind)).fold(f64::MIN_POSITIVE, f64::max);
    let mut svg = String::new();
    {
        let height = 60 + 40 * kinds.len() as u32;
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let rows = i32::try_from(kinds.len())?;
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .margin_right(90)
            .x_label_area_size(30)
            .y_label_area_size(LABELS)
            .build_cartesian_2d(0.0..widest, (0..rows - 1).into_segmented())?;
        let label = |row: &SegmentValue<i32>| match row {
            SegmentValue::CenterOf(row) => usize::try_from(rows - 1 - row)
                .ok()
                .and_then(|at| kinds.get(at))
                .map_or(String::new(), |kind| kind.name.clone()),
            _ => String::new(),
        };
        quiet(&mut chart.configure_mesh())
            .disable_y_mesh()
            .x_labels(6)
            .y_labels(kinds.len())
            .y_label_formatter(&label)
            .draw()?;
        for (row, kind) in (0..rows).rev().zip(&kinds) {
            let color = if kind.name.starts_with("qemu") { ink::GREY } else { ink::BLUE };
            let median = kind.medians[at].1.unwrap_or_default();
            let corners = [(0.0, SegmentValue::Exact(row)), (median, SegmentValue::Exact(row + 1))];
            let mut bar = Rectangle::new(corners, color.light.filled());
            bar.set_margin(8, 8, 0, 0);
            chart.draw_series([bar])?;
            let dots = values(kind).into_iter().map(|value| (value, SegmentValue::CenterOf(row)));
            chart.draw_series(dots.map(|place| Circle::new(place, 4, TEXT.light.stroke_width(1))))?;
            let end = values(kind).into_iter().fold(median, f64::max);
            let text = Text::new(table::number(median), (10, -8), text_style(TEXT));
            chart.draw_series([EmptyElement::at((end, SegmentValue::CenterOf(row))) + text])?;
        }
        root.present()?;
    }
    Ok(svg)
}
