//! Free memory that need not move: a guest's balloon takes it before the move and gives it back after.
//!
//! The paper's dynamic self-ballooning (Hines, Deshpande, Gopalan, section 3.4) with a stock guest's own driver:
//! what the guest calls free goes into the balloon, all but a few per cent; QEMU gives the pages back to the
//! system, so they are holes in the RAM file, known to be zero, and do not cross. A guest that needs them meanwhile
//! gets them where its balloon has `deflate-on-oom`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::QemuError;
use super::qmp::Qmp;

/// How long a guest may take to tell what is free: QEMU asks once a second.
const STATISTICS_PATIENCE: Duration = Duration::from_secs(10);
/// How long a balloon may take that still grows, and how long one that does not.
const INFLATION_PATIENCE: Duration = Duration::from_secs(60);
const STALL_PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(100);

/// What a balloon has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inflated {
    /// Bytes that the guest had before.
    pub before: u64,
    /// Bytes that it has left.
    pub left: u64,
}

impl Inflated {
    /// Bytes that it gave back.
    pub fn bytes(self) -> u64 {
        self.before.saturating_sub(self.left)
    }
}

/// Has the balloon at `device` of QEMU's tree take so many per cent of what the guest, which has `before` bytes, calls
/// free. Returns when it has them, gets no further, or is told to stop.
///
/// Errors: the guest tells no statistics, or QEMU refuses.
pub(super) fn inflate(
    qmp: &mut Qmp,
    device: &str,
    (before, percent): (u64, u8),
    stop: &AtomicBool,
) -> Result<Inflated, QemuError> {
    let free = free_bytes(qmp, device)?;
    let target = target(before, free, percent);
    set(qmp, target)?;
    let (begun, mut left, mut progress) = (Instant::now(), before, Instant::now());
    let given_up = |progress: Instant| {
        let over = begun.elapsed() > INFLATION_PATIENCE || progress.elapsed() > STALL_PATIENCE;
        over || stop.load(Ordering::Relaxed)
    };
    while left > target && !given_up(progress) {
        std::thread::sleep(LOOK);
        let now = actual(qmp)?;
        if now < left {
            progress = Instant::now();
        }
        left = now;
    }
    // A guest that gave no more shall not begin again while it moves.
    set(qmp, left.max(target))?;
    Ok(Inflated { before, left })
}

/// Lets the guest have so many bytes.
pub(super) fn set(qmp: &mut Qmp, bytes: u64) -> Result<(), QemuError> {
    qmp.execute("balloon", &json!({ "value": bytes })).map(drop)
}

/// What the guest is to have.
fn target(actual: u64, free: u64, percent: u8) -> u64 {
    // Not so large as to overflow: a guest may say anything.
    actual.saturating_sub(free.min(actual) / 100 * u64::from(percent.min(100)))
}

/// Bytes that the guest has.
pub(super) fn actual(qmp: &mut Qmp) -> Result<u64, QemuError> {
    let answer = qmp.execute("query-balloon", &json!({}))?;
    let bytes = answer["actual"].as_u64();
    bytes.ok_or_else(|| QemuError::Answer { command: "query-balloon".into(), answer: answer.to_string() })
}

/// What the guest says is free now.
fn free_bytes(qmp: &mut Qmp, device: &str) -> Result<u64, QemuError> {
    let property = |name: &str| json!({"path": device, "property": name});
    let interval = "guest-stats-polling-interval";
    let asked_before = qmp.execute("qom-get", &property(interval))?;
    let told_before = statistics(qmp, device)?["last-update"].clone();
    set_property(qmp, device, interval, &json!(1))?;
    let begun = Instant::now();
    let free = loop {
        std::thread::sleep(LOOK);
        let told = statistics(qmp, device)?;
        // Not known is -1, as an unsigned number.
        let free = told["stats"]["stat-free-memory"].as_u64().filter(|free| *free != u64::MAX);
        match free.filter(|_| told["last-update"].as_u64() > Some(0) && told["last-update"] != told_before) {
            Some(free) => break Ok(free),
            None if begun.elapsed() > STATISTICS_PATIENCE => break Err(silent()),
            None => {}
        }
    };
    set_property(qmp, device, interval, &asked_before)?;
    free
}

fn statistics(qmp: &mut Qmp, device: &str) -> Result<Value, QemuError> {
    qmp.execute("qom-get", &json!({"path": device, "property": "guest-stats"}))
}

fn set_property(qmp: &mut Qmp, device: &str, name: &str, value: &Value) -> Result<(), QemuError> {
    qmp.execute("qom-set", &json!({"path": device, "property": name, "value": value})).map(drop)
}

fn silent() -> QemuError {
    QemuError::Unfit(
        "its balloon does not say how much memory is free: does the guest have the driver (virtio_balloon)? Leave \
         --balloon out otherwise"
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_what_is_free_is_taken_and_never_more_than_there_is() {
        assert_eq!(target(1000, 400, 95), 620);
        assert_eq!(target(1000, 400, 0), 1000);
        assert_eq!(target(1000, u64::MAX, 255), 0);
        assert_eq!(Inflated { before: 10, left: 7 }.bytes(), 3);
        assert_eq!(Inflated { before: 7, left: 10 }.bytes(), 0);
    }
}
