//! The forms of a report, from one that was made up.

use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::Parser;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
use postcopy_tools::machine::Machine;
use postcopy_transport::Transport;

use super::*;
use crate::args::Cli;
use crate::run::recorder::Recorder;
use crate::run::{Measured, Round};

/// A run of `rounds` rounds of 1000 reads of 1, 2, … µs times `scale`.
fn measured(transport: Transport, bytes: u32, rounds: u32, scale: u64) -> Measured {
    let epoch = Instant::now();
    let round = |round: u32| {
        let mut recorder = Recorder::new(epoch).unwrap();
        let mut now = epoch + Duration::from_secs(round.into());
        let begin = now;
        for index in 1..=1000 {
            now += Duration::from_micros(index);
            recorder.record(now, index * 1000 * scale).unwrap();
        }
        recorder.end(now);
        Round { intervals: recorder.into_intervals(), reads: 1000, elapsed: now - begin, mirrored: None }
    };
    Measured { transport, bytes, rounds: (0..rounds).map(round).collect() }
}

fn report(more: &[&str], rounds: u32, scale: u64) -> Report {
    let line = ["pcbench", "--transport", "shm,tcp"].iter().chain(more);
    let plan = Plan::try_from(&Cli::try_parse_from(line).unwrap().read).unwrap();
    let all = [(Transport::Shm, 64), (Transport::Shm, 4096), (Transport::Tcp, 64), (Transport::Tcp, 4096)];
    let nasty = Machine { cpu: "<script>alert(1)</script>".into(), ..Machine::here() };
    let run = Run {
        begun: SystemTime::now(),
        took: Duration::from_secs(1),
        environment: Machine::here(),
        server: Some((std::net::SocketAddr::from(([192, 0, 2, 7], 7171)), nasty)),
        cpus: None,
        left_out: Vec::new(),
        measured: all.map(|(transport, bytes)| measured(transport, bytes, rounds, scale)).into(),
    };
    Report::new(&plan, run).unwrap()
}

#[test]
fn json_is_read_back_as_it_was() {
    let report = report(&[], 3, 1);
    let text = report.text(Format::Json).unwrap();
    let again = Report::parse(&text).unwrap();
    let latency = again.measurements[0].times.latency;
    assert_eq!((latency.count, latency.min_us, latency.max_us), (3000, 1.0, 1000.0));
    assert!((latency.p50_us - 500.0).abs() < 0.5, "three digits: {latency:?}");
    assert_eq!(again.text(Format::Table).unwrap(), report.text(Format::Table).unwrap());
    for bad in ["", "{}", "[1]", "{\"version\":1}", "{\"version\":2}"] {
        assert!(Report::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_histogram_in_the_json_opens() {
    let report = report(&[], 1, 1);
    let bytes = BASE64_STANDARD.decode(&report.measurements[0].times.histogram).unwrap();
    let opened: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
    assert_eq!(opened, report.measurements[0].times.samples.histogram);
}

#[test]
fn the_interval_log_opens_and_holds_every_read() {
    let log = {
        let report = report(&[], 2, 1);
        hdr::hlog(&report.at, &report.distributions()).unwrap()
    };
    let text = String::from_utf8(log.clone()).unwrap();
    assert!(text.contains("#[StartTime: ") && text.contains("Tag=tcp-4096,"), "{text}");
    let mut reads = 0;
    let mut last = Duration::ZERO;
    for entry in IntervalLogIterator::new(&log) {
        if let LogEntry::Interval(interval) = entry.unwrap() {
            let bytes = BASE64_STANDARD.decode(interval.encoded_histogram()).unwrap();
            let opened: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
            reads += opened.len();
            assert!(interval.start_timestamp() >= last);
            last = interval.start_timestamp();
        }
    }
    assert_eq!(reads, 4 * 2 * 1000);
}

#[test]
fn the_distribution_has_the_columns_and_ends_at_one() {
    let text = hdr::hgrm(&report(&[], 1, 1).measurements[1].times);
    let lines: Vec<&str> = text.lines().collect();
    let columns: Vec<&str> = lines[0].split_whitespace().collect();
    assert_eq!(columns, ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]);
    let last = lines.iter().rfind(|line| !line.starts_with('#')).unwrap();
    let fields: Vec<&str> = last.split_whitespace().collect();
    assert_eq!(fields[1..], ["1.000000000000", "1000"]);
    assert!(text.contains("#[Mean    =      500.500, StdDeviation   =      288.8"), "{text}");
}

#[test]
fn perftest_and_osu_have_their_columns() {
    let latency = report(&[], 1, 1).text(Format::Perftest).unwrap();
    let row = latency.lines().find(|line| line.starts_with(" 4096")).unwrap();
    let fields: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(fields, ["4096", "1000", "1.00", "1000.00", "500.22", "500.50", "288.82", "990.21", "999.42"]);
    let bandwidth = report(&["--depth", "4"], 1, 1).text(Format::Perftest).unwrap();
    assert!(
        bandwidth
            .contains(" #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n")
    );
    let row = bandwidth.lines().find(|line| line.starts_with(" 4096")).unwrap();
    // 1000 reads of 4096 bytes in 500.5 ms, in MiB a second.
    assert_eq!(row.split_whitespace().nth(3), Some("7.80"), "{row}");
    let osu = report(&[], 1, 1).text(Format::Osu).unwrap();
    assert!(osu.contains("# Size            Latency (us)\n64                      500.50\n"), "{osu}");
}

#[test]
fn csv_has_as_many_fields_as_names() {
    let text = report(&[], 1, 1).text(Format::Csv).unwrap();
    let widths: Vec<usize> = text.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(widths.len(), 5);
    assert!(widths.iter().all(|width| *width == widths[0]), "{text}");
}

#[test]
fn what_a_server_says_is_escaped_on_the_page() {
    let page = page::page(&report(&[], 2, 1)).unwrap();
    assert!(!page.contains("<script"), "a server's text is in the page as it came");
    let picture = plot::picture(&report(&["--sizes", "64"], 1, 1).panels(), "some plots");
    assert!(page.contains("&lt;script&gt;") && page.matches("<svg").count() == 3);
    assert!(picture.unwrap().starts_with("<svg role="));
}

#[test]
fn the_verdict_says_what_the_figures_say() {
    let quiet = report(&[], 3, 1);
    let says = |report: &Report, what: &str| report.verdict.iter().any(|sentence| sentence.contains(what));
    assert!(says(&quiet, "A 4 KiB page over tcp takes 500.2 µs"), "{:?}", quiet.verdict);
    assert!(says(&quiet, "The machine is quiet"), "{:?}", quiet.verdict);
    let late = report(&["--rate", "1000000"], 1, 1);
    assert!(says(&late, "did not keep up"), "{:?}", late.verdict);
}
