//! What a guest is made of and what it boots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use postcopy_engine::memory::{LayoutError, MemoryLayout, PAGE_SIZE};

use crate::error::VmError;

/// Most vCPUs a guest may have. The MP table's place (1 KiB below 640 KiB) bounds it.
pub const MAX_CPUS: u8 = 32;

/// Where the PC's hole for devices starts: memory that does not fit below goes above 4 GiB.
pub const PCI_HOLE_START: u64 = 3 << 30;

/// Least memory of a guest: the first MiB has the boot structures, and something must be above.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;

/// A kernel command line that suits a stock distribution kernel here.
///
/// `reboot=k` and `panic=-1` make every end of the guest an exit of the VMM. There is no PCI, no
/// real-time clock and only a rudimentary keyboard controller, so probing for them is switched
/// off (a missing real-time clock alone costs a stock kernel seconds); `quiet` because each
/// character on an emulated serial line costs two exits. Nothing about the TSC is claimed: the
/// guest is not shown an invariant TSC, so that kvmclock, which survives migration to a host of
/// another frequency, stays its clock source.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 pci=off quiet \
     i8042.noaux i8042.nokbd i8042.nomux i8042.nopnp initcall_blacklist=cmos_init \
     cryptomgr.notests random.trust_cpu=on";

/// The shape of a guest. Both sides of a migration need the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// How many vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// How much memory, in bytes; a multiple of the page size.
    pub memory_bytes: u64,
}

impl VmConfig {
    /// Where the guest's memory goes: what [`crate::Vm`] expects of the memory it is given.
    ///
    /// Errors: an amount of memory that is zero or not a multiple of the page size.
    pub fn layout(&self) -> Result<MemoryLayout, LayoutError> {
        MemoryLayout::pc(self.memory_bytes, PCI_HOLE_START)
    }

    /// Refuses what cannot be built.
    pub(crate) fn check(&self) -> Result<(), VmError> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(VmError::Config(format!("{} vCPUs; give it 1 to {MAX_CPUS}", self.cpus)));
        }
        if self.memory_bytes < MIN_MEMORY_BYTES || !self.memory_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(VmError::Config(format!(
                "{} bytes of memory; give it at least 2 MiB, in whole pages",
                self.memory_bytes
            )));
        }
        Ok(())
    }
}

/// What a guest boots from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// A bzImage, or an ELF64 file that is entered in 64-bit mode with a Linux zero page in RSI.
    pub kernel: PathBuf,
    /// The initial RAM file system, if any.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; see [`DEFAULT_CMDLINE`].
    pub cmdline: String,
}
