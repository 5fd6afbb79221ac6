//! What the figures of `pcbench fault` mean, in words. Every sentence follows from values of the report.

use super::report::{FaultReport, Faulted};
use crate::report::table::time;
use crate::report::verdict::{noisy, of_the_machine};

/// The sentences, the most important first.
pub(super) fn verdict(report: &FaultReport) -> Vec<String> {
    let mut out: Vec<String> = report.cases.iter().map(|case| of_a_case(report, case)).collect();
    out.extend(of_serving(report));
    if report.rounds > 1 {
        let named = |case: &Faulted| (case.case.words().join(", "), case.times.spread);
        out.extend(noisy(report.cases.iter().map(named)));
    }
    let here = &report.at.environment;
    let threads = usize::from(report.threads) + report.shards;
    if report.at.server.is_none() && here.cores <= threads {
        out.push(format!(
            "Both ends are on this machine, and {} thread(s) that touch, {} of the pager and what answers them share {} \
             processor(s): their competition is in the figures.",
            report.threads, report.shards, here.cores
        ));
    }
    out.extend(of_the_machine(&report.at, report.transport == "verbs"));
    out
}

fn of_a_case(report: &FaultReport, case: &Faulted) -> String {
    let by =
        if case.case.self_service { "A thread that serves itself" } else { "Served by the pager, a thread" };
    let l = &case.times.latency;
    let waits =
        format!("{by} waits {} µs for a page at the median and {} µs at p99", time(l.p50_us), time(l.p99_us));
    match (case.case.policy, without_drain(report, case)) {
        (None, _) => format!("{waits}: {:.1} × a raw read.", case.times_raw),
        (Some(policy), quiet) => {
            let beside = quiet.map_or(String::new(), |quiet| {
                format!(", {:.1} × as long as without", l.p50_us / quiet.times.latency.p50_us.max(0.001))
            });
            format!(
                "{waits} beside the drain ({policy}){beside}. All was here after {:.0} ms; of {} touches until then {} \
                 needed no read of their own.",
                case.resident_ms, case.touched_pages, case.hit_pages
            )
        }
    }
}

/// The same without a drain.
fn without_drain<'a>(report: &'a FaultReport, case: &Faulted) -> Option<&'a Faulted> {
    report.cases.iter().find(|other| !other.case.drain && other.case.self_service == case.case.self_service)
}

/// Who serves faults better, without a drain.
fn of_serving(report: &FaultReport) -> Option<String> {
    let of = |itself| report.cases.iter().find(|case| !case.case.drain && case.case.self_service == itself);
    let (handler, itself) = (of(false)?.times.latency.p50_us, of(true)?.times.latency.p50_us);
    let ratio = handler / itself.max(0.001);
    Some(match ratio >= 1.0 {
        true => format!(
            "Without a drain, threads that serve themselves wait {ratio:.1} times less than for the pager."
        ),
        false => format!(
            "Without a drain, threads wait {:.1} times less for the pager than if they serve themselves.",
            1.0 / ratio
        ),
    })
}
