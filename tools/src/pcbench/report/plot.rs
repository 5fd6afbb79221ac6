//! Plots of times: percentiles, and latencies over the run. What is measured has its own beside them ([`Panel`]).
//!
//! Each is drawn on any area, so that a page has several pictures and `--plot` one.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;
use postcopy_tools::ink::{FONT, TEXT, axis_time, beside, labelled, quiet, series, text_style};

use super::times::{Moment, Times};

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(crate) type Drawn = Result<(), Box<dyn std::error::Error>>;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 400;
/// What of it the values take.
pub(crate) const PLOT_HEIGHT: u32 = HEIGHT - 52;
/// Shortest time that a logarithmic axis shows, in µs.
pub(crate) const SHORTEST_US: f64 = 0.01;

/// A plot: what it shows, and how it is drawn.
pub(crate) struct Panel<'a> {
    /// Above it.
    pub(crate) title: String,
    /// Below its title on a page: how to read it.
    pub(crate) about: &'static str,
    pub(crate) draw: Box<dyn Fn(&Area<'_>) -> Drawn + 'a>,
}

/// What has lines in plots: its name, its colour, its times.
#[derive(Clone)]
pub(crate) struct Series<'a> {
    pub(crate) name: String,
    pub(crate) ink: usize,
    pub(crate) times: &'a Times,
}

/// The two plots that all times have. `room` is the space for the names of lines, in pixels.
pub(crate) fn of_times<'a>(
    shown: &[Series<'a>],
    room: i32,
    [percentiles_of, over_the_run]: [(String, &'static str); 2],
) -> [Panel<'a>; 2] {
    let (first, second) = (shown.to_vec(), shown.to_vec());
    let panel = |(title, about), draw| Panel { title, about, draw };
    [
        panel(percentiles_of, Box::new(move |area: &Area<'_>| percentiles(area, &first, room)) as Box<_>),
        panel(over_the_run, Box::new(move |area: &Area<'_>| timeline(area, &second, room)) as Box<_>),
    ]
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing a plot: {error}")
}

impl Panel<'_> {
    /// Its picture alone.
    ///
    /// Errors: it cannot be drawn.
    pub(super) fn svg(&self) -> anyhow::Result<String> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
            (self.draw)(&root).map_err(failed)?;
            root.present().map_err(failed)?;
        }
        Ok(labelled(&svg, &self.title))
    }
}

/// All plots as one picture on white.
///
/// Errors: a plot cannot be drawn.
pub(crate) fn picture(panels: &[Panel<'_>], label: &str) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let height = panels.len() as u32 * (HEIGHT + 40);
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw_all(&root, panels).map_err(failed)?;
        root.present().map_err(failed)?;
    }
    Ok(labelled(&svg, label))
}

fn draw_all(root: &Area<'_>, panels: &[Panel<'_>]) -> Drawn {
    root.fill(&WHITE)?;
    let heading = (FONT.0, 20).into_font().color(&TEXT.light);
    for (area, panel) in root.split_evenly((panels.len(), 1)).iter().zip(panels) {
        (panel.draw)(&area.titled(&panel.title, heading.clone())?)?;
    }
    Ok(())
}

/// Decades around all values, in µs.
pub(crate) fn decades<'a>(values: impl Iterator<Item = f64> + 'a) -> (f64, f64) {
    let (low, high) = values
        .map(|us| us.max(SHORTEST_US))
        .fold((f64::INFINITY, SHORTEST_US), |(low, high), us| (low.min(us), high.max(us)));
    (10f64.powf(low.min(high).log10().floor()), 10f64.powf((high * 1.1).log10().ceil()))
}

/// A quantile as a distance: 0 at 0 %, 1 at 90 %, 2 at 99 %, …
fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile).max(1e-9).log10()
}

/// The points of a percentile curve, up to the rank of the maximum.
fn curve(times: &Times) -> Vec<(f64, f64)> {
    let histogram = &times.samples.histogram;
    let count = histogram.len().max(1) as f64;
    let (least, most) = (times.pooled.min_us, times.pooled.max_us);
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

fn percentiles(area: &Area<'_>, shown: &[Series<'_>], room: i32) -> Drawn {
    let lines: Vec<_> = shown.iter().map(|series| (series, curve(series.times))).collect();
    let all = || lines.iter().flat_map(|(_, points)| points.iter());
    let (low, high) = decades(all().map(|point| point.1));
    let right = all().map(|point| point.0).fold(2.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(room)
        .x_label_area_size(32)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..right, (low..high).log_scale())?;
    quiet(&mut chart.configure_mesh())
        .x_labels(right.floor() as usize + 1)
        .x_label_formatter(&|x| percent(*x))
        .y_label_formatter(&|us| axis_time(*us))
        .draw()?;
    let mut ends = Vec::new();
    for (line, points) in &lines {
        let color = series(line.ink).light;
        chart.draw_series([PathElement::new(points.clone(), color.stroke_width(2))])?;
        ends.extend(points.last().map(|end| (line.ink, line.name.clone(), *end)));
    }
    for ((index, name, end), down) in beside(ends, (low, high), PLOT_HEIGHT) {
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

fn timeline(area: &Area<'_>, shown: &[Series<'_>], room: i32) -> Drawn {
    let all = || shown.iter().flat_map(|series| series.times.timeline.iter());
    let (low, high) = decades(all().flat_map(|moment| [moment.p50_us, moment.max_us]));
    let end = all().map(|moment| moment.start_s + moment.seconds).fold(0.001, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(room)
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
    for line in shown {
        let color = series(line.ink).light;
        let moments = &line.times.timeline;
        let x = |moment: &Moment| moment.start_s + moment.seconds / 2.0;
        chart.draw_series(
            moments
                .iter()
                .map(|m| Circle::new((x(m), m.max_us.max(SHORTEST_US)), 2, color.mix(0.35).filled())),
        )?;
        chart.draw_series(
            moments.iter().map(|m| Circle::new((x(m), m.p50_us.max(SHORTEST_US)), 3, color.filled())),
        )?;
        let last = moments.last().map(|_| (end * 1.01, line.times.latency.p50_us.max(SHORTEST_US)));
        ends.extend(last.map(|at| (line.ink, line.name.clone(), at)));
    }
    for ((index, name, at), down) in beside(ends, (low, high), PLOT_HEIGHT) {
        let label = Text::new(name, (10, down - 8), text_style(series(index)));
        chart.draw_series([EmptyElement::at(at) + label])?;
    }
    Ok(())
}
