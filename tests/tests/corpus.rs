//! Every input in `fuzz/corpus` through its decoder: what the fuzzers found worth keeping, and what
//! once failed.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::path::Path;

/// A fuzz target's name and what it feeds.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 7] = [
    ("control_frame", postcopy_engine::fuzz::control_frame),
    ("lane_setup", postcopy_transport::fuzz::lane_setup),
    ("page_map", postcopy_engine::fuzz::page_map),
    ("preamble", postcopy_engine::fuzz::preamble),
    ("tcp_lane", postcopy_transport::fuzz::tcp_lane),
    ("tcp_responder", postcopy_transport::fuzz::tcp_responder),
    ("vm_state", postcopy_vmm::fuzz_state),
];

#[test]
fn no_input_of_the_corpus_makes_a_decoder_panic() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz");
    for (name, feed) in TARGETS {
        let inputs = std::fs::read_dir(fuzz.join("corpus").join(name)).unwrap();
        let count = inputs.map(|input| feed(&std::fs::read(input.unwrap().path()).unwrap())).count();
        assert!(count > 0, "no corpus for {name}: scripts/fuzz --keep {name} makes one");
    }
}

#[test]
fn every_target_has_its_corpus_tested() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz/targets");
    let names = std::fs::read_dir(fuzz).unwrap();
    let mut names: Vec<_> =
        names.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    assert_eq!(names, TARGETS.map(|(name, _)| name));
}
