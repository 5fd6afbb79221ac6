//! A vCPU's thread: KVM_RUN, and what its exits ask for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::cpu::msrs;
use crate::devices::{BusEvent, Devices};
use crate::exit::ExitReason;
use crate::kick::Kick;
use crate::machine::Machine;
use crate::self_service::VcpuFaults;
use crate::touches::Touches;

/// What a vCPU's thread does before it enters the guest after a stop.
#[derive(Default)]
struct Resume {
    /// Registers that make KVM touch guest memory; see [`msrs`].
    msrs: Vec<kvm_msr_entry>,
    /// Tell the guest that it was stopped, so that its watchdogs do not bark.
    stopped: bool,
}

/// A vCPU. Its thread holds `fd` while it runs and releases it while it is parked.
pub(crate) struct Vcpu {
    pub(crate) kick: Kick,
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    fd: Mutex<VcpuFd>,
    resume: Mutex<Resume>,
    /// Where it serves its own faults.
    faults: Mutex<Option<VcpuFaults>>,
    /// It need not any more.
    service_ended: AtomicBool,
    /// Its thread, as gettid(2) gives it, once that runs.
    thread: OnceLock<i32>,
    /// How many pages it has touched, where that was asked for and KVM tells it.
    touches: Option<Touches>,
}

impl Vcpu {
    /// `deferred` are registers to be set before the first entry.
    pub(crate) fn new(
        mut fd: VcpuFd,
        cpuid: Vec<kvm_cpuid_entry2>,
        deferred: Vec<kvm_msr_entry>,
        touches: Option<Touches>,
    ) -> Self {
        let kick = Kick::new(&mut fd);
        let resume = Resume { msrs: deferred, stopped: false };
        Self {
            kick,
            cpuid,
            fd: Mutex::new(fd),
            resume: Mutex::new(resume),
            faults: Mutex::new(None),
            service_ended: AtomicBool::new(false),
            thread: OnceLock::new(),
            touches,
        }
    }

    /// How many pages it has touched since it was made, where that is told.
    pub(crate) fn touched_pages(&self) -> Option<u64> {
        self.touches.as_ref()?.count().ok()
    }

    /// Its thread, as gettid(2) gives it, once that runs.
    pub(crate) fn thread(&self) -> Option<i32> {
        self.thread.get().copied()
    }

    /// The vCPU's descriptor. Waits while the vCPU runs.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it serve its own faults from its next entry on.
    pub(crate) fn serve_faults(&self, faults: VcpuFaults) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = Some(faults);
    }

    /// Has it let go of what serves its faults, after the next kick.
    pub(crate) fn end_service(&self) {
        self.service_ended.store(true, Ordering::Release);
    }

    fn resume(&self) -> MutexGuard<'_, Resume> {
        self.resume.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a start after a stop: the guest shall be told.
    pub(crate) fn mark_stopped(&self) {
        self.resume().stopped = true;
    }

    /// Registers not yet set because the vCPU has not run since it was restored.
    pub(crate) fn deferred(&self) -> Vec<kvm_msr_entry> {
        self.resume().msrs.clone()
    }

    /// The thread's whole life.
    pub(crate) fn run(&self, machine: &Machine) {
        self.kick.attach();
        self.thread.get_or_init(|| rustix::thread::gettid().as_raw_nonzero().get());
        loop {
            self.kick.clear();
            if !machine.gate.pass() {
                break;
            }
            if let Err(reason) = self.enter(&machine.devices) {
                machine.end(reason);
            }
        }
        machine.gate.leave();
    }

    /// Runs the guest until the vCPU is kicked (`Ok`) or the guest ends.
    fn enter(&self, devices: &Devices) -> Result<(), ExitReason> {
        let mut fd = self.fd();
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if self.service_ended.load(Ordering::Acquire) {
            *faults = None;
        }
        self.prepare(&fd)?;
        loop {
            let handled = match (fd.run(), faults.as_mut()) {
                (Ok(VcpuExit::MmioRead(at, data)), Some(faults)) if faults.is_memory(at) => {
                    faults.read(at, data)
                }
                (Ok(VcpuExit::MmioWrite(at, data)), Some(faults)) if faults.is_memory(at) => {
                    faults.write(at, data)
                }
                (Ok(VcpuExit::InternalError), Some(faults)) => faults.after_emulation_failure(&fd),
                (Ok(exit), _) => {
                    handle(exit, devices)?;
                    continue;
                }
                (Err(error), faults) => match (error.errno(), faults) {
                    (libc::EINTR, _) => return Ok(()),
                    (libc::EAGAIN, _) => Ok(()),
                    (libc::EFAULT, Some(faults)) => faults.after_efault(&mut fd),
                    _ => Err(format!("KVM_RUN: {error}")),
                },
            };
            handled.map_err(|error| ExitReason::Failed(format!("{error}{}", place(&fd))))?;
        }
    }

    fn prepare(&self, fd: &VcpuFd) -> Result<(), ExitReason> {
        let Resume { msrs, stopped } = std::mem::take(&mut *self.resume());
        msrs::write(fd, &msrs).map_err(|error| ExitReason::Failed(error.to_string()))?;
        if stopped && let Err(error) = fd.kvmclock_ctrl() {
            tracing::debug!(%error, "the guest has no kvmclock to be told by that it was stopped");
        }
        Ok(())
    }
}

/// Does what an exit asks for.
fn handle(exit: VcpuExit<'_>, devices: &Devices) -> Result<(), ExitReason> {
    match exit {
        VcpuExit::IoOut(port, data) => match devices.write(port, data) {
            BusEvent::None => Ok(()),
            BusEvent::Reset => Err(ExitReason::Reset),
        },
        VcpuExit::IoIn(port, data) => {
            devices.read(port, data);
            Ok(())
        }
        VcpuExit::MmioRead(_, data) => {
            data.fill(0xff);
            Ok(())
        }
        VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::Hlt => Ok(()),
        VcpuExit::Shutdown => Err(ExitReason::TripleFault),
        other => Err(ExitReason::Failed(format!("{other:?}"))),
    }
}

/// Where the vCPU stands, for an error message.
fn place(fd: &VcpuFd) -> String {
    fd.get_regs().map(|regs| format!(" at RIP {:#x}", regs.rip)).unwrap_or_default()
}
