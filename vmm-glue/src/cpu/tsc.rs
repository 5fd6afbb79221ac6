//! The guest's time-stamp counter across a move.
//!
//! It goes on by the wall time that passed between save and restore, so that deadlines set before
//! the move are due after it, and never goes back: where the destination's wall clock is behind
//! the source's, it goes on from where it was. Several vCPUs keep exactly the distances that they
//! had.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::msrs;
use crate::clock::wall_clock_ns;
use crate::error::{KvmContext, StateError, VmError};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, 0xae, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, 0xae, 0xe2, kvm_device_attr);

/// Rates closer than this many parts per million need no scaling.
const TOLERANCE_PPM: u64 = 250;

/// A vCPU's counter at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TscState {
    /// The rate that the guest sees, or 0 if the host does not know it.
    khz: u32,
    value: u64,
    /// CLOCK_REALTIME when `value` was read.
    wall_ns: u64,
    /// The offset from the host's counter, where KVM tells it: exact distances between vCPUs.
    offset: Option<u64>,
}

impl TscState {
    pub(crate) fn save(vcpu: &VcpuFd) -> Result<Self, VmError> {
        Ok(Self {
            khz: vcpu.get_tsc_khz().unwrap_or(0),
            value: msrs::read_one(vcpu, msrs::TSC)?,
            wall_ns: wall_clock_ns(),
            offset: get_offset(vcpu),
        })
    }

    /// The counter's value `now_ns` (CLOCK_REALTIME); never less than it was.
    fn value_at(&self, now_ns: u64) -> u64 {
        let elapsed = u128::from(now_ns.saturating_sub(self.wall_ns));
        let ticks = elapsed * u128::from(self.khz) / 1_000_000;
        self.value.wrapping_add(u64::try_from(ticks).unwrap_or(u64::MAX))
    }

    /// Sets the counter's rate.
    ///
    /// Errors: the host's rate is another and KVM cannot scale it.
    pub(crate) fn restore_rate(&self, kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), VmError> {
        let host_khz = vcpu.get_tsc_khz().unwrap_or(0);
        let apart = u64::from(self.khz.abs_diff(host_khz));
        if self.khz == 0 || host_khz == 0 || apart * 1_000_000 <= TOLERANCE_PPM * u64::from(self.khz) {
            return Ok(());
        }
        if kvm.check_extension(kvm_ioctls::Cap::TscControl) && vcpu.set_tsc_khz(self.khz).is_ok() {
            return Ok(());
        }
        Err(StateError::TscRate { guest_khz: self.khz, host_khz }.into())
    }

    /// Sets the counter. `boot` is the boot vCPU's counter as saved, and its offset as restored
    /// here: the others are set by their distance to it.
    ///
    /// Returns the offset, if KVM knows offsets.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        boot: Option<(&TscState, u64)>,
    ) -> Result<Option<u64>, VmError> {
        let value = self.value_at(wall_clock_ns());
        msrs::write(vcpu, &[kvm_msr_entry { index: msrs::TSC, data: value, ..Default::default() }])?;
        // KVM takes a write that is near another vCPU's or its own first value for an attempt to
        // synchronise and may set something else: the offset says exactly what is meant.
        let Some(offset) = get_offset(vcpu) else { return Ok(None) };
        let wanted = match (boot, self.offset) {
            (Some((TscState { offset: Some(saved), .. }, restored)), Some(own)) => {
                restored.wrapping_add(own.wrapping_sub(*saved))
            }
            _ => {
                let now = msrs::read_one(vcpu, msrs::TSC)?;
                offset.wrapping_add(self.value_at(wall_clock_ns()).wrapping_sub(now))
            }
        };
        set_offset(vcpu, wanted)?;
        Ok(Some(wanted))
    }
}

fn attribute(address: &u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_ref(address) as u64,
        flags: 0,
    }
}

fn get_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attr = kvm_device_attr { addr: std::ptr::from_mut(&mut offset) as u64, ..attribute(&0) };
    // SAFETY: the attribute's address is that of `offset`, which is writable, 8 bytes as this
    // attribute is, and lives through the call; the kernel reads `attr` and writes only there.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    (result == 0).then_some(offset)
}

fn set_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), VmError> {
    let attr = attribute(&offset);
    // SAFETY: the attribute's address is that of `offset`, 8 bytes as this attribute is, which
    // lives through the call; the kernel only reads.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) };
    match result {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()).kvm("KVM_VCPU_TSC_OFFSET"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_goes_on_with_wall_time_and_never_back() {
        let state = TscState { khz: 2_000_000, value: 1000, wall_ns: 5_000_000_000, offset: None };
        assert_eq!(state.value_at(5_000_000_000), 1000);
        assert_eq!(state.value_at(5_000_001_000), 1000 + 2000);
        assert_eq!(state.value_at(1), 1000);
    }
}
