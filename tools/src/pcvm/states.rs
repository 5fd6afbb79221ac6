//! Where the guest of a process is, and what its main loop and its control server share of that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use postcopy_engine::session::{Limiter, Owed, Phase, Progress};
use tokio::sync::watch;

use crate::arrival::Arrival;
use crate::control::Status;
use crate::held::HeldGuest;

/// Where the guest is.
pub(crate) enum State {
    /// There is none yet.
    Waiting,
    /// It runs here.
    Running(Arc<dyn HeldGuest>),
    /// It is being moved away.
    Migrating(Arc<dyn HeldGuest>),
    /// The handover was not confirmed. Guest and exported memory are kept until a person decides.
    InDoubt { guest: Arc<dyn HeldGuest>, owed: Box<Owed> },
    /// It runs at the destination, which still needs this memory and cannot be heard.
    Kept { owed: Box<Owed>, reason: String },
    /// The same, and the destination is being reached again.
    Recovering,
    /// It has moved away, or ended.
    Gone,
    /// The user asked for the end.
    Quit,
}

/// A guest whose handover was not confirmed, and its memory on offer.
type Doubtful = (Arc<dyn HeldGuest>, Box<Owed>);

/// What the control server and the main loop share.
pub(crate) struct Host {
    state: Mutex<State>,
    arrival: Mutex<Arrival>,
    changed: tokio::sync::Notify,
    pub(crate) progress: watch::Sender<Progress>,
    /// Somebody has asked for the migration that is under way to be called off.
    called_off: watch::Sender<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Waiting),
            arrival: Mutex::new(Arrival::None),
            changed: tokio::sync::Notify::new(),
            progress: watch::Sender::new(Progress::default()),
            called_off: watch::Sender::new(false),
        })
    }

    pub(crate) fn set(&self, state: State) -> State {
        let before = std::mem::replace(&mut *lock(&self.state), state);
        self.changed.notify_waiters();
        before
    }

    /// Waits until it is so.
    pub(crate) async fn reached(&self, wanted: impl Fn(&State) -> bool) {
        loop {
            let changed = self.changed.notified();
            if wanted(&lock(&self.state)) {
                return;
            }
            changed.await;
        }
    }

    /// Takes the guest for a migration, if it runs here and may be moved.
    pub(crate) fn begin_migration(&self) -> Result<Arc<dyn HeldGuest>, String> {
        if let Arrival::Stranded { reason, .. } = &*lock(&self.arrival) {
            return Err(format!("the guest's memory has not all arrived here: {reason}"));
        }
        let mut state = lock(&self.state);
        match &*state {
            State::Running(guest) => {
                let guest = guest.clone();
                *state = State::Migrating(guest.clone());
                self.progress.send_replace(Progress::default());
                self.called_off.send_replace(false);
                Ok(guest)
            }
            State::Migrating(_) | State::Recovering => Err("the guest is being moved already".into()),
            State::Waiting => Err("there is no guest here yet".into()),
            State::InDoubt { .. } => {
                Err("the last handover is in doubt; end that with `pcvm resolve`".into())
            }
            State::Kept { .. } | State::Gone | State::Quit => Err("the guest is not here any more".into()),
        }
    }

    /// Calls off the migration that is under way, if the guest still runs here for certain.
    pub(crate) fn call_off(&self) -> Result<(), String> {
        match &*lock(&self.state) {
            State::Migrating(_) if self.progress.borrow().phase.is_before_stop() => {
                self.called_off.send_replace(true);
                Ok(())
            }
            State::Migrating(_) | State::Recovering => {
                Err("it is too late: the guest was stopped for its move; see `pcvm status`".into())
            }
            _ => Err("no guest is being moved from here".into()),
        }
    }

    /// Says true when the migration that is under way is called off.
    pub(crate) fn called_off(&self) -> watch::Receiver<bool> {
        self.called_off.subscribe()
    }

    /// Takes guest and export out of doubt.
    pub(crate) fn take_doubt(&self) -> Option<Doubtful> {
        let mut state = lock(&self.state);
        if !matches!(&*state, State::InDoubt { .. }) {
            return None;
        }
        match std::mem::replace(&mut *state, State::Waiting) {
            State::InDoubt { guest, owed } => Some((guest, owed)),
            _ => None,
        }
    }

    /// Takes the memory that is kept on offer, to reach the destination again.
    pub(crate) fn take_kept(&self) -> Result<Box<Owed>, String> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, State::Recovering) {
            State::Kept { owed, .. } => Ok(owed),
            other => {
                let reason = match &other {
                    State::InDoubt { .. } => {
                        "the handover is in doubt: end that with `pcvm resolve --guest there` first"
                    }
                    State::Recovering | State::Migrating(_) => "that is under way already",
                    _ => "no guest has left that could need its memory from here",
                };
                *state = other;
                Err(reason.into())
            }
        }
    }

    pub(crate) fn guest(&self) -> Option<Arc<dyn HeldGuest>> {
        match &*lock(&self.state) {
            State::Running(guest) | State::Migrating(guest) => Some(guest.clone()),
            _ => None,
        }
    }

    /// Whether it is this side's guest, and not on its way.
    pub(crate) fn runs_here(&self) -> bool {
        matches!(&*lock(&self.state), State::Running(_))
    }

    /// Whether a guest that has left, or may have, needs its memory from here.
    pub(crate) fn is_needed(&self) -> bool {
        match &*lock(&self.state) {
            State::Migrating(_) => {
                matches!(self.progress.borrow().phase, Phase::InDoubt | Phase::Draining | Phase::Recovering)
            }
            State::InDoubt { .. } | State::Kept { .. } | State::Recovering => true,
            State::Waiting | State::Running(_) | State::Gone | State::Quit => false,
        }
    }

    /// Whether the memory of a guest that arrived here is on its way.
    pub(crate) fn is_draining(&self) -> bool {
        matches!(&*lock(&self.arrival), Arrival::Draining { .. })
    }

    /// Waits until the memory of a guest that arrived here is all here.
    pub(crate) async fn resident(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.is_draining() {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn set_arrival(&self, arrival: Arrival) {
        *lock(&self.arrival) = arrival;
        self.changed.notify_waiters();
    }

    /// What changes how much of a guest's memory may cross, while that is on its way here.
    pub(crate) fn limiter(&self) -> Option<Limiter> {
        match &*lock(&self.arrival) {
            Arrival::Draining { limiter, .. } | Arrival::Stranded { limiter, .. } => Some(limiter.clone()),
            Arrival::None | Arrival::Resident(_) => None,
        }
    }

    pub(crate) fn status(&self) -> Status {
        let (arrival, stranded) = match &*lock(&self.arrival) {
            Arrival::None => (None, None),
            Arrival::Draining { status, .. } | Arrival::Resident(status) => {
                (Some(status.borrow().report), None)
            }
            Arrival::Stranded { reason, status, .. } => (Some(status.borrow().report), Some(reason.clone())),
        };
        let mut migration = None;
        let (state, detail) = match &*lock(&self.state) {
            State::Waiting => ("waiting", "no guest has arrived yet".into()),
            State::Running(_) if stranded.is_some() => ("stranded", stranded.unwrap_or_default()),
            State::Running(_) => ("running", "the guest runs here".into()),
            State::Migrating(_) => {
                migration = Some(*self.progress.borrow());
                ("migrating", "the guest is being moved".into())
            }
            State::InDoubt { .. } => (
                "in-doubt",
                "the destination did not confirm the handover; find out whether the guest runs there, then \
                 `pcvm resolve`"
                    .into(),
            ),
            State::Kept { reason, .. } => {
                let held = "its memory is kept on offer here, see `pcvm recover`";
                ("kept", format!("the guest is at the destination; {held}: {reason}"))
            }
            State::Recovering => {
                migration = Some(*self.progress.borrow());
                ("migrating", "the guest is at the destination, which is being reached again".into())
            }
            State::Gone | State::Quit => ("gone", "the guest is not here any more".into()),
        };
        Status { state: state.into(), detail, migration, arrival }
    }
}
