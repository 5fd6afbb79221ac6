//! Why the VMM could not do what was asked, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::exit::ExitReason;

/// What can go wrong in this crate. One line each: what is wrong, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// There is no KVM on this machine.
    #[error(
        "/dev/kvm is missing: load kvm-intel or kvm-amd, or enable virtualisation in the firmware or the hypervisor above"
    )]
    NoKvm,
    /// KVM is there, but not for this user.
    #[error(
        "/dev/kvm may not be opened by this user: add the user to group kvm (usermod -aG kvm USER, then log in again), or run as root"
    )]
    KvmDenied,
    /// KVM cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened: {0}")]
    KvmOpen(#[source] io::Error),
    /// KVM is too old or was built without something that a guest here needs.
    #[error(
        "this host's KVM lacks {0}: use Linux 5.17 or newer on x86-64 with the in-kernel interrupt controller"
    )]
    MissingCapability(&'static str),
    /// A call to KVM failed.
    #[error("{operation} failed: {source}")]
    Kvm {
        /// The ioctl or step.
        operation: &'static str,
        /// What it reported.
        source: io::Error,
    },
    /// Another system call failed.
    #[error("{operation} failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What it reported.
        source: io::Error,
    },
    /// The configuration makes no sense.
    #[error("configuration refused: {0}")]
    Config(String),
    /// A file that the guest boots from cannot be read.
    #[error("cannot read {what} {path}: {source}")]
    BootFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// The kernel file is neither a bzImage nor an ELF file for x86-64.
    #[error("{0} is no kernel: a bzImage (/boot/vmlinuz-*) or an x86-64 ELF file is needed")]
    NotAKernel(PathBuf),
    /// The kernel file says what it is but cannot be loaded.
    #[error("kernel {path} cannot be loaded: {reason}")]
    BadKernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest's memory cannot hold what it boots from.
    #[error(
        "{have_mib} MiB of memory is too little for this kernel and initrd: give the guest at least {need_mib} MiB"
    )]
    TooLittleMemory {
        /// What the guest has below 4 GiB.
        have_mib: u64,
        /// What would do.
        need_mib: u64,
    },
    /// The kernel command line does not fit.
    #[error("the kernel command line has {have} bytes, this kernel takes at most {limit}: shorten it")]
    CommandLine {
        /// Its length.
        have: usize,
        /// What the kernel takes.
        limit: usize,
    },
    /// The saved state cannot be used.
    #[error("saved state refused: {0}")]
    State(#[from] StateError),
    /// The vCPUs did not stop in time.
    #[error(
        "{running} of {cpus} vCPUs did not stop within {waited:?}: they wait for a page that nobody serves; resume or restart the pager, then pause again"
    )]
    PauseTimeout {
        /// How many did not stop.
        running: u32,
        /// How many there are.
        cpus: u32,
        /// How long they were given.
        waited: Duration,
    },
    /// Something was asked that needs a paused guest.
    #[error("{0} needs a paused guest: pause it first")]
    NotPaused(&'static str),
    /// The guest has ended, so it can neither be paused nor saved nor started.
    #[error("the guest has ended: {0}")]
    Ended(ExitReason),
}

/// Why a saved state was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It does not begin as a saved state does.
    #[error("these bytes are no VM state")]
    Magic,
    /// It is of a version that this program does not know.
    #[error(
        "it is of version {found}, this program reads version {known}: run the same release on both hosts"
    )]
    Version {
        /// What it says.
        found: u32,
        /// What we read.
        known: u32,
    },
    /// It is longer than any state may be.
    #[error("it has {0} bytes, more than the bound of {limit}", limit = crate::state::MAX_STATE_BYTES)]
    TooLong(usize),
    /// It ends early, or has bytes left over.
    #[error("it should have {expected} bytes and has {found}: transfer it again")]
    Length {
        /// What its header announces.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// Its checksum does not match.
    #[error("its checksum does not match: transfer it again")]
    Checksum,
    /// Its contents cannot be decoded although the checksum matches.
    #[error("its contents make no sense ({0}): it was written by a different program")]
    Contents(String),
    /// It is of another machine than the one configured here.
    #[error(
        "it is of a guest with {found}, this side was configured for {configured}: configure both sides alike"
    )]
    Machine {
        /// What the state says.
        found: String,
        /// What the configuration says.
        configured: String,
    },
    /// The guest uses processor features that this host does not have.
    #[error(
        "the guest uses processor features that this host lacks ({0}): migrate to a host of the same kind"
    )]
    Cpu(String),
    /// The guest's TSC frequency cannot be had here.
    #[error(
        "the guest's TSC runs at {guest_khz} kHz, this host's at {host_khz} kHz and cannot be scaled: migrate to a host of the same frequency"
    )]
    TscRate {
        /// The guest's.
        guest_khz: u32,
        /// This host's.
        host_khz: u32,
    },
    /// A model-specific register cannot be set to the guest's value here.
    #[error(
        "register MSR {index:#x} cannot be set to {value:#x} on this host: migrate to a host of the same kind and kernel"
    )]
    Msr {
        /// Which register.
        index: u32,
        /// The guest's value.
        value: u64,
    },
}

/// Names the KVM call in an error.
pub(crate) trait KvmContext<T> {
    fn kvm(self, operation: &'static str) -> Result<T, VmError>;
}

impl<T> KvmContext<T> for Result<T, kvm_ioctls::Error> {
    fn kvm(self, operation: &'static str) -> Result<T, VmError> {
        self.map_err(|error| VmError::Kvm { operation, source: io::Error::from_raw_os_error(error.errno()) })
    }
}

/// Names the system call in an error.
pub(crate) trait SystemContext<T> {
    fn system(self, operation: &'static str) -> Result<T, VmError>;
}

impl<T> SystemContext<T> for io::Result<T> {
    fn system(self, operation: &'static str) -> Result<T, VmError> {
        self.map_err(|source| VmError::System { operation, source })
    }
}
