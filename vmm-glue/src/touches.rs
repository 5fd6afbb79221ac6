//! How many pages a guest has touched since it runs here: KVM knows, where nobody else can see it.
//!
//! A page has no entry in the processor's second-level page tables until the guest touches it, whether it has come or not. KVM
//! counts the faults that it ends by making one (`pf_fixed`), for each vCPU, and tells it by the vCPU's statistics (Linux 5.14). So
//! of a guest that was taken in, that is how many pages it has touched: those whose touch found them missing, which the pager
//! counts, and those that were there, which it cannot see. A page that KVM forgot and the guest touched again counts again.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVMIO, kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// The statistic.
pub(crate) const NAME: &str = "pf_fixed";
/// The most that a description of the statistics may have: Linux 6.18 has some 40 of 64 bytes.
const MOST_DESCRIBED: usize = 1 << 20;

/// Where KVM keeps that number for one vCPU.
pub(crate) struct Touches {
    statistics: File,
    at: u64,
}

impl Touches {
    /// `None` where this KVM has no such statistics.
    pub(crate) fn of_if_told(vcpu: &VcpuFd) -> Option<Self> {
        Self::of(vcpu).inspect_err(|error| tracing::debug!(%error, "KVM tells no touched pages")).ok()
    }

    fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the ioctl takes no argument, and changes nothing that exists.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: KVM has made this descriptor for us alone.
        let statistics = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let at = find(&statistics, NAME)?;
        Ok(Self { statistics, at })
    }

    /// Pages that it has touched.
    pub(crate) fn count(&self) -> io::Result<u64> {
        let mut number = [0; 8];
        self.statistics.read_exact_at(&mut number, self.at)?;
        Ok(u64::from_ne_bytes(number))
    }
}

/// All vCPUs' together. No guest runs without touching a page: a KVM that says so does not count.
pub(crate) fn sum(vcpus: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    vcpus.sum::<Option<u64>>().filter(|pages| *pages > 0)
}

/// Where a statistic of 64 bits lies in the file (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD).
fn find(statistics: &File, name: &str) -> io::Result<u64> {
    let mut header = [0; size_of::<kvm_stats_header>()];
    statistics.read_exact_at(&mut header, 0)?;
    let [_, name_bytes, count, _, described_at, data_at] = std::array::from_fn(|at| word(&header, 4 * at));
    let each = size_of::<kvm_stats_desc>() + name_bytes as usize;
    let all = each.saturating_mul(count as usize);
    if all > MOST_DESCRIBED {
        return Err(io::Error::other("KVM describes its statistics in an unknown way"));
    }
    let mut described = vec![0; all];
    statistics.read_exact_at(&mut described, described_at.into())?;
    // flags u32, exponent i16, size u16 (in numbers), offset u32, bucket_size u32, and the name with zeros behind it.
    let is_it = |entry: &&[u8]| entry[16..].split(|byte| *byte == 0).next() == Some(name.as_bytes());
    let entry = described.chunks_exact(each).find(is_it);
    let entry = entry.ok_or_else(|| io::Error::other(format!("KVM has no statistic {name}")))?;
    Ok(u64::from(data_at) + u64::from(word(entry, 8)))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|byte| bytes[at + byte]))
}
