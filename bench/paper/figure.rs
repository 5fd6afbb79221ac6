//! The paper's figure: network faults of quicksort by the number of processes, a line an order; beside it the paper's own.

use plotters::coord::Shift;
use plotters::prelude::*;
use postcopy_tools::ink::{
    AMBER, BLUE, FONT, GREEN, GREY, Ink, TEXT, VERMILION, beside, labelled, quiet, text_style,
};

use super::suite::{FIGURE, PROCESSES, Results};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

const SIZE: (u32, u32) = (1280, 560);
/// Room right of a plot for the names of its lines, in pixels.
const NAMES: i32 = 190;
/// What of the height the values take.
const PLOT_HEIGHT: u32 = SIZE.1 - 100;
/// Network faults from which to which both are drawn.
const SPAN: (f64, f64) = (50.0, 7000.0);
/// Ours that the paper does not have, as they are drawn; all are in the table.
const DRAWN_TOO: [&str; 2] = ["adaptive", "adaptive, LRU"];

/// A line: its name, and its network faults by [`PROCESSES`].
type Line = (String, Vec<f64>);

/// The drawing, as SVG.
pub(crate) fn svg(results: &Results) -> anyhow::Result<String> {
    let papers = |name: &str| FIGURE.iter().any(|(other, ..)| *other == name);
    let drawn = results.figure.iter().filter(|row| papers(&row.name) || DRAWN_TOO.contains(&&*row.name));
    let ours: Vec<Line> = drawn.map(|row| (row.name.clone(), row.faults.clone())).collect();
    let theirs = |(name, _, _, counts): &(&str, _, _, [u64; 5])| {
        ((*name).to_owned(), counts.iter().map(|count| *count as f64).collect())
    };
    let theirs: Vec<Line> = FIGURE.iter().map(theirs).collect();
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&root, &ours, &theirs).map_err(|error| anyhow::anyhow!("drawing the figure: {error}"))?;
        root.present()?;
    }
    Ok(labelled(&text, "Network faults of quicksort by the number of processes: this engine, and the paper"))
}

fn draw(root: &Area<'_>, ours: &[Line], theirs: &[Line]) -> Drawn {
    root.fill(&WHITE)?;
    let heading = (FONT.0, 20).into_font().color(&TEXT.light);
    let title = "Network faults of quicksort in P processes, 1 Gb/s; dashed: by recency (LRU)";
    let (left, right) = root.titled(title, heading)?.split_horizontally(SIZE.0 / 2);
    plot(&left, "this engine", ours)?;
    plot(&right, "the paper (read from its plot)", theirs)
}

/// A colour for each policy, whatever its order.
fn ink(name: &str) -> Ink {
    match name {
        name if name.starts_with("push") => GREY,
        name if name.starts_with("adaptive") => VERMILION,
        name if name.contains("multi") => AMBER,
        name if name.starts_with("dual") => GREEN,
        _ => BLUE,
    }
}

fn plot(area: &Area<'_>, title: &str, lines: &[Line]) -> Drawn {
    let [first, .., last] = PROCESSES.map(|count| count as f64);
    let mut chart = ChartBuilder::on(area)
        .caption(title, text_style(TEXT))
        .margin(12)
        .margin_right(NAMES)
        .x_label_area_size(32)
        .y_label_area_size(56)
        .build_cartesian_2d((first..last * 1.01).log_scale().base(2.0), (SPAN.0..SPAN.1).log_scale())?;
    let whole = |value: &f64| format!("{value:.0}");
    quiet(&mut chart.configure_mesh()).x_label_formatter(&whole).y_label_formatter(&whole).draw()?;
    let mut ends = Vec::new();
    for (at, (name, faults)) in lines.iter().enumerate() {
        let points: Vec<_> =
            PROCESSES.iter().map(|count| *count as f64).zip(faults.iter().copied()).collect();
        ends.extend(points.last().map(|end| (at, name.clone(), *end)));
        let style = ink(name).light.stroke_width(2);
        match name.ends_with("LRU") {
            true => chart.draw_series(DashedLineSeries::new(points, 6, 4, style))?,
            false => chart.draw_series(LineSeries::new(points, style))?,
        };
    }
    for ((_, name, end), down) in beside(ends, SPAN, PLOT_HEIGHT) {
        let label = Text::new(name.clone(), (8, down - 8), text_style(ink(&name)));
        chart.draw_series([EmptyElement::at(end) + label])?;
    }
    Ok(())
}
