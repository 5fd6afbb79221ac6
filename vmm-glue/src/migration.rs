//! A [`Vm`] as the engine's sessions see it: moved away from here, or taken in.
//!
//! What is here is only translation; the protocol is the engine's, the machine is [`Vm`]'s.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use postcopy_engine::memory::GuestMemory;
use postcopy_engine::page_set::PageSet;
use postcopy_engine::pager::FaultServer;
use postcopy_engine::session::{
    DestinationGuest, DestinationHost, DirtyLog, GuestDescription, GuestError, SourceGuest, UseLog,
};

use crate::fault_address::FaultAddresses;
use crate::machine::Idle;
use crate::{
    BootSource, Console, ExitReason, KvmDirtyLog, MAX_STATE_BYTES, PreparedVm, Vm, VmConfig, VmError,
};

/// Kind and version of VMM that a guest's state belongs to. Changes with [`crate::STATE_VERSION`].
const VMM: &str = "postcopy-vmm/1";

/// Longest configuration that a peer may send.
const MAX_CONFIG: usize = 64 << 10;

/// A guest that can be moved: a [`Vm`] with its memory and configuration.
pub struct MovableVm {
    config: VmConfig,
    memory: GuestMemory,
    /// Made by the state that arrives; `None` before.
    vm: Mutex<Option<Vm>>,
    /// The machine that waits for that state.
    prepared: Mutex<Option<PreparedVm>>,
    /// It has ended, and nothing went wrong.
    over: AtomicBool,
    /// What tells its vCPUs which page they missed, where they serve themselves.
    addresses: Option<Arc<FaultAddresses>>,
}

impl MovableVm {
    /// Boots a new guest and lets it run.
    ///
    /// Errors: as [`Vm::boot`].
    pub fn boot(config: VmConfig, source: &BootSource, console: Console) -> Result<Self, VmError> {
        let layout = config.layout().map_err(|error| VmError::Config(error.to_string()))?;
        let memory = GuestMemory::new(layout)
            .map_err(|source| VmError::System { operation: "making guest memory", source })?;
        let vm = Vm::boot(config.clone(), memory.clone(), source, console)?;
        vm.start()?;
        Ok(Self::new(config, memory, Some(vm), None, None))
    }

    fn new(
        config: VmConfig,
        memory: GuestMemory,
        vm: Option<Vm>,
        prepared: Option<PreparedVm>,
        addresses: Option<Arc<FaultAddresses>>,
    ) -> Self {
        let (vm, prepared) = (Mutex::new(vm), Mutex::new(prepared));
        Self { config, memory, vm, prepared, over: AtomicBool::new(false), addresses }
    }

    /// The guest's shape.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Why the guest ended, if it has.
    pub fn ended(&self) -> Option<ExitReason> {
        self.vm().as_ref().and_then(|vm| vm.exit_event().reason())
    }

    /// Types `bytes` at the guest's console; says how many were taken.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.vm().as_ref().map_or(0, |vm| vm.console_input(bytes))
    }

    /// Ends the guest here: it runs elsewhere, or is no longer wanted.
    pub fn end(&self) {
        let vm = self.vm().take();
        let failed =
            vm.as_ref().and_then(|vm| vm.exit_event().reason()).is_some_and(|reason| reason.failed());
        self.over.store(!failed, Ordering::Release);
        drop(vm);
    }

    fn vm(&self) -> MutexGuard<'_, Option<Vm>> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, work: impl FnOnce(&Vm) -> Result<T, VmError>) -> Result<T, GuestError> {
        let vm = self.vm();
        let vm = vm.as_ref().ok_or("there is no guest here any more")?;
        Ok(work(vm)?)
    }
}

impl SourceGuest for MovableVm {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn describe(&self) -> Result<(String, Vec<u8>), GuestError> {
        Ok((VMM.into(), postcard::to_stdvec(&self.config)?))
    }

    fn freeze(&self, state: &mut dyn Write) -> Result<Instant, GuestError> {
        let since = Instant::now();
        let saved = self.with(|vm| {
            vm.pause()?;
            vm.save()
        })?;
        state.write_all(&saved)?;
        Ok(since)
    }

    fn runs_on_our_mapping(&self) -> bool {
        true
    }

    fn log_dirty(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        self.with(|vm| Ok(Box::new(vm.log_dirty()?) as Box<dyn DirtyLog>))
    }

    fn thaw(&self) -> Result<(), GuestError> {
        self.with(Vm::start)
    }
}

impl UseLog for KvmDirtyLog {
    fn mark(&mut self) -> Result<(), GuestError> {
        self.written().map(drop).map_err(Into::into)
    }

    fn since_mark(&mut self) -> Result<PageSet, GuestError> {
        Ok(self.written()?)
    }
}

impl DirtyLog for KvmDirtyLog {
    fn dirty(mut self: Box<Self>) -> Result<PageSet, GuestError> {
        self.written()?;
        Ok(self.all().clone())
    }
}

impl DestinationGuest for MovableVm {
    fn load(&self, state: &mut dyn Read) -> Result<(), GuestError> {
        let mut saved = Vec::new();
        // What is longer is refused as that.
        state.take(MAX_STATE_BYTES as u64 + 1).read_to_end(&mut saved)?;
        let prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take();
        let prepared = prepared.ok_or("the guest's state came twice")?;
        *self.vm() = Some(prepared.restore(&saved)?);
        Ok(())
    }

    fn serve_faults(&self, servers: Vec<FaultServer>) -> Result<(), GuestError> {
        match &self.addresses {
            Some(addresses) => self.with(|vm| vm.serve_faults(servers, addresses)),
            None => Err("the vCPUs cannot serve their own faults here".into()),
        }
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.with(Vm::start)
    }

    fn memory_arrived(&self) {
        if let Some(vm) = self.vm().as_ref() {
            vm.memory_arrived();
        }
    }

    fn has_ended(&self) -> bool {
        self.over.load(Ordering::Acquire) || self.ended().is_some_and(|reason| !reason.failed())
    }

    fn touched_pages(&self) -> Option<u64> {
        self.vm().as_ref().and_then(Vm::touched_pages)
    }

    fn vcpu_threads(&self) -> Vec<i32> {
        self.vm().as_ref().map(Vm::vcpu_threads).unwrap_or_default()
    }
}

/// Takes guests of this VMM in.
pub struct VmHost {
    console: Arc<dyn Fn() -> Console + Send + Sync>,
    addresses: Option<Arc<FaultAddresses>>,
}

impl VmHost {
    /// A host whose guests' consoles are made by `console`.
    pub fn new(console: impl Fn() -> Console + Send + Sync + 'static) -> Self {
        Self { console: Arc::new(console), addresses: None }
    }

    /// Lets the guests' vCPUs serve their own faults: a touch of a missing page is answered by the
    /// vCPU's own thread, over a lane of its own.
    ///
    /// The price: such a guest halts on its processor when it idles, and leaves it to nobody.
    /// Otherwise KVM answers a fault by letting the vCPU wait in the background, and nobody is told.
    ///
    /// Errors: this process may not attach a BPF program to KVM's tracepoint (CAP_BPF and
    /// CAP_PERFMON, or root), or the kernel has none.
    pub fn with_self_service(mut self) -> Result<Self, VmError> {
        self.attach()?;
        Ok(self)
    }

    fn attach(&mut self) -> Result<(), VmError> {
        let attached = FaultAddresses::attach();
        let operation = "attaching a BPF program to the tracepoint kvm_page_fault (needs root, or CAP_BPF \
                         and CAP_PERFMON, and tracefs)";
        self.addresses = Some(Arc::new(attached.map_err(|source| VmError::System { operation, source })?));
        Ok(())
    }

    /// As [`VmHost::with_self_service`] where each vCPU can have a processor (four or more) and this
    /// process may; else the pager's thread serves all faults.
    pub fn with_self_service_if_possible(mut self) -> Self {
        if !postcopy_engine::is_crowded()
            && let Err(error) = self.attach()
        {
            tracing::info!(%error, "vCPUs cannot serve their own faults here; the pager does");
        }
        self
    }
}

impl DestinationHost for VmHost {
    type Guest = MovableVm;

    fn serving_threads(&self, description: &GuestDescription) -> usize {
        let config = postcard::from_bytes::<VmConfig>(&description.config);
        let served = self.addresses.is_some() && description.config.len() <= MAX_CONFIG;
        config.map_or(0, |config| if served { usize::from(config.cpus) } else { 0 })
    }

    fn prepare(&self, description: &GuestDescription, memory: &GuestMemory) -> Result<MovableVm, GuestError> {
        if description.vmm != VMM {
            return Err(format!("the guest is of {:?}, this side is {VMM}", description.vmm).into());
        }
        if description.config.len() > MAX_CONFIG {
            return Err("the guest's configuration is longer than 64 KiB".into());
        }
        let config: VmConfig = postcard::from_bytes(&description.config)?;
        if config.layout()? != description.layout {
            return Err("the guest's memory does not fit its configuration".into());
        }
        let idle = if self.addresses.is_some() { Idle::OnItsProcessor } else { Idle::Yielding };
        let prepared = Vm::prepare_with(config.clone(), memory.clone(), (self.console)(), idle)?;
        Ok(MovableVm::new(config, memory.clone(), None, Some(prepared), self.addresses.clone()))
    }
}
