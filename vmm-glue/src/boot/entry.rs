//! The boot processor at the kernel's 64-bit entry: flat segments, 4 GiB mapped one to one,
//! interrupts off, RSI on the zero page.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use super::{layout, put};
use crate::error::{KvmContext, VmError};

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLED: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const MAPPED_GIB: u64 = 4;

/// The boot protocol's selectors.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CODE_TYPE: u8 = 0xb;
const DATA_TYPE: u8 = 0x3;
const TASK_TYPE: u8 = 0xb;

/// How the boot processor starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryState {
    pub(super) rip: u64,
}

/// A flat code or data segment.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    let code = type_ == CODE_TYPE;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l: u8::from(code),
        db: u8::from(!code),
        g: 1,
        ..Default::default()
    }
}

/// A task-state segment, which must be there although nothing uses it.
fn task() -> kvm_segment {
    kvm_segment { limit: 0xffff, selector: TASK_SELECTOR, type_: TASK_TYPE, present: 1, ..Default::default() }
}

/// The segment as a GDT entry.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_) | u64::from(segment.s) << 4 | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// Writes the descriptor and page tables.
pub(super) fn write_tables(view: &GuestMemoryMmap) -> Result<(), VmError> {
    let segments = [flat(CODE_SELECTOR, CODE_TYPE), flat(DATA_SELECTOR, DATA_TYPE), task()];
    let gdt: Vec<u64> = [0, 0].into_iter().chain(segments.iter().map(descriptor)).collect();
    put_words(view, layout::GDT, gdt)?;
    put_words(view, layout::IDT, [0])?;
    put_words(view, layout::PML4, [layout::PDPT | PRESENT_WRITABLE])?;
    let directory = |gib: u64| layout::PAGE_DIRECTORIES + gib * 0x1000;
    put_words(view, layout::PDPT, (0..MAPPED_GIB).map(|gib| directory(gib) | PRESENT_WRITABLE))?;
    let pages = (0..MAPPED_GIB * ENTRIES).map(|n| (n * LARGE_PAGE_BYTES) | PRESENT_WRITABLE | LARGE_PAGE);
    put_words(view, layout::PAGE_DIRECTORIES, pages)
}

fn put_words(
    view: &GuestMemoryMmap,
    address: u64,
    words: impl IntoIterator<Item = u64>,
) -> Result<(), VmError> {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    put(view, address, &bytes)
}

impl EntryState {
    /// Puts the boot processor there. The other processors wait for it as KVM made them.
    pub(crate) fn apply(self, vcpu: &VcpuFd) -> Result<(), VmError> {
        let mut sregs = vcpu.get_sregs().kvm("KVM_GET_SREGS")?;
        set_long_mode(&mut sregs);
        vcpu.set_sregs(&sregs).kvm("KVM_SET_SREGS")?;
        let regs = kvm_regs {
            rip: self.rip,
            rsp: layout::STACK,
            rbp: layout::STACK,
            rsi: layout::ZERO_PAGE,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        vcpu.set_regs(&regs).kvm("KVM_SET_REGS")
    }
}

fn set_long_mode(sregs: &mut kvm_sregs) {
    sregs.cs = flat(CODE_SELECTOR, CODE_TYPE);
    let data = flat(DATA_SELECTOR, DATA_TYPE);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task();
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, 5 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (layout::IDT, 7);
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.efer |= EFER_LONG_MODE_ENABLED | EFER_LONG_MODE_ACTIVE;
}
