//! Writes a journal to a raw disk until it is told to end: one block at a time, each acknowledged by
//! the disk before the next.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::Serialize;

use crate::clocks::boottime_ns;
use crate::console::BadLines;
use crate::journal::{BLOCK_BYTES, Entry};

/// How long a disk may take to appear: its driver has just been loaded.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long before a write that failed is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// A write that the disk refused.
#[derive(Serialize)]
struct Refused {
    disk_sequence: u64,
    error: String,
}

/// A journal and its writer.
#[derive(Debug)]
pub struct Disk {
    file: File,
    slots: u64,
    acknowledged: AtomicU64,
    bad: BadLines,
    /// Set at the end; held while a block is written.
    ended: Mutex<bool>,
}

impl Disk {
    /// Opens a disk or file for direct, durable writes of whole blocks.
    ///
    /// Errors: it does not appear, cannot be opened so, or is smaller than a block.
    pub fn open(path: &Path) -> io::Result<Self> {
        let begin = Instant::now();
        while !path.exists() && begin.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        let flags = OFlags::DIRECT | OFlags::DSYNC;
        let refused = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(refused)?;
        let slots = file.seek(SeekFrom::End(0))? / BLOCK_BYTES as u64;
        match slots {
            0 => Err(refused(io::Error::other("no room for a block"))),
            _ => Ok(Self::new(file, slots)),
        }
    }

    fn new(file: File, slots: u64) -> Self {
        let (acknowledged, bad) = (AtomicU64::new(0), BadLines::default());
        Self { file, slots, acknowledged, bad, ended: Mutex::new(false) }
    }

    /// Starts to write until the end, with a pause after each block.
    pub fn start(self, pace: Duration) -> Arc<Self> {
        let disk = Arc::new(self);
        let writer = disk.clone();
        std::thread::spawn(move || {
            while let Some(result) = writer.append() {
                std::thread::sleep(if result { pace } else { RETRY });
            }
        });
        disk
    }

    /// The last block that the disk has acknowledged; 0 before the first.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// Ends the writing: on return, no block is on its way.
    pub fn end(&self) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Writes the next block, unless this is over; false if the disk did not take it.
    fn append(&self) -> Option<bool> {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if *ended {
            return None;
        }
        let entry = Entry { sequence: self.acknowledged() + 1, boot_ns: boottime_ns() };
        let at = entry.sequence % self.slots * BLOCK_BYTES as u64;
        let result = self.file.write_all_at(&entry.encode().0, at);
        match &result {
            Ok(()) => self.acknowledged.store(entry.sequence, Ordering::Release),
            Err(error) => self.bad.say(&Refused { disk_sequence: entry.sequence, error: error.to_string() }),
        }
        Some(result.is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Slot, decode};

    #[test]
    fn each_block_goes_to_its_slot_and_is_counted_once_it_is_there() {
        let path = std::env::temp_dir().join(format!("postcopy-guest-disk-{}", std::process::id()));
        let image = File::create(&path).unwrap();
        image.set_len(3 * BLOCK_BYTES as u64 + 100).unwrap();
        // Without O_DIRECT, which not every file system has.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let disk = Disk::new(file, 3);
        assert!((0..5).all(|_| disk.append() == Some(true)));
        disk.end();
        assert_eq!(disk.append(), None);
        assert_eq!(disk.acknowledged(), 5);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let held = |slot: usize| match decode(bytes[slot * BLOCK_BYTES..][..BLOCK_BYTES].try_into().unwrap())
        {
            Slot::Written(entry) => entry.sequence,
            other => panic!("slot {slot}: {other:?}"),
        };
        assert_eq!([held(0), held(1), held(2)], [3, 4, 5]);
    }

    #[test]
    fn a_disk_without_room_is_refused() {
        let path = std::env::temp_dir().join(format!("postcopy-guest-small-{}", std::process::id()));
        std::fs::write(&path, [0; 100]).unwrap();
        let refused = Disk::open(&path).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(refused.contains("postcopy-guest-small"), "{refused}");
    }
}
