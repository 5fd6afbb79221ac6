//! The plots: latency by size, percentiles of one size, latencies over the run.
//!
//! Each is drawn on any area, so that the page has three pictures and `--plot` one.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;
use postcopy_tools::ink::{FONT, TEXT, axis_time, labelled, quiet, series, text_style};
use postcopy_tools::size;

use super::{Measurement, Report};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 400;
/// Room right of a plot for the names of its lines.
const NAMES: i32 = 90;
/// Shortest time that a logarithmic axis shows, in µs.
const SHORTEST_US: f64 = 0.01;
/// The page size, the one to look at closely if it was measured.
const PAGE: u32 = 4096;

/// A plot with its title and what it shows.
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) about: &'static str,
    pub(super) svg: String,
}

/// A line: its name, its place among the transports, its points.
struct Line {
    name: String,
    ink: usize,
    points: Vec<(f64, f64)>,
}

/// Every plot that the report has values for.
///
/// Errors: a plot cannot be drawn.
pub(super) fn plots(report: &Report) -> anyhow::Result<Vec<Plot>> {
    let mut plots = Vec::new();
    let shown = size::short(shown_size(report).into());
    if sizes(report).len() > 1 {
        let title = "Latency by size".to_owned();
        let about = "Medians, and p99 as the faint line above. Both axes logarithmic.";
        plots.push(Plot { svg: alone(&title, |area| by_size(area, report))?, title, about });
    }
    let title = format!("Percentiles at {shown}");
    let about = "How long the given part of all reads took at most. Further right is rarer.";
    plots.push(Plot { svg: alone(&title, |area| percentiles(area, report))?, title, about });
    let title = format!("Over the run at {shown}");
    let about = "Median (dot) and maximum (faint dot above it) of each short interval; gaps are the turns of other \
                 transports and sizes.";
    plots.push(Plot { svg: alone(&title, |area| timeline(area, report))?, title, about });
    Ok(plots)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing a plot: {error}")
}

fn alone(title: &str, draw: impl Fn(&Area<'_>) -> Drawn) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        draw(&root).map_err(failed)?;
        root.present().map_err(failed)?;
    }
    Ok(labelled(&svg, title))
}

/// All plots as one picture on white.
///
/// Errors: a plot cannot be drawn.
pub(super) fn picture(report: &Report) -> anyhow::Result<String> {
    let has_sizes = sizes(report).len() > 1;
    let count = if has_sizes { 3 } else { 2 };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, count * (HEIGHT + 40))).into_drawing_area();
        draw_all(&root, report, has_sizes, count as usize).map_err(failed)?;
        root.present().map_err(failed)?;
    }
    Ok(labelled(&svg, "pcbench: latency of one-sided reads"))
}

fn draw_all(root: &Area<'_>, report: &Report, has_sizes: bool, count: usize) -> Drawn {
    root.fill(&WHITE)?;
    let shown = size::short(shown_size(report).into());
    let mut areas = root.split_evenly((count, 1)).into_iter();
    let heading = (FONT.0, 20).into_font().color(&TEXT.light);
    let mut next = |title: &str| -> Result<Area<'_>, Box<dyn std::error::Error>> {
        Ok(areas.next().ok_or("no room for a plot")?.titled(title, heading.clone())?)
    };
    if has_sizes {
        by_size(&next("Latency by size: median, and p99 (faint)")?, report)?;
    }
    percentiles(&next(&format!("Percentiles at {shown}"))?, report)?;
    timeline(&next(&format!("Median and maximum over the run at {shown}"))?, report)
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

fn shown(report: &Report) -> Vec<(usize, &Measurement)> {
    let bytes = shown_size(report);
    let of = |name: &str| report.measurements.iter().find(|m| m.transport == name && m.bytes == bytes);
    transports(report).into_iter().enumerate().filter_map(|(index, name)| Some((index, of(name)?))).collect()
}

/// Decades around all values, in µs.
fn decades<'a>(values: impl Iterator<Item = f64> + 'a) -> (f64, f64) {
    let (low, high) = values
        .map(|us| us.max(SHORTEST_US))
        .fold((f64::INFINITY, SHORTEST_US), |(low, high), us| (low.min(us), high.max(us)));
    (10f64.powf(low.min(high).log10().floor()), 10f64.powf((high * 1.1).log10().ceil()))
}

fn by_size(area: &Area<'_>, report: &Report) -> Drawn {
    let value = |m: &Measurement, us: f64| (f64::from(m.bytes), us.max(SHORTEST_US));
    let (low, high) = decades(report.measurements.iter().flat_map(|m| [m.latency.p50_us, m.latency.p99_us]));
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
        let tails: Vec<_> = own.iter().map(|m| value(m, m.latency.p99_us)).collect();
        chart.draw_series([PathElement::new(tails, color.mix(0.35).stroke_width(2))])?;
        let points: Vec<_> = own.iter().map(|m| value(m, m.latency.p50_us)).collect();
        chart.draw_series([PathElement::new(points.clone(), color.stroke_width(2))])?;
        chart.draw_series(points.iter().map(|at| Circle::new(*at, 4, color.filled())))?;
        ends.extend(points.last().map(|end| (index, name.to_owned(), *end)));
    }
    for (index, name, end, down) in beside(ends, low, high) {
        let label = Text::new(name, (12, down - 8), text_style(series(index)));
        chart.draw_series([EmptyElement::at(end) + label])?;
    }
    Ok(())
}

/// Names of lines beside their ends, moved down where they would cover each other.
fn beside(
    ends: Vec<(usize, String, (f64, f64))>,
    low: f64,
    high: f64,
) -> Vec<(usize, String, (f64, f64), i32)> {
    const LINE: i32 = 18;
    let pixel = |us: f64| (f64::from(HEIGHT - 52) * (high / us).ln() / (high / low).ln()) as i32;
    let mut sorted = ends;
    sorted.sort_by(|a, b| b.2.1.total_cmp(&a.2.1));
    let mut free = i32::MIN;
    let place = |(index, name, end): (usize, String, (f64, f64))| {
        let wanted = pixel(end.1);
        let given = wanted.max(free);
        free = given + LINE;
        (index, name, end, given - wanted)
    };
    sorted.into_iter().map(place).collect()
}

/// A quantile as a distance: 0 at 0 %, 1 at 90 %, 2 at 99 %, …
fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile).max(1e-9).log10()
}

/// The points of a percentile curve, up to the rank of the maximum.
fn curve(measurement: &Measurement) -> Vec<(f64, f64)> {
    let histogram = &measurement.samples.histogram;
    let count = histogram.len().max(1) as f64;
    let (least, most) = (measurement.pooled.min_us, measurement.pooled.max_us);
    let last = nines(1.0 - 1.0 / count);
    let steps = 200;
    let at = |step: i32| {
        let x = last * f64::from(step) / f64::from(steps);
        let us = histogram.value_at_quantile(1.0 - 10f64.powf(-x)) as f64 / 1e3;
        (x, us.clamp(least, most).max(SHORTEST_US))
    };
    let mut points: Vec<(f64, f64)> = (0..=steps).map(at).collect();
    points.extend(points.last().map(|(x, _)| (*x, most.max(SHORTEST_US))));
    points
}

fn percentiles(area: &Area<'_>, report: &Report) -> Drawn {
    let lines: Vec<Line> = shown(report)
        .into_iter()
        .map(|(ink, m)| Line { name: m.transport.clone(), ink, points: curve(m) })
        .collect();
    let all = || lines.iter().flat_map(|line| line.points.iter());
    let (low, high) = decades(all().map(|point| point.1));
    let right = all().map(|point| point.0).fold(2.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(NAMES)
        .x_label_area_size(32)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..right, (low..high).log_scale())?;
    quiet(&mut chart.configure_mesh())
        .x_labels(right.floor() as usize + 1)
        .x_label_formatter(&|x| percent(*x))
        .y_label_formatter(&|us| axis_time(*us))
        .draw()?;
    let mut ends = Vec::new();
    for line in &lines {
        let color = series(line.ink).light;
        chart.draw_series([PathElement::new(line.points.clone(), color.stroke_width(2))])?;
        ends.extend(line.points.last().map(|end| (line.ink, line.name.clone(), *end)));
    }
    for (index, name, end, down) in beside(ends, low, high) {
        let label = Text::new(name, (10, down - 8), text_style(series(index)));
        chart.draw_series([EmptyElement::at(end) + label])?;
    }
    Ok(())
}

/// A distance of [`nines`] as the percentile that it is.
fn percent(x: f64) -> String {
    match x {
        x if x < 0.5 => "0 %".into(),
        x => {
            format!("{:.*} %", (x.round() as usize).saturating_sub(2), 100.0 * (1.0 - 10f64.powf(-x.round())))
        }
    }
}

fn timeline(area: &Area<'_>, report: &Report) -> Drawn {
    let shown = shown(report);
    let all = || shown.iter().flat_map(|(_, m)| m.timeline.iter());
    let (low, high) = decades(all().flat_map(|moment| [moment.p50_us, moment.max_us]));
    let end = all().map(|moment| moment.start_s + moment.seconds).fold(0.001, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(NAMES)
        .x_label_area_size(32)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..end * 1.01, (low..high).log_scale())?;
    quiet(&mut chart.configure_mesh())
        .disable_x_mesh()
        .x_labels(8)
        .x_label_formatter(&|s| format!("{s} s"))
        .y_label_formatter(&|us| axis_time(*us))
        .draw()?;
    let mut ends = Vec::new();
    for (index, measurement) in &shown {
        let color = series(*index).light;
        let moments = &measurement.timeline;
        let x = |moment: &super::measurement::Moment| moment.start_s + moment.seconds / 2.0;
        chart.draw_series(
            moments
                .iter()
                .map(|m| Circle::new((x(m), m.max_us.max(SHORTEST_US)), 2, color.mix(0.35).filled())),
        )?;
        chart.draw_series(
            moments.iter().map(|m| Circle::new((x(m), m.p50_us.max(SHORTEST_US)), 3, color.filled())),
        )?;
        let last = moments.last().map(|_| (end * 1.01, measurement.latency.p50_us.max(SHORTEST_US)));
        ends.extend(last.map(|at| (*index, measurement.transport.clone(), at)));
    }
    for (index, name, at, down) in beside(ends, low, high) {
        let label = Text::new(name, (10, down - 8), text_style(series(index)));
        chart.draw_series([EmptyElement::at(at) + label])?;
    }
    Ok(())
}
