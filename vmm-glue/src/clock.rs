//! The guest's kvmclock across a move, and the host's wall clock.
//!
//! kvmclock goes on by the wall time that passed. The kernel does that itself where it can
//! (KVM_CLOCK_REALTIME, Linux 5.16 with a stable TSC); elsewhere it is done here, a few
//! microseconds less exactly. It never goes back.

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::error::{KvmContext, VmError};

/// CLOCK_REALTIME in nanoseconds.
pub(crate) fn wall_clock_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// kvmclock at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClockState {
    clock_ns: u64,
    /// CLOCK_REALTIME at that moment.
    wall_ns: u64,
    /// True if KVM read both at once.
    paired: bool,
}

impl ClockState {
    pub(crate) fn save(vm: &VmFd) -> Result<Self, VmError> {
        let data = vm.get_clock().kvm("KVM_GET_CLOCK")?;
        let paired = data.flags & KVM_CLOCK_REALTIME != 0;
        let wall_ns = if paired { data.realtime } else { wall_clock_ns() };
        Ok(Self { clock_ns: data.clock, wall_ns, paired })
    }

    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), VmError> {
        let by_kernel =
            self.paired && vm.check_extension_int(Cap::AdjustClock) & KVM_CLOCK_REALTIME as i32 != 0;
        let data = match by_kernel {
            true => kvm_clock_data {
                clock: self.clock_ns,
                realtime: self.wall_ns,
                flags: KVM_CLOCK_REALTIME,
                ..Default::default()
            },
            false => kvm_clock_data { clock: self.clock_at(wall_clock_ns()), ..Default::default() },
        };
        vm.set_clock(&data).kvm("KVM_SET_CLOCK")
    }

    fn clock_at(&self, now_ns: u64) -> u64 {
        self.clock_ns.saturating_add(now_ns.saturating_sub(self.wall_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_on_with_wall_time_and_never_back() {
        let state = ClockState { clock_ns: 100, wall_ns: 1000, paired: false };
        assert_eq!(state.clock_at(1500), 600);
        assert_eq!(state.clock_at(10), 100);
    }
}
