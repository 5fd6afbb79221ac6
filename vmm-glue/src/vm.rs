//! A guest, from the embedder's side.
//!
//! ```text
//!  boot ──┐
//!         ├──▶ paused ── start ──▶ running ── pause ──▶ paused ── save ──▶ bytes
//!  restore┘       ▲                   │
//!                 └───── start ◀──────┴── the guest ends: exit_event
//! ```

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use postcopy_engine::memory::{Gpa, GuestMemory};
use postcopy_engine::page_set::PageSet;
use postcopy_engine::pager::FaultServer;

use crate::config::{BootSource, VmConfig};
use crate::console::{Console, StdinFeed};
use crate::crew::Crew;
use crate::error::VmError;
use crate::exit::ExitEvent;
use crate::fault_address::FaultAddresses;
use crate::gate::Order;
use crate::kick;
use crate::machine::{Idle, Machine, Prepared};
use crate::state::VmState;
use crate::touches;

/// How long [`Vm::pause`] waits for the vCPUs.
pub const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a dropped [`Vm`] waits for its threads before it leaves them behind.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a dropped [`Vm`] kicks a thread that does not end.
const KICK_INTERVAL: Duration = Duration::from_millis(50);

/// A guest with its vCPU threads.
///
/// Dropping it ends the guest. A vCPU that waits uninterruptibly in the kernel for a page that
/// nobody serves cannot be ended; its thread is left behind after five seconds, with all that it
/// uses, and ends when the page arrives or the userfaultfd is closed. So drop the `Vm` before the
/// pager, or close the userfaultfd first.
pub struct Vm {
    stdin: Option<StdinFeed>,
    machine: Arc<Machine>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("cpus", &self.threads.len()).finish_non_exhaustive()
    }
}

/// KVM's dirty log of a guest; see [`Vm::log_dirty`].
pub struct KvmDirtyLog {
    machine: Arc<Machine>,
    all: PageSet,
}

impl KvmDirtyLog {
    /// The pages that the guest has written, or KVM for it, since the log began or since the last
    /// call. Exact if the guest is paused.
    ///
    /// Errors: KVM refuses.
    pub fn written(&mut self) -> Result<PageSet, VmError> {
        let written = self.machine.written()?;
        self.all.add(&written);
        Ok(written)
    }

    /// All that it has told since it began.
    pub fn all(&self) -> &PageSet {
        &self.all
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.machine.log_writes(false) {
            tracing::debug!(%error, "KVM goes on noting what the guest writes");
        }
    }
}

/// A machine that waits for a guest's state; see [`Vm::prepare`].
pub struct PreparedVm {
    machine: Prepared,
    crew: Crew,
    stdin: bool,
}

impl std::fmt::Debug for PreparedVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedVm").finish_non_exhaustive()
    }
}

impl PreparedVm {
    /// Makes it the guest that [`Vm::save`] wrote. It does not run yet.
    ///
    /// Guest memory is not touched, as with [`Vm::restore`].
    ///
    /// Errors: as [`Vm::restore`].
    pub fn restore(self, state: &[u8]) -> Result<Vm, VmError> {
        let state = VmState::decode(state)?;
        Vm::launch(self.machine.restore(state)?, self.crew, self.stdin)
    }
}

impl Vm {
    /// Makes a guest and loads what it boots from. It does not run yet; see [`Vm::start`].
    ///
    /// `memory` must be all holes (as new) and have [`VmConfig::layout`].
    ///
    /// Errors: no usable KVM, files that are missing or wrong, too little memory for them.
    pub fn boot(
        config: VmConfig,
        memory: GuestMemory,
        source: &BootSource,
        console: Console,
    ) -> Result<Self, VmError> {
        let (output, stdin) = console.open()?;
        let cpus = config.cpus;
        let machine = Machine::boot(config, memory, source, output)?;
        Self::launch(machine, Crew::begin(cpus)?, stdin)
    }

    /// Makes a guest from a state that [`Vm::save`] wrote, here or on another host. It does not
    /// run yet.
    ///
    /// Guest memory is not touched: its pages may be missing and registered with userfaultfd
    /// before this call. The first access is made by a vCPU thread after [`Vm::start`]; what KVM
    /// itself touches first there is in [`Vm::early_pages`].
    ///
    /// Errors: no usable KVM; a state that is damaged, of another version or of a guest of another
    /// shape; a host that lacks what the guest's processor has.
    pub fn restore(
        config: VmConfig,
        memory: GuestMemory,
        state: &[u8],
        console: Console,
    ) -> Result<Self, VmError> {
        let state = VmState::decode(state)?;
        state.check_shape(&config, memory.layout())?;
        let PreparedVm { machine, crew, stdin } = Self::prepare(config, memory, console)?;
        Self::launch(machine.restore(state)?, crew, stdin)
    }

    /// Does what can be done for [`Vm::restore`] before the state is there: most of the work. So
    /// a destination prepares while the guest still runs at the source.
    ///
    /// Errors: no usable KVM, or a configuration that makes no sense.
    pub fn prepare(config: VmConfig, memory: GuestMemory, console: Console) -> Result<PreparedVm, VmError> {
        Self::prepare_with(config, memory, console, Idle::Yielding)
    }

    pub(crate) fn prepare_with(
        config: VmConfig,
        memory: GuestMemory,
        console: Console,
        idle: Idle,
    ) -> Result<PreparedVm, VmError> {
        let (output, stdin) = console.open()?;
        let cpus = config.cpus;
        let machine = Prepared::new(config, memory, output, idle)?;
        Ok(PreparedVm { machine, crew: Crew::begin(cpus)?, stdin })
    }

    fn launch(machine: Machine, crew: Crew, stdin: bool) -> Result<Self, VmError> {
        kick::install_handler()?;
        let machine = Arc::new(machine);
        let mut vm = Self { stdin: None, threads: crew.man(&machine), machine: machine.clone() };
        vm.wait_parked(PAUSE_TIMEOUT)?;
        if stdin {
            vm.stdin = Some(StdinFeed::start(machine)?);
        }
        Ok(vm)
    }

    /// Lets the vCPUs run: after [`Vm::boot`] or [`Vm::restore`], and again after [`Vm::pause`].
    ///
    /// Errors: the guest has ended.
    pub fn start(&self) -> Result<(), VmError> {
        self.check_alive()?;
        self.machine.gate.order(Order::Run);
        Ok(())
    }

    /// Stops all vCPUs at an instruction boundary, with no device access pending, and waits until
    /// they have stopped. Does nothing to a guest that is paused.
    ///
    /// Errors: the guest has ended, or a vCPU did not stop within [`PAUSE_TIMEOUT`]: it waits in
    /// the kernel for a page that nobody serves, and that wait cannot be interrupted. Then the
    /// order to stop stands, and is obeyed when the page comes; [`Vm::start`] takes it back.
    ///
    /// Whether a wait for a page can be interrupted is the kernel's choice. Where the guest has
    /// interrupts enabled, KVM mostly lets a worker wait in the vCPU's stead, and the vCPU stops
    /// at once; otherwise Linux 6.1 waits uninterruptibly, as does any kernel where KVM itself
    /// accesses the page (it emulates an instruction, or sets up the clock page). So pause while
    /// the pager serves.
    pub fn pause(&self) -> Result<(), VmError> {
        self.pause_within(PAUSE_TIMEOUT)
    }

    /// As [`Vm::pause`], with another bound on the wait.
    ///
    /// Errors: as [`Vm::pause`].
    pub fn pause_within(&self, timeout: Duration) -> Result<(), VmError> {
        self.check_alive()?;
        if self.machine.gate.all_parked() {
            return Ok(());
        }
        self.machine.vcpus.iter().for_each(|vcpu| vcpu.mark_stopped());
        self.machine.gate.order(Order::Park);
        self.machine.kick();
        self.wait_parked(timeout)?;
        self.check_alive()
    }

    fn wait_parked(&self, waited: Duration) -> Result<(), VmError> {
        let cpus = self.threads.len() as u32;
        let timeout = |running| VmError::PauseTimeout { running, cpus, waited };
        self.machine.gate.wait_parked(waited).map_err(timeout)
    }

    /// Everything of a paused guest but its memory, for [`Vm::restore`].
    ///
    /// Errors: the guest is not paused or has ended, or KVM refuses to tell something.
    pub fn save(&self) -> Result<Vec<u8>, VmError> {
        self.check_alive()?;
        if !self.machine.gate.all_parked() {
            return Err(VmError::NotPaused("saving"));
        }
        self.machine.save()
    }

    fn check_alive(&self) -> Result<(), VmError> {
        self.machine.exit.reason().map_or(Ok(()), |reason| Err(VmError::Ended(reason)))
    }

    /// How the guest's end is learnt: an event to wait for or to poll, and the reason.
    pub fn exit_event(&self) -> &ExitEvent {
        &self.machine.exit
    }

    /// Types `bytes` at the guest's serial console. Returns how many were taken: there is room for
    /// 64 KiB that the guest has not read.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.machine.devices.serial().input(bytes)
    }

    /// Has each vCPU serve its own faults, over a server of its own. Memory must be trapped for
    /// self-service, and the guest must not have started since its restore.
    ///
    /// Errors: another number of servers than of vCPUs, or the pages that KVM touches first do not
    /// come.
    pub(crate) fn serve_faults(
        &self,
        servers: Vec<FaultServer>,
        addresses: &Arc<FaultAddresses>,
    ) -> Result<(), VmError> {
        self.machine.serve_faults(servers, addresses)
    }

    /// No page is missing any more: lets go of what served the vCPUs' faults.
    pub(crate) fn memory_arrived(&self) {
        self.machine.vcpus.iter().for_each(|vcpu| vcpu.end_service());
        self.machine.kick();
    }

    /// The vCPUs' threads in their order, as gettid(2) gives them.
    pub(crate) fn vcpu_threads(&self) -> Vec<i32> {
        self.machine.vcpus.iter().filter_map(|vcpu| vcpu.thread()).collect()
    }

    /// How many pages the vCPUs of a restored guest have touched since then, where KVM tells that (Linux 5.14).
    pub fn touched_pages(&self) -> Option<u64> {
        touches::sum(self.machine.vcpus.iter().map(|vcpu| vcpu.touched_pages()))
    }

    /// Has KVM note which pages the guest writes, until the log is dropped. The guest may run, and a
    /// log may outlive this. There is one log at a time.
    ///
    /// Errors: KVM refuses.
    pub fn log_dirty(&self) -> Result<KvmDirtyLog, VmError> {
        self.machine.log_writes(true)?;
        Ok(KvmDirtyLog { machine: self.machine.clone(), all: PageSet::default() })
    }

    /// Pages that are touched first when a restored guest starts: the clock page and others that
    /// KVM accesses itself, and the page tables' roots. A pager does well to fetch them first, and
    /// must have them before the start where a missing page is an error for KVM rather than a
    /// wait (`UFFD_FEATURE_SIGBUS`): KVM passes over a clock page that it cannot access. Empty for
    /// a guest that was booted.
    pub fn early_pages(&self) -> &[Gpa] {
        self.machine.early_pages()
    }
}

/// A `Vm` may be handed to, and used from, several threads.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Vm>();
    shared::<ExitEvent>();
};

impl Drop for Vm {
    fn drop(&mut self) {
        self.stdin = None;
        self.machine.gate.order(Order::End);
        let deadline = Instant::now() + DROP_TIMEOUT;
        loop {
            self.machine.kick();
            match self.machine.gate.wait_ended(KICK_INTERVAL) {
                Ok(()) => break,
                Err(left) if Instant::now() >= deadline => {
                    tracing::warn!(left, "vCPU threads wait for missing pages and are left behind");
                    return;
                }
                Err(_) => {}
            }
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}
