//! The paper's figure: network faults of quicksort by the number of processes, a line an order.

use plotters::prelude::*;

use super::suite::{PROCESSES, Results};

/// The drawing, as SVG.
pub(crate) fn svg(results: &Results) -> anyhow::Result<String> {
    let mut text = String::new();
    let most = results.figure.iter().flat_map(|row| &row.faults).fold(1.0, |a: f64, b| a.max(*b));
    {
        let area = SVGBackend::with_string(&mut text, (900, 560)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption("Quicksort in P processes over 1 Gb/s", ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(
                (PROCESSES[0] as f64..PROCESSES[4] as f64).log_scale(),
                (most / 200.0..most).log_scale(),
            )?;
        let whole = |value: &f64| format!("{value:.0}");
        chart
            .configure_mesh()
            .x_desc("processes")
            .y_desc("network faults")
            .x_label_formatter(&whole)
            .y_label_formatter(&whole)
            .draw()?;
        for (at, row) in results.figure.iter().enumerate() {
            let colour = Palette99::pick(at).to_rgba();
            let points = PROCESSES.iter().map(|count| *count as f64).zip(row.faults.iter().copied());
            let line = PathElement::new(points.collect::<Vec<_>>(), colour.stroke_width(2));
            chart
                .draw_series(std::iter::once(line))?
                .label(row.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
        area.present()?;
    }
    Ok(text)
}
