//! The colours of plots, on light paper and on dark, and pictures that those can read who do not
//! see them.
//!
//! A plot is drawn in the light colours; a page's style sheet replaces them on dark by matching
//! the attribute (`dark_style`), so no plot is drawn twice.

use std::fmt::Write;

use plotters::chart::MeshStyle;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

use crate::text::escape;

/// A colour on light paper and its replacement on dark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ink {
    /// On light paper, which is what plots are drawn in.
    pub light: RGBColor,
    dark: RGBColor,
}

const fn ink(light: (u8, u8, u8), dark: (u8, u8, u8)) -> Ink {
    Ink { light: RGBColor(light.0, light.1, light.2), dark: RGBColor(dark.0, dark.1, dark.2) }
}

// Okabe and Ito's colours, told apart by people of every colour vision; lighter on dark.
/// A series' colour.
pub const BLUE: Ink = ink((0, 114, 178), (92, 180, 240));
/// A series' colour.
pub const VERMILION: Ink = ink((213, 94, 0), (255, 138, 61));
/// A series' colour.
pub const GREEN: Ink = ink((0, 138, 100), (52, 201, 154));
/// A series' colour.
pub const PURPLE: Ink = ink((170, 80, 130), (226, 148, 192));
/// A series' colour.
pub const AMBER: Ink = ink((190, 130, 0), (240, 192, 64));
/// What is there and does not matter.
pub const GREY: Ink = ink((168, 173, 180), (96, 103, 112));
/// Text in a plot.
pub const TEXT: Ink = ink((31, 35, 40), (222, 226, 231));
/// Axes of a plot.
pub const AXIS: Ink = ink((110, 118, 129), (139, 148, 158));
/// Lines of a plot's grid.
pub const GRID: Ink = ink((221, 225, 230), (52, 58, 66));
const INKS: [Ink; 9] = [BLUE, VERMILION, GREEN, PURPLE, AMBER, GREY, TEXT, AXIS, GRID];

/// Colours of series; a sixth looks like the first, and is told apart by its label.
const SERIES: [Ink; 5] = [BLUE, VERMILION, GREEN, PURPLE, AMBER];

/// The style of a page, before `dark_style`.
const PAGE_STYLE: &str = include_str!("page.css");

/// The font of plots, and its height in pixels.
pub const FONT: (&str, i32) = ("sans-serif", 15);

/// The colour of the `index`th series.
pub fn series(index: usize) -> Ink {
    SERIES[index % SERIES.len()]
}

impl Ink {
    /// As CSS on light paper, which is also how it stands in an SVG.
    pub fn css(self) -> String {
        hex(self.light)
    }
}

fn hex(RGBColor(red, green, blue): RGBColor) -> String {
    format!("#{red:02X}{green:02X}{blue:02X}")
}

/// Style rules that turn the colours of plots and their keys into those on dark.
fn dark_style() -> String {
    INKS.iter().fold(String::new(), |mut css, ink| {
        let (light, dark) = (hex(ink.light), hex(ink.dark));
        let _ =
            writeln!(css, "svg [fill=\"{light}\"]{{fill:{dark}}}svg [stroke=\"{light}\"]{{stroke:{dark}}}");
        css
    })
}

/// The style of text in plots.
pub fn text_style(color: Ink) -> TextStyle<'static> {
    FONT.into_font().color(&color.light)
}

/// Axes, grid and labels as every plot has them: quiet, and no lines between the bold ones.
pub fn quiet<'m, 'a, 'b, X, Y, XT, YT, DB>(
    mesh: &'m mut MeshStyle<'a, 'b, X, Y, DB>,
) -> &'m mut MeshStyle<'a, 'b, X, Y, DB>
where
    X: Ranged<ValueType = XT> + ValueFormatter<XT>,
    Y: Ranged<ValueType = YT> + ValueFormatter<YT>,
    DB: DrawingBackend,
{
    mesh.bold_line_style(GRID.light)
        .light_line_style(TRANSPARENT)
        .axis_style(AXIS.light)
        .label_style(text_style(TEXT))
}

/// The end of a line in a plot: what it is, its name, and where it is.
pub type LineEnd = (usize, String, (f64, f64));

/// Names of lines beside their ends, each with the pixels that it is moved down by, where they would cover each other. The
/// vertical axis is logarithmic, between these values on so many pixels.
pub fn beside(ends: Vec<LineEnd>, (low, high): (f64, f64), height: u32) -> Vec<(LineEnd, i32)> {
    const LINE: i32 = 18;
    let pixel = |value: f64| (f64::from(height) * (high / value).ln() / (high / low).ln()) as i32;
    let mut sorted = ends;
    sorted.sort_by(|a, b| b.2.1.total_cmp(&a.2.1));
    let mut free = i32::MIN;
    let place = |end: LineEnd| {
        let wanted = pixel(end.2.1);
        let given = wanted.max(free);
        free = given + LINE;
        (end, given - wanted)
    };
    sorted.into_iter().map(place).collect()
}

/// The beginning of a page, up to and with its heading. `title` is plain text.
pub fn page_head(title: &str) -> String {
    let (title, dark) = (escape(title), dark_style());
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>\n{PAGE_STYLE}@media (prefers-color-scheme: dark) {{\n{dark}}}\n</style>\n</head>\n<body>\n<main>\n\
         <h1>{title}</h1>\n"
    )
}

/// Names the picture for those who do not see it.
pub fn labelled(svg: &str, about: &str) -> String {
    svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", escape(about)), 1)
}

/// A time in microseconds, in the unit that reads best: for axes, whose values are round.
pub fn axis_time(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{} s", us / 1e6),
        us if us >= 1e3 => format!("{} ms", us / 1e3),
        us if us >= 1.0 => format!("{us} µs"),
        us => format!("{} ns", (us * 1e3).round()),
    }
}
