//! The plots, each an SVG element to stand in a page.
//!
//! Colours are those of light paper; the page's style sheet replaces them on dark (see
//! [`postcopy_tools::ink`]). Legends are the page's, so that text can wrap there.

use anyhow::anyhow;
use plotters::prelude::*;
use postcopy_tools::ink::{Ink, TEXT, axis_time, labelled, quiet, series as series_ink, text_style};

const WIDTH: u32 = 960;
const LEFT: u32 = 150;
/// Names of the percentiles of a series, in order.
const PERCENTILES: [&str; 5] = ["p50", "p90", "p99", "p99.9", "max"];
/// Shortest time that a logarithmic axis shows, in µs.
const SHORTEST_US: f64 = 0.1;

/// A line of a percentile plot.
pub(super) struct Series {
    pub(super) label: String,
    /// In microseconds, in the order of [`PERCENTILES`].
    pub(super) percentiles: [f64; 5],
}

/// Part of a stacked bar: its name and colour.
pub(super) type Part = (&'static str, Ink);

/// A stacked bar.
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) parts: Vec<f64>,
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing a plot: {error}")
}

/// Latency percentiles of each series, on a logarithmic axis.
pub(super) fn percentiles(about: &str, series: &[Series]) -> anyhow::Result<String> {
    let mut svg = String::new();
    draw_percentiles(&mut svg, series).map_err(failed)?;
    Ok(labelled(&svg, about))
}

fn bounds(series: &[Series]) -> (f64, f64) {
    let all = || series.iter().flat_map(|series| series.percentiles).map(|us| us.max(SHORTEST_US));
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(1.0, f64::max));
    (10f64.powf(low.min(high).log10().floor()), 10f64.powf((high * 1.3).log10().ceil()))
}

fn draw_percentiles(svg: &mut String, series: &[Series]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, (WIDTH, 400)).into_drawing_area();
    let (low, high) = bounds(series);
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .margin_right(LEFT)
        .x_label_area_size(30)
        .y_label_area_size(80)
        .build_cartesian_2d(-0.2f64..4.2, (low..high).log_scale())?;
    quiet(&mut chart.configure_mesh())
        .disable_x_mesh()
        .x_labels(5)
        .x_label_formatter(&|at| PERCENTILES.get(at.round() as usize).copied().unwrap_or("").to_owned())
        .y_label_formatter(&|us| axis_time(*us))
        .draw()?;
    for (index, series) in series.iter().enumerate() {
        let color = series_ink(index).light;
        let points: Vec<(f64, f64)> =
            (0..).zip(series.percentiles).map(|(at, us)| (f64::from(at), us.max(SHORTEST_US))).collect();
        chart.draw_series([PathElement::new(points.clone(), color.stroke_width(2))])?;
        // The markers' shapes tell series apart without colour.
        let points = points.into_iter();
        match index % 3 {
            0 => chart.draw_series(points.map(|at| Circle::new(at, 5, color.filled())))?,
            1 => chart.draw_series(points.map(|at| TriangleMarker::new(at, 7, color.filled())))?,
            _ => chart.draw_series(points.map(|at| Cross::new(at, 5, color.stroke_width(2))))?,
        };
    }
    for (index, at) in label_places(series, low, high) {
        let label = Text::new(series[index].label.clone(), (14, at - 8), text_style(series_ink(index)));
        let end = (4.0, series[index].percentiles[4].max(SHORTEST_US));
        chart.draw_series([EmptyElement::at(end) + label])?;
    }
    root.present()?;
    Ok(())
}

/// For each series how many pixels its label stands below its last point, so that labels do not
/// cover each other.
fn label_places(series: &[Series], low: f64, high: f64) -> Vec<(usize, i32)> {
    const HEIGHT: f64 = 350.0;
    const LINE: i32 = 19;
    let place = |us: f64| (HEIGHT * (high / us.max(SHORTEST_US)).ln() / (high / low).ln()) as i32;
    let mut order: Vec<(usize, i32)> =
        series.iter().enumerate().map(|(index, series)| (index, place(series.percentiles[4]))).collect();
    order.sort_by_key(|(_, place)| *place);
    let mut free = i32::MIN;
    for (_, place) in &mut order {
        let wanted = *place;
        let given = wanted.max(free);
        free = given + LINE;
        *place = given - wanted;
    }
    order
}

/// Bars of stacked parts, one a migration, each with its sum.
pub(super) fn bars(about: &str, unit: &str, parts: &[Part], bars: &[Bar]) -> anyhow::Result<String> {
    let mut svg = String::new();
    draw_bars(&mut svg, unit, parts, bars).map_err(failed)?;
    Ok(labelled(&svg, about))
}

fn draw_bars(
    svg: &mut String,
    unit: &str,
    parts: &[Part],
    bars: &[Bar],
) -> Result<(), Box<dyn std::error::Error>> {
    let rows = i32::try_from(bars.len())?;
    let root = SVGBackend::with_string(svg, (WIDTH, 60 + 48 * bars.len() as u32)).into_drawing_area();
    let sums: Vec<f64> = bars.iter().map(|bar| bar.parts.iter().sum()).collect();
    let widest = sums.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .margin_right(110)
        .x_label_area_size(30)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(0.0..widest, (0..rows - 1).into_segmented())?;
    quiet(&mut chart.configure_mesh())
        .disable_y_mesh()
        .x_labels(6)
        .y_labels(bars.len())
        .x_label_formatter(&|value| format!("{value} {unit}"))
        .y_label_formatter(&|row| row_label(row, bars))
        .draw()?;
    for (row, (bar, sum)) in (0..rows).rev().zip(bars.iter().zip(&sums)) {
        let (bottom, top) = (SegmentValue::Exact(row), SegmentValue::Exact(row + 1));
        let mut from = 0.0;
        for ((_, color), value) in parts.iter().zip(&bar.parts) {
            let mut part =
                Rectangle::new([(from, bottom.clone()), (from + value, top.clone())], color.light.filled());
            part.set_margin(8, 8, 0, 0);
            chart.draw_series([part])?;
            from += value;
        }
        let label = Text::new(format!("{sum:.1} {unit}"), (8, -8), text_style(TEXT));
        chart.draw_series([EmptyElement::at((from, SegmentValue::CenterOf(row))) + label])?;
    }
    root.present()?;
    Ok(())
}

/// Rows count from below, bars from above.
fn row_label(row: &SegmentValue<i32>, bars: &[Bar]) -> String {
    let SegmentValue::CenterOf(row) = row else { return String::new() };
    let from_above = bars.len().checked_sub(*row as usize + 1);
    from_above.and_then(|at| bars.get(at)).map(|bar| bar.label.clone()).unwrap_or_default()
}
