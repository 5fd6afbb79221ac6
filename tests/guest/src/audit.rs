//! Finds what is wrong with a journal, from outside: in the image of the disk that a guest has
//! written it to.
//!
//! The highest number that is there decides what each slot must hold, to the last byte: the latest
//! block that belongs into it, or zeros where none has come to it yet. Whoever writes must have
//! ended, or stand still.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::journal::{BLOCK_BYTES, Entry, Slot, decode};

/// A slot that does not hold what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Nothing at all is where a block must be.
    Lost {
        /// The slot.
        slot: u64,
        /// The block that must be there.
        expected: u64,
    },
    /// An earlier block of the same slot: the latest was acknowledged, and not kept.
    Stale {
        /// The slot.
        slot: u64,
        /// The block that must be there.
        expected: u64,
        /// The block that is.
        found: u64,
    },
    /// A whole block that belongs to another slot.
    Doubled {
        /// The slot.
        slot: u64,
        /// The block that is there.
        found: u64,
    },
    /// Neither a whole block nor zeros.
    Torn {
        /// The slot.
        slot: u64,
        /// The block that it would be by its head.
        sequence: u64,
        /// The first byte of the slot that is wrong for that.
        offset: usize,
    },
    /// A block that was written before the one that precedes it: two have written.
    OutOfTime {
        /// The block.
        sequence: u64,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { slot, expected } => write!(f, "slot {slot} is empty in place of block {expected}"),
            Self::Stale { slot, expected, found } => {
                write!(f, "slot {slot} holds block {found}, which block {expected} has replaced")
            }
            Self::Doubled { slot, found } => {
                write!(f, "slot {slot} holds block {found}, which belongs elsewhere")
            }
            Self::Torn { slot, sequence, offset } => {
                write!(f, "slot {slot} is torn: as block {sequence} it is wrong from byte {offset}")
            }
            Self::OutOfTime { sequence } => {
                write!(f, "block {sequence} was written earlier than block {}", sequence - 1)
            }
        }
    }
}

/// What is there, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// How many slots the disk has.
    pub slots: u64,
    /// The highest block that is whole and in its slot; 0 if there is none.
    pub highest: u64,
    /// All that is wrong, by slot.
    pub damage: Vec<Damage>,
}

impl Audit {
    /// Panics unless the journal is without damage and has the block that its writer has last
    /// known to be written.
    pub fn assert_holds(&self, acknowledged: u64) {
        let found: Vec<String> = self.damage.iter().take(20).map(ToString::to_string).collect();
        assert!(found.is_empty(), "{} slots are damaged:\n{}", self.damage.len(), found.join("\n"));
        let highest = self.highest;
        assert!(highest >= acknowledged, "block {acknowledged} was acknowledged, the last is {highest}");
    }
}

/// Looks at every byte of a disk image, as [`Disk`](crate::disk::Disk) has written it.
///
/// Errors: it cannot be read, or has no room for a block.
pub fn audit(image: &Path) -> io::Result<Audit> {
    let mut file = File::open(image)?;
    let slots = file.seek(SeekFrom::End(0))? / BLOCK_BYTES as u64;
    if slots == 0 {
        return Err(io::Error::other(format!("{} has no room for a block", image.display())));
    }
    file.rewind()?;
    let mut found = Vec::new();
    let mut bytes = [0; BLOCK_BYTES];
    for _ in 0..slots {
        file.read_exact(&mut bytes)?;
        found.push(decode(&bytes));
    }
    Ok(judge(&found))
}

/// The latest block up to `highest` that belongs into `slot`.
fn expected_in(slot: u64, slots: u64, highest: u64) -> Option<u64> {
    let back = (highest % slots + slots - slot) % slots;
    highest.checked_sub(back).filter(|sequence| *sequence > 0)
}

fn judge(found: &[Slot]) -> Audit {
    let slots = found.len() as u64;
    let in_place = (0..).zip(found).filter_map(|(slot, found)| match found {
        Slot::Written(entry) if entry.sequence % slots == slot => Some(entry.sequence),
        _ => None,
    });
    let highest = in_place.max().unwrap_or(0);
    let wrong = (0..).zip(found).filter_map(|(slot, found)| {
        let expected = expected_in(slot, slots, highest);
        match (*found, expected) {
            (Slot::Empty, None) => None,
            (Slot::Empty, Some(expected)) => Some(Damage::Lost { slot, expected }),
            (Slot::Torn { sequence, offset }, _) => Some(Damage::Torn { slot, sequence, offset }),
            (Slot::Written(Entry { sequence, .. }), Some(expected)) if sequence == expected => None,
            (Slot::Written(Entry { sequence: found, .. }), Some(expected)) if found % slots == slot => {
                Some(Damage::Stale { slot, expected, found })
            }
            (Slot::Written(Entry { sequence: found, .. }), _) => Some(Damage::Doubled { slot, found }),
        }
    });
    let damage = wrong.chain(out_of_time(found)).collect();
    Audit { slots, highest, damage }
}

/// Blocks that are older than those before them.
fn out_of_time(found: &[Slot]) -> Vec<Damage> {
    let mut written: Vec<Entry> = found.iter().filter_map(written).collect();
    written.sort_unstable_by_key(|entry| entry.sequence);
    let pairs = written.windows(2).filter(|pair| pair[1].boot_ns < pair[0].boot_ns);
    pairs.map(|pair| Damage::OutOfTime { sequence: pair[1].sequence }).collect()
}

fn written(slot: &Slot) -> Option<Entry> {
    match slot {
        Slot::Written(entry) => Some(*entry),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Block;

    const SLOTS: usize = 8;

    fn block(sequence: u64) -> Block {
        Entry { sequence, boot_ns: 1000 + sequence }.encode()
    }

    /// A disk of eight slots and a bit, with blocks 1 to `highest` written.
    fn disk(highest: u64) -> Vec<u8> {
        let mut image = vec![0; SLOTS * BLOCK_BYTES + 100];
        (1..=highest).for_each(|sequence| put(&mut image, sequence as usize % SLOTS, &block(sequence)));
        image
    }

    fn put(image: &mut [u8], slot: usize, block: &Block) {
        image[slot * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(&block.0);
    }

    fn audited(name: &str, image: &[u8]) -> Audit {
        let path = std::env::temp_dir().join(format!("postcopy-guest-{name}-{}", std::process::id()));
        std::fs::write(&path, image).unwrap();
        let result = audit(&path);
        std::fs::remove_file(&path).unwrap();
        result.unwrap()
    }

    #[test]
    fn a_whole_journal_has_no_damage_at_any_length() {
        for highest in 0..40 {
            let audit = audited("whole", &disk(highest));
            assert_eq!(audit, Audit { slots: SLOTS as u64, highest, damage: Vec::new() });
            audit.assert_holds(highest);
        }
    }

    #[test]
    #[should_panic(expected = "block 21 was acknowledged, the last is 20")]
    fn a_journal_that_ends_before_what_was_acknowledged() {
        audited("short", &disk(20)).assert_holds(21);
    }

    #[test]
    #[should_panic(expected = "slot 3 is empty in place of block 19")]
    fn damage_is_told_in_words() {
        let mut image = disk(20);
        put(&mut image, 3, &Block([0; BLOCK_BYTES]));
        audited("words", &image).assert_holds(20);
    }

    #[test]
    fn a_lost_block_is_found() {
        let mut image = disk(20);
        put(&mut image, 18 % SLOTS, &Block([0; BLOCK_BYTES]));
        assert_eq!(audited("lost", &image).damage, [Damage::Lost { slot: 2, expected: 18 }]);
    }

    #[test]
    fn a_block_that_was_never_replaced_is_found() {
        let mut image = disk(20);
        put(&mut image, 18 % SLOTS, &block(10));
        assert_eq!(audited("stale", &image).damage, [Damage::Stale { slot: 2, expected: 18, found: 10 }]);
    }

    #[test]
    fn a_block_in_a_second_place_is_found() {
        let mut image = disk(20);
        put(&mut image, 5, &block(20));
        assert_eq!(audited("doubled", &image).damage, [Damage::Doubled { slot: 5, found: 20 }]);
        let mut image = disk(3);
        put(&mut image, 6, &block(2));
        assert_eq!(audited("early", &image).damage, [Damage::Doubled { slot: 6, found: 2 }]);
        // One from a future that no slot knows of belongs nowhere, either.
        put(&mut image, 6, &block(99));
        assert_eq!(audited("future", &image).damage, [Damage::Doubled { slot: 6, found: 99 }]);
    }

    #[test]
    fn a_torn_block_is_found_wherever_the_tear_is() {
        for cut in (512..BLOCK_BYTES).step_by(512) {
            let mut image = disk(20);
            let from = 4 * BLOCK_BYTES;
            image[from + cut..][..BLOCK_BYTES - cut].copy_from_slice(&block(12).0[cut..]);
            let audit = audited("torn", &image);
            let torn = Damage::Torn { slot: 4, sequence: 20, offset: cut };
            assert_eq!((audit.highest, &audit.damage[..]), (19, &[torn][..]), "{cut}");
        }
    }

    #[test]
    fn one_changed_bit_is_found() {
        let mut image = disk(20);
        image[6 * BLOCK_BYTES + 4095] ^= 0x80;
        let damage = audited("bit", &image).damage;
        assert_eq!(damage, [Damage::Torn { slot: 6, sequence: 14, offset: 4095 }]);
    }

    #[test]
    fn a_second_writer_is_found_by_its_time() {
        let mut image = disk(20);
        put(&mut image, 3, &Entry { sequence: 19, boot_ns: 5 }.encode());
        assert_eq!(audited("writers", &image).damage, [Damage::OutOfTime { sequence: 19 }]);
    }
}
