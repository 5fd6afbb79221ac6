//! A thin KVM virtual machine monitor that shows the engine whole.
//!
//! It boots a stock Linux kernel (or any ELF64 file that follows its 64-bit boot protocol) with
//! an initramfs and a serial console, stops it at an instruction boundary, saves all that it is
//! apart from its memory, and restores that elsewhere without touching a page of the guest's
//! memory, so that a pager can bring the pages after the guest has gone on.
//!
//! And it moves guests of a stock QEMU, which has all that this machine has not: see [`qemu`].
//!
//! What this machine is not: a general VMM. There are no disks, no network, no PCI, no ACPI; x86-64 only.
//!
//! ```text
//!  embedder ──▶ Vm ──▶ Machine ◀── one thread a vCPU: Gate, KVM_RUN, Devices
//!                        ├── boot      loads a new guest                (writes guest memory)
//!                        ├── cpu       CPUID, MSRs, TSC, registers      (never touches it)
//!                        ├── platform  interrupt controllers, timer, clock
//!                        └── state     all of it as bytes
//! ```
//!
//! Guest memory is reached by raw addresses and volatile copies only; there is no reference into
//! it. The signal SIGRTMIN belongs to this crate.

#![warn(missing_docs)]

mod boot;
mod clock;
mod config;
mod console;
mod cpu;
mod crew;
mod devices;
mod error;
mod exit;
mod fault_address;
mod gate;
mod kick;
mod machine;
mod memory;
mod migration;
mod platform;
pub mod qemu;
mod self_service;
mod state;
mod touches;
mod vcpu;
mod vm;

pub use config::{BootSource, DEFAULT_CMDLINE, MAX_CPUS, MIN_MEMORY_BYTES, PCI_HOLE_START, VmConfig};
pub use console::Console;
pub use error::{StateError, VmError};
pub use exit::{ExitEvent, ExitReason};
pub use migration::{MovableVm, VmHost};
pub use state::{MAX_STATE_BYTES, STATE_VERSION};
pub use vm::{KvmDirtyLog, PAUSE_TIMEOUT, PreparedVm, Vm};

/// Feeds any bytes to the decoder of saved states: an entry point for fuzzing.
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub fn fuzz_state(bytes: &[u8]) {
    state::fuzz(bytes);
}

/// Whether this machine has a KVM that can run guests of this crate.
///
/// Errors: as [`Vm::boot`] has them for KVM.
pub fn check_kvm() -> Result<(), VmError> {
    platform::open().map(drop)
}
