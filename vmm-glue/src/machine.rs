//! A guest as the embedder and the vCPU threads share it: how it is put together, and how it is
//! taken apart into a state.

use std::io::Write;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use postcopy_engine::memory::{Gpa, GuestMemory};
use postcopy_engine::page_set::PageSet;
use postcopy_engine::pager::FaultServer;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot;
use crate::config::{BootSource, VmConfig};
use crate::cpu::state::{VcpuContext, VcpuState};
use crate::cpu::{cpuid, msrs, xsave};
use crate::devices::Devices;
use crate::devices::i8042::I8042;
use crate::devices::serial::{SERIAL_GSI, SerialDevice};
use crate::error::{KvmContext, StateError, SystemContext, VmError};
use crate::exit::{ExitEvent, ExitReason};
use crate::fault_address::FaultAddresses;
use crate::gate::{Gate, Order};
use crate::memory::{log_writes, register_slots, written};
use crate::platform::{self, PlatformState};
use crate::self_service::VcpuFaults;
use crate::state::VmState;
use crate::touches::Touches;
use crate::vcpu::Vcpu;

/// What a vCPU does with its processor while the guest idles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    /// It leaves it to others.
    Yielding,
    /// It halts on it. KVM then has no way to let a vCPU wait for a missing page in the background
    /// (its asynchronous page faults), and tells the vCPU's thread at once.
    OnItsProcessor,
}

/// Where the guest's console output goes.
pub(crate) type Output = Box<dyn Write + Send>;

/// See the module. Fields drop in order: the vCPUs and the VM before the memory they run on.
pub(crate) struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) gate: Gate,
    pub(crate) exit: ExitEvent,
    pub(crate) devices: Devices,
    /// The MSRs that are saved; probed while the vCPUs of the guest's first host were new.
    msr_indices: Vec<u32>,
    early_pages: Vec<Gpa>,
    chassis: Chassis,
    config: VmConfig,
    memory: GuestMemory,
}

/// A machine with memory and interrupt controllers, before it has processors and devices.
struct Chassis {
    vm: VmFd,
    kvm: Kvm,
    serial_line: EventFd,
    xsave_size: usize,
}

impl Chassis {
    fn new(memory: &GuestMemory, idle: Idle) -> Result<Self, VmError> {
        let kvm = platform::open()?;
        let vm = platform::create(&kvm)?;
        if idle == Idle::OnItsProcessor {
            platform::halt_in_guest(&vm)?;
        }
        register_slots(&vm, memory)?;
        let serial_line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).system("eventfd")?;
        vm.register_irqfd(&serial_line, SERIAL_GSI).kvm("KVM_IRQFD")?;
        let xsave_size = xsave::size(&vm);
        Ok(Self { vm, kvm, serial_line, xsave_size })
    }

    fn create_vcpu(&self, index: usize) -> Result<VcpuFd, VmError> {
        self.vm.create_vcpu(index as u64).kvm("KVM_CREATE_VCPU")
    }

    fn serial_line(&self) -> Result<EventFd, VmError> {
        self.serial_line.try_clone().system("dup of an eventfd")
    }

    fn context(&self) -> VcpuContext<'_> {
        VcpuContext { kvm: &self.kvm, xsave_size: self.xsave_size }
    }

    /// The MSRs to save; `vcpus` are new.
    fn probe_msrs(&self, vcpus: &[VcpuFd]) -> Result<Vec<u32>, VmError> {
        vcpus.first().map_or(Ok(Vec::new()), |boot| msrs::probe(&self.kvm, boot))
    }
}

/// Refuses memory that is not what the configuration says.
fn check_memory(config: &VmConfig, memory: &GuestMemory) -> Result<(), VmError> {
    config.check()?;
    let (asked, held) = (config.memory_bytes, memory.layout().total_bytes());
    match asked == held {
        true => Ok(()),
        false => Err(VmError::Config(format!("{asked} bytes of memory configured, {held} given"))),
    }
}

/// A machine that waits for the state of a guest. What takes long is done: KVM waits out grace
/// periods when memory is given to a VM, and that is no time to lose while a guest stands still.
pub(crate) struct Prepared {
    fds: Vec<VcpuFd>,
    /// How many pages each will have touched, where KVM tells that.
    touches: Vec<Option<Touches>>,
    chassis: Chassis,
    supported: CpuId,
    config: VmConfig,
    memory: GuestMemory,
    output: Output,
}

impl Prepared {
    /// A machine of the given shape. Guest memory is not touched.
    pub(crate) fn new(
        config: VmConfig,
        memory: GuestMemory,
        output: Output,
        idle: Idle,
    ) -> Result<Self, VmError> {
        check_memory(&config, &memory)?;
        let chassis = Chassis::new(&memory, idle)?;
        let supported = cpuid::supported(&chassis.kvm)?;
        let fds = (0..usize::from(config.cpus)).map(|index| chassis.create_vcpu(index));
        let fds = fds.collect::<Result<Vec<_>, _>>()?;
        let touches = fds.iter().map(Touches::of_if_told).collect();
        Ok(Self { fds, touches, chassis, supported, config, memory, output })
    }

    /// The guest as saved. Guest memory is not touched.
    pub(crate) fn restore(self, state: VmState) -> Result<Machine, VmError> {
        let Self { fds, touches, chassis, supported, config, memory, output } = self;
        state.check_shape(&config, memory.layout())?;
        for (vcpu, fd) in state.vcpus.iter().zip(&fds) {
            cpuid::check(&vcpu.cpuid, supported.as_slice())?;
            vcpu.restore_cpuid(fd)?;
        }
        restore_vcpus(&state.vcpus, &fds, chassis.context())?;
        state.platform.restore(&chassis.vm)?;
        let serial = SerialDevice::restore(&state.devices.serial, chassis.serial_line()?, output);
        let serial = serial.map_err(|error| StateError::Contents(error.to_string()))?;
        Ok(Machine {
            early_pages: early_pages(&state.vcpus),
            // What could be set here can be read here, so the next save needs no new probe.
            msr_indices: state.vcpus.first().map(VcpuState::msr_indices).unwrap_or_default(),
            gate: Gate::new(u32::from(config.cpus)),
            exit: ExitEvent::new().system("eventfd")?,
            devices: Devices::new(serial, state.devices.i8042),
            vcpus: assemble(state.vcpus, fds.into_iter().zip(touches)),
            chassis,
            config,
            memory,
        })
    }
}

impl Machine {
    /// A new guest, loaded, about to execute its kernel's first instruction.
    pub(crate) fn boot(
        config: VmConfig,
        memory: GuestMemory,
        source: &BootSource,
        output: Output,
    ) -> Result<Self, VmError> {
        check_memory(&config, &memory)?;
        let entry = boot::load(&config, &memory, source)?;
        let chassis = Chassis::new(&memory, Idle::Yielding)?;
        let supported = cpuid::supported(&chassis.kvm)?;
        let mut fds = Vec::new();
        let mut shown: Vec<CpuId> = Vec::new();
        for index in 0..config.cpus {
            let fd = chassis.create_vcpu(usize::from(index))?;
            let cpuid = cpuid::for_guest(&chassis.kvm, &supported, index);
            fd.set_cpuid2(&cpuid).kvm("KVM_SET_CPUID2")?;
            fds.push(fd);
            shown.push(cpuid);
        }
        let msr_indices = chassis.probe_msrs(&fds)?;
        fds.iter().for_each(msrs::set_boot);
        fds.first().map_or(Ok(()), |boot| entry.apply(boot))?;
        let vcpus = fds.into_iter().zip(shown);
        Ok(Self {
            vcpus: vcpus
                .map(|(fd, cpuid)| Vcpu::new(fd, cpuid.as_slice().to_vec(), Vec::new(), None))
                .collect(),
            gate: Gate::new(u32::from(config.cpus)),
            exit: ExitEvent::new().system("eventfd")?,
            devices: Devices::new(SerialDevice::new(chassis.serial_line()?, output), I8042::default()),
            msr_indices,
            early_pages: Vec::new(),
            chassis,
            config,
            memory,
        })
    }

    /// The state of a machine whose vCPUs are all parked.
    pub(crate) fn save(&self) -> Result<Vec<u8>, VmError> {
        let mut vcpus = Vec::new();
        for vcpu in &self.vcpus {
            let (fd, context) = (vcpu.fd(), self.chassis.context());
            let mut state = VcpuState::save(&fd, &vcpu.cpuid, &self.msr_indices, context)?;
            state.override_msrs(&vcpu.deferred());
            vcpus.push(state);
        }
        let state = VmState {
            config: self.config.clone(),
            layout: self.memory.layout().clone(),
            platform: PlatformState::save(&self.chassis.vm)?,
            devices: self.devices.save(),
            vcpus,
        };
        state.encode()
    }

    /// Has each vCPU serve its own faults: one server for each, in their order. The pages that KVM
    /// touches itself are brought now, since it passes over those that are missing.
    pub(crate) fn serve_faults(
        &self,
        servers: Vec<FaultServer>,
        addresses: &Arc<FaultAddresses>,
    ) -> Result<(), VmError> {
        if servers.len() != self.vcpus.len() {
            return Err(VmError::Config(format!("{} servers for {} vCPUs", servers.len(), self.vcpus.len())));
        }
        for (at, (vcpu, server)) in self.vcpus.iter().zip(servers).enumerate() {
            let mut faults = VcpuFaults::new(server, addresses.clone(), self.memory.clone());
            for page in self.early_pages.iter().filter(|_| at == 0) {
                let brought = faults.bring_first(*page);
                brought.map_err(|error| VmError::Config(format!("bringing the first pages: {error}")))?;
            }
            vcpu.serve_faults(faults);
        }
        Ok(())
    }

    /// Guest pages that are touched first after a restore, by KVM itself or by the processor's
    /// page-table walk.
    pub(crate) fn early_pages(&self) -> &[Gpa] {
        &self.early_pages
    }

    /// The guest has ended: records why, and gets the other vCPUs out.
    pub(crate) fn end(&self, reason: ExitReason) {
        self.exit.set(reason);
        self.gate.order(Order::Park);
        self.kick();
    }

    /// See [`log_writes`].
    pub(crate) fn log_writes(&self, logging: bool) -> Result<(), VmError> {
        log_writes(&self.chassis.vm, &self.memory, logging)
    }

    /// See [`written`].
    pub(crate) fn written(&self) -> Result<PageSet, VmError> {
        written(&self.chassis.vm, &self.memory)
    }

    /// Makes all vCPUs look at their orders.
    pub(crate) fn kick(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.kick.send());
    }
}

fn restore_vcpus(states: &[VcpuState], fds: &[VcpuFd], context: VcpuContext<'_>) -> Result<(), VmError> {
    let mut boot = None;
    for (state, fd) in states.iter().zip(fds) {
        let offset = state.restore(fd, boot, context)?;
        boot = boot.or(offset.map(|offset| (state.tsc(), offset)));
    }
    Ok(())
}

fn assemble(states: Vec<VcpuState>, made: impl Iterator<Item = (VcpuFd, Option<Touches>)>) -> Vec<Vcpu> {
    let make = |(state, (fd, touches)): (VcpuState, (VcpuFd, Option<Touches>))| {
        let deferred = state.deferred_msrs();
        Vcpu::new(fd, state.cpuid, deferred, touches)
    };
    states.into_iter().zip(made).map(make).collect()
}

fn early_pages(states: &[VcpuState]) -> Vec<Gpa> {
    let mut pages: Vec<Gpa> = states.iter().flat_map(VcpuState::early_pages).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}
