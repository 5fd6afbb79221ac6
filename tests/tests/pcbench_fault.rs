//! `pcbench fault` as its users run it: that every page comes once, and the forms of its report.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use postcopy_e2e::{
    Scratch, Served, assert_refused, number, pcbench, pcbench_report as report, stderr, stdout, wait_until,
};
use serde_json::Value;

/// Handler and self-service, without a drain, over memory of 2 MiB.
const SHORT: [&str; 7] = ["fault", "--memory", "2M", "--drain", "off", "--rounds", "1"];
/// The same in two rounds.
const TWICE: [&str; 7] = ["fault", "--memory", "2M", "--drain", "off", "--rounds", "2"];
const PAGES: u64 = 512;

#[test]
fn faults_under_every_policy_bring_each_page_once() {
    const PAGES: u64 = 1024;
    let policies = ["linear", "bubble-multi:3:dual", "adaptive"];
    let args = ["fault", "--memory", "4M", "--rounds", "1", "--self-service", "off", "--json"];
    let out = pcbench(&[&args[..], &["--pattern", "sequential", "--policy", &policies.join(",")]].concat());
    assert!(out.status.success(), "{}", stderr(&out));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let cases = report["cases"].as_array().unwrap();
    let names: Vec<&Value> = cases.iter().map(|case| &case["policy"]).collect();
    assert_eq!(names, [&Value::Null, &policies[0].into(), &policies[1].into(), &policies[2].into()]);
    for case in cases {
        let pages = |what: &str| case["pager"]["pages"][what].as_u64().unwrap();
        let brought = [pages("fault_pages"), pages("prepage_pages"), pages("drain_pages")];
        assert_eq!(brought.iter().sum::<u64>(), PAGES, "{case}");
        let told = ["touched_pages", "hit_pages", "wasted_pages"].map(|what| case[what].as_u64().unwrap());
        if case["drain"] == false {
            assert_eq!((brought[0], told), (PAGES, [PAGES, 0, 0]), "{case}");
        }
        let [touched, hits, waste] = told;
        assert!(touched <= PAGES && hits <= touched && hits + waste == brought[1] + brought[2], "{case}");
        if case["policy"] == "linear" {
            assert_eq!(brought[1], 0, "{case}");
        }
    }
}

#[test]
fn memory_of_another_process_is_faulted_in_and_every_page_comes_once() {
    const PAGES: u64 = 1024;
    let served = Served::start(&["--memory", "8M"]);
    let args = ["fault", served.address(), "--memory", "4M", "--rounds", "2", "--threads", "2", "--json"];
    let out = pcbench(&[&args[..], &["--transport", "tcp", "--access", "write"]].concat());
    assert!(out.status.success(), "{}", stderr(&out));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["server"]["address"], served.address());
    assert!(number(&report, "/raw_read/latency/p50_us") > 0.0 && number(&report, "/raw_bulk_mb_s") > 0.0);
    let cases = report["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4, "handler and self-service, each with and without the drain");
    for case in cases {
        let pages = |what: &str| case["pager"]["pages"][what].as_u64().unwrap();
        let brought = [pages("fault_pages"), pages("prepage_pages"), pages("drain_pages")];
        assert_eq!((brought.iter().sum::<u64>(), &case["touched"]), (PAGES, &PAGES.into()), "{case}");
        assert!(pages("prepage_hits") <= brought[1], "{case}");
        for stage in ["post", "read", "install", "total"] {
            let path = format!("/pager/stages/{stage}");
            assert!(number(case, &format!("{path}/count")) > 0.0, "{case}");
            assert!(
                number(case, &format!("{path}/p50_us")) <= number(case, &format!("{path}/p99_us")),
                "{case}"
            );
        }
    }
    wait_until("nothing is left of it at the server", || served.threads() == 1);
    let text = stdout(&pcbench(&["fault", served.address(), "--memory", "1M", "--rounds", "1"]));
    for word in
        ["memory at 127.0.0.1", "tcp of 1 MiB", "prepaged", "hits", "waste", "stages of a fault", "install"]
    {
        assert!(text.contains(word), "`{word}` is not in:\n{text}");
    }
}

#[test]
fn stalls_are_told_as_reads_are() {
    let report = report(&TWICE);
    assert_eq!(report["version"], 2);
    assert!(report["environment"]["cores"].as_u64().unwrap() >= 1 && number(&report, "/took_s") > 0.0);
    let cases = report["cases"].as_array().unwrap();
    for case in cases.iter().chain([&report["raw_read"]]) {
        let names = ["min_us", "p50_us", "p90_us", "p99_us", "p999_us", "p9999_us", "max_us"];
        let values: Vec<f64> = names.iter().map(|name| number(case, &format!("/latency/{name}"))).collect();
        assert!(values.is_sorted() && values[0] > 0.0, "{values:?}");
        assert!(number(case, "/median_ci/low_us") <= number(case, "/median_ci/high_us"), "{case}");
        assert!(case["histogram"].as_str().unwrap().len() > 20, "{case}");
    }
    for case in cases {
        let rounds = case["rounds"].as_array().unwrap();
        assert_eq!(rounds.len(), 2);
        // Without a drain every touch stalls, and no stall is counted twice.
        let each = |round: &Value| round["latency"]["count"].as_u64().unwrap();
        assert_eq!(case["latency"]["count"].as_u64().unwrap(), rounds.iter().map(each).sum::<u64>());
        assert!(rounds.iter().all(|round| each(round) == PAGES), "{rounds:?}");
        let moments = case["timeline"].as_array().unwrap();
        assert_eq!(moments.iter().map(|moment| moment["reads"].as_u64().unwrap()).sum::<u64>(), 2 * PAGES);
    }
    let said = report["verdict"].as_array().unwrap().iter().filter_map(Value::as_str);
    assert!(said.clone().any(|sentence| sentence.contains("waits")), "{:?}", report["verdict"]);
}

#[test]
fn every_form_of_the_report_is_written() {
    let scratch = Scratch::new("fault-forms");
    let file = |name: &str| scratch.file(name).to_str().unwrap().to_owned();
    let files: Vec<String> = ["--report a.html", "--plot a.svg", "--hgrm a.hgrm", "--hlog a.hlog"]
        .iter()
        .filter_map(|pair| pair.split_once(' '))
        .flat_map(|(flag, name)| [flag.to_owned(), file(name)])
        .collect();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let out = pcbench(&[&SHORT[..], &["--format", "csv"], &files].concat());
    assert!(out.status.success(), "{}", stderr(&out));
    let lines: Vec<usize> = stdout(&out).lines().map(|line| line.split(',').count()).collect();
    assert!(lines.len() == 3 && lines.iter().all(|fields| *fields == lines[0]), "{}", stdout(&out));
    let read = |name: &str| std::fs::read_to_string(scratch.file(name)).unwrap();
    let page = read("a.html");
    assert!(page.starts_with("<!DOCTYPE html>") && page.matches("<svg").count() == 2);
    assert!(page.contains("Stages of a fault") && page.contains("itself, no drain"), "{page}");
    assert!(read("a.svg").starts_with("<svg"));
    for tag in ["tcp-raw-read", "tcp-handler-off", "tcp-itself-off"] {
        assert!(read(&format!("a-{tag}.hgrm")).contains("1/(1-Percentile)"));
        assert!(read("a.hlog").contains(&format!("Tag={tag},")));
    }
    for (format, header) in [("perftest", "t_typical[usec]"), ("osu", "# Size")] {
        let out = pcbench(&[&SHORT[..], &["--format", format]].concat());
        assert!(out.status.success(), "{}", stderr(&out));
        assert_eq!(
            stdout(&out).matches(header).count(),
            3,
            "raw reads, and a block a case: {}",
            stdout(&out)
        );
    }
}

#[test]
fn a_file_that_cannot_be_written_is_said_before_anything_is_measured() {
    let out = pcbench(&[&SHORT[..], &["--plot", "/nonexistent/a.svg"]].concat());
    assert_refused(&out, &["cannot write /nonexistent/a.svg"]);
}

#[test]
fn two_runs_are_compared_case_by_case_and_never_with_reads() {
    let scratch = Scratch::new("fault-compare");
    let measured = report(&SHORT);
    let write = |name: &str, report: &Value| {
        let path = scratch.file(name);
        std::fs::write(&path, report.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let with_medians = |median_us: f64| {
        let mut report = measured.clone();
        for case in report["cases"].as_array_mut().unwrap() {
            for (path, factor) in
                [("/latency/p50_us", 1.0), ("/median_ci/low_us", 0.99), ("/median_ci/high_us", 1.01)]
            {
                *case.pointer_mut(path).unwrap() = (median_us * factor).into();
            }
        }
        report
    };
    let (a, b) = (write("a.json", &with_medians(20.0)), write("b.json", &with_medians(30.0)));
    let compare = |args: &[&str]| pcbench(&[&["compare"], args].concat());
    assert_eq!(compare(&[&a, &a, "--fail-above", "5%"]).status.code(), Some(0));
    assert_eq!(compare(&[&a, &b, "--fail-above", "5%"]).status.code(), Some(1));
    let told: Value = serde_json::from_slice(&compare(&[&a, &b, "--json"]).stdout).unwrap();
    let difference = &told["differences"][1];
    assert_eq!((&difference["faults_by"], &difference["drain"]), (&"itself".into(), &"off".into()));
    assert!((number(difference, "/p50_percent") - 50.0).abs() < 0.1, "{difference}");
    let reads = report_of_reads();
    let out = compare(&[&a, &write("reads.json", &reads)]);
    assert_eq!(out.status.code(), Some(2));
    assert_refused(&out, &["nothing in common"]);
    let mut older = measured.clone();
    older["version"] = 1.into();
    assert_refused(&compare(&[&a, &write("older.json", &older)]), &["older.json", "another version"]);
}

fn report_of_reads() -> Value {
    report(&["--transport", "shm", "--sizes", "4K", "--iterations", "100", "--rounds", "1"])
}
