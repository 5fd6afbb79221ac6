//! All of a vCPU's state, and the order in which it is put back.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use postcopy_engine::memory::Gpa;
use serde::{Deserialize, Serialize};

use super::tsc::TscState;
use super::{msrs, xsave};
use crate::error::{KvmContext, StateError, VmError};

/// A vCPU as saved.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u8>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
    tsc: TscState,
}

/// What a vCPU is saved and restored with.
#[derive(Clone, Copy)]
pub(crate) struct VcpuContext<'a> {
    pub(crate) kvm: &'a Kvm,
    pub(crate) xsave_size: usize,
}

impl VcpuState {
    /// Reads the state of a vCPU that is outside KVM_RUN. `indices` are the MSRs to save.
    ///
    /// The MP state comes first: reading it makes KVM process a pending INIT or SIPI, which
    /// changes all the rest. The events come before the local APIC for the same reason.
    pub(crate) fn save(
        vcpu: &VcpuFd,
        cpuid: &[kvm_cpuid_entry2],
        indices: &[u32],
        context: VcpuContext<'_>,
    ) -> Result<Self, VmError> {
        let mp_state = vcpu.get_mp_state().kvm("KVM_GET_MP_STATE")?;
        let events = vcpu.get_vcpu_events().kvm("KVM_GET_VCPU_EVENTS")?;
        Ok(Self {
            cpuid: cpuid.to_vec(),
            regs: vcpu.get_regs().kvm("KVM_GET_REGS")?,
            sregs: vcpu.get_sregs().kvm("KVM_GET_SREGS")?,
            xsave: xsave::save(vcpu, context.xsave_size)?,
            xcrs: vcpu.get_xcrs().kvm("KVM_GET_XCRS")?,
            debug: vcpu.get_debug_regs().kvm("KVM_GET_DEBUGREGS")?,
            lapic: vcpu.get_lapic().kvm("KVM_GET_LAPIC")?,
            tsc: TscState::save(vcpu)?,
            msrs: msrs::read(vcpu, indices)?,
            events,
            mp_state,
        })
    }

    /// Sets what a new vCPU must have before anything else is probed or set.
    pub(crate) fn restore_cpuid(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        let cpuid = CpuId::from_entries(&self.cpuid);
        let cpuid = cpuid.map_err(|_| StateError::Contents("too many CPUID entries".into()))?;
        vcpu.set_cpuid2(&cpuid).kvm("KVM_SET_CPUID2")
    }

    /// Puts the state into a new vCPU that has its CPUID. No guest memory is touched; what would
    /// touch it is in [`VcpuState::deferred_msrs`].
    ///
    /// The order matters: the segment registers hold the APIC's base and mode, which the local
    /// APIC needs; its timer mode must stand before the TSC deadline, and the TSC before that
    /// too; the events come last because setting registers clears pending ones.
    ///
    /// `boot` and the result are as for [`TscState::restore`].
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        boot: Option<(&TscState, u64)>,
        context: VcpuContext<'_>,
    ) -> Result<Option<u64>, VmError> {
        self.tsc.restore_rate(context.kvm, vcpu)?;
        vcpu.set_mp_state(self.mp_state).kvm("KVM_SET_MP_STATE")?;
        vcpu.set_sregs(&self.sregs).kvm("KVM_SET_SREGS")?;
        vcpu.set_regs(&self.regs).kvm("KVM_SET_REGS")?;
        vcpu.set_xcrs(&self.xcrs).kvm("KVM_SET_XCRS")?;
        xsave::restore(vcpu, context.xsave_size, &self.xsave)?;
        vcpu.set_debug_regs(&self.debug).kvm("KVM_SET_DEBUGREGS")?;
        vcpu.set_lapic(&self.lapic).kvm("KVM_SET_LAPIC")?;
        msrs::write(
            vcpu,
            &self.msrs_where(|index| index != msrs::TSC_DEADLINE && !msrs::is_deferred(index)),
        )?;
        let offset = self.tsc.restore(vcpu, boot)?;
        msrs::write(vcpu, &self.msrs_where(|index| index == msrs::TSC_DEADLINE))?;
        vcpu.set_vcpu_events(&self.events).kvm("KVM_SET_VCPU_EVENTS")?;
        Ok(offset)
    }

    fn msrs_where(&self, wanted: impl Fn(u32) -> bool) -> Vec<kvm_msr_entry> {
        let wanted = |entry: &&kvm_msr_entry| entry.index != msrs::TSC && wanted(entry.index);
        self.msrs.iter().filter(wanted).copied().collect()
    }

    /// The registers to be set by the vCPU's own thread before it first runs.
    pub(crate) fn deferred_msrs(&self) -> Vec<kvm_msr_entry> {
        self.msrs_where(msrs::is_deferred)
    }

    /// Which MSRs were saved.
    pub(crate) fn msr_indices(&self) -> Vec<u32> {
        self.msrs.iter().map(|entry| entry.index).collect()
    }

    /// Replaces registers that were read by what they shall be: a vCPU that was restored and has
    /// not run yet has its deferred registers still to be set.
    pub(crate) fn override_msrs(&mut self, entries: &[kvm_msr_entry]) {
        for entry in entries {
            if let Some(own) = self.msrs.iter_mut().find(|own| own.index == entry.index) {
                own.data = entry.data;
            }
        }
    }

    /// Pages that are touched first when this vCPU runs again.
    pub(crate) fn early_pages(&self) -> Vec<Gpa> {
        const PAGE_FRAME: u64 = 0x000f_ffff_ffff_f000;
        let shared = msrs::shared_addresses(&self.msrs).chain([self.sregs.cr3]);
        shared.map(|address| Gpa(address & PAGE_FRAME)).collect()
    }

    pub(crate) fn tsc(&self) -> &TscState {
        &self.tsc
    }
}
