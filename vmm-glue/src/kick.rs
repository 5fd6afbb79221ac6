//! Getting a vCPU out of KVM_RUN.
//!
//! A kick sets the `immediate_exit` byte that the kernel reads on entry, and then sends a signal
//! whose handler does nothing but interrupt a KVM_RUN that is under way. Between the two no
//! moment is left in which a kick could be lost. On the way out the kernel has completed no
//! pending port access; the next entry with `immediate_exit` set does that and returns at once,
//! so EINTR always means an instruction boundary.
//!
//! The signal is SIGRTMIN; an embedder must leave it to this crate.
//!
//! A vCPU that waits in the kernel for a missing page can be kicked only where that wait is
//! interruptible; see [`crate::Vm::pause`].

use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::error::{KvmContext, VmError};

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler, once per process.
pub(crate) fn install_handler() -> Result<(), VmError> {
    static RESULT: OnceLock<Result<(), vmm_sys_util::errno::Error>> = OnceLock::new();
    (*RESULT.get_or_init(|| register_signal_handler(SIGRTMIN(), do_nothing))).kvm("sigaction")
}

/// The means to kick one vCPU.
pub(crate) struct Kick {
    immediate_exit: NonNull<AtomicU8>,
    thread: OnceLock<libc::pthread_t>,
}

// SAFETY: the pointer is into the vCPU's shared page, which `Kick::new`'s caller keeps mapped, and
// is only used for atomic accesses; pthread_t is an identifier that any thread may use.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// A kick for `vcpu`, to be dropped no later than that: it points into its mapping.
    pub(crate) fn new(vcpu: &mut VcpuFd) -> Self {
        let byte = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: `byte` is the address of a field of a mapped structure, thus not null.
        let immediate_exit = unsafe { NonNull::new_unchecked(byte.cast::<AtomicU8>()) };
        Self { immediate_exit, thread: OnceLock::new() }
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the byte stays mapped (see `new`), AtomicU8 has the layout of a byte, and this
        // process touches it only through here; the kernel reads it.
        unsafe { self.immediate_exit.as_ref() }
    }

    /// For the vCPU's thread at its start: kicks are for this thread.
    pub(crate) fn attach(&self) {
        if let Err(error) = unblock_signal(SIGRTMIN()) {
            tracing::error!(?error, "cannot unblock the kick signal");
        }
        // SAFETY: no preconditions.
        let this = unsafe { libc::pthread_self() };
        let _ = self.thread.set(this);
    }

    /// For the vCPU's thread, before it reads its orders: takes back earlier kicks.
    pub(crate) fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    /// Makes the vCPU leave KVM_RUN. The order that it shall find must have been given before.
    pub(crate) fn send(&self) {
        self.flag().store(1, Ordering::SeqCst);
        if let Some(thread) = self.thread.get() {
            // SAFETY: the thread has not been joined: `Vm` joins it only after its last kick.
            let result = unsafe { libc::pthread_kill(*thread, SIGRTMIN()) };
            if result != 0 && result != libc::ESRCH {
                tracing::error!(errno = result, "cannot signal a vCPU thread");
            }
        }
    }
}
