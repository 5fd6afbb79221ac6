//! What the memory that is read holds: words that differ by place, so that a read which lands the
//! wrong bytes is seen.

use postcopy_transport::HostMemory;

const WORD: u64 = 8;
/// Bytes checked at a time.
const CHECKED: u64 = 64 << 10;

fn word(index: u64) -> [u8; 8] {
    let mixed = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 31).to_le_bytes()
}

/// Memory that reads come from, or land in.
///
/// Errors: there is not enough, or no huge pages are reserved.
pub(crate) fn memory(name: &str, len: usize, huge_pages: bool) -> std::io::Result<HostMemory> {
    if huge_pages { HostMemory::huge(name, len) } else { HostMemory::anonymous(name, len) }
}

/// Fills `memory`.
pub(crate) fn fill(memory: &HostMemory) {
    for offset in (0..memory.len() as u64).step_by(WORD as usize) {
        let filled = memory.write(offset, &word(offset / WORD));
        assert!(filled, "the length is a multiple of a word");
    }
}

/// Whether the `len` bytes at `at` of `landing` are those from `offset` (a multiple of 8).
pub(crate) fn matches(landing: &HostMemory, at: u64, offset: u64, len: u32) -> bool {
    let mut bytes = vec![0; len as usize];
    let whole = |(index, bytes): (u64, &[u8])| word(index).starts_with(bytes);
    landing.read(at, &mut bytes) && (offset / WORD..).zip(bytes.chunks(WORD as usize)).all(whole)
}

/// Checks every byte of `memory`.
///
/// Errors: a byte is wrong; where.
pub(crate) fn check_all(memory: &HostMemory) -> anyhow::Result<()> {
    let len = memory.len() as u64;
    for at in (0..len).step_by(CHECKED as usize) {
        let whole = matches(memory, at, at, CHECKED.min(len - at) as u32);
        anyhow::ensure!(
            whole,
            "memory is not what the source has in the 64 KiB at {at:#x}: a defect, please report it"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_bit_is_seen() {
        let memory = HostMemory::anonymous("test", 4096).unwrap();
        fill(&memory);
        assert!(matches(&memory, 0, 0, 4096));
        assert!(!matches(&memory, 0, 8, 64), "another place has other bytes");
        assert!(matches(&memory, 64, 64, 13), "a size that is no multiple of a word");
        check_all(&memory).unwrap();
        let mut byte = [0];
        assert!(memory.read(4095, &mut byte) && memory.write(4095, &[byte[0] ^ 1]));
        assert!(!matches(&memory, 0, 0, 4096));
        let error = check_all(&memory).unwrap_err().to_string();
        assert!(error.contains("at 0x0"), "{error}");
    }
}
