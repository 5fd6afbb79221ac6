//! A guest that a process has taken into a QEMU, which was killed while the guest's memory came: another goes on.
//!
//! All that is needed is in the QEMU, which waits: the userfaultfds under its RAM, and a file that the library which is
//! preloaded into it has made for this, the [`Ledger`]. There the pager keeps what is known of each page, and here what
//! is known of the QEMU. Nothing is asked of the QEMU itself: its main loop may wait for a page, and answers nobody then.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use postcopy_engine::memory::GuestMemory;
use postcopy_engine::pager::{Ledger, Stage, Trap};
use postcopy_engine::places::Places;
use postcopy_engine::proc_pages::memfd;
use postcopy_engine::session::GuestError;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};

use super::guest::{QemuGuest, Started};
use super::host::layout;
use super::process::Process;
use super::settings::Settings;
use super::{Facts, QemuError, ram};

/// What the library's memfd is called.
const NAME: &str = "postcopy-ledger";

/// What a process that takes this one's place has to know of a QEMU.
#[derive(Serialize, Deserialize)]
pub(super) struct Noted {
    pub(super) facts: Facts,
    pub(super) trapped: Trapped,
    /// Where its sockets are.
    pub(super) folder: PathBuf,
    /// Those of its vCPUs.
    pub(super) threads: Vec<i32>,
    /// What it was set to before the move.
    pub(super) before: Settings,
    /// Bytes that the guest is to have when all of it is here, where its balloon took some for the move.
    pub(super) deflate_to: Option<u64>,
}

/// How its RAM is trapped.
#[derive(Serialize, Deserialize)]
pub(super) struct Trapped {
    /// Where it is mapped.
    pub(super) places: Places,
    /// Numbers of its userfaultfds, one for each shard.
    pub(super) userfaultfds: Vec<i32>,
}

impl Noted {
    /// Errors: it is longer than a ledger has room for.
    pub(super) fn keep(&self, ledger: &Ledger) -> Result<(), GuestError> {
        Ok(ledger.note(&serde_json::to_vec(self)?)?)
    }
}

/// A guest that runs here, taken over from a process that was killed.
pub struct TakenOver {
    /// The guest.
    pub guest: Arc<QemuGuest>,
    /// Its memory.
    pub memory: GuestMemory,
    /// What keeps it from reading zeros, where its memory has not all come.
    pub trap: Option<Trap>,
}

impl TakenOver {
    /// The guest of the QEMU `pid`, which `pcvm receive` has started and left behind.
    ///
    /// Errors: there is no such QEMU, its guest was never this side's, whoever took it in still lives, or this process may not
    /// look into it. All is then as it was.
    pub fn of(pid: i32) -> Result<Self, QemuError> {
        let none = || QemuError::Unfit(format!("there is no process {pid}"));
        let process = Pid::from_raw(pid).ok_or_else(none)?;
        let pidfd = pidfd_open(process, PidfdFlags::empty()).map_err(|_| none())?;
        let ledger =
            Ledger::open(&kept_by(pid)?).map_err(QemuError::system("taking over the guest's memory"))?;
        let noted: Noted = serde_json::from_slice(&ledger.noted())
            .map_err(|_| QemuError::Unfit(format!("no guest has come to the QEMU of process {pid}")))?;
        if ledger.stage() == Stage::None {
            return Err(QemuError::Unfit(format!(
                "the guest of process {pid} was not handed over to this side before whoever took it in was killed: it is \
                 its source's (`pcvm resolve` where that is in doubt); end the process"
            )));
        }
        let Noted { facts, trapped, folder, threads, before, deflate_to } = noted;
        let layout = layout(facts.ram_bytes()).map_err(|error| QemuError::Unfit(error.to_string()))?;
        let files = trapped.places.each().map(|place| Ok((ram::open_at(pid, place.address)?, place.len)));
        let files = files.collect::<Result<Vec<_>, QemuError>>()?;
        let memory =
            GuestMemory::of_files(layout, files).map_err(QemuError::system("mapping the guest's RAM"))?;
        if memory.layout().total_pages() != ledger.pages() {
            return Err(QemuError::Unfit("what is known of its pages is of other memory".into()));
        }
        let trap = match ledger.stage() {
            Stage::Draining => Some(trap_of(&pidfd, pid, trapped, ledger)?),
            Stage::None | Stage::Over => None,
        };
        let process = Process::take_over(pidfd, folder)?;
        let started = Started { process, threads, before };
        let guest = Arc::new(QemuGuest::taken_over(facts, memory.clone(), started, deflate_to));
        Ok(Self { guest, memory, trap })
    }
}

/// The file that the library has made in process `pid`.
fn kept_by(pid: i32) -> Result<File, QemuError> {
    let kept = memfd(Path::new(&format!("/proc/{pid}")), NAME).map_err(ram::looking(pid, "its files"))?;
    let none = format!("process {pid} is no QEMU that `pcvm receive --vmm qemu` has started");
    kept.ok_or(QemuError::Unfit(none))
}

fn trap_of(pidfd: &OwnedFd, pid: i32, trapped: Trapped, ledger: Ledger) -> Result<Trap, QemuError> {
    let Trapped { places, userfaultfds } = trapped;
    let each = userfaultfds.into_iter().map(|number| pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()));
    let descriptors = each.collect::<Result<Vec<_>, _>>();
    let descriptors = descriptors.map_err(|errno| ram::looking(pid, "its userfaultfds")(errno.into()))?;
    Trap::take_over(descriptors, &places, ledger).map_err(|error| QemuError::Unfit(error.to_string()))
}
