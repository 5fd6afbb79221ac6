//! A vCPU's thread: KVM_RUN, and what its exits ask for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::cpu::msrs;
use crate::devices::{BusEvent, Devices};
use crate::exit::ExitReason;
use crate::kick::Kick;
use crate::machine::Machine;

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
}

impl Vcpu {
    /// `deferred` are registers to be set before the first entry.
    pub(crate) fn new(mut fd: VcpuFd, cpuid: Vec<kvm_cpuid_entry2>, deferred: Vec<kvm_msr_entry>) -> Self {
        let kick = Kick::new(&mut fd);
        let resume = Resume { msrs: deferred, stopped: false };
        Self { kick, cpuid, fd: Mutex::new(fd), resume: Mutex::new(resume) }
    }

    /// The vCPU's descriptor. Waits while the vCPU runs.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.prepare(&fd)?;
        loop {
            match fd.run() {
                Ok(exit) => handle(exit, devices)?,
                Err(error) => match error.errno() {
                    libc::EINTR => return Ok(()),
                    libc::EAGAIN => {}
                    _ => return Err(ExitReason::Failed(format!("KVM_RUN: {error}{}", place(&fd)))),
                },
            }
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
