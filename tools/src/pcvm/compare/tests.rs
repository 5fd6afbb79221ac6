//! Literal reports in, numbers and safe markup out.

use super::input::{Migration, load_all, parse_guest, parse_report};
use super::*;

const REPORT: &str = r#"{
  "version": 1, "transport": "verbs", "memory_bytes": 268435456, "state_bytes": 5120,
  "setup_us": 12500, "downtime_us": 7654, "freeze_us": 1234, "load_us": 2345,
  "resident_us": 2345678, "total_us": 2400123,
  "pager": {
    "total_pages": 65536, "outstanding_pages": 0,
    "pages": {"network_faults": 4321, "minor_faults": 765, "zero_faults": 89, "drain_pages": 30000,
      "prepage_pages": 1000, "fault_pages": 4300, "zero_pages": 30236},
    "fault_bytes": 17612800, "bulk_bytes": 122880000, "map_bytes": 4096,
    "stages": {
      "post": {"count": 4321, "min_us": 1, "p50_us": 2.5, "p90_us": 4, "p99_us": 9.5, "p999_us": 20, "max_us": 41.5},
      "read": {"count": 4321, "min_us": 50, "p50_us": 87.5, "p90_us": 120, "p99_us": 260, "p999_us": 900, "max_us": 1500},
      "install": {"count": 4321, "min_us": 2, "p50_us": 5.5, "p90_us": 8, "p99_us": 19, "p999_us": 60, "max_us": 99},
      "total": {"count": 4321, "min_us": 60, "p50_us": 96.5, "p90_us": 140, "p99_us": 312.5, "p999_us": 990, "max_us": 1650.5}
    }
  }
}"#;

const GUEST: &str = r#"pcguest: {"uptime_s":12.5,"monotonic_ok":true,"ticks":99,"pass":3,"pages":98304,"bad":0,"stall_us":{"count":40000,"p50":0.5,"p90":33.0,"p99":411.5,"p999":1600.0,"max":8123.5},"longest_pause_ms":9.25,"rate_pages_s":20000.0}"#;

fn migration(label: &str, guest: bool) -> Migration {
    Migration {
        label: label.into(),
        report: parse_report(REPORT).unwrap(),
        guest: guest.then(|| parse_guest(GUEST).unwrap()),
    }
}

fn comparison(migrations: Vec<Migration>) -> Comparison {
    let environment = Machine { cpu: "CPU <1>".into(), cores: 2, kernel: "6.1".into(), ..Machine::default() };
    Comparison {
        version: COMPARISON_VERSION,
        title: "A & B".into(),
        note: String::new(),
        environment,
        migrations,
    }
}

#[test]
fn the_table_has_the_numbers() {
    let text = table::text(&[migration("one", true), migration("two", false)]);
    let row = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
    for (name, value) in [
        ("downtime", "7.65"),
        ("of that freeze", "1.23"),
        ("of that load", "2.35"),
        ("resume to all resident", "2345.68"),
        ("total", "2400.12"),
        ("by fault", "4300 (16.8 MiB)"),
        ("by prepaging", "1000 (3.9 MiB)"),
        ("by drain", "30000 (117.2 MiB)"),
        ("zero", "30236"),
        ("network faults", "4321"),
        ("minor faults", "765"),
        ("faults on zero", "89"),
        ("post", "2.5 / 9.5 / 41.5"),
        ("read", "87.5 / 260.0 / 1500.0"),
        ("install", "5.5 / 19.0 / 99.0"),
        ("whole fault", "96.5 / 312.5 / 1650.5"),
    ] {
        assert_eq!(row(name).matches(value).count(), 2, "{value} twice in: {}", row(name));
    }
    assert!(row("access, p50").contains("0.5 / 411.5 / 8123.5") && row("access, p50").ends_with(" -"));
    assert!(row("longest pause").contains("9.25") && row("pages wrong").contains(" 0 "));
}

#[test]
fn the_page_has_the_plots_and_every_label_escaped() {
    let evil = r#"<script>"x"&'"#;
    let html = page::page(&comparison(vec![migration(evil, true), migration("plain", false)])).unwrap();
    assert!(!html.contains("<script") && !html.contains(evil), "{html}");
    assert!(html.contains("&lt;script&gt;&quot;x&quot;&amp;&#39;") && html.contains("CPU &lt;1&gt;"));
    assert!(html.contains("<title>A &amp; B</title>"));
    assert_eq!(html.matches("<svg role=\"img\"").count(), 5);
    for outside in ["http://", "https://", "src=", "url("] {
        let found = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        assert!(!found.contains(outside), "{outside}");
    }
}

#[test]
fn a_migration_without_faults_and_many_migrations_can_be_drawn() {
    let mut none = migration("none", false);
    none.report = postcopy_engine::session::MigrationReport { version: 1, ..Default::default() };
    let html = page::page(&comparison(vec![none.clone()])).unwrap();
    assert_eq!(html.matches("<svg role=\"img\"").count(), 3);
    assert!(table::text(&[none]).contains("whole fault"));
    let many = (0..9).map(|at| migration(&format!("number {at}"), true)).collect();
    assert!(page::page(&comparison(many)).unwrap().contains("number 8"));
}

#[test]
fn what_is_no_report_is_refused() {
    let newer = REPORT.replace("\"version\": 1", "\"version\": 2");
    for (text, reason) in [
        ("", "EOF"),
        ("[]", "no version"),
        ("{\"version\":1}", "missing field"),
        (newer.as_str(), "its version is 2, this pcvm reads 1"),
        (GUEST, "expected value"),
    ] {
        let error = parse_report(text).unwrap_err().to_string();
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
    }
    for text in ["", "{}", REPORT, "pcguest: ready {\"pages\":1}"] {
        assert!(parse_guest(text).is_err(), "{text}");
    }
}

#[test]
fn names_that_are_not_understood_are_refused() {
    for (name, reason) in [
        ("report.json", "no label"),
        ("=report.json", "no label"),
        ("a\u{1b}[31m=report.json", "no label"),
        ("a=/nonexistent/report.json", "cannot read /nonexistent/report.json"),
    ] {
        let error = load_all(&[name.to_owned()]).unwrap_err().to_string();
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
    }
    let path = std::env::temp_dir().join(format!("pcvm-compare-{}.json", std::process::id()));
    std::fs::write(&path, REPORT).unwrap();
    let name = format!("same={}", path.display());
    let loaded = load_all(std::slice::from_ref(&name)).unwrap();
    let twice = load_all(&[name.clone(), name]).unwrap_err().to_string();
    std::fs::remove_file(&path).unwrap();
    assert!(loaded[0].label == "same" && twice.contains("comes twice"), "{twice}");
}
