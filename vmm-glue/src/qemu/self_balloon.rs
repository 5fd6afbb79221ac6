//! Dynamic self-ballooning: what a guest does not use stays in its balloon, all the time.
//!
//! The paper (Hines, Deshpande, Gopalan, section 3.4) does it in the guest: a thread inflates the balloon to 95 % of
//! the free memory every five seconds; under memory pressure it deflates, and the thread rests for some ten intervals. Here
//! the thread is on the host, the driver is the guest's own, and what is free the guest tells by its balloon's
//! statistics. [`Rule`] decides; [`SelfBalloon`] asks and acts.
//!
//! The monitor is held for a turn alone, in between it is anybody's: `pcvm migrate --qmp` among them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::QemuError;
use super::balloon::{self, Statistics, share};
use super::foreign::Parts;
use super::qmp::Qmp;

/// Turns in which a balloon does not grow after its guest was pressed for memory: the paper's ten intervals.
const REST: u32 = 10;
/// How long a balloon may take in one turn. Less than others wait for the monitor.
const TURN_PATIENCE: Duration = Duration::from_secs(3);
/// How often QEMU asks a guest what is free: twice as often as the balloon is looked at, so that what is found is of after
/// the last change, and at least this often.
const ASKED_EVERY: Duration = Duration::from_secs(2);
/// The least that is worth a change: this part of a guest's memory, or a MiB.
const LEAST_PART: u64 = 256;
const LEAST: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// What a guest has, and what it says.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Bytes that it has without a balloon.
    whole: u64,
    /// Bytes that it has.
    has: u64,
    told: Statistics,
}

impl Seen {
    fn ballooned(&self) -> u64 {
        self.whole.saturating_sub(self.has)
    }
}

/// When a balloon takes and gives what. Without I/O.
#[derive(Clone, Debug)]
struct Rule {
    /// Per cent of what would be free without a balloon that go into it.
    percent: u8,
    /// Turns in which it does not grow.
    rest: u32,
    /// What the guest was left the last time, and what it had swapped out then.
    before: Option<(u64, Option<u64>)>,
}

impl Rule {
    /// Whether the guest has taken memory back by itself (`deflate-on-oom`), or swapped, since the last turn.
    fn is_pressed(&self, seen: &Seen) -> bool {
        let Some((left, swapped_out)) = self.before else { return false };
        seen.has > left || swapped_out.zip(seen.told.swapped_out).is_some_and(|(before, now)| now > before)
    }

    /// Whether the guest was pressed in the last turn.
    fn begins_to_rest(&self) -> bool {
        self.rest == REST
    }

    /// Bytes that the guest is to have, if that is to change.
    ///
    /// A guest under pressure gets half of its balloon at once. Otherwise a share of what would be free without a
    /// balloon is in it, so that it also gives way, little by little, to a guest that uses more.
    fn next(&mut self, seen: &Seen) -> Option<u64> {
        let pressed = self.is_pressed(seen);
        self.rest = if pressed { REST } else { self.rest.saturating_sub(1) };
        let idle = seen.told.free.saturating_add(seen.ballooned()).min(seen.whole);
        let shared = seen.whole - share(idle, self.percent);
        let halved = seen.has + seen.ballooned() / 2;
        let wanted = if pressed { shared.max(halved) } else { shared };
        let wanted = if self.rest > 0 { wanted.max(seen.has) } else { wanted };
        // In whole pages, as a guest gives them.
        let wanted = wanted.min(seen.whole).next_multiple_of(PAGE).min(seen.whole);
        (wanted.abs_diff(seen.has) >= (seen.whole / LEAST_PART).max(LEAST)).then_some(wanted)
    }

    /// Takes up what the guest was left.
    fn left(&mut self, bytes: u64, told: Statistics) {
        self.before = Some((bytes, told.swapped_out));
    }
}

/// How a guest's memory is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Share {
    /// Bytes that the guest has without a balloon.
    pub whole_bytes: u64,
    /// Bytes that it has.
    pub has_bytes: u64,
    /// Bytes of them that were free before this turn.
    pub free_bytes: u64,
    /// It was pressed for memory since the turn before.
    pub pressed: bool,
}

/// What a turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The balloon has taken or given something.
    Changed(Share),
    /// It is as it should be, or the guest does not run, or has said nothing new.
    Same,
    /// Somebody else has the monitor.
    Busy,
    /// QEMU has ended.
    Ended,
}

/// Keeps a guest's balloon.
#[derive(Debug)]
pub struct SelfBalloon {
    monitor: PathBuf,
    device: String,
    rule: Rule,
    /// When the balloon was changed last, in seconds of this host's clock: what the guest said by then is of before.
    changed: u64,
    /// How often QEMU asked for statistics before.
    asked_before: Value,
}

impl SelfBalloon {
    /// The balloon of the guest whose QEMU has its monitor at `monitor`, which is to hold so many per cent of what would
    /// be free without it, and is looked at every `interval`. Waits until the guest says what is free.
    ///
    /// Errors: the monitor does not answer, there is no balloon, one that would not give way, or one that tells nothing.
    pub fn attach(monitor: &Path, percent: u8, interval: Duration) -> Result<Self, QemuError> {
        let mut qmp = Qmp::connect(monitor)?;
        let device = Parts::of(&mut qmp)?.balloon().ok_or_else(balloon::none)?;
        if balloon::property(&mut qmp, &device, "deflate-on-oom")? != true {
            return Err(QemuError::Balloon(
                "its balloon does not give way to a guest that runs out of memory, which then ends programs: start QEMU \
                 with -device virtio-balloon-pci,deflate-on-oom=on"
                    .into(),
            ));
        }
        balloon::ask(&mut qmp, &device)?;
        let asked_before = balloon::ask_every(&mut qmp, &device, (interval / 2).min(ASKED_EVERY))?;
        let rule = Rule { percent, rest: 0, before: None };
        Ok(Self { monitor: monitor.into(), device, rule, changed: 0, asked_before })
    }

    /// Looks at the guest once, and has its balloon take or give. To be called from a blocking thread; ends early when
    /// told to `stop`.
    ///
    /// Errors: QEMU refuses something.
    pub fn turn(&mut self, stop: &AtomicBool) -> Result<Turn, QemuError> {
        match Qmp::connect(&self.monitor).and_then(|mut qmp| self.look(&mut qmp, stop)) {
            Err(QemuError::Ended { .. }) => Ok(Turn::Ended),
            Err(QemuError::Monitor { source, .. }) if is_busy(&source) => Ok(Turn::Busy),
            Err(QemuError::Monitor { source, .. }) if is_gone(&source) => Ok(Turn::Ended),
            looked => looked,
        }
    }

    fn look(&mut self, qmp: &mut Qmp, stop: &AtomicBool) -> Result<Turn, QemuError> {
        if qmp.execute("query-status", &json!({}))?["running"] != true {
            return Ok(Turn::Same);
        }
        let told = balloon::statistics(qmp, &self.device)?.filter(|told| told.at > self.changed);
        let Some(told) = told else { return Ok(Turn::Same) };
        let seen = Seen { whole: whole(qmp)?, has: balloon::actual(qmp)?, told };
        let Some(wanted) = self.rule.next(&seen) else {
            self.rule.left(seen.has, told);
            return Ok(Turn::Same);
        };
        // What it is given it may take later.
        let left = balloon::take(qmp, (seen.has, wanted), TURN_PATIENCE, stop)?.max(wanted);
        self.rule.left(left, told);
        self.changed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let (whole_bytes, has_bytes, free_bytes) = (seen.whole, left, told.free);
        let pressed = self.rule.begins_to_rest();
        Ok(Turn::Changed(Share { whole_bytes, has_bytes, free_bytes, pressed }))
    }

    /// Gives the guest all of its memory. To be called from a blocking thread.
    ///
    /// Errors: the monitor does not answer, or QEMU refuses; the balloon keeps what it has.
    pub fn release(&self) -> Result<(), QemuError> {
        let mut qmp = Qmp::connect(&self.monitor)?;
        let whole = whole(&mut qmp)?;
        balloon::set(&mut qmp, whole)?;
        balloon::ask_as_before(&mut qmp, &self.device, &self.asked_before)
    }
}

/// A monitor that has a client lets others connect and says nothing.
fn is_busy(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Nobody listens there any more, or did until now.
fn is_gone(error: &std::io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe)
}

/// Bytes that the guest has without a balloon.
fn whole(qmp: &mut Qmp) -> Result<u64, QemuError> {
    let answer = qmp.execute("query-memory-size-summary", &json!({}))?;
    let base = answer["base-memory"].as_u64();
    let bytes = base.map(|base| base.saturating_add(answer["plugged-memory"].as_u64().unwrap_or(0)));
    let command = "query-memory-size-summary";
    bytes.ok_or_else(|| QemuError::Answer { command: command.into(), answer: answer.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn rule() -> Rule {
        Rule { percent: 95, rest: 0, before: None }
    }

    fn seen(has: u64, free: u64, swapped_out: Option<u64>) -> Seen {
        Seen { whole: 1000 * MIB, has: has * MIB, told: Statistics { at: 1, free: free * MIB, swapped_out } }
    }

    /// One turn of a guest that does as it is told; gives what it has then, in MiB.
    fn turn(rule: &mut Rule, seen: &Seen) -> u64 {
        let left = rule.next(seen).unwrap_or(seen.has);
        rule.left(left, seen.told);
        left / MIB
    }

    #[test]
    fn what_is_free_is_taken_and_nothing_more_the_next_time() {
        let mut rule = rule();
        let left = turn(&mut rule, &seen(1000, 400, None));
        assert_eq!(left, 620);
        for _ in 0..5 {
            assert_eq!(rule.next(&seen(left, 400 - (1000 - left), None)), None);
        }
    }

    #[test]
    fn it_gives_way_to_a_guest_that_uses_more_and_takes_what_it_has_freed() {
        let mut rule = rule();
        // Of 400 that were idle the guest uses the 20 that it was left.
        assert_eq!(turn(&mut rule, &seen(620, 0, None)), 639);
        assert_eq!(turn(&mut rule, &seen(639, 139, None)), 525);
    }

    #[test]
    fn a_guest_under_pressure_gets_half_of_the_balloon_and_is_left_alone_for_ten_turns() {
        let mut pressed = [
            // It took back what it needed.
            (None, seen(630, 2, None)),
            // It swapped.
            (Some(0), seen(620, 2, Some(4096))),
        ];
        for (swapped_out, later) in &mut pressed {
            let mut rule = rule();
            turn(&mut rule, &seen(1000, 400, *swapped_out));
            let left = turn(&mut rule, later);
            assert_eq!(left, later.has / MIB + (1000 - later.has / MIB) / 2);
            // All is free again, and nothing is taken.
            let freed = seen(left, left, later.told.swapped_out);
            for _ in 1..REST {
                assert_eq!(turn(&mut rule, &freed), left);
            }
            assert!(turn(&mut rule, &freed) < left);
        }
    }

    #[test]
    fn it_gives_while_it_rests() {
        let mut rule = Rule { rest: 5, ..rule() };
        assert_eq!(turn(&mut rule, &seen(500, 0, None)), 525);
    }

    #[test]
    fn whatever_a_guest_says_it_is_left_something_of_what_it_has() {
        for free in [0, 1, u64::MAX - 1, u64::MAX / MIB * MIB] {
            for has in [0, 1, 1000 * MIB, 2000 * MIB, u64::MAX] {
                let told = Statistics { at: 1, free, swapped_out: None };
                for before in [None, Some((7, Some(3)))] {
                    let mut rule = Rule { before, ..rule() };
                    let wanted = rule.next(&Seen { whole: 1000 * MIB, has, told });
                    assert!(
                        wanted.is_none_or(|wanted| (50 * MIB..=1000 * MIB).contains(&wanted)),
                        "{wanted:?}"
                    );
                }
            }
        }
    }
}
