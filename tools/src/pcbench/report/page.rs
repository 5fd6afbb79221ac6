//! The page: one HTML file that needs nothing else, light or dark as the reader has it.
//!
//! Everything that comes from elsewhere (the machine, the server, flags) is escaped.

use std::fmt::Write;

use postcopy_tools::ink::page_head;
use postcopy_tools::machine::Machine;
use postcopy_tools::size;
use postcopy_tools::text::{date, escape};

use super::plot::Panel;
use super::reads::panels;
use super::table::{by_size, how, time};
use super::{Circumstances, Measurement, Report};

/// The columns of the table of figures.
const COLUMNS: [&str; 13] = [
    "transport",
    "size",
    "reads",
    "min",
    "p50",
    "95 % CI",
    "p90",
    "p99",
    "p99.9",
    "p99.99",
    "max",
    "mean ± σ",
    "MB/s",
];

/// What a page has around its figures.
pub(crate) struct Frame<'a> {
    pub(crate) title: String,
    /// How it was measured, in words.
    pub(crate) how: String,
    pub(crate) at: &'a Circumstances,
    pub(crate) verdict: &'a [String],
    pub(crate) panels: Vec<Panel<'a>>,
}

/// The whole page of a report of reads.
///
/// Errors: a plot cannot be drawn.
pub(super) fn page(report: &Report) -> anyhow::Result<String> {
    let title = match &report.at.server {
        Some(server) => format!("One-sided reads from {}", server.address),
        None => "One-sided reads over the loopback".to_owned(),
    };
    let (how, panels) = (how(&report.settings), panels(report));
    let frame = Frame { title, how, at: &report.at, verdict: &report.verdict, panels };
    frame.around(&figures(report))
}

impl Frame<'_> {
    /// The page, with `figures` below its plots.
    ///
    /// Errors: a plot cannot be drawn.
    pub(crate) fn around(&self, figures: &str) -> anyhow::Result<String> {
        let mut out = page_head(&self.title);
        let (how, machine) = (escape(&self.how), escape(&self.at.environment.line()));
        let _ =
            writeln!(out, "<p class=\"machine\">Measured on: {machine}</p>\n<p class=\"machine\">{how}</p>");
        if !self.verdict.is_empty() {
            out.push_str("<section>\n<h2>Verdict</h2>\n<ul>\n");
            for sentence in self.verdict {
                let _ = writeln!(out, "<li>{}</li>", escape(sentence));
            }
            out.push_str("</ul>\n</section>\n");
        }
        for panel in &self.panels {
            let (title, about, svg) = (escape(&panel.title), escape(panel.about), panel.svg()?);
            let _ = writeln!(
                out,
                "<section>\n<h2>{title}</h2>\n<p>{about}</p>\n<figure>{svg}</figure>\n</section>"
            );
        }
        out.push_str(figures);
        circumstances(&mut out, self.at);
        out.push_str("</main>\n</body>\n</html>\n");
        Ok(out)
    }
}

/// A section with a table: what it is of, its columns, and its rows as HTML.
pub(crate) fn section(title: &str, about: &str, columns: &[&str], rows: &str) -> String {
    let mut out = format!("<section>\n<h2>{title}</h2>\n<p>{about}</p>\n");
    out.push_str("<div class=\"scroll\"><table class=\"dense\">\n<thead><tr>");
    for column in columns {
        let _ = write!(out, "<th scope=\"col\">{column}</th>");
    }
    let _ = write!(out, "</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n</section>\n");
    out
}

fn figures(report: &Report) -> String {
    let mut rows = String::new();
    by_size(report).into_iter().for_each(|measurement| row(&mut rows, measurement));
    let about = "Latency in µs; percentiles are medians over the rounds.";
    section("Figures", about, &COLUMNS, &rows)
}

fn row(out: &mut String, m: &Measurement) {
    let l = &m.times.latency;
    let _ = write!(out, "<tr><th scope=\"row\">{}</th>", escape(&m.transport));
    let cells = [
        size::short(m.bytes.into()),
        l.count.to_string(),
        time(l.min_us),
        time(l.p50_us),
        format!("{}–{}", time(m.times.median_ci.low_us), time(m.times.median_ci.high_us)),
        time(l.p90_us),
        time(l.p99_us),
        time(l.p999_us),
        time(l.p9999_us),
        time(l.max_us),
        format!("{} ± {}", time(m.times.mean_us), time(m.times.stdev_us)),
        format!("{:.1}", m.mb_per_s),
    ];
    for cell in cells {
        let _ = write!(out, "<td>{cell}</td>");
    }
    out.push_str("</tr>\n");
    if let Some(reverse) = &m.reverse {
        let l = &reverse.latency;
        out.push_str("<tr><th scope=\"row\" class=\"part\">the server's reads</th>");
        let us = |us: f64| time(us);
        let (empty, rate) = (String::new(), format!("{:.1}", reverse.mb_per_s));
        for cell in [
            empty.clone(),
            l.count.to_string(),
            us(l.min_us),
            us(l.p50_us),
            empty.clone(),
            us(l.p90_us),
            us(l.p99_us),
            us(l.p999_us),
            us(l.p9999_us),
            us(l.max_us),
            empty,
            rate,
        ] {
            let _ = write!(out, "<td>{cell}</td>");
        }
        out.push_str("</tr>\n");
    }
}

fn circumstances(out: &mut String, at: &Circumstances) {
    out.push_str(
        "<section>\n<h2>Circumstances</h2>\n<div class=\"scroll\"><table class=\"facts\">\n<tbody>\n",
    );
    let build = &at.build;
    let program = format!("pcbench {}, {} build, {}", build.version, build.profile, build.architecture);
    fact(out, "Program", &program);
    fact(out, "Run", &format!("{}, {:.1} s", date(at.started_unix_s), at.took_s));
    machine(out, "This machine", &at.environment);
    if let Some(server) = &at.server {
        machine(out, "The server", &server.machine);
    }
    out.push_str("</tbody>\n</table></div>\n</section>\n");
}

fn fact(out: &mut String, name: &str, value: &str) {
    let (name, value) = (escape(name), escape(value));
    let _ = writeln!(out, "<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>");
}

fn machine(out: &mut String, name: &str, machine: &Machine) {
    fact(out, name, &machine.line());
    let yes_no = |yes: bool| if yes { "yes" } else { "no" };
    fact(out, "– virtual machine", yes_no(machine.virtual_machine));
    fact(out, "– load average", &format!("{:.2}", machine.load));
    fact(
        out,
        "– frequency governor",
        machine.governor.as_deref().unwrap_or("none: the frequency is fixed or unknown"),
    );
    let pages = format!(
        "{} reserved; shared memory: {}",
        machine.reserved_huge_pages,
        machine.shmem_huge_pages.as_deref().unwrap_or("unknown")
    );
    fact(out, "– huge pages", &pages);
    for port in &machine.rdma {
        let mtu = port.interface_mtu.map_or_else(String::new, |mtu| {
            format!(", MTU {mtu} of {}", port.interface.as_deref().unwrap_or("?"))
        });
        let value = format!(
            "port {}, {}, {}, {}, firmware {}{mtu}",
            port.port, port.state, port.rate, port.link, port.firmware
        );
        fact(out, &format!("– {}", port.device), &value);
    }
}
