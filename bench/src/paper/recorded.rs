//! Traces of real programs and guests, from what valgrind's lackey prints of a program, or the kernel's tracer
//! of a guest.
//!
//! ```text
//! I  04001a30,3        an instruction: a nanosecond
//!  L 1ffefff6e8,8      a load;  S a store;  M both
//! ```
//!
//! A program's pages are numbered in the order of their addresses, without the gaps between mappings.
//!
//! ```text
//! # guest pages: 65536                               before all others
//!  qemu-system-x86-538 [001] ..... 33.646519: kvm_page_fault: vcpu 0 rip 0x… address 0x1062ff8 error_code 0x…
//! ```
//!
//! A guest's pages keep their numbers. One whose every page is out of KVM's tables faults at each first touch.

use std::collections::{BTreeMap, HashSet};
use std::io::BufRead;

use super::trace::{Touch, Trace};

const PAGE_SHIFT: u32 = 12;

/// The trace of a program that was moved just before its first instruction, or of a guest from its first fault on.
///
/// Errors: what reading gives.
pub fn recorded(name: &str, mut printed: impl BufRead) -> std::io::Result<Trace> {
    let mut first = Vec::new();
    printed.read_until(b'\n', &mut first)?;
    match guest_pages(&first) {
        Some(pages) => of_guest(name, pages, printed),
        None => of_program(name, std::io::Read::chain(&first[..], printed)),
    }
}

fn of_program(name: &str, lackey: impl BufRead) -> std::io::Result<Trace> {
    let mut seen = BTreeMap::new();
    let (mut touches, mut think_ns) = (Vec::new(), 0);
    for line in lackey.split(b'\n') {
        let line = line?;
        let Some((kind, page)) = access(&line) else { continue };
        think_ns += u64::from(kind == b'I');
        seen.entry(page).or_insert_with(|| {
            touches.push(Touch { page, think_ns: std::mem::take(&mut think_ns) });
            0
        });
    }
    for (number, place) in seen.values_mut().enumerate() {
        *place = number as u64;
    }
    touches.iter_mut().for_each(|touch| touch.page = seen[&touch.page]);
    Ok(Trace { name: name.into(), pages: touches.len() as u64, touches, used: Vec::new() })
}

/// What a line says: the kind of access, and its page.
fn access(line: &[u8]) -> Option<(u8, u64)> {
    let (kind, rest) = (line.get(..3)?, line.get(3..)?);
    let kind = *kind.iter().find(|byte| b"ILSM".contains(byte))?;
    let end = rest.iter().position(|byte| *byte == b',')?;
    let address = u64::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?, 16).ok()?;
    Some((kind, address >> PAGE_SHIFT))
}

/// The first line of a guest's faults.
fn guest_pages(line: &[u8]) -> Option<u64> {
    std::str::from_utf8(line).ok()?.strip_prefix("# guest pages: ")?.trim_end().parse().ok()
}

fn of_guest(name: &str, pages: u64, faults: impl BufRead) -> std::io::Result<Trace> {
    let (mut seen, mut touches, mut before) = (HashSet::new(), Vec::new(), None);
    for line in faults.split(b'\n') {
        let line = line?;
        let Some((now, page)) = std::str::from_utf8(&line).ok().and_then(fault) else { continue };
        // What lies above is a device, and no memory.
        if page >= pages || !seen.insert(page) {
            continue;
        }
        let think_ns = now - before.replace(now).unwrap_or(now).min(now);
        touches.push(Touch { page, think_ns });
    }
    Ok(Trace { name: name.into(), pages, touches, used: Vec::new() })
}

/// What a line of the tracer's says: when, in nanoseconds, and the page.
fn fault(line: &str) -> Option<(u64, u64)> {
    let (before, after) = line.split_once(": kvm_page_fault: ")?;
    let (seconds, micros) = before.rsplit_once(' ')?.1.split_once('.')?;
    let address = after.split_once(" address 0x")?.1.split(' ').next()?;
    let ns = seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?;
    Some((
        ns + micros.parse::<u32>().ok()? as u64 * 1000,
        u64::from_str_radix(address, 16).ok()? >> PAGE_SHIFT,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_faults_become_first_touches() {
        let printed = b"# guest pages: 100\n# tracer: nop\n\
            \x20 qemu-system-x86-538     [001] ....1    33.646519: kvm_page_fault: vcpu 0 rip 0xffffffffa564f043 address 0x0000000000062ff8 error_code 0x6\n\
            \x20 qemu-system-x86-538     [001] ....1    33.646522: kvm_page_fault: vcpu 0 rip 0x1 address 0x00000000fee00030 error_code 0x6\n\
            \x20 qemu-system-x86-538     [001] ....1    34.000001: kvm_page_fault: vcpu 0 rip 0x1 address 0x0000000000001008 error_code 0x4\n\
            \x20 qemu-system-x86-538     [001] ....1    34.000009: kvm_page_fault: vcpu 0 rip 0x1 address 0x0000000000062000 error_code 0x6\n";
        let trace = recorded("guest", &printed[..]).unwrap();
        let touch = |page, think_ns| Touch { page, think_ns };
        assert_eq!(trace.touches, [touch(0x62, 0), touch(1, 353_482_000)]);
        assert_eq!(trace.pages, 100);
    }

    #[test]
    fn lackeys_lines_become_first_touches() {
        let printed =
            b"==1== Lackey\nI  04001a30,3\n L 1ffefff6e8,8\nI  04001a33,3\nI  04001a36,3\n S 02000000,4\n";
        let trace = recorded("three", &printed[..]).unwrap();
        let touch = |page, think_ns| Touch { page, think_ns };
        assert_eq!(trace.touches, [touch(1, 1), touch(2, 0), touch(0, 2)]);
        assert_eq!(trace.pages, 3);
    }
}
