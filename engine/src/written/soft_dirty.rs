//! Writes noted by soft-dirty bits (Documentation/admin-guide/mm/soft-dirty.rst).

use std::io;
use std::path::Path;

use postcopy_transport::HostMemory;

use crate::memory::PAGE_SIZE;
use crate::places::Places;
use crate::proc_pages::each;

/// Clears the bits of all pages of the process of this folder in /proc.
pub(super) fn clear(process: &Path) -> io::Result<()> {
    std::fs::write(process.join("clear_refs"), "4")
}

/// Whether this kernel notes writes so.
///
/// Errors: it lets nobody look.
pub(super) fn is_noted() -> io::Result<bool> {
    let probe = HostMemory::anonymous("soft-dirty", PAGE_SIZE as usize)?;
    // The bit of a page that is new and written is set wherever there are such bits.
    let written = probe.write(0, &[1]);
    debug_assert!(written);
    let mut noted = false;
    let place = Places::one(probe.base() as u64, PAGE_SIZE);
    each(Path::new("/proc/self"), &place, |_, entry| noted = entry.is_soft_dirty())?;
    Ok(noted)
}
