//! Loading a guest: kernel, initrd, command line, memory map, and the processor state at entry,
//! by the Linux 64-bit boot protocol.
//!
//! It writes guest memory and nothing else: a guest that is restored never comes here.

mod entry;
mod kernel;
mod layout;
mod mptable;

use std::fs::File;
use std::path::Path;

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use postcopy_engine::memory::{GuestMemory, MemoryRegion};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) use entry::EntryState;

use crate::config::{BootSource, VmConfig};
use crate::error::VmError;
use crate::memory::loader_view;
use kernel::{Kernel, Loaded};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Memory that a kernel wants beside itself and its unpacked initrd to come up at all.
const WORKING_BYTES: u64 = 24 * MIB;

/// An initial RAM disk's place.
#[derive(Clone, Copy, Default)]
struct Initrd {
    address: u64,
    len: u64,
}

/// Loads `source` into `memory`; returns how the boot processor is to start.
///
/// Errors: files that cannot be read or are not what they should be, and too little memory.
pub(crate) fn load(
    config: &VmConfig,
    memory: &GuestMemory,
    source: &BootSource,
) -> Result<EntryState, VmError> {
    let kernel = Kernel::open(&source.kernel)?;
    let initrd = source.initrd.as_deref().map(open_initrd).transpose()?;
    let low = low_memory(memory);
    check_memory(low, &kernel, initrd.as_ref().map_or(0, |(_, len)| *len))?;
    check_cmdline(&kernel, &source.cmdline)?;

    let view = loader_view(memory)?;
    let initrd = match initrd {
        Some((file, len)) => load_initrd(&view, file, len, low.min(kernel.initrd_limit()), source)?,
        None => Initrd::default(),
    };
    let loaded = kernel.load(&view)?;
    put(&view, layout::CMDLINE, source.cmdline.as_bytes())?;
    put(&view, layout::CMDLINE + source.cmdline.len() as u64, &[0])?;
    put(&view, layout::MP_TABLE, &mptable::table(config.cpus))?;
    let params = zero_page(memory.layout().regions(), &loaded, initrd, source.cmdline.len());
    view.write_obj(params, GuestAddress(layout::ZERO_PAGE)).map_err(unplaced)?;
    entry::write_tables(&view)?;
    Ok(EntryState { rip: loaded.entry })
}

fn unplaced(error: vm_memory::GuestMemoryError) -> VmError {
    VmError::Config(format!("the boot structures do not fit into guest memory: {error}"))
}

fn put(view: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), VmError> {
    view.write_slice(bytes, GuestAddress(address)).map_err(unplaced)
}

/// End of the memory that starts at 0.
fn low_memory(memory: &GuestMemory) -> u64 {
    memory.layout().regions().first().map_or(0, |region| region.len)
}

fn open_initrd(path: &Path) -> Result<(File, u64), VmError> {
    let unreadable = |source| VmError::BootFile { what: "initrd", path: path.to_path_buf(), source };
    let file = File::open(path).map_err(unreadable)?;
    let len = file.metadata().map_err(unreadable)?.len();
    Ok((file, len))
}

/// Refuses memory that cannot hold the kernel, the packed initrd and (guessed as three times
/// that) the unpacked one.
fn check_memory(low: u64, kernel: &Kernel, initrd: u64) -> Result<(), VmError> {
    let mut need = kernel.end.max(layout::HIGH_MEMORY);
    if kernel.cmdline_limit().is_some() {
        need = need.saturating_add(WORKING_BYTES);
    }
    need = need.saturating_add(initrd.saturating_mul(4));
    if low < need {
        return Err(VmError::TooLittleMemory { have_mib: low / MIB, need_mib: need.div_ceil(MIB) });
    }
    Ok(())
}

fn check_cmdline(kernel: &Kernel, cmdline: &str) -> Result<(), VmError> {
    let limit = kernel.cmdline_limit().unwrap_or(usize::MAX).min(layout::CMDLINE_MAX - 1);
    if cmdline.len() > limit {
        return Err(VmError::CommandLine { have: cmdline.len(), limit });
    }
    if cmdline.contains('\0') {
        return Err(VmError::Config("the kernel command line has a zero byte in it".into()));
    }
    Ok(())
}

/// Copies the initrd to the end of low memory, below `limit`.
fn load_initrd(
    view: &GuestMemoryMmap,
    mut file: File,
    len: u64,
    limit: u64,
    source: &BootSource,
) -> Result<Initrd, VmError> {
    let address = limit.saturating_sub(len) & !(PAGE - 1);
    let read = view.read_exact_volatile_from(GuestAddress(address), &mut file, len as usize);
    read.map_err(|error| VmError::BootFile {
        what: "initrd",
        path: source.initrd.clone().unwrap_or_default(),
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(Initrd { address, len })
}

fn zero_page(regions: &[MemoryRegion], loaded: &Loaded, initrd: Initrd, cmdline: usize) -> boot_params {
    const LOADER_UNREGISTERED: u8 = 0xff;
    let mut params = boot_params { hdr: loaded.header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNREGISTERED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline as u32;
    params.hdr.ramdisk_image = initrd.address as u32;
    params.hdr.ramdisk_size = initrd.len as u32;
    let map = e820(regions);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    params
}

/// The memory map: all regions, less the PC's hole below 1 MiB.
fn e820(regions: &[MemoryRegion]) -> Vec<boot_e820_entry> {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let entry = |addr, end: u64, kind| boot_e820_entry { addr, size: end - addr, r#type: kind };
    let mut map =
        vec![entry(0, layout::MP_TABLE, RAM), entry(layout::MP_TABLE, layout::BIOS_START, RESERVED)];
    for region in regions {
        let start = region.gpa.0.max(layout::HIGH_MEMORY);
        map.push(entry(start, region.gpa.0 + region.len, RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy_engine::memory::MemoryLayout;

    #[test]
    fn the_memory_map_covers_all_memory_but_the_hole() {
        let layout = MemoryLayout::pc(4 << 30, 3 << 30).unwrap();
        let usable: u64 =
            e820(layout.regions()).iter().filter(|entry| { entry.r#type } == 1).map(|entry| entry.size).sum();
        assert_eq!(usable, layout.total_bytes() - (layout::HIGH_MEMORY - layout::MP_TABLE));
    }
}
