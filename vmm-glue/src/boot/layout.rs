//! Where the boot structures lie in guest physical memory. All below 1 MiB, all from the Linux
//! boot protocol or free by it.

/// The global descriptor table.
pub(super) const GDT: u64 = 0x500;
/// The interrupt descriptor table: one empty entry, so that an early exception ends the guest.
pub(super) const IDT: u64 = 0x560;
/// The zero page (`struct boot_params`).
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack at entry.
pub(super) const STACK: u64 = 0x8ff0;
/// Page-map level 4, then its one page-directory-pointer table, then four page directories.
pub(super) const PML4: u64 = 0x9000;
pub(super) const PDPT: u64 = 0xa000;
pub(super) const PAGE_DIRECTORIES: u64 = 0xb000;
/// The kernel's command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Its bound, unless the kernel states a lower one.
pub(super) const CMDLINE_MAX: usize = 0x1_0000;
/// The MP table; also the end of usable memory below 1 MiB. The kernel looks for it here.
pub(super) const MP_TABLE: u64 = 0x9_fc00;
/// Bytes there are for it.
pub(super) const MP_TABLE_MAX: usize = 0x400;
/// Where BIOS memory would start and main memory goes on.
pub(super) const BIOS_START: u64 = 0xa_0000;
/// One MiB: where the kernel is loaded.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

const _: () = assert!(PAGE_DIRECTORIES + 4 * 0x1000 <= CMDLINE);
const _: () = assert!(CMDLINE + CMDLINE_MAX as u64 <= MP_TABLE);
const _: () = assert!(MP_TABLE + MP_TABLE_MAX as u64 == BIOS_START);
