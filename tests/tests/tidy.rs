//! Rules over the source itself, each with its reason. What clippy can check, clippy checks.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::path::{Path, PathBuf};

/// Longest file: past this it has grown a second job.
const MAX_LINES: usize = 450;
/// Longest function in lines, its signature and braces among them.
const MAX_FUNCTION: usize = 60;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() && entry.file_name() != "target" {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every Rust file of the project: its name, and its text.
fn sources() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    for folder in ["transport", "engine", "vmm-glue", "tools", "bench", "tests"] {
        if root().join(folder).exists() {
            collect(&root().join(folder), &mut paths);
        }
    }
    assert!(paths.len() > 40, "the source was not found: {paths:?}");
    let named = |path: PathBuf| {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        (name, std::fs::read_to_string(path).unwrap())
    };
    paths.into_iter().map(named).collect()
}

fn check(rule: &str, broken: impl Fn(&str, &str) -> Option<String>) {
    let all = sources();
    let found: Vec<String> = all
        .iter()
        .filter_map(|(name, text)| broken(name, text).map(|what| format!("{name}: {what}")))
        .collect();
    assert!(found.is_empty(), "{rule}\n{}", found.join("\n"));
}

#[test]
fn each_file_says_what_it_is() {
    check("a newcomer reads the first lines and knows whether to go on: open with `//!`", |_, text| {
        (!text.starts_with("//!")).then(|| "no module documentation".into())
    });
}

#[test]
fn nothing_is_left_for_later_in_the_source() {
    // Put together here, so that this file does not break its own rule.
    let marks = [["FIX", "ME"].concat(), ["TO", "DO"].concat(), ["XX", "X"].concat()];
    check("open work belongs in an issue, where somebody sees it", |_, text| {
        marks.iter().find(|mark| text.contains(mark.as_str())).cloned()
    });
}

#[test]
fn no_module_is_named_for_nothing() {
    check("a name says what is inside", |name, _| {
        let stem = Path::new(name).file_stem()?.to_str()?.to_owned();
        ["utils", "util", "helpers", "misc"].contains(&stem.as_str()).then_some(stem)
    });
}

#[test]
fn files_have_one_job() {
    check("split a file that grows a second job", |_, text| {
        let lines = text.lines().count();
        (lines > MAX_LINES).then(|| format!("{lines} lines, at most {MAX_LINES}"))
    });
}

#[test]
fn functions_fit_a_screen() {
    check("a function is read in one look", |_, text| {
        let mut begun: Option<(usize, usize, &str)> = None;
        for (number, line) in text.lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let code = line.trim_start();
            let is_fn = code.contains("fn ") && !code.starts_with("//") && !code.ends_with(';');
            match begun {
                None if is_fn && code.ends_with(['{', '(', '>']) => begun = Some((number, indent, code)),
                // A declaration without a body.
                Some((_, outer, _)) if indent == outer && code.ends_with(';') => begun = None,
                Some((first, outer, name)) if indent == outer && code == "}" => {
                    let lines = number - first + 1;
                    if lines > MAX_FUNCTION {
                        return Some(format!("{lines} lines: {name}"));
                    }
                    begun = None;
                }
                _ => {}
            }
        }
        None
    });
}

#[test]
fn the_planner_does_no_input_or_output() {
    let banned =
        ["std::net", "std::fs", "std::thread", "Instant::now", "SystemTime", "std::os", "unsafe", "tokio"];
    check(
        "the paging core runs under a simulation as under the pager: no clock, descriptor or thread",
        |name, text| {
            let core = name.starts_with("engine/src/planner/") && !name.ends_with("tests.rs");
            banned.iter().find(|word| core && text.contains(*word)).map(|word| (*word).into())
        },
    );
}

#[test]
fn unsafe_stays_in_leaf_modules() {
    let leaves = [
        "transport/src/memory.rs",
        "transport/src/memory/mapping.rs",
        "transport/src/sched.rs",
        "transport/src/shm.rs",
        "transport/src/tcp/vectored.rs",
        "transport/src/verbs/",
        "engine/src/pagemap.rs",
        "engine/src/pager/sigbus.rs",
        "engine/src/pager/trap.rs",
        "engine/src/pager/trap/part.rs",
        "engine/src/pager/trap/tests.rs",
        "engine/src/proc_pages/scan.rs",
        "engine/src/touched/away.rs",
        "engine/tests/killed_pager.rs",
        "engine/tests/other_program.rs",
        "vmm-glue/",
        "tests/guest/",
    ];
    check("unsafe lives behind safe types, in few places that one can audit", |name, text| {
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let mut bare = code.filter(|line| line.contains("unsafe {") || line.contains("unsafe impl"));
        let listed = leaves.iter().any(|leaf| name.starts_with(leaf)) || name == "tests/tests/tidy.rs";
        bare.next().filter(|_| !listed).map(|line| line.trim().into())
    });
}

#[test]
fn each_promise_is_linked_to_a_test_that_exists_or_pending() {
    let text = std::fs::read_to_string(root().join("SPECIFICATION.md")).unwrap();
    let all: String = sources().into_iter().map(|(_, text)| text).collect();
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| P")).collect();
    assert!(rows.len() >= 10, "SPECIFICATION.md has no promises");
    for row in rows {
        if row.contains("*pending*") || row.contains("bench/") {
            continue;
        }
        let tests: Vec<&str> = row.split('`').skip(1).step_by(2).filter(|code| code.contains("::")).collect();
        assert!(!tests.is_empty(), "neither tested nor pending: {row}");
        for test in tests {
            let function = test.rsplit("::").next().unwrap();
            assert!(all.contains(&format!("fn {function}(")), "{test} does not exist: {row}");
        }
    }
}
