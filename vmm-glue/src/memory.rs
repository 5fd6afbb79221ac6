//! Guest memory as KVM and as the rust-vmm crates see it.
//!
//! Both views are of the *guest* mapping and made of raw addresses: no reference into guest
//! memory exists anywhere in this crate.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use postcopy_engine::memory::{GuestMemory, MemoryRegion};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::error::{KvmContext, VmError};

/// Where a region starts in this process. The region is one of `memory`'s layout.
fn host_address(memory: &GuestMemory, region: &MemoryRegion) -> Result<*mut u8, VmError> {
    let len = usize::try_from(region.len).ok();
    len.and_then(|len| memory.guest().at(region.offset, len))
        .ok_or_else(|| VmError::Config("the memory is smaller than its layout".into()))
}

/// Gives the guest its memory, one slot a region.
///
/// The caller keeps `memory` for as long as `vm` exists.
pub(crate) fn register_slots(vm: &VmFd, memory: &GuestMemory) -> Result<(), VmError> {
    for (slot, region) in (0u32..).zip(memory.layout().regions()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.gpa.0,
            memory_size: region.len,
            userspace_addr: host_address(memory, region)? as u64,
        };
        // SAFETY: the range is one region of the guest mapping, checked by `host_address`, and
        // regions do not overlap (the layout's invariant). The mapping outlives the VM, as the
        // caller promises by holding `memory` beside it.
        unsafe { vm.set_user_memory_region(slot) }.kvm("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}

/// The memory as rust-vmm's loaders take it. Valid only while `memory` is held.
pub(crate) fn loader_view(memory: &GuestMemory) -> Result<GuestMemoryMmap, VmError> {
    let mut regions = Vec::new();
    for region in memory.layout().regions() {
        let address = host_address(memory, region)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: the range lies in the guest mapping, which `memory` keeps, readable, writable
        // and shared; the region made here does not own it and so never unmaps it.
        let mapping = unsafe { MmapRegion::build_raw(address, region.len as usize, prot, flags) };
        let mapping = mapping.map_err(|error| VmError::Config(format!("guest memory: {error}")))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(region.gpa.0));
        regions.push(region.ok_or_else(|| VmError::Config("a memory region wraps around".into()))?);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| VmError::Config(format!("guest memory: {error}")))
}
