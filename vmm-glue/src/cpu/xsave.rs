//! The extended processor state (x87, SSE, AVX and what came later) as plain bytes.
//!
//! KVM's structure has no length of its own; here the length is explicit and checked, so that a
//! state from a host with more of it is refused rather than cut off.

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::error::{KvmContext, StateError, VmError};

const BASE_BYTES: usize = size_of::<kvm_xsave>();
const WORD: usize = size_of::<u32>();

/// Bytes that this VM's KVM reads and writes.
pub(crate) fn size(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(BASE_BYTES)
}

fn empty(size: usize) -> Result<Xsave, VmError> {
    let words = size.saturating_sub(BASE_BYTES).div_ceil(WORD);
    Xsave::new(words).map_err(|_| VmError::Config("XSAVE area too large".into()))
}

/// Reads the state; `size` is this VM's [`size`].
pub(crate) fn save(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>, VmError> {
    let mut area = empty(size)?;
    if size > BASE_BYTES {
        // SAFETY: `area` has the size that KVM reported for this VM, and nothing in this process
        // enables further dynamic features after that.
        unsafe { vcpu.get_xsave2(&mut area) }.kvm("KVM_GET_XSAVE2")?;
    } else {
        let base = vcpu.get_xsave().kvm("KVM_GET_XSAVE")?;
        // SAFETY: only the fixed part is replaced; `len`, which describes the rest, stays.
        unsafe { area.as_mut_fam_struct() }.xsave.region = base.region;
    }
    let words = area.as_fam_struct_ref().xsave.region.iter().chain(area.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).take(size.next_multiple_of(WORD)).collect())
}

/// Writes the state back; `size` is this VM's [`size`].
///
/// Errors: more state than this host's processor has.
pub(crate) fn restore(vcpu: &VcpuFd, size: usize, bytes: &[u8]) -> Result<(), VmError> {
    if bytes.len() < BASE_BYTES || !bytes.len().is_multiple_of(WORD) {
        return Err(StateError::Contents("an XSAVE area of odd size".into()).into());
    }
    if bytes.len() > size.next_multiple_of(WORD) {
        let lacks = format!("{} bytes of XSAVE state, here {size}", bytes.len());
        return Err(StateError::Cpu(lacks).into());
    }
    let mut area = empty(size)?;
    let mut words =
        bytes.chunks_exact(WORD).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    // SAFETY: only the fixed part is written; `len` stays.
    let region = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    region.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    area.as_mut_slice().iter_mut().zip(words).for_each(|(to, from)| *to = from);
    // SAFETY: `area` has the size that KVM reported for this VM.
    unsafe { vcpu.set_xsave2(&area) }.kvm("KVM_SET_XSAVE")
}
