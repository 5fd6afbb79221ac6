//! Guest memory as KVM and as the rust-vmm crates see it.
//!
//! Both views are of the *guest* mapping and made of raw addresses: no reference into guest
//! memory exists anywhere in this crate.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use postcopy_engine::memory::{GuestMemory, MemoryRegion, PAGE_SIZE};
use postcopy_engine::page_set::PageSet;
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
    set_slots(vm, memory, 0)
}

/// Has KVM note which pages the guest writes (`logging`), from now on, or not any more. The guest may
/// run; its slots are registered.
pub(crate) fn log_writes(vm: &VmFd, memory: &GuestMemory, logging: bool) -> Result<(), VmError> {
    set_slots(vm, memory, if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
}

/// The pages that KVM has noted since the last call, or since [`log_writes`].
pub(crate) fn written(vm: &VmFd, memory: &GuestMemory) -> Result<PageSet, VmError> {
    let mut pages = PageSet::new(memory.layout().total_pages(), false);
    for (slot, region) in (0u32..).zip(memory.layout().regions()) {
        let log = vm.get_dirty_log(slot, region.len as usize).kvm("KVM_GET_DIRTY_LOG")?;
        pages.add_log(region.offset / PAGE_SIZE, &log, (region.offset + region.len) / PAGE_SIZE);
    }
    Ok(pages)
}

fn set_slots(vm: &VmFd, memory: &GuestMemory, flags: u32) -> Result<(), VmError> {
    for (slot, region) in (0u32..).zip(memory.layout().regions()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags,
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
