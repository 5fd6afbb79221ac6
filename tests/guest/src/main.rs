//! The guest program of the test images: process 1 of a virtual machine, or a plain process.
//!
//! It walks memory whose every byte it can predict, measures how long each first access takes,
//! and prints a line of JSON a second. It takes commands, one a line: `report`, `reset`, `verify`,
//! `hold MIB` (of memory more, full of content, instead of what it held before), `poweroff`. Beside that it can keep a disk and a network busy. See `params` for what
//! it can be told at the start.

use std::io::{self, BufRead};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use postcopy_guest::clocks::{ClockWatch, boottime_ns, monotonic_ns};
use postcopy_guest::console::{BadLines, MAX_BAD_PRINTED, json, say};
use postcopy_guest::disk::Disk;
use postcopy_guest::init;
use postcopy_guest::network;
use postcopy_guest::params::Params;
use postcopy_guest::stats::{Pauses, Percentiles, Report, round};
use postcopy_guest::walker::Walker;

const TICK: Duration = Duration::from_millis(100);
/// What held memory is full of.
const HELD: u8 = 0xa5;

/// What other threads keep up.
#[derive(Default)]
struct Background {
    clocks: ClockWatch,
    ticks: AtomicU64,
}

fn start_ticks(background: Arc<Background>) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(TICK);
            background.clocks.look();
            background.ticks.fetch_add(1, Ordering::Relaxed);
        }
    });
}

fn start_commands() -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Starts what keeps disk and network busy, if it is asked for; gives the disk.
fn start_devices(params: &Params) -> io::Result<Option<Arc<Disk>>> {
    match params.net {
        Some(net) if init::is_init() => say(&format!("network on {}", network::set_up(net)?)),
        Some(_) => return Err(io::Error::other("net is for virtual machines: it changes the machine")),
        None => {}
    }
    if let Some(port) = params.echo {
        network::start_echo(port)?;
    }
    let Some(path) = &params.disk else { return Ok(None) };
    Ok(Some(Disk::open(path)?.start(Duration::from_micros(params.disk_pace_us))))
}

/// The loop and what it has to remember.
struct Program {
    params: Params,
    walker: Walker,
    background: Arc<Background>,
    commands: Receiver<String>,
    disk: Option<Arc<Disk>>,
    held: Vec<u8>,
    bad_lines: BadLines,
    pauses: Pauses,
    last_turn_ns: u64,
    last_report: Instant,
    pages_at_report: u64,
}

impl Program {
    fn new(params: Params) -> io::Result<Self> {
        let disk = start_devices(&params)?;
        let start = Instant::now();
        let walker = Walker::new(&params)?;
        let (pages, fill_ms) = (walker.pages(), start.elapsed().as_millis());
        say(&format!("ready {{\"pages\":{pages},\"fill_ms\":{fill_ms}}}"));
        let background = Arc::new(Background::default());
        start_ticks(background.clone());
        Ok(Self {
            params,
            walker,
            background,
            commands: start_commands(),
            disk,
            held: Vec::new(),
            bad_lines: BadLines::default(),
            pauses: Pauses::new(monotonic_ns()),
            last_turn_ns: monotonic_ns(),
            last_report: Instant::now(),
            pages_at_report: 0,
        })
    }

    /// Walks until told to end or the last pass is done.
    fn run(&mut self) {
        loop {
            if let Err(mismatch) = self.walker.step() {
                self.bad_lines.say(&mismatch);
            }
            self.note_gap();
            if !self.obey() || (self.params.passes > 0 && self.walker.pass() >= self.params.passes) {
                // The last report has all that was written, and the machine's end cuts nothing off.
                self.disk.iter().for_each(|disk| disk.end());
                self.report(None);
                return;
            }
            let due = self.params.report_ms > 0
                && self.last_report.elapsed() >= Duration::from_millis(self.params.report_ms);
            if due {
                self.report(None);
            }
            if self.params.pace_us > 0 {
                std::thread::sleep(Duration::from_micros(self.params.pace_us));
                self.last_turn_ns = monotonic_ns();
            }
        }
    }

    /// Notes how long it is since the last turn of the loop.
    fn note_gap(&mut self) {
        let now = monotonic_ns();
        self.pauses.note(now.saturating_sub(self.last_turn_ns), now);
        self.last_turn_ns = now;
    }

    /// Does what was asked; false at the end.
    fn obey(&mut self) -> bool {
        match self.commands.try_recv() {
            Err(TryRecvError::Empty) => return true,
            // Whoever closed the input of a plain process wants it to go on by itself.
            Err(TryRecvError::Disconnected) => return true,
            Ok(command) => match command.trim() {
                "report" => self.report_on_command(),
                "reset" => self.reset(),
                "verify" => self.verify(),
                "poweroff" => return false,
                "" => {}
                other => match other.strip_prefix("hold ").and_then(|mib| mib.parse().ok()) {
                    Some(mib) => self.hold(mib),
                    None => {
                        say(&format!("unknown command {other:?}: report, reset, verify, hold MIB, poweroff"))
                    }
                },
            },
        }
        self.walker.stalls[1].clear();
        self.last_turn_ns = monotonic_ns();
        true
    }

    fn report_on_command(&mut self) {
        let since = self.walker.stalls[1].percentiles();
        self.report(Some(since));
    }

    fn reset(&mut self) {
        self.walker.stalls[0].clear();
        self.pauses = Pauses::new(monotonic_ns());
        say("reset");
    }

    fn hold(&mut self, mib: usize) {
        // The old goes before the new is there.
        self.held = Vec::new();
        self.held = vec![HELD; mib << 20];
        say(&format!("holds {mib}"));
    }

    fn verify(&mut self) {
        let mut bad =
            self.held.chunks(4096).filter(|page| page.iter().any(|byte| *byte != HELD)).count() as u64;
        for mismatch in self.walker.verify_all() {
            bad += 1;
            if bad <= MAX_BAD_PRINTED {
                say(&format!("BAD {}", json(&mismatch)));
            }
        }
        say(&format!("verified {} bad {bad}", self.walker.pages()));
    }

    fn report(&mut self, since_command_us: Option<Percentiles>) {
        self.background.clocks.look();
        let pages = self.walker.verified;
        let first_touch_ns = self.walker.first_touches.median_ns();
        let rate = (pages - self.pages_at_report) as f64 / self.last_report.elapsed().as_secs_f64();
        say(&json(&Report {
            uptime_s: round(boottime_ns() as f64 / 1e9),
            monotonic_ok: self.background.clocks.ok(),
            ticks: self.background.ticks.load(Ordering::Relaxed),
            pass: self.walker.pass(),
            pages,
            bad: self.walker.bad,
            stall_us: self.walker.stalls[0].percentiles(),
            since_command_us,
            first_touch_us: round(first_touch_ns as f64 / 1e3),
            lost_ms: round(self.walker.stalls[0].above(first_touch_ns) as f64 / 1e6),
            longest_pause_ms: self.pauses.longest().first().map_or(0.0, |pause| pause.ms),
            stood_still_ms: round(self.pauses.stood_still_ns() as f64 / 1e6),
            pauses: self.pauses.longest().to_vec(),
            rate_pages_s: round(rate),
            disk_blocks: self.disk.as_ref().map(|disk| disk.acknowledged()),
        }));
        self.pages_at_report = pages;
        self.last_report = Instant::now();
        self.last_turn_ns = monotonic_ns();
    }
}

fn params() -> Result<Params, Box<dyn std::error::Error>> {
    if init::is_init() {
        init::set_up()?;
        init::load_modules()?;
        return Ok(Params::from_cmdline(&std::fs::read_to_string("/proc/cmdline")?)?);
    }
    Ok(Params::from_args(std::env::args().skip(1))?)
}

fn work() -> Result<(), Box<dyn std::error::Error>> {
    let params = params()?;
    say(&format!("up {{\"mb\":{},\"uptime_s\":{}}}", params.mb, round(boottime_ns() as f64 / 1e9)));
    Program::new(params)?.run();
    Ok(())
}

fn main() -> ExitCode {
    let result = work();
    if let Err(error) = &result {
        say(&format!("ended: {error}"));
    }
    if init::is_init() {
        say(&format!("cannot end the machine: {}", init::end_machine()));
        loop {
            std::thread::park();
        }
    }
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
