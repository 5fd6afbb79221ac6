//! What the guest program of the test images has printed on a console (whole lines only: the last
//! may still be on its way), and what pcvm reports of a move.

use serde_json::Value;

/// Its lines, without what marks them as its own.
pub fn said(console: &str) -> impl Iterator<Item = &str> {
    let whole = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.filter_map(|line| line.trim_end().strip_prefix("pcguest: "))
}

/// What a console has had since it had so many bytes, whole lines only: a guest that came then may have begun its first
/// elsewhere, and the one before it may have ended here in the middle.
pub fn since(console: &str, bytes: usize) -> &str {
    let new = console.get(bytes..).unwrap_or_default();
    new.split_once('\n').map_or("", |(_, whole)| whole)
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

/// Checks that nothing bad was found, that its kernel complains of nothing and no clock went back, and returns the last report.
pub fn assert_well(console: &str) -> Value {
    for word in ["BAD", "Kernel panic", "BUG:", "Oops"] {
        assert!(!console.contains(word), "{console}");
    }
    let mut walks = walks(console);
    for walk in &walks {
        assert_eq!((&walk["bad"], &walk["monotonic_ok"]), (&0.into(), &true.into()), "{walk}");
    }
    walks.pop().unwrap_or_else(|| panic!("no report yet: {console}"))
}

/// A figure of a move's report, by its JSON pointer.
pub fn number(report: &Value, path: &str) -> u64 {
    report.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {path} in {report}"))
}

/// All of so many pages have come, each once.
pub fn assert_whole(report: &Value, total: u64) {
    assert_eq!(number(report, "/pager/total_pages"), total);
    assert_eq!(number(report, "/pager/outstanding_pages"), 0);
    let kinds = ["fault_pages", "recent_pages", "prepage_pages", "drain_pages", "zero_pages", "kept_pages"];
    let pages = kinds.map(|kind| number(report, &format!("/pager/pages/{kind}")));
    assert_eq!(pages.iter().sum::<u64>(), total, "{report}");
}
