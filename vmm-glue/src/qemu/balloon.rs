//! A guest's balloon: what it says is free, and having it take that.
//!
//! Before a move it takes what need not move, and gives it back after (`inflate`); all the time, that is
//! `self_balloon.rs`. Both are the paper's dynamic self-ballooning (Hines, Deshpande, Gopalan, section 3.4) with a
//! stock guest's own driver: what the guest calls free goes into the balloon, all but a few per cent; QEMU gives the
//! pages back to the system, so they are holes in the RAM file, known to be zero, and do not cross. A guest that needs
//! them meanwhile gets them where its balloon has `deflate-on-oom`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::QemuError;
use super::qmp::Qmp;

/// How long a guest may take to tell what is free: QEMU asks once a second.
const STATISTICS_PATIENCE: Duration = Duration::from_secs(10);
/// How long a balloon may take before a move that still grows, and how long one may that does not.
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

/// What a guest says of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Statistics {
    /// When it said so, in seconds of this host's clock.
    pub(super) at: u64,
    /// Bytes that nothing is in.
    pub(super) free: u64,
    /// Bytes that it has swapped out since it began, if it tells that.
    pub(super) swapped_out: Option<u64>,
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
    let free = ask(qmp, device)?.free;
    let target = before.saturating_sub(share(free.min(before), percent));
    let left = take(qmp, (before, target), INFLATION_PATIENCE, stop)?;
    Ok(Inflated { before, left })
}

/// So many per cent of `bytes`. A guest may say anything: not so large as to overflow.
pub(super) fn share(bytes: u64, percent: u8) -> u64 {
    bytes / 100 * u64::from(percent.min(100))
}

/// Has the balloon leave the guest, which has `has` bytes, `target`; gives what is left when it has that, gets no
/// further, or is told to stop. A guest that gave no more does not begin again afterwards.
pub(super) fn take(
    qmp: &mut Qmp,
    (has, target): (u64, u64),
    patience: Duration,
    stop: &AtomicBool,
) -> Result<u64, QemuError> {
    set(qmp, target)?;
    let (begun, mut left, mut progress) = (Instant::now(), has, Instant::now());
    let given_up = |progress: Instant| {
        let over = begun.elapsed() > patience || progress.elapsed() > STALL_PATIENCE;
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
    if left > target {
        set(qmp, left)?;
    }
    Ok(left)
}

/// Lets the guest have so many bytes.
pub(super) fn set(qmp: &mut Qmp, bytes: u64) -> Result<(), QemuError> {
    qmp.execute("balloon", &json!({ "value": bytes })).map(drop)
}

/// Bytes that the guest has.
pub(super) fn actual(qmp: &mut Qmp) -> Result<u64, QemuError> {
    let answer = qmp.execute("query-balloon", &json!({}))?;
    let bytes = answer["actual"].as_u64();
    bytes.ok_or_else(|| QemuError::Answer { command: "query-balloon".into(), answer: answer.to_string() })
}

/// How often QEMU asks a guest for its statistics, in seconds; 0 for never.
const POLLING: &str = "guest-stats-polling-interval";

/// Has QEMU ask the guest for its statistics as often as it did before [`ask_every`].
pub(super) fn ask_as_before(qmp: &mut Qmp, device: &str, before: &Value) -> Result<(), QemuError> {
    set_property(qmp, device, POLLING, before)
}

/// Has QEMU ask the guest for its statistics so often; gives how often it did.
pub(super) fn ask_every(qmp: &mut Qmp, device: &str, interval: Duration) -> Result<Value, QemuError> {
    let before = property(qmp, device, POLLING)?;
    set_property(qmp, device, POLLING, &json!(interval.as_secs().max(1)))?;
    Ok(before)
}

/// Has the guest say how its memory is, and waits for that.
///
/// Errors: it says nothing.
pub(super) fn ask(qmp: &mut Qmp, device: &str) -> Result<Statistics, QemuError> {
    let (before, begun) = (statistics(qmp, device)?, Instant::now());
    let asked_before = ask_every(qmp, device, Duration::from_secs(1))?;
    let told = loop {
        std::thread::sleep(LOOK);
        match statistics(qmp, device)? {
            Some(told) if before.is_none_or(|before| before.at != told.at) => break Ok(told),
            _ if begun.elapsed() > STATISTICS_PATIENCE => break Err(silent()),
            _ => {}
        }
    };
    ask_as_before(qmp, device, &asked_before)?;
    told
}

/// What the guest said last, if it has said anything.
pub(super) fn statistics(qmp: &mut Qmp, device: &str) -> Result<Option<Statistics>, QemuError> {
    let told = property(qmp, device, "guest-stats")?;
    // Not known is -1, as an unsigned number.
    let known = |name: &str| told["stats"][name].as_u64().filter(|bytes| *bytes != u64::MAX);
    let at = told["last-update"].as_u64().filter(|at| *at > 0);
    let (swapped_out, free) = (known("stat-swap-out"), known("stat-free-memory"));
    Ok(at.zip(free).map(|(at, free)| Statistics { at, free, swapped_out }))
}

pub(super) fn property(qmp: &mut Qmp, device: &str, name: &str) -> Result<Value, QemuError> {
    qmp.execute("qom-get", &json!({"path": device, "property": name}))
}

fn set_property(qmp: &mut Qmp, device: &str, name: &str, value: &Value) -> Result<(), QemuError> {
    qmp.execute("qom-set", &json!({"path": device, "property": name, "value": value})).map(drop)
}

pub(super) fn none() -> QemuError {
    QemuError::Balloon("it has no balloon (-device virtio-balloon-pci,deflate-on-oom=on)".into())
}

fn silent() -> QemuError {
    QemuError::Balloon(
        "its balloon does not say how much memory is free: does the guest have the driver (virtio_balloon)?"
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_what_is_free_is_taken_and_never_more_than_there_is() {
        assert_eq!(share(400, 95), 380);
        assert_eq!(share(400, 0), 0);
        assert_eq!(share(u64::MAX, 255), u64::MAX / 100 * 100);
        assert_eq!(Inflated { before: 10, left: 7 }.bytes(), 3);
        assert_eq!(Inflated { before: 7, left: 10 }.bytes(), 0);
    }
}
