//! What the figures mean, in words. Every sentence follows from values of the report.

use super::{Circumstances, Measurement, Report};
use postcopy_tools::machine::RdmaPort;
use postcopy_tools::size;

/// The size that a fault on an ordinary page reads.
const PAGE: u32 = 4096;
/// Rounds' medians that lie further apart than this make a run noisy.
const NOISY_SPREAD: f64 = 0.10;
/// A tail that is this many times the median is worth a sentence.
const LONG_TAIL: f64 = 10.0;
/// Medians of short intervals that differ by this factor are of more than one mode; of fewer
/// intervals nothing is said.
const TWO_MODES: f64 = 2.0;
const FEWEST_INTERVALS: usize = 10;
/// An open loop that reaches less than this part of its rate did not keep up.
const KEPT_UP: f64 = 0.99;
/// Load average, by processor, from which a machine counts as busy before anything is measured.
const BUSY: f64 = 0.6;
/// MTU of an interface from which RoCE packets carry 4096 bytes.
const LARGE_MTU: u32 = 4096 + 100;

/// The sentences, the most important first.
pub(super) fn verdict(report: &Report) -> Vec<String> {
    let mut out = Vec::new();
    faults(&mut out, report);
    out.extend(what_dominates(report));
    kept_up(&mut out, report);
    noise(&mut out, report);
    modes(&mut out, report);
    surroundings(&mut out, report);
    out
}

fn of_a_page(report: &Report) -> impl Iterator<Item = &Measurement> {
    report.measurements.iter().filter(|m| m.bytes == PAGE)
}

/// What a fault waits, and how that compares with a copy inside the machine.
fn faults(out: &mut Vec<String>, report: &Report) {
    let floor = of_a_page(report).find(|m| m.transport == "shm").map(|m| m.times.latency.p50_us);
    for m in of_a_page(report).filter(|m| m.transport != "shm" && report.settings.rate.is_none()) {
        let l = &m.times.latency;
        let mut sentence = format!(
            "A 4 KiB page over {} takes {:.1} µs at the median and {:.1} µs at p99, before the kernel's share of a fault",
            m.transport, l.p50_us, l.p99_us
        );
        if let Some(floor) = floor.filter(|floor| *floor > 0.0) {
            let rest = 100.0 * (1.0 - floor / l.p50_us.max(floor));
            sentence.push_str(&format!(
                ": {:.0} × the copy through shared memory ({floor:.2} µs), so {rest:.0} % of it is the way there and back",
                l.p50_us / floor
            ));
        }
        out.push(sentence + ".");
    }
    if let (Some(tcp), Some(verbs)) =
        (of_a_page(report).find(|m| m.transport == "tcp"), of_a_page(report).find(|m| m.transport == "verbs"))
    {
        let ratio = tcp.times.latency.p50_us / verbs.times.latency.p50_us;
        out.push(match ratio >= 1.0 {
            true => format!("Verbs beats TCP {ratio:.1} times at 4 KiB."),
            false => format!(
                "Verbs is {:.1} times slower than TCP at 4 KiB: expected of software RoCE, wrong on hardware (see pcbench doctor).",
                1.0 / ratio
            ),
        });
    }
}

/// Fixed cost against cost by the byte, from the smallest and the largest size.
fn what_dominates(report: &Report) -> Vec<String> {
    let mut out = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for m in report.measurements.iter().filter(|m| m.transport != "shm") {
        if seen.contains(&m.transport.as_str()) || report.is_streaming() || report.settings.rate.is_some() {
            continue;
        }
        seen.push(&m.transport);
        let own = || report.measurements.iter().filter(|other| other.transport == m.transport);
        let (Some(small), Some(large)) = (own().min_by_key(|m| m.bytes), own().max_by_key(|m| m.bytes))
        else {
            continue;
        };
        if large.bytes < 64 * small.bytes.max(64) {
            continue;
        }
        let per_byte =
            (large.times.latency.p50_us - small.times.latency.p50_us) / f64::from(large.bytes - small.bytes);
        if per_byte <= 0.0 {
            continue;
        }
        let even = small.times.latency.p50_us / per_byte;
        out.push(format!(
            "Over {} a read costs {:.1} µs whatever its size and {:.2} µs for each KiB: below some {} the fixed cost \
             dominates, above it the bytes.",
            m.transport,
            small.times.latency.p50_us,
            per_byte * 1024.0,
            size::short((even as u64).next_power_of_two().max(1))
        ));
    }
    out
}

fn kept_up(out: &mut Vec<String>, report: &Report) {
    let Some(rate) = report.settings.rate else { return };
    for m in report.measurements.iter().filter(|m| m.reads_per_s < KEPT_UP * rate) {
        out.push(format!(
            "{} did not keep up at {}: {:.0} of {rate} reads/s; its latencies are those of a growing queue.",
            m.transport,
            size::short(m.bytes.into()),
            m.reads_per_s
        ));
    }
}

fn noise(out: &mut Vec<String>, report: &Report) {
    if report.settings.rounds > 1 {
        let named =
            |m: &Measurement| (format!("{} at {}", m.transport, size::short(m.bytes.into())), m.times.spread);
        out.extend(noisy(report.measurements.iter().map(named)));
    }
    let tail = |m: &&Measurement| {
        m.times.latency.p50_us > 0.0 && m.times.latency.p999_us > LONG_TAIL * m.times.latency.p50_us
    };
    if let Some(m) = of_a_page(report).filter(|m| m.transport != "shm").find(tail) {
        out.push(format!(
            "One 4 KiB read of {} in a thousand takes {:.0} × the median or longer: something else runs on these \
             processors, or they sleep between reads.",
            m.transport,
            m.times.latency.p999_us / m.times.latency.p50_us
        ));
    }
}

/// How far the rounds lie apart, by the [spread](super::Times::spread) of each that was measured.
pub(crate) fn noisy(spreads: impl Iterator<Item = (String, f64)>) -> Option<String> {
    let (what, spread) = spreads.max_by(|a, b| a.1.total_cmp(&b.1))?;
    let percent = 100.0 * spread;
    Some(match spread > NOISY_SPREAD {
        true => format!(
            "The machine is noisy: medians of the rounds lie up to {percent:.0} % apart ({what}); trust no \
             difference below that, and ask for more --rounds."
        ),
        false => {
            format!("The machine is quiet: medians of the rounds lie at most {percent:.0} % apart ({what}).")
        }
    })
}

/// Whether a 4 KiB read takes now one time and then quite another, interval by interval.
fn modes(out: &mut Vec<String>, report: &Report) {
    for m in of_a_page(report).filter(|m| m.times.timeline.len() >= FEWEST_INTERVALS) {
        let mut medians: Vec<f64> = m.times.timeline.iter().map(|moment| moment.p50_us).collect();
        medians.sort_by(f64::total_cmp);
        let (low, high) = (medians[medians.len() / 10], medians[medians.len() * 9 / 10]);
        if low > 0.0 && high > TWO_MODES * low {
            out.push(format!(
                "{} has more than one mode at 4 KiB: medians of short intervals go from {low:.1} to {high:.1} µs, as \
                 when reader and responder share a processor for a while; --cpu pins the reader.",
                m.transport
            ));
        }
    }
}

/// What about this machine moves the figures.
fn surroundings(out: &mut Vec<String>, report: &Report) {
    let here = &report.at.environment;
    if report.at.server.is_none() && here.cores <= 2 {
        out.push(format!(
            "Over the loopback reader and responder share {} processor{}: TCP's figures include their competition.",
            here.cores,
            if here.cores == 1 { "" } else { "s" }
        ));
    }
    out.extend(of_the_machine(&report.at, report.measurements.iter().any(|m| m.transport == "verbs")));
    out.extend(report.settings.missing.iter().map(|reason| format!("Not measured: {reason}.")));
}

/// What of the build and the machine moves any figure; `verbs`, whether its RDMA devices were used.
pub(crate) fn of_the_machine(at: &Circumstances, verbs: bool) -> Vec<String> {
    let (here, mut out) = (&at.environment, Vec::new());
    if at.build.profile == "debug" {
        out.push("This is a debug build: its figures mean little; build with --release.".into());
    }
    if here.load > BUSY * here.cores as f64 {
        out.push(format!(
            "The load average was {:.1} on {} processors before anything was measured: what others do is in the figures.",
            here.load, here.cores
        ));
    }
    if here.virtual_machine {
        out.push("This is a virtual machine: its host takes processors away unseen.".into());
    }
    if let Some(governor) = here.governor.as_ref().filter(|governor| *governor != "performance") {
        out.push(format!(
            "Processors may slow down (governor `{governor}`): set `performance` for figures that repeat."
        ));
    }
    if verbs {
        out.extend(here.rdma.iter().filter_map(small_mtu));
    }
    out
}

fn small_mtu(port: &RdmaPort) -> Option<String> {
    let mtu = port.interface_mtu.filter(|mtu| *mtu < LARGE_MTU && port.link == "Ethernet")?;
    Some(format!(
        "{} sends small packets (MTU {mtu} of {}): with an MTU of 9000 RoCE carries a page in one packet.",
        port.device,
        port.interface.as_deref().unwrap_or("its interface")
    ))
}
