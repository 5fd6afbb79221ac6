//! The MultiProcessor Specification 1.4 table: which processors and interrupt lines there are.
//!
//! It stands in for ACPI. All multi-byte fields are little-endian.

use super::layout::{MP_TABLE, MP_TABLE_MAX};
use crate::config::MAX_CPUS;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const ISA_LINES: u8 = 16;

const FLOATING_POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;
const CPU_BYTES: usize = 20;
const SMALL_ENTRY_BYTES: usize = 8;
const SMALL_ENTRIES: usize = 1 + 1 + ISA_LINES as usize + 2;
const _: () = assert!(
    FLOATING_POINTER_BYTES + HEADER_BYTES + CPU_BYTES * MAX_CPUS as usize + SMALL_ENTRY_BYTES * SMALL_ENTRIES
        <= MP_TABLE_MAX
);

const ENTRY_CPU: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;

/// The value that makes `bytes` and itself sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

fn cpu(index: u8) -> Vec<u8> {
    const ENABLED: u8 = 1;
    const BOOT: u8 = 2;
    let flags = if index == 0 { ENABLED | BOOT } else { ENABLED };
    let mut entry = vec![ENTRY_CPU, index, APIC_VERSION, flags];
    entry.extend(0x600u32.to_le_bytes());
    entry.extend(0x201u32.to_le_bytes());
    entry.extend([0; 8]);
    entry
}

fn entries(cpus: u8) -> Vec<Vec<u8>> {
    let io_apic_id = cpus;
    let mut all: Vec<Vec<u8>> = (0..cpus).map(cpu).collect();
    all.push([&[ENTRY_BUS, 0][..], b"ISA   "].concat());
    all.push([&[ENTRY_IO_APIC, io_apic_id, APIC_VERSION, 1][..], &IO_APIC.to_le_bytes()].concat());
    for line in 0..ISA_LINES {
        all.push(vec![ENTRY_INTERRUPT, INTERRUPT_INT, 0, 0, 0, line, io_apic_id, line]);
    }
    all.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, 0, 0, 0, 0]);
    all.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, 0xff, 1]);
    all
}

fn header(entries: &[Vec<u8>]) -> Vec<u8> {
    let len = HEADER_BYTES + entries.iter().map(Vec::len).sum::<usize>();
    let mut header = b"PCMP".to_vec();
    header.extend((len as u16).to_le_bytes());
    header.extend([4, 0]);
    header.extend(b"POSTCOPYVM          ");
    header.extend(0u32.to_le_bytes());
    header.extend(0u16.to_le_bytes());
    header.extend((entries.len() as u16).to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    header.extend(0u32.to_le_bytes());
    header
}

/// The bytes to be placed at [`MP_TABLE`].
pub(super) fn table(cpus: u8) -> Vec<u8> {
    let entries = entries(cpus);
    let mut config = [header(&entries), entries.concat()].concat();
    config[7] = checksum(&config);

    let mut pointer = b"_MP_".to_vec();
    pointer.extend((MP_TABLE as u32 + FLOATING_POINTER_BYTES as u32).to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    [pointer, config].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_lengths_hold_for_every_cpu_count() {
        for cpus in 1..=MAX_CPUS {
            let table = table(cpus);
            assert!(table.len() <= MP_TABLE_MAX);
            let (pointer, config) = table.split_at(FLOATING_POINTER_BYTES);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(config), 0);
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
            assert_eq!(config.len(), HEADER_BYTES + CPU_BYTES * usize::from(cpus) + 8 * SMALL_ENTRIES);
        }
    }
}
