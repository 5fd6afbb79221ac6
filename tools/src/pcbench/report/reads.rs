//! The plots of reads: latency by size, and the times of one size.

use plotters::prelude::*;
use postcopy_tools::ink::{axis_time, beside, quiet, series, text_style};
use postcopy_tools::size;

use super::plot::{Area, Drawn, PLOT_HEIGHT, Panel, SHORTEST_US, Series, decades, of_times};
use super::{Measurement, Report};

/// Room right of a plot for the names of its lines.
const NAMES: i32 = 90;
/// The page size, the one to look at closely if it was measured.
const PAGE: u32 = 4096;

/// Every plot that the report has values for.
pub(super) fn panels(report: &Report) -> Vec<Panel<'_>> {
    let mut panels = Vec::new();
    let shown = size::short(shown_size(report).into());
    if sizes(report).len() > 1 {
        panels.push(Panel {
            title: "Latency by size: median, and p99 (faint)".into(),
            about: "Medians, and p99 as the faint line above. Both axes logarithmic.",
            draw: Box::new(|area| by_size(area, report)),
        });
    }
    let percentiles = (
        format!("Percentiles at {shown}"),
        "How long the given part of all reads took at most. Further right is rarer.",
    );
    let over_the_run = (
        format!("Median and maximum over the run at {shown}"),
        "Median (dot) and maximum (faint dot above it) of each short interval; gaps are the turns of other \
         transports and sizes.",
    );
    panels.extend(of_times(&of_one_size(report), NAMES, [percentiles, over_the_run]));
    panels
}

fn transports(report: &Report) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for measurement in &report.measurements {
        if !names.contains(&measurement.transport.as_str()) {
            names.push(&measurement.transport);
        }
    }
    names
}

fn sizes(report: &Report) -> Vec<u32> {
    let mut sizes: Vec<u32> = report.measurements.iter().map(|measurement| measurement.bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// The size whose distribution is shown: a page if there is one, else the smallest.
fn shown_size(report: &Report) -> u32 {
    let sizes = sizes(report);
    if sizes.contains(&PAGE) { PAGE } else { sizes.first().copied().unwrap_or(PAGE) }
}

fn of_one_size(report: &Report) -> Vec<Series<'_>> {
    let bytes = shown_size(report);
    let of = |name: &str| report.measurements.iter().find(|m| m.transport == name && m.bytes == bytes);
    let line = |(ink, name): (usize, &str)| Some(Series { name: name.into(), ink, times: &of(name)?.times });
    transports(report).into_iter().enumerate().filter_map(line).collect()
}

fn by_size(area: &Area<'_>, report: &Report) -> Drawn {
    let value = |m: &Measurement, us: f64| (f64::from(m.bytes), us.max(SHORTEST_US));
    let (low, high) =
        decades(report.measurements.iter().flat_map(|m| [m.times.latency.p50_us, m.times.latency.p99_us]));
    let sizes = sizes(report);
    let (first, last) = (sizes.first().copied().unwrap_or(1), sizes.last().copied().unwrap_or(1));
    let span = f64::from(first)..f64::from(last) * 1.02;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(NAMES)
        .x_label_area_size(32)
        .y_label_area_size(80)
        .build_cartesian_2d(span.log_scale().base(2.0), (low..high).log_scale())?;
    quiet(&mut chart.configure_mesh())
        .disable_x_mesh()
        .x_labels(12)
        .x_label_formatter(&|bytes| size::short(bytes.round() as u64))
        .y_label_formatter(&|us| axis_time(*us))
        .draw()?;
    let mut ends = Vec::new();
    for (index, name) in transports(report).into_iter().enumerate() {
        let color = series(index).light;
        let mut own: Vec<&Measurement> = report.measurements.iter().filter(|m| m.transport == name).collect();
        own.sort_by_key(|m| m.bytes);
        let tails: Vec<_> = own.iter().map(|m| value(m, m.times.latency.p99_us)).collect();
        chart.draw_series([PathElement::new(tails, color.mix(0.35).stroke_width(2))])?;
        let points: Vec<_> = own.iter().map(|m| value(m, m.times.latency.p50_us)).collect();
        chart.draw_series([PathElement::new(points.clone(), color.stroke_width(2))])?;
        chart.draw_series(points.iter().map(|at| Circle::new(*at, 4, color.filled())))?;
        ends.extend(points.last().map(|end| (index, name.to_owned(), *end)));
    }
    for ((index, name, end), down) in beside(ends, (low, high), PLOT_HEIGHT) {
        let label = Text::new(name, (12, down - 8), text_style(series(index)));
        chart.draw_series([EmptyElement::at(end) + label])?;
    }
    Ok(())
}
