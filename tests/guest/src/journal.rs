//! A journal on a raw disk, every byte of which can be predicted: a ring of blocks in which block
//! number n lies in slot n % slots.
//!
//! ```text
//! byte    0        8          16              24       32                4096
//!         │ magic  │ sequence │ boot time, ns │ check  │ words of the sequence │
//! ```
//!
//! All words are little-endian. Sequence numbers begin at 1, so that a disk of zeros is an empty
//! journal. This is the format; `disk` writes it, `audit` finds what is wrong with one.

use crate::pattern::{Contents, PAGE_WORDS, Page, mix};

/// Bytes in a block.
pub const BLOCK_BYTES: usize = PAGE_WORDS * 8;

/// What each block begins with: "PCJRNL01".
const MAGIC: u64 = u64::from_le_bytes(*b"PCJRNL01");
/// Decides the contents of all journals.
const SEED: u64 = 0x6a6f_7572_6e61_6c31;

/// A block's bytes, aligned as direct writes need them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(align(4096))]
pub struct Block(pub [u8; BLOCK_BYTES]);

/// What a block tells of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number, from 1.
    pub sequence: u64,
    /// CLOCK_BOOTTIME of the writer as it was written.
    pub boot_ns: u64,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Zeros: nothing was ever written.
    Empty,
    /// A block, right in every byte.
    Written(Entry),
    /// Anything else. `sequence` is what it would be called by its head.
    Torn {
        /// The sequence number in its head.
        sequence: u64,
        /// The first byte that is wrong for that sequence number.
        offset: usize,
    },
}

impl Entry {
    fn words(self) -> Page {
        let mut words = [0; PAGE_WORDS];
        Contents::new(SEED).fill(self.sequence, 0, &mut words);
        let check = mix(mix(self.sequence) ^ self.boot_ns);
        words[..4].copy_from_slice(&[MAGIC, self.sequence, self.boot_ns, check]);
        words
    }

    /// The whole block.
    pub fn encode(self) -> Block {
        let mut block = Block([0; BLOCK_BYTES]);
        for (bytes, word) in block.0.chunks_exact_mut(8).zip(self.words()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        block
    }
}

/// Looks at every byte of a slot.
pub fn decode(found: &[u8; BLOCK_BYTES]) -> Slot {
    if found.iter().all(|byte| *byte == 0) {
        return Slot::Empty;
    }
    let word =
        |index: usize| found[index * 8..][..8].iter().rev().fold(0, |word, b| word << 8 | u64::from(*b));
    let entry = Entry { sequence: word(1), boot_ns: word(2) };
    let expected = entry.encode();
    match found.iter().zip(expected.0).position(|(found, expected)| *found != expected) {
        // Nobody writes number 0.
        None if entry.sequence > 0 => Slot::Written(entry),
        wrong => Slot::Torn { sequence: entry.sequence, offset: wrong.unwrap_or(8) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_block_begins_as_it_is_documented() {
        let block = Entry { sequence: 0x0102, boot_ns: 7 }.encode();
        assert_eq!(&block.0[..16], b"PCJRNL01\x02\x01\0\0\0\0\0\0");
        assert_eq!(block.0[16..24], 7u64.to_le_bytes());
        assert_eq!(decode(&[0; BLOCK_BYTES]), Slot::Empty);
        let nobodys = Entry { sequence: 0, boot_ns: 7 }.encode();
        assert_eq!(decode(&nobodys.0), Slot::Torn { sequence: 0, offset: 8 });
    }

    proptest! {
        #[test]
        fn any_changed_byte_of_a_block_is_found(
            sequence in 1u64.., boot_ns: u64, offset in 0..BLOCK_BYTES, flip in 1u8..,
        ) {
            let entry = Entry { sequence, boot_ns };
            let mut block = entry.encode();
            prop_assert_eq!(decode(&block.0), Slot::Written(entry));
            block.0[offset] ^= flip;
            let is_torn = matches!(decode(&block.0), Slot::Torn { .. });
            prop_assert!(is_torn);
        }

        #[test]
        fn a_block_of_two_halves_is_torn(a in 1u64.., b in 1u64.., cut in 1..BLOCK_BYTES / 512) {
            prop_assume!(a != b);
            let mut block = Entry { sequence: a, boot_ns: 1 }.encode();
            block.0[cut * 512..].copy_from_slice(&Entry { sequence: b, boot_ns: 2 }.encode().0[cut * 512..]);
            let is_torn = matches!(decode(&block.0), Slot::Torn { .. });
            prop_assert!(is_torn);
        }
    }
}
