//! What the kernel emulates for the whole machine: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, KVM_X86_DISABLE_EXITS_HLT, kvm_enable_cap, kvm_irqchip, kvm_pit_config,
    kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};

use crate::clock::ClockState;
use crate::error::{KvmContext, StateError, VmError};

const API_VERSION: i32 = 12;
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Three pages below the BIOS that Intel processors without unrestricted guests need, and one
/// for the identity page table. Outside all memory.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Opens /dev/kvm.
///
/// Errors: it is missing, denied, or lacks what is needed here.
pub(crate) fn open() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => VmError::NoKvm,
        libc::EACCES | libc::EPERM => VmError::KvmDenied,
        errno => VmError::KvmOpen(std::io::Error::from_raw_os_error(errno)),
    })?;
    if kvm.get_api_version() != API_VERSION {
        return Err(VmError::MissingCapability("API version 12"));
    }
    let needed = [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        (Cap::Xcrs, "KVM_CAP_XCRS"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(VmError::MissingCapability(name)),
        None => Ok(kvm),
    }
}

/// Lets the guest halt on the processor instead of leaving KVM; before there are vCPUs.
///
/// Errors: the kernel cannot.
pub(crate) fn halt_in_guest(vm: &VmFd) -> Result<(), VmError> {
    let capability = kvm_enable_cap {
        cap: KVM_CAP_X86_DISABLE_EXITS,
        args: [KVM_X86_DISABLE_EXITS_HLT.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&capability).kvm("KVM_CAP_X86_DISABLE_EXITS")
}

/// Makes a VM with its interrupt controllers and timer, and no memory or vCPUs yet.
pub(crate) fn create(kvm: &Kvm) -> Result<VmFd, VmError> {
    let vm = kvm.create_vm().kvm("KVM_CREATE_VM")?;
    vm.set_identity_map_address(IDENTITY_MAP).kvm("KVM_SET_IDENTITY_MAP_ADDR")?;
    vm.set_tss_address(TSS).kvm("KVM_SET_TSS_ADDR")?;
    vm.create_irq_chip().kvm("KVM_CREATE_IRQCHIP")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).kvm("KVM_CREATE_PIT2")?;
    Ok(vm)
}

/// The machine's own state as saved.
#[derive(Serialize, Deserialize)]
pub(crate) struct PlatformState {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: ClockState,
}

impl PlatformState {
    pub(crate) fn save(vm: &VmFd) -> Result<Self, VmError> {
        let mut chips = Vec::new();
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).kvm("KVM_GET_IRQCHIP")?;
            chips.push(chip);
        }
        let pit = vm.get_pit2().kvm("KVM_GET_PIT2")?;
        Ok(Self { chips, pit, clock: ClockState::save(vm)? })
    }

    /// Puts it back, after the vCPUs: the controllers look at their local APICs.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), VmError> {
        if self.chips.iter().map(|chip| chip.chip_id).ne(CHIPS) {
            return Err(StateError::Contents("other interrupt controllers than a PC's".into()).into());
        }
        vm.set_pit2(&self.pit).kvm("KVM_SET_PIT2")?;
        self.clock.restore(vm)?;
        for chip in &self.chips {
            vm.set_irqchip(chip).kvm("KVM_SET_IRQCHIP")?;
        }
        Ok(())
    }
}
