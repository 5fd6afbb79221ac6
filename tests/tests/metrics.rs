//! What a process that holds a guest says of itself while it runs: metrics over HTTP, and the phases
//! of a migration in its log.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use postcopy_e2e::{Pcvm, Scratch, assert_refused, free_port, free_ports, pcvm};
use serde_json::Value;

/// What a server of metrics answers to `request`.
fn ask(port: u16, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    // It may have refused, and closed, before it has read everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

/// The metrics: the lines of the body.
fn scrape(port: u16) -> Vec<String> {
    let answer = ask(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 OK") && head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    body.lines().map(str::to_owned).collect()
}

/// The value of a sample.
fn value(metrics: &[String], sample: &str) -> f64 {
    let found = metrics.iter().find_map(|line| line.strip_prefix(sample)?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("no {sample} in {metrics:#?}"))
}

#[test]
fn a_guest_that_moves_is_seen_from_both_sides() {
    let scratch = Scratch::new("metrics");
    let [port, seen_a, seen_b] = free_ports();
    let kernel = scratch.tiny_kernel();
    let (at_a, at_b) = (format!("127.0.0.1:{seen_a}"), format!("127.0.0.1:{seen_b}"));
    let [listen, again] = [port, free_port()].map(|port| format!("127.0.0.1:{port}"));
    let run = ["run", "--kernel", kernel.to_str().unwrap(), "--memory", "8M", "--metrics", &at_a];
    let run = [&run[..], &["--again", "--listen", &again]].concat();
    let source = Pcvm::start_logging(&scratch, "a", &run, "info");
    source.wait_for_console("tiny: round 1 ok");
    let receive = ["receive", "--listen", &listen, "--metrics", &at_b, "--self-service", "off"];
    let destination = Pcvm::start_logging(&scratch, "b", &receive, "info");
    assert_eq!(value(&scrape(seen_a), "pcvm_guest_state{state=\"running\"}"), 1.0);
    let waiting = scrape(seen_b);
    assert_eq!(value(&waiting, "pcvm_guest_state{state=\"waiting\"}"), 1.0);
    assert!(!waiting.iter().any(|line| line.starts_with("pcvm_pages_total")), "{waiting:#?}");

    let report = source.migrate(&listen, &["--transport", "tcp"]);
    source.wait_until("it waits again", |source| source.status()["state"] == "waiting");
    destination.wait_until("it has told the end", |it| it.log().contains("Released"));
    for (port, direction) in [(seen_a, "out"), (seen_b, "in")] {
        let metrics = scrape(port);
        let of = |name: &str, label: &str| {
            let comma = if label.is_empty() { "" } else { "," };
            value(&metrics, &format!("{name}{{direction=\"{direction}\"{comma}{label}}}"))
        };
        let ways = ["fault", "recency", "prepaging", "drain", "zero"];
        let pages: f64 = ways.iter().map(|way| of("pcvm_pages_total", &format!("by=\"{way}\""))).sum();
        assert_eq!((pages, of("pcvm_outstanding_pages", "")), (2048.0, 0.0), "{metrics:#?}");
        assert_eq!((of("pcvm_ram_total", ""), of("pcvm_ram_remaining", "")), (f64::from(8 << 20), 0.0));
        let faults = of("pcvm_faults_total", "kind=\"network\"");
        assert_eq!(of("pcvm_postcopy_latency_dist_count", ""), faults, "{metrics:#?}");
        assert_eq!(of("pcvm_postcopy_latency_dist_bucket", "le=\"+Inf\""), faults);
        assert_eq!(of("pcvm_fault_stage_us_count", "stage=\"read\""), faults);
        assert!(faults > 0.0 && of("pcvm_postcopy_latency", "") > 0.0, "{metrics:#?}");
    }
    let queried = &report["query_migrate"];
    assert_eq!(queried["downtime"].as_u64().unwrap(), report["downtime_us"].as_u64().unwrap() / 1000);
    assert_eq!(
        value(&scrape(seen_a), "pcvm_downtime{direction=\"out\"}"),
        queried["downtime"].as_f64().unwrap()
    );
    let faults = &report["pager"]["pages"]["network_faults"];
    let buckets = queried["postcopy-latency-dist"].as_array().unwrap();
    assert_eq!((buckets.len(), &queried["ram"]["postcopy-requests"]), (24, faults));
    assert_eq!(buckets.iter().map(|count| count.as_u64().unwrap()).sum::<u64>(), faults.as_u64().unwrap());
    phases_follow_each_other(&source, &["Setup", "Frozen", "InDoubt", "Draining", "Resident", "Released"]);
    let arrival =
        ["Offer", "Prepared", "LanesReady", "Frozen", "StateLoaded", "Resumed", "Resident", "Released"];
    phases_follow_each_other(&destination, &arrival);
}

#[test]
fn memory_that_moved_is_in_huge_pages_again_and_is_so_at_the_next_host_too() {
    let scratch = Scratch::new("huge-pages");
    let [port_b, port_c, seen_b, seen_c] = free_ports();
    let [at_b, at_c] = [port_b, port_c].map(|port| format!("127.0.0.1:{port}"));
    let [metrics_b, metrics_c] = [seen_b, seen_c].map(|port| format!("127.0.0.1:{port}"));
    let a = Pcvm::run_tiny(&scratch, "a");
    let b = Pcvm::receive(&scratch, "b", port_b, &["--metrics", &metrics_b, "--huge-pages", "on"]);
    let c = Pcvm::receive(&scratch, "c", port_c, &["--metrics", &metrics_c]);
    let huge = |seen: u16| value(&scrape(seen), "pcvm_huge_page_bytes{direction=\"in\"}");
    let refused = |seen: u16| value(&scrape(seen), "pcvm_huge_page_refused_bytes{direction=\"in\"}");
    for (from, to, at, seen) in [(&a, &b, &at_b, seen_b), (&b, &c, &at_c, seen_c)] {
        from.migrate(at, &[]);
        to.wait_until("memory is put together", |_| huge(seen) + refused(seen) >= 2_097_152.0);
        to.wait_for_progress();
        if refused(seen) > 0.0 {
            eprintln!("skipped: this kernel has no huge pages for the guest; {}", to.log());
            return;
        }
    }
    assert!(![a, b, c].iter().any(|process| process.console().contains("BAD")));
}

/// The phases are in the log, in this order, and their times ascend.
fn phases_follow_each_other(process: &Pcvm, phases: &[&str]) {
    // The log may be coloured.
    let log: String = process.log();
    let mut plain = String::new();
    let mut rest = log.as_str();
    while let Some((before, after)) = rest.split_once('\x1b') {
        plain += before;
        rest = after.split_once('m').map_or("", |(_, after)| after);
    }
    plain += rest;
    let field = |line: &str, name: &str| {
        let (_, after) = line.split_once(&format!("{name}="))?;
        Some(after.split(' ').next()?.trim_matches('"').to_owned())
    };
    let told: Vec<(String, u64)> = plain
        .lines()
        .filter_map(|line| Some((field(line, "phase")?, field(line, "elapsed_us")?.parse().ok()?)))
        .collect();
    let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, phases, "{plain}");
    assert!(told.is_sorted_by_key(|(_, elapsed)| *elapsed), "{told:?}");
}

#[test]
fn whoever_asks_for_something_else_is_refused_and_disturbs_nobody() {
    let scratch = Scratch::new("metrics-strangers");
    let [port, seen] = free_ports();
    let metrics = format!("127.0.0.1:{seen}");
    let receiver = Pcvm::receive(&scratch, "b", port, &["--metrics", &metrics]);
    // They say nothing, and are cut off in time.
    let silent: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(("127.0.0.1", seen)).unwrap()).collect();
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\xff\xfe\x00\r\n\r\n", "400"),
        (&[b'x'; 100_000], "400"),
    ] {
        let answer = ask(seen, request);
        // What is still unread when the server closes may take the answer with it.
        let reset = answer.is_empty() && request.len() > 8192;
        assert!(reset || answer.starts_with(&format!("HTTP/1.0 {status} ")), "{status}: {answer}");
    }
    assert_eq!(value(&scrape(seen), "pcvm_guest_state{state=\"waiting\"}"), 1.0);
    let begun = Instant::now();
    for mut stream in silent {
        let mut nothing = Vec::new();
        let _ = stream.read_to_end(&mut nothing);
        assert!(nothing.is_empty(), "an answer without a request");
    }
    assert!(begun.elapsed() < Duration::from_secs(60), "the silent were cut off");
    assert_eq!(receiver.status()["state"], Value::from("waiting"));

    let control = scratch.file("c.sock");
    let listen = format!("127.0.0.1:{}", free_port());
    let out = pcvm(&[
        "receive",
        "--listen",
        &listen,
        "--control",
        control.to_str().unwrap(),
        "--console",
        "none",
        "--metrics",
        &metrics,
    ]);
    assert_refused(&out, &["metrics", &metrics, "--metrics"]);
}
