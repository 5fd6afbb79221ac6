//! Model-specific registers: which are saved, and how they are put back.
//!
//! Three kinds need care. The *paravirtual* ones hold guest addresses of structures that KVM
//! writes; enabling kvmclock makes KVM pin its page, which after a post-copy resume may not have
//! arrived, so these are set last, by the vCPU's own thread, once the pager serves. The *wall
//! clock* ones are commands, not state: writing them writes guest memory at once, and a guest
//! writes them again whenever it wants the time; they are never restored. The *TSC* has a module
//! of its own ([`super::tsc`]), and its deadline is only meaningful once it is right.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::error::{KvmContext, StateError, VmError};

pub(crate) const TSC: u32 = 0x10;
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;

const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// MSR_KVM_SYSTEM_TIME and its successor: where kvmclock is, and bit 0 for on.
const SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];
/// Asynchronous page faults, steal time, end of interrupt: addresses with flags in the low bits.
const SHARED_PAGES: [u32; 3] = [0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];
const PARAVIRTUAL: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4d08;
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// True for a register that only the vCPU's own thread may restore.
pub(crate) fn is_deferred(index: u32) -> bool {
    PARAVIRTUAL.contains(&index) || SYSTEM_TIME.contains(&index)
}

fn is_excluded(index: u32) -> bool {
    WALL_CLOCK.contains(&index) || HYPER_V.contains(&index)
}

/// The registers of `vcpu` (a new one, with its CPUID set) that can be read and written back.
pub(crate) fn probe(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, VmError> {
    let list = kvm.get_msr_index_list().kvm("KVM_GET_MSR_INDEX_LIST")?;
    let usable = |index: &u32| !is_excluded(*index) && round_trips(vcpu, *index);
    Ok(list.as_slice().iter().copied().filter(usable).collect())
}

fn round_trips(vcpu: &VcpuFd, index: u32) -> bool {
    let Ok(mut one) = Msrs::from_entries(&[entry(index, 0)]) else { return false };
    let untested = [TSC, TSC_DEADLINE].contains(&index) || is_deferred(index);
    matches!(vcpu.get_msrs(&mut one), Ok(1)) && (untested || matches!(vcpu.set_msrs(&one), Ok(1)))
}

/// Reads `indices`.
///
/// Errors: KVM refuses one that it could read when the VM was made.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VmError> {
    let mut all = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(KVM_MAX_MSR_ENTRIES) {
        let wanted: Vec<kvm_msr_entry> = chunk.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = batch(&wanted)?;
        let read = vcpu.get_msrs(&mut msrs).kvm("KVM_GET_MSRS")?;
        if let Some(index) = chunk.get(read) {
            return Err(VmError::Config(format!("MSR {index:#x} can no longer be read")));
        }
        all.extend_from_slice(msrs.as_slice());
    }
    Ok(all)
}

/// Reads one register.
pub(crate) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<u64, VmError> {
    Ok(read(vcpu, &[index])?.first().map_or(0, |entry| entry.data))
}

/// Writes `entries` in order. One that this host refuses is passed over if its value is zero:
/// that is what a register which is not there reads as.
///
/// Errors: the first that is refused and not zero.
pub(crate) fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = batch(&rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)])?;
        let written = vcpu.set_msrs(&msrs).kvm("KVM_SET_MSRS")?;
        rest = &rest[written..];
        if written == msrs.as_slice().len() {
            continue;
        }
        match rest {
            [refused, after @ ..] if refused.data == 0 => rest = after,
            [refused, ..] => {
                return Err(StateError::Msr { index: refused.index, value: refused.data }.into());
            }
            [] => {}
        }
    }
    Ok(())
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, VmError> {
    Msrs::from_entries(entries).map_err(|_| VmError::Config("too many MSRs".into()))
}

/// Sets what firmware would have set: fast string operations, and memory cached by default.
pub(crate) fn set_boot(vcpu: &VcpuFd) {
    const FAST_STRINGS: u64 = 1;
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    let misc = read_one(vcpu, MISC_ENABLE).unwrap_or(0) | FAST_STRINGS;
    for one in [entry(MISC_ENABLE, misc), entry(MTRR_DEFAULT_TYPE, ENABLED_WRITE_BACK)] {
        if let Err(error) = write(vcpu, &[one]) {
            tracing::debug!(%error, "boot register left as it is");
        }
    }
}

/// Guest physical addresses of structures that KVM itself accesses for a vCPU with these
/// registers.
pub(crate) fn shared_addresses(entries: &[kvm_msr_entry]) -> impl Iterator<Item = u64> {
    const ENABLED: u64 = 1;
    const FLAGS: u64 = 0x3f;
    entries
        .iter()
        .filter(|entry| SYSTEM_TIME.contains(&entry.index) || SHARED_PAGES.contains(&entry.index))
        .filter(|entry| entry.data & ENABLED != 0)
        .map(|entry| if SYSTEM_TIME.contains(&entry.index) { entry.data & !1 } else { entry.data & !FLAGS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_enabled_structures_count_as_shared() {
        let entries =
            [entry(0x4b56_4d01, 0x1001), entry(0x4b56_4d03, 0x2000), entry(0x4b56_4d02, 0x3041 | 1)];
        let shared: Vec<u64> = shared_addresses(&entries).collect();
        assert_eq!(shared, [0x1000, 0x3040]);
    }
}
