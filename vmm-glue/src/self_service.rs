//! A vCPU that brings its own missing pages.
//!
//! Where memory is trapped for self-service, a touch of a missing page comes out of KVM_RUN: as
//! EFAULT (the address is in [`FaultAddresses`]), as an access to a device where there is memory, or
//! as an instruction that KVM's emulator could not fetch. Each is answered by bringing the page and
//! running on.

use std::sync::Arc;

use kvm_bindings::KVM_EXIT_MEMORY_FAULT;
use kvm_ioctls::VcpuFd;
use postcopy_engine::memory::{Gpa, GuestMemory, PAGE_SIZE, PageIndex};
use postcopy_engine::pager::{FaultServer, Served};

use crate::fault_address::FaultAddresses;

/// Exits in a row for the same reason and address after which the vCPU gives up: bringing the page
/// is not what it wants.
const MAX_REPEATS: u32 = 1000;

/// The faults of one vCPU.
pub(crate) struct VcpuFaults {
    server: FaultServer,
    addresses: Arc<FaultAddresses>,
    memory: GuestMemory,
    last: Option<Gpa>,
    repeats: u32,
}

impl VcpuFaults {
    pub(crate) fn new(server: FaultServer, addresses: Arc<FaultAddresses>, memory: GuestMemory) -> Self {
        Self { server, addresses, memory, last: None, repeats: 0 }
    }

    /// Brings the page at `gpa`, unless the pager has failed. Errors: it is no memory, or bringing it does not
    /// help.
    fn bring(&mut self, gpa: Gpa) -> Result<Served, String> {
        self.repeats = if self.last == Some(gpa) { self.repeats + 1 } else { 0 };
        self.last = Some(gpa);
        if self.repeats >= MAX_REPEATS {
            return Err(format!("it faults on {:#x} again and again, though the page is there", gpa.0));
        }
        let offset = self.memory.layout().offset_of(gpa);
        let offset = offset.ok_or_else(|| format!("a fault at {:#x}, where it has no memory", gpa.0))?;
        let served = self.server.serve(PageIndex::containing(offset)).map_err(|error| error.to_string())?;
        if served == Served::Stranded {
            // It faults again until the pager goes on, or it is told to stop.
            self.last = None;
        }
        Ok(served)
    }

    /// Brings a page before the guest runs here. Errors: as [`VcpuFaults::bring`], or the pager has failed.
    pub(crate) fn bring_first(&mut self, gpa: Gpa) -> Result<(), String> {
        match self.bring(gpa)? {
            Served::Here => Ok(()),
            Served::Stranded => Err("the pager has failed".into()),
        }
    }

    /// As [`VcpuFaults::bring`], for an access of our own, which must find the page there.
    fn bring_for_us(&mut self, gpa: Gpa) -> Result<(), String> {
        while self.bring(gpa)? == Served::Stranded {}
        Ok(())
    }

    /// After EFAULT: brings the page that the vCPU missed.
    pub(crate) fn after_efault(&mut self, fd: &mut VcpuFd) -> Result<(), String> {
        let run = fd.get_kvm_run();
        // SAFETY: the members of the union are plain numbers; which one the kernel wrote is asked next.
        let address = unsafe { run.__bindgen_anon_1.memory_fault }.gpa;
        let told = (run.exit_reason == KVM_EXIT_MEMORY_FAULT).then_some(address);
        match told.or_else(|| self.addresses.of_this_thread()) {
            Some(gpa) => self.bring(Gpa(gpa)).map(drop),
            // Another thread's address is in the slot: fault again.
            None if self.repeats < MAX_REPEATS => {
                self.repeats += 1;
                Ok(())
            }
            None => Err("KVM_RUN fails with EFAULT, and nothing tells where".into()),
        }
    }

    /// After an instruction that KVM could not emulate: brings the page it stands in.
    pub(crate) fn after_emulation_failure(&mut self, fd: &VcpuFd) -> Result<(), String> {
        let regs = fd.get_regs().map_err(|error| error.to_string())?;
        let place = fd.translate_gva(regs.rip).map_err(|error| error.to_string())?;
        match place.valid {
            0 => Err(format!("KVM cannot emulate the instruction at {:#x}", regs.rip)),
            _ => self.bring(Gpa(place.physical_address)).map(drop),
        }
    }

    /// Whether a device access is one to memory.
    pub(crate) fn is_memory(&self, address: u64) -> bool {
        self.memory.layout().offset_of(Gpa(address)).is_some()
    }

    /// An access of KVM's emulator to memory that was missing: brings the page, and makes it.
    pub(crate) fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), String> {
        let offset = self.present(address, data.len())?;
        if self.memory.guest().read(offset, data) { Ok(()) } else { Err(past_the_end(address)) }
    }

    /// As [`VcpuFaults::read`], for a write.
    pub(crate) fn write(&mut self, address: u64, data: &[u8]) -> Result<(), String> {
        let offset = self.present(address, data.len())?;
        if self.memory.guest().write(offset, data) { Ok(()) } else { Err(past_the_end(address)) }
    }

    fn present(&mut self, address: u64, len: usize) -> Result<u64, String> {
        self.bring_for_us(Gpa(address))?;
        let end = Gpa(address + len.max(1) as u64 - 1);
        if end.0 / PAGE_SIZE != address / PAGE_SIZE {
            self.bring_for_us(end)?;
        }
        self.memory.layout().offset_of(Gpa(address)).ok_or_else(|| past_the_end(address))
    }
}

fn past_the_end(address: u64) -> String {
    format!("an access at {address:#x} past the end of memory")
}
