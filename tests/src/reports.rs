//! What the guest program of the test images has printed on a console. Whole lines only: the last
//! may still be on its way.

use serde_json::Value;

/// Its lines, without what marks them as its own.
pub fn said(console: &str) -> impl Iterator<Item = &str> {
    let whole = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.filter_map(|line| line.trim_end().strip_prefix("pcguest: "))
}

/// Its reports of a walk under way (others tell of the start).
pub fn walks(console: &str) -> Vec<Value> {
    let all = said(console).filter_map(|line| serde_json::from_str::<Value>(line).ok());
    all.filter(|report| report.get("stall_us").is_some()).collect()
}

/// Its answers to `verify`.
pub fn verdicts(console: &str) -> Vec<&str> {
    said(console).filter(|line| line.starts_with("verified ")).collect()
}

/// Checks that nothing bad was found and no clock went back, and returns the last report.
pub fn assert_well(console: &str) -> Value {
    assert!(!console.contains("BAD"), "{console}");
    let mut walks = walks(console);
    for walk in &walks {
        assert_eq!((&walk["bad"], &walk["monotonic_ok"]), (&0.into(), &true.into()), "{walk}");
    }
    walks.pop().unwrap_or_else(|| panic!("no report yet: {console}"))
}
