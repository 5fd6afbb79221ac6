//! What is compared, from `LABEL=REPORT.json[,GUEST.json]` and the files that it names.
//!
//! Files come from anywhere: whatever is wrong with one is an error of one line that names it.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use postcopy_engine::session::{MigrationReport, REPORT_VERSION};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest label in characters; longer ones would not fit beside a plot.
const MAX_LABEL: usize = 24;
/// What the test guest puts before its lines.
const GUEST_PREFIX: &str = "pcguest: ";

/// One migration.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Migration {
    pub(super) label: String,
    pub(super) report: MigrationReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) guest: Option<GuestReport>,
}

/// What the guest saw: a line of the test guest's program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct GuestReport {
    /// Pages verified since the guest's start.
    pub(super) pages: u64,
    /// Pages that were wrong.
    pub(super) bad: u64,
    /// Times of accesses since the guest was told to `reset`.
    pub(super) stall_us: Stalls,
    /// Longest time in which the guest's program got nothing done.
    pub(super) longest_pause_ms: f64,
}

/// Percentiles of access times, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stalls {
    pub(super) count: u64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

/// Reads every migration named on the command line.
///
/// Errors: a name that is not understood or comes twice, and those of [`load`].
pub(super) fn load_all(names: &[String]) -> anyhow::Result<Vec<Migration>> {
    let mut migrations: Vec<Migration> = Vec::new();
    for name in names {
        let migration = load(name)?;
        let twice = migrations.iter().any(|other| other.label == migration.label);
        ensure!(!twice, "the label `{}` comes twice; give each migration its own", migration.label);
        migrations.push(migration);
    }
    Ok(migrations)
}

/// Reads one migration.
///
/// Errors: no label, a file that cannot be read, or one that is no report.
fn load(name: &str) -> anyhow::Result<Migration> {
    let Some((label, files)) = name.split_once('=') else {
        bail!("`{name}` has no label; write LABEL=REPORT.json or LABEL=REPORT.json,GUEST.json");
    };
    check_label(label)?;
    let (report, guest) = match files.split_once(',') {
        Some((report, guest)) => (report, Some(guest)),
        None => (files, None),
    };
    Ok(Migration {
        label: label.to_owned(),
        report: report_from(Path::new(report))?,
        guest: guest.map(|path| guest_from(Path::new(path))).transpose()?,
    })
}

fn check_label(label: &str) -> anyhow::Result<()> {
    let fits = (1..=MAX_LABEL).contains(&label.chars().count()) && !label.contains(char::is_control);
    ensure!(fits, "{label:?} is no label: write 1 to {MAX_LABEL} printable characters before the `=`");
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn report_from(path: &Path) -> anyhow::Result<MigrationReport> {
    parse_report(&read(path)?)
        .with_context(|| format!("{} is no report of `pcvm migrate --json`", path.display()))
}

pub(super) fn parse_report(text: &str) -> anyhow::Result<MigrationReport> {
    let value: Value = serde_json::from_str(text)?;
    let version = value.get("version").and_then(Value::as_u64).context("it has no version")?;
    ensure!(
        version == u64::from(REPORT_VERSION),
        "its version is {version}, this pcvm reads {REPORT_VERSION}"
    );
    typed(value)
}

fn guest_from(path: &Path) -> anyhow::Result<GuestReport> {
    parse_guest(&read(path)?).with_context(|| format!("{} is no report of the test guest", path.display()))
}

/// From a line of the guest's console, or the JSON in it.
pub(super) fn parse_guest(text: &str) -> anyhow::Result<GuestReport> {
    let text = text.trim();
    typed(serde_json::from_str(text.strip_prefix(GUEST_PREFIX).unwrap_or(text))?)
}

fn typed<T: DeserializeOwned>(value: Value) -> anyhow::Result<T> {
    Ok(serde_json::from_value(value)?)
}
