//! The figures in Prometheus's text format, version 0.0.4.

use std::fmt::Write;

use postcopy_engine::session::{Phase, Progress, QueryMigrate};
use postcopy_engine::stats::{Distribution, PagerReport};

use crate::control::Status;

/// Where a guest may be: see `docs/control.md`.
const STATES: [&str; 7] = ["waiting", "running", "migrating", "in-doubt", "stranded", "kept", "gone"];
/// How far a migration from here may be.
const PHASES: [(Phase, &str); 7] = [
    (Phase::Setup, "setup"),
    (Phase::PreCopy, "pre-copy"),
    (Phase::Frozen, "frozen"),
    (Phase::InDoubt, "in-doubt"),
    (Phase::Draining, "draining"),
    (Phase::Recovering, "recovering"),
    (Phase::Resident, "resident"),
];

/// A figure of a pager: its name and unit, its label, and where it is found.
type Figure<T> = (&'static str, &'static str, &'static str, fn(&T) -> u64);

/// What only grows. Those of one name follow each other.
const COUNTERS: [Figure<PagerReport>; 15] = [
    ("pcvm_pages_total", "Pages that have come, by how.", "by=\"fault\"", |p| p.pages.fault_pages),
    ("pcvm_pages_total", "", "by=\"recency\"", |p| p.pages.recent_pages),
    ("pcvm_pages_total", "", "by=\"prepaging\"", |p| p.pages.prepage_pages),
    ("pcvm_pages_total", "", "by=\"drain\"", |p| p.pages.drain_pages),
    ("pcvm_pages_total", "", "by=\"zero\"", |p| p.pages.zero_pages),
    ("pcvm_pages_total", "", "by=\"discard\"", |p| p.pages.discarded_pages),
    ("pcvm_pages_total", "", "by=\"kept\"", |p| p.pages.kept_pages),
    ("pcvm_precopy_pages_total", "Pages read in the round of pre-copy.", "", |p| p.precopy_pages),
    ("pcvm_lane_bytes_total", "Bytes read, by lane.", "lane=\"urgent\"", |p| p.fault_bytes),
    ("pcvm_lane_bytes_total", "", "lane=\"bulk\"", |p| p.bulk_bytes.saturating_add(p.map_bytes)),
    ("pcvm_faults_total", "Faults, by what they found.", "kind=\"network\"", |p| p.pages.network_faults),
    ("pcvm_faults_total", "", "kind=\"minor\"", |p| p.pages.minor_faults),
    ("pcvm_faults_total", "", "kind=\"zero\"", |p| p.pages.zero_faults),
    ("pcvm_self_served_faults_total", "Network faults that the thread itself served.", "", |p| {
        p.self_served_faults
    }),
    ("pcvm_prepage_hits_total", "Minor faults on a page that was prepaged.", "", |p| p.pages.prepage_hits),
];

/// What a pager says of now.
const GAUGES: [Figure<PagerReport>; 4] = [
    ("pcvm_outstanding_pages", "Pages still to come.", "", |p| p.outstanding_pages),
    ("pcvm_max_bandwidth", "Bytes a second that may cross unasked; 0: no limit.", "", |p| p.max_bandwidth),
    ("pcvm_huge_page_bytes", "Bytes put together to huge pages after they came.", "", |p| p.huge_pages.bytes),
    ("pcvm_huge_page_refused_bytes", "Bytes that the kernel refused to put together.", "", |p| {
        p.huge_pages.refused_bytes
    }),
];

/// QEMU's figures of guest memory.
const RAM: [Figure<QueryMigrate>; 11] = [
    ("pcvm_ram_total", "Guest memory in bytes.", "", |q| q.ram.total),
    ("pcvm_ram_remaining", "Bytes still to come.", "", |q| q.ram.remaining),
    ("pcvm_ram_transferred", "Bytes that have crossed.", "", |q| q.ram.transferred),
    ("pcvm_ram_duplicate", "Zero pages, which do not cross.", "", |q| q.ram.duplicate),
    ("pcvm_ram_normal", "Pages that have crossed.", "", |q| q.ram.normal),
    ("pcvm_ram_normal_bytes", "Bytes of pages that have crossed.", "", |q| q.ram.normal_bytes),
    ("pcvm_ram_page_size", "Bytes of a page.", "", |q| q.ram.page_size),
    ("pcvm_ram_postcopy_requests", "Faults that went to the wire.", "", |q| q.ram.postcopy_requests),
    ("pcvm_ram_precopy_bytes", "Bytes that crossed before the stop.", "", |q| q.ram.precopy_bytes),
    ("pcvm_ram_postcopy_bytes", "Bytes that have crossed since the resume.", "", |q| q.ram.postcopy_bytes),
    ("pcvm_postcopy_latency", "Mean latency of network faults, ns.", "", |q| q.postcopy_latency),
];

/// QEMU's figures that the side which moves a guest away has.
const TIMES: [Figure<QueryMigrate>; 3] = [
    ("pcvm_setup_time", "From the first connection to the stop of the guest, ms.", "", |q| q.setup_time),
    ("pcvm_downtime", "How long the guest stood still, ms.", "", |q| q.downtime),
    ("pcvm_total_time", "Since the first connection, ms.", "", |q| q.total_time),
];

/// What a process knows, as text. `out` is the last migration from here, if there was one.
pub(super) fn render(status: &Status, out: &Progress) -> String {
    let mut text = String::new();
    let away = (*out != Progress::default()).then_some(out);
    states(
        &mut text,
        "pcvm_guest_state",
        "1 for where the guest is.",
        "state",
        STATES.map(|s| (s, s == status.state)),
    );
    if let Some(out) = away {
        let phases = PHASES.map(|(phase, name)| (name, phase == out.phase));
        states(&mut text, "pcvm_migration_phase", "1 for how far the move from here is.", "phase", phases);
    }
    let mut pagers: Vec<(&str, &PagerReport)> = Vec::new();
    pagers.extend(status.arrival.as_ref().map(|pager| ("direction=\"in\"", pager)));
    pagers.extend(away.map(|out| ("direction=\"out\"", &out.pager)));
    figures(&mut text, "counter", &COUNTERS, &pagers);
    figures(&mut text, "gauge", &GAUGES, &pagers);
    let queried: Vec<(&str, QueryMigrate)> =
        pagers.iter().map(|(direction, pager)| (*direction, QueryMigrate::from(*pager))).collect();
    let queried: Vec<_> = queried.iter().map(|(direction, figures)| (*direction, figures)).collect();
    figures(&mut text, "gauge", &RAM, &queried);
    if let Some(out) = away {
        figures(&mut text, "gauge", &TIMES, &[("direction=\"out\"", &QueryMigrate::from(out))]);
    }
    latencies(&mut text, &pagers);
    text
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn states<const N: usize>(text: &mut String, name: &str, help: &str, label: &str, each: [(&str, bool); N]) {
    head(text, name, "gauge", help);
    for (state, now) in each {
        let _ = writeln!(text, "{name}{{{label}=\"{state}\"}} {}", u8::from(now));
    }
}

/// Figures of each of `of`, which carry a label that tells them apart.
fn figures<T>(text: &mut String, kind: &str, figures: &[Figure<T>], of: &[(&str, &T)]) {
    let mut last = "";
    for (name, help, label, value) in figures {
        if of.is_empty() {
            return;
        }
        if *name != last {
            head(text, name, kind, help);
            last = name;
        }
        for (direction, of) in of {
            let comma = if label.is_empty() { "" } else { "," };
            let _ = writeln!(text, "{name}{{{direction}{comma}{label}}} {}", value(of));
        }
    }
}

/// The distributions: QEMU's of whole faults, and ours of their stages.
fn latencies(text: &mut String, pagers: &[(&str, &PagerReport)]) {
    if pagers.is_empty() {
        return;
    }
    let name = "pcvm_postcopy_latency_dist";
    head(text, name, "histogram", "Latency of network faults, in microseconds.");
    for (direction, pager) in pagers {
        histogram(text, name, direction, &pager.latencies.total);
    }
    let name = "pcvm_fault_stage_us";
    head(text, name, "histogram", "Stages of network faults, in microseconds.");
    for (direction, pager) in pagers {
        let stages = &pager.latencies;
        for (stage, of) in [("post", &stages.post), ("read", &stages.read), ("install", &stages.install)] {
            histogram(text, name, &format!("{direction},stage=\"{stage}\""), of);
        }
    }
}

fn histogram(text: &mut String, name: &str, labels: &str, distribution: &Distribution) {
    let mut below = 0u64;
    let (_last, whole) = distribution.buckets.split_last().unwrap_or((&0, &[]));
    for (power, count) in whole.iter().enumerate() {
        below = below.saturating_add(*count);
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{}\"}} {below}", 2u64 << power);
    }
    let (count, sum) = (distribution.count(), distribution.sum_ns as f64 / 1e3);
    let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}");
    let _ = writeln!(text, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {count}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: &str, arrival: Option<PagerReport>) -> Status {
        Status { state: state.into(), detail: "a \"detail\"\n".into(), migration: None, arrival }
    }

    #[test]
    fn a_name_has_one_head_and_each_line_is_a_sample() {
        let mut pager = PagerReport { total_pages: 9, outstanding_pages: 4, ..Default::default() };
        for ns in [500, 3_000, 3_000, u64::MAX / 4] {
            pager.latencies.total.record(ns);
        }
        let out = Progress { phase: Phase::Draining, pager, downtime_us: 12_345, ..Default::default() };
        let text = render(&status("migrating", Some(pager)), &out);
        let heads: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let mut names = heads.clone();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), heads.len(), "a name has two heads: {text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok() && sample.starts_with("pcvm_"), "{line}");
            let name = sample.split('{').next().unwrap();
            let name =
                ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(heads.iter().any(|head| head.contains(name)), "{line} has no head");
        }
        for line in [
            "pcvm_guest_state{state=\"migrating\"} 1",
            "pcvm_guest_state{state=\"running\"} 0",
            "pcvm_migration_phase{phase=\"draining\"} 1",
            "pcvm_outstanding_pages{direction=\"in\"} 4",
            "pcvm_ram_remaining{direction=\"out\"} 16384",
            "pcvm_downtime{direction=\"out\"} 12",
            "pcvm_postcopy_latency_dist_bucket{direction=\"in\",le=\"2\"} 1",
            "pcvm_postcopy_latency_dist_bucket{direction=\"in\",le=\"4\"} 3",
            "pcvm_postcopy_latency_dist_bucket{direction=\"in\",le=\"8388608\"} 3",
            "pcvm_postcopy_latency_dist_bucket{direction=\"in\",le=\"+Inf\"} 4",
            "pcvm_postcopy_latency_dist_count{direction=\"in\"} 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }

    #[test]
    fn who_waits_says_only_that() {
        let text = render(&status("waiting", None), &Progress::default());
        assert!(
            text.contains("pcvm_guest_state{state=\"waiting\"} 1") && !text.contains("pcvm_pages"),
            "{text}"
        );
    }
}
