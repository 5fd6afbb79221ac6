//! A QEMU guest that moves: saved by QEMU's own migration without its RAM, loaded by the same.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use postcopy_engine::memory::GuestMemory;
use postcopy_engine::session::{DestinationGuest, DirtyLog, GuestError, SourceGuest, UseLog};
use serde_json::{Value, json};

use super::backend::Backend;
use super::balloon::{self, Inflated};
use super::host::{Described, VMM, layout};
use super::process::{Ended, Process};
use super::qmp::Qmp;
use super::settings::{Settings, Side};
use super::{Facts, QemuError, facts, locked, ram, uses};

/// How long QEMU may take to save or load its devices.
const STATE_PATIENCE: Duration = Duration::from_secs(60);
/// What it means that its settings could not be set back.
const STILL_SET_UP: &str =
    "QEMU's migration is still set up for a move of ours: one of its own would not carry the RAM";
/// The object of QEMU's that keeps the name of a session, so that it lives as long as the guest's memory here.
const SESSION: &str = "postcopy-session";
/// How much of QEMU's state is passed on at once.
const PIECE: usize = 64 << 10;

/// A guest in a QEMU: one that was found running, or one that was started to take it in.
pub struct QemuGuest {
    /// As they were when it was last asked: devices may be plugged in.
    facts: Mutex<Facts>,
    memory: GuestMemory,
    qmp: Arc<Mutex<Qmp>>,
    process: Option<Process>,
    /// The vCPUs' threads, if it was started for this guest.
    threads: Vec<i32>,
    /// Whether it may have run in the QEMU that was started for it.
    resumed: AtomicBool,
    /// What QEMU was set to before the move.
    before: Mutex<Option<Settings>>,
    /// Whether it was asked to write its state: a migration under way may be ours.
    saving: AtomicBool,
    /// Bytes that the guest is to have after the move, where its balloon took some for that.
    deflate_to: Mutex<Option<u64>>,
}

/// A QEMU that was started to take a guest in.
pub(super) struct Started {
    pub(super) process: Process,
    pub(super) threads: Vec<i32>,
    pub(super) before: Settings,
}

impl Drop for QemuGuest {
    fn drop(&mut self) {
        // A QEMU whose guest has not come is nobody's.
        if let (Some(process), false) = (&self.process, self.resumed.load(Ordering::Acquire)) {
            process.kill();
        }
    }
}

impl QemuGuest {
    /// The guest of the running QEMU whose monitor is the Unix socket `monitor`. Nothing changes
    /// for it.
    ///
    /// Errors: the monitor does not answer or is another client's, the guest cannot be moved, or
    /// this process may not open its memory.
    pub fn attach(monitor: &Path) -> Result<Self, QemuError> {
        let mut qmp = Qmp::connect(monitor)?;
        let facts = Facts::gather(&mut qmp)?;
        let files = ram::open(qmp.peer()?, &facts.ram)?;
        let layout = layout(facts.ram_bytes()).map_err(|error| QemuError::Unfit(error.to_string()))?;
        let memory =
            GuestMemory::of_files(layout, files).map_err(QemuError::system("mapping the guest's RAM"))?;
        Ok(Self::new(facts, memory, qmp, None, None))
    }

    pub(super) fn new(
        facts: Facts,
        memory: GuestMemory,
        qmp: Qmp,
        started: Option<Started>,
        deflate_to: Option<u64>,
    ) -> Self {
        let (process, threads, before) = match started {
            Some(Started { process, threads, before }) => (Some(process), threads, Some(before)),
            None => (None, Vec::new(), None),
        };
        let (qmp, resumed) = (Arc::new(Mutex::new(qmp)), AtomicBool::new(false));
        let (before, deflate_to) = (Mutex::new(before), Mutex::new(deflate_to));
        let (facts, saving) = (Mutex::new(facts), AtomicBool::new(false));
        Self { facts, memory, qmp, process, threads, resumed, before, saving, deflate_to }
    }

    /// That of a QEMU which another process has started, and where it was resumed.
    pub(super) fn taken_over(
        facts: Facts,
        memory: GuestMemory,
        started: Started,
        deflate_to: Option<u64>,
    ) -> Self {
        let qmp = started.process.monitor_later();
        let guest = Self::new(facts, memory, qmp, Some(started), deflate_to);
        guest.resumed.store(true, Ordering::Release);
        guest
    }

    /// Has its balloon take so many per cent of what it calls free, which then need not move. It gets them back at
    /// the destination when all else is there, or by [`QemuGuest::deflate`]. To be called from a blocking thread, before
    /// a migration; ends early when told to `stop`.
    ///
    /// Errors: it has no balloon, or one that tells nothing.
    pub fn inflate(&self, percent: u8, stop: &AtomicBool) -> Result<Inflated, QemuError> {
        let device = locked(&self.facts).balloon.clone().ok_or_else(balloon::none)?;
        let mut qmp = self.qmp();
        let before = balloon::actual(&mut qmp)?;
        *locked(&self.deflate_to) = Some(before);
        balloon::inflate(&mut qmp, &device, (before, percent), stop)
    }

    /// Gives back what [`QemuGuest::inflate`] has taken, if the guest stays.
    ///
    /// Errors: QEMU refuses, or has ended.
    pub fn deflate(&self) -> Result<(), QemuError> {
        match locked(&self.deflate_to).take() {
            Some(bytes) => balloon::set(&mut self.qmp(), bytes),
            None => Ok(()),
        }
    }

    /// The name of the session in which a process has moved it away that has ended since: see [`SourceGuest::keep_name`].
    ///
    /// Errors: it runs here, or nobody has begun to move it.
    pub fn kept_name(&self) -> Result<String, QemuError> {
        let mut qmp = self.qmp();
        if qmp.execute("query-status", &json!({}))?["running"] == true {
            return Err(QemuError::Unfit("it runs here, and has nothing to recover".into()));
        }
        let name =
            qmp.execute("qom-get", &json!({"path": format!("/objects/{SESSION}"), "property": "data"}));
        match name.as_ref().map(Value::as_str) {
            Ok(Some(name)) => Ok(name.to_owned()),
            _ => Err(QemuError::Unfit("nobody has moved it away from here".into())),
        }
    }

    fn ram(&self) -> Vec<Backend> {
        locked(&self.facts).ram.clone()
    }

    /// How its QEMU ended, if it was started to take it in and has.
    pub fn ended(&self) -> Option<Ended> {
        self.process.as_ref().and_then(Process::ended)
    }

    /// Ends its QEMU: it runs elsewhere, or is no longer wanted.
    pub fn end(&self) {
        // It may be gone already.
        let asked = self.qmp().execute("quit", &json!({}));
        if let Err(error) = asked {
            tracing::debug!(%error, "QEMU was asked to quit");
        }
        if let Some(process) = &self.process {
            process.wait();
        }
    }

    fn qmp(&self) -> MutexGuard<'_, Qmp> {
        locked(&self.qmp)
    }

    /// An error of QEMU's, with its last words if it has ended.
    fn explain(&self, error: QemuError) -> GuestError {
        match (&error, &self.process) {
            (QemuError::Ended { .. }, Some(process)) => process.last_words().into(),
            _ => error.into(),
        }
    }

    /// Sets QEMU back to what it was set to, unless that was done.
    fn set_back(&self) {
        if let Some(before) = locked(&self.before).take() {
            self.later("settings", STILL_SET_UP, move |qmp| before.restore(qmp));
        }
    }

    /// Asks something of QEMU in a thread of this `name`, for which nothing has to wait; says what it means if it
    /// `failed`.
    fn later(
        &self,
        name: &str,
        failed: &'static str,
        ask: impl FnOnce(&mut Qmp) -> Result<(), QemuError> + Send + 'static,
    ) {
        let qmp = self.qmp.clone();
        let work = move || {
            if let Err(error) = ask(&mut locked(&qmp)) {
                tracing::warn!(%error, "{failed}");
            }
        };
        if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(work) {
            tracing::warn!(%error, "{failed}");
        }
    }

    /// Has QEMU write its devices' state, and passes it on as it comes. QEMU stops the guest when it has written what is
    /// long, the memory of firmware and displays.
    fn save(&self, state: &mut dyn Write) -> Result<Instant, QemuError> {
        let mut qmp = self.qmp();
        // Somebody may have stopped it since; the destination would have it run.
        refuse_a_stopped_one(&mut qmp)?;
        let begun = Instant::now();
        // Given, and not a path: QEMU may be another user's, or confined.
        let made = UnixStream::pair().map_err(QemuError::system("making a socket for QEMU's state"));
        let (ours, theirs) = made?;
        let before = Settings::now(&mut qmp, Side::Source)?;
        locked(&self.before).insert(before).for_a_move(&mut qmp)?;
        qmp.forget_events();
        qmp.give("postcopy-state", theirs.as_fd())?;
        // QEMU's copy alone is left, so that its end is seen.
        drop(theirs);
        self.saving.store(true, Ordering::Release);
        qmp.execute("migrate", &json!({"uri": "fd:postcopy-state"}))?;
        pass_on(ours, state)?;
        migration_ends(&mut qmp, "save the guest's state")?;
        let stopped = qmp.event("STOP", Duration::from_millis(1), |_| true);
        let since = stopped.ok().and_then(|event| at(&event)).unwrap_or(begun).max(begun);
        Ok(since)
    }

    fn run_on(&self) -> Result<(), QemuError> {
        let mut qmp = self.qmp();
        // Another's migration is let be.
        if self.saving.load(Ordering::Acquire) {
            call_off(&mut qmp)?;
            self.saving.store(false, Ordering::Release);
        }
        if let Some(before) = locked(&self.before).take()
            && let Err(error) = before.restore(&mut qmp)
        {
            tracing::warn!(%error, "{STILL_SET_UP}");
        }
        forget_name(&mut qmp);
        Ok(())
    }

    fn read_in(&self, state: &mut dyn Read) -> Result<(), QemuError> {
        let mut qmp = self.qmp();
        let failed = || QemuError::system("giving QEMU the guest's state");
        let none = || QemuError::Unfit("it was not started to take a guest in".into());
        let socket = self.process.as_ref().ok_or_else(none)?.state_socket();
        let mut stream = UnixStream::connect(socket).map_err(failed())?;
        stream.set_write_timeout(Some(STATE_PATIENCE)).map_err(failed())?;
        let sent = std::io::copy(state, &mut stream).and_then(|_| stream.shutdown(Shutdown::Write));
        migration_ends(&mut qmp, "load the guest's state")?;
        sent.map_err(failed())
    }
}

impl SourceGuest for QemuGuest {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn describe(&self) -> Result<(String, Vec<u8>), GuestError> {
        refuse_a_stopped_one(&mut self.qmp())?;
        // Since it was asked a guest that has arrived here may have got what binds it to this host, or a balloon.
        let facts = Facts::gather(&mut self.qmp())?;
        if facts.ram != self.ram() {
            return Err("its RAM is another than it was".into());
        }
        let deflate_to = *locked(&self.deflate_to);
        *locked(&self.facts) = facts.clone();
        let described = Described { facts, deflate_to };
        Ok((VMM.into(), postcard::to_stdvec(&described)?))
    }

    fn may_discard(&self) -> bool {
        locked(&self.facts).balloon.is_some()
    }

    fn freeze(&self, state: &mut dyn Write) -> Result<Instant, GuestError> {
        self.save(state).map_err(|error| self.explain(error))
    }

    fn log_dirty(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        uses::log_dirty(&self.qmp, &self.ram()).map_err(|error| self.explain(error))
    }

    fn watch_uses(&self) -> Result<Option<Box<dyn UseLog>>, GuestError> {
        uses::watch(&self.qmp, &self.ram()).map_err(|error| self.explain(error))
    }

    fn keep_name(&self, session: &str) -> Result<(), GuestError> {
        let mut qmp = self.qmp();
        forget_name(&mut qmp);
        Ok(qmp
            .execute("object-add", &json!({"qom-type": "secret", "id": SESSION, "data": session}))
            .map(drop)?)
    }

    fn thaw(&self) -> Result<(), GuestError> {
        self.run_on().map_err(|error| self.explain(error))
    }
}

impl DestinationGuest for QemuGuest {
    fn load(&self, state: &mut dyn Read) -> Result<(), GuestError> {
        self.read_in(state).map_err(|error| self.explain(error))
    }

    fn give_up(&self) {
        self.process.iter().for_each(Process::kill);
    }

    fn resume(&self) -> Result<(), GuestError> {
        let mut qmp = self.qmp();
        self.resumed.store(true, Ordering::Release);
        qmp.execute("cont", &json!({})).map_err(|error| self.explain(error))?;
        drop(qmp);
        // The guest runs: that is told first.
        self.later("announce", "the network was not told that the guest has moved", announce);
        self.set_back();
        Ok(())
    }

    fn memory_arrived(&self) {
        // The process before may have come to it, or not.
        self.set_back();
        let Some(bytes) = locked(&self.deflate_to).take() else { return };
        let failed = "the guest's balloon keeps what it took for the move";
        self.later("balloon", failed, move |qmp| balloon::set(qmp, bytes));
    }

    fn has_ended(&self) -> bool {
        self.ended().is_some_and(Ended::in_order)
    }

    /// By QEMU's own account of its KVM (since QEMU 7.1).
    fn touched_pages(&self) -> Option<u64> {
        facts::touched_pages(&mut self.qmp())
    }

    fn vcpu_threads(&self) -> Vec<i32> {
        self.threads.clone()
    }
}

/// Errors: the guest does not run.
fn refuse_a_stopped_one(qmp: &mut Qmp) -> Result<(), QemuError> {
    let status = qmp.execute("query-status", &json!({}))?;
    if status["running"] == true {
        return Ok(());
    }
    let now = status["status"].as_str().unwrap_or("stopped");
    Err(QemuError::Unfit(format!("it does not run ({now}); continue it first (cont)")))
}

/// Removes the name of a session before, if there is one.
fn forget_name(qmp: &mut Qmp) {
    if let Err(error) = qmp.execute("object-del", &json!({"id": SESSION})) {
        tracing::debug!(%error, "no name of a session was kept");
    }
}

/// Tells switches where the guest is now. QEMU has begun to say so when it had loaded; the guest was not
/// yet there to answer.
fn announce(qmp: &mut Qmp) -> Result<(), QemuError> {
    let announcement = json!({"initial": 50, "max": 550, "rounds": 5, "step": 100});
    qmp.execute("announce-self", &announcement).map(drop)
}

/// Passes QEMU's state on, all of it, each piece as it comes.
fn pass_on(mut stream: UnixStream, state: &mut dyn Write) -> Result<(), QemuError> {
    let failed = || QemuError::system("reading QEMU's state");
    stream.set_read_timeout(Some(STATE_PATIENCE)).map_err(failed())?;
    let mut piece = vec![0; PIECE];
    loop {
        match stream.read(&mut piece).map_err(failed())? {
            0 => return Ok(()),
            read => {
                let passed = state.write_all(&piece[..read]).and_then(|()| state.flush());
                passed.map_err(QemuError::system("passing QEMU's state on"))?;
            }
        }
    }
}

/// Ends a migration of QEMU's, which may be over, and has the guest run.
fn call_off(qmp: &mut Qmp) -> Result<(), QemuError> {
    qmp.execute("migrate_cancel", &json!({}))?;
    let end = Instant::now() + STATE_PATIENCE;
    let running = loop {
        let migration = qmp.execute("query-migrate", &json!({}))?;
        let guest = qmp.execute("query-status", &json!({}))?;
        // A migration that is over may not have let go of the guest yet, which then cannot be continued.
        let under_way = facts::under_way(&migration);
        if under_way.is_none() && guest["status"] != "finish-migrate" {
            break guest["running"] == true;
        }
        if Instant::now() > end {
            let reason = format!("it is still {}, the guest {}", migration["status"], guest["status"]);
            return Err(QemuError::Migration { what: "end the saving of its state", reason });
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    if !running {
        qmp.execute("cont", &json!({}))?;
    }
    Ok(())
}

/// Waits for the end of a migration of QEMU's.
fn migration_ends(qmp: &mut Qmp, what: &'static str) -> Result<(), QemuError> {
    let over = |data: &Value| matches!(data["status"].as_str(), Some("completed" | "failed" | "cancelled"));
    let event = qmp.event("MIGRATION", STATE_PATIENCE, over)?;
    if event["data"]["status"] == "completed" {
        return Ok(());
    }
    let answer = qmp.execute("query-migrate", &json!({}))?;
    let reason = answer["error-desc"].as_str().unwrap_or("see its messages").to_owned();
    Err(QemuError::Migration { what, reason })
}

/// When an event happened. It has the time of this machine's clock.
fn at(event: &Value) -> Option<Instant> {
    let (seconds, micros) =
        (event["timestamp"]["seconds"].as_u64()?, event["timestamp"]["microseconds"].as_u64()?);
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(micros);
    Instant::now().checked_sub(SystemTime::now().duration_since(then).ok()?)
}
