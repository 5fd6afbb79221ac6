//! pcbench under TLS: lanes are encrypted, carry the same bytes, and are there for those alone whom one authority has signed.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use postcopy_e2e::authority::Authority;
use postcopy_e2e::{Scratch, Served, assert_refused, pcbench, pcbench_report};

const HERE: &str = "127.0.0.1";
const SHORT: [&str; 4] = ["--iterations", "200", "--rounds", "1"];

#[test]
fn lanes_under_tls_carry_the_same_bytes() {
    let scratch = Scratch::new("pcbench-tls");
    let folder = Authority::default().folder(&scratch, "certificates", HERE);
    let tls = ["--tls", folder.to_str().unwrap()];
    let served = Served::start(&tls);
    let reads =
        ["read", served.address(), "--sizes", "64,4K,1M", "--verify", "--bidirectional", "--lanes", "2"];
    let report = pcbench_report(&[&reads[..], &SHORT, &tls].concat());
    assert_eq!(report["settings"]["tls"], true);
    for measured in report["measurements"].as_array().unwrap() {
        assert_eq!((&measured["transport"], &measured["latency"]["count"]), (&"tcp".into(), &200.into()));
    }
    let faults = ["fault", served.address(), "--memory", "4M", "--rounds", "1"];
    let report = pcbench_report(&[&faults[..], &tls].concat());
    assert_eq!(report["tls"], true);
    for case in report["cases"].as_array().unwrap() {
        assert_eq!(case["touched"], 1024, "each was compared: {case}");
    }
}

#[test]
fn nobody_else_reads() {
    let scratch = Scratch::new("pcbench-tls-others");
    let [ours, theirs] = ["ours", "theirs"].map(|name| Authority::default().folder(&scratch, name, HERE));
    let (ours, theirs) = (["--tls", ours.to_str().unwrap()], ["--tls", theirs.to_str().unwrap()]);
    let served = Served::start(&ours);
    let reads = [&["read", served.address(), "--sizes", "64"][..], &SHORT].concat();
    let refused = |more: &[&str], words: &[&str]| {
        assert_refused(&pcbench(&[&reads[..], more].concat()), words);
    };
    refused(&["--transport", "tcp"], &["the lanes of this server are under TLS; read with --tls"]);
    refused(&theirs, &["a lane under TLS (docs/tls.md)", "invalid peer certificate"]);
    refused(&[&ours[..], &["--tls-hostname", "elsewhere.example"]].concat(), &["not valid for name"]);
    refused(&[&ours[..], &["--transport", "shm"]].concat(), &["--tls is for tcp"]);
    for command in ["read", "fault"] {
        let out = pcbench(&[command, served.address(), "--tls", "/nowhere"]);
        assert_refused(&out, &["/nowhere/ca-cert.pem: "]);
        assert_eq!(out.status.code(), Some(2), "that is of the command line");
    }
    assert_refused(&pcbench(&[&SHORT[..], &ours].concat()), &["--tls is for HOST", "pcbench serve --tls"]);
    assert_refused(&pcbench(&[&["fault"][..], &ours].concat()), &["--tls is for HOST"]);
    let clear = Served::start(&[]);
    let asks = [&["read", clear.address()][..], &ours].concat();
    assert_refused(&pcbench(&asks), &["this server has no certificates; start it with --tls"]);
    // It serves on.
    pcbench_report(&[&reads[..], &ours].concat());
}
