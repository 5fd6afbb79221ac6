//! Traces of real programs, from what valgrind's lackey prints.
//!
//! ```text
//! I  04001a30,3        an instruction: a nanosecond
//!  L 1ffefff6e8,8      a load;  S a store;  M both
//! ```
//!
//! Pages are numbered in the order of their addresses, without the gaps between mappings.

use std::io::BufRead;

use super::trace::{Touch, Trace};

const PAGE_SHIFT: u32 = 12;

/// The trace of a program that was moved just before its first instruction.
///
/// Errors: what reading gives.
pub fn recorded(name: &str, lackey: impl BufRead) -> std::io::Result<Trace> {
    let mut seen = std::collections::BTreeMap::new();
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
    Ok(Trace { name: name.into(), pages: touches.len() as u64, touches, recency: Vec::new() })
}

/// What a line says: the kind of access, and its page.
fn access(line: &[u8]) -> Option<(u8, u64)> {
    let (kind, rest) = (line.get(..3)?, line.get(3..)?);
    let kind = *kind.iter().find(|byte| b"ILSM".contains(byte))?;
    let end = rest.iter().position(|byte| *byte == b',')?;
    let address = u64::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?, 16).ok()?;
    Some((kind, address >> PAGE_SHIFT))
}

#[cfg(test)]
mod tests {
    use super::*;

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
