//! A QEMU that waits for a guest, as the engine's sessions see it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use postcopy_engine::memory::{Gpa, GuestMemory, MemoryLayout, MemoryRegion};
use postcopy_engine::pager::{Ledger, Shards, Trap};
use postcopy_engine::session::{DestinationHost, GuestDescription, GuestError};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::facts::vcpu_threads;
use super::guest::{QemuGuest, Started};
use super::handover::HandedOver;
use super::process::Process;
use super::qmp::Qmp;
use super::settings::{Settings, Side};
use super::taken_over::{Noted, Trapped};
use super::{Facts, QemuError};

/// Kind of VMM that the state belongs to.
pub(super) const VMM: &str = "qemu/2";
/// Longest description of a QEMU that a peer may send.
const MAX_FACTS: usize = 4096;

/// How to start a destination's QEMU.
#[derive(Clone, Debug)]
pub struct QemuCommand {
    /// The program.
    pub program: OsString,
    /// Its arguments: the machine, as at the source.
    pub arguments: Vec<OsString>,
    /// `libpostcopy_handover.so`.
    pub library: PathBuf,
    /// Threads that are to bring its memory.
    pub shards: Shards,
}

/// A started QEMU without a guest.
struct Waiting {
    facts: Facts,
    process: Process,
    qmp: Qmp,
    before: Settings,
    handover: Option<HandedOver>,
    /// What is noted for a process that takes this one's place, once the RAM is taken over.
    noted: Option<(Ledger, Trapped)>,
}

/// Takes one guest in, into the QEMU that it has started.
pub struct QemuHost {
    waiting: Mutex<Option<Waiting>>,
}

impl QemuHost {
    /// Starts QEMU, so that what is wrong with its arguments is known before any guest comes.
    ///
    /// Errors: QEMU does not start, its RAM is not a shared file in memory, or a device binds it to
    /// this host.
    pub fn start(command: &QemuCommand) -> Result<Self, QemuError> {
        if !command.library.exists() {
            let text = format!(
                "{} is missing: build it (cargo build --release -p postcopy-handover), or say where it is with \
                 --handover-library",
                command.library.display()
            );
            return Err(QemuError::Arguments(text));
        }
        let (process, mut qmp, handed) = Process::start(command)?;
        let ready = Facts::gather(&mut qmp).and_then(|facts| {
            let handover = HandedOver::of(handed.try_iter().collect(), &facts.ram)?;
            // Disks are left to the source until the guest runs here.
            let before = Settings::now(&mut qmp, Side::Destination)?;
            before.for_a_move(&mut qmp)?;
            Ok((facts, handover, before))
        });
        match ready {
            Ok((facts, handover, before)) => {
                let waiting = Waiting { facts, process, qmp, before, handover: Some(handover), noted: None };
                Ok(Self { waiting: Mutex::new(Some(waiting)) })
            }
            Err(error) => {
                process.kill();
                Err(error)
            }
        }
    }

    /// Ends a QEMU that no guest has come to.
    pub fn end(&self) {
        if let Some(waiting) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waiting.process.kill();
        }
    }
}

impl Drop for QemuHost {
    fn drop(&mut self) {
        self.end();
    }
}

/// QEMU's RAM as the engine sees it: one region, by place in the files of its backends, one after the other. Where the machine maps it is
/// QEMU's business.
pub(super) fn layout(bytes: u64) -> Result<MemoryLayout, GuestError> {
    Ok(MemoryLayout::new(vec![MemoryRegion { gpa: Gpa(0), len: bytes, offset: 0 }])?)
}

/// What a source says of its guest.
#[derive(Serialize, Deserialize)]
pub(super) struct Described {
    pub(super) facts: Facts,
    /// Bytes that the guest is to have when all of it is here, where its balloon took some for the move.
    pub(super) deflate_to: Option<u64>,
}

fn described(description: &GuestDescription) -> Result<Described, GuestError> {
    if description.vmm != VMM {
        return Err(format!("the guest is of {:?}, this side waits for one of QEMU", description.vmm).into());
    }
    if description.config.len() > MAX_FACTS {
        return Err("the description of the guest is longer than 4 KiB".into());
    }
    let described: Described = postcard::from_bytes(&description.config)?;
    if layout(described.facts.ram_bytes())? != description.layout {
        return Err("the guest's memory does not fit its description".into());
    }
    Ok(described)
}

impl DestinationHost for QemuHost {
    type Guest = QemuGuest;

    fn memory(
        &self,
        description: &GuestDescription,
        _served: bool,
        _shards: Shards,
    ) -> Result<(GuestMemory, Trap), GuestError> {
        let Described { facts, .. } = described(description)?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = waiting.as_mut().ok_or("QEMU has its guest already")?;
        facts.fits(&waiting.facts)?;
        let handover = waiting.handover.take().ok_or("a guest was let in before, and did not come")?;
        let HandedOver { userfaultfds, numbers, ledger, files, places } = handover;
        let memory = GuestMemory::of_files(description.layout.clone(), files)?;
        let ledger = Ledger::begin(&ledger, description.layout.total_pages())?;
        let trap = Trap::adopt(userfaultfds, &places, &memory)?.noted_in(ledger.clone())?;
        // Memory that is too small for all of them is trapped by the first.
        let userfaultfds = numbers.into_iter().take(trap.shards()).collect();
        waiting.noted = Some((ledger, Trapped { places, userfaultfds }));
        Ok((memory, trap))
    }

    fn prepare(&self, description: &GuestDescription, memory: &GuestMemory) -> Result<QemuGuest, GuestError> {
        let Described { deflate_to, .. } = described(description)?;
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Waiting { facts, process, mut qmp, before, noted, .. } =
            waiting.ok_or("QEMU has its guest already")?;
        let uri = format!("unix:{}", process.state_socket().display());
        let ready =
            qmp.execute("migrate-incoming", &json!({"uri": uri})).and_then(|_| vcpu_threads(&mut qmp));
        let threads = ready.inspect_err(|_| process.kill())?;
        if let Some((ledger, trapped)) = noted {
            let (facts, before, folder) = (facts.clone(), before.clone(), process.folder().to_owned());
            let noted = Noted { facts, trapped, folder, threads: threads.clone(), before, deflate_to };
            if let Err(error) = noted.keep(&ledger) {
                tracing::warn!(%error, "if this process is killed, no other can go on");
            }
        }
        Ok(QemuGuest::new(facts, memory.clone(), qmp, Some(Started { process, threads, before }), deflate_to))
    }
}
