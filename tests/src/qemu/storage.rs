//! Storage that two QEMU processes share: files with direct writes and locks, as on a host's disk.
//!
//! Where temporary files are on a tmpfs, which has no direct writes (before Linux 6.6), it is an
//! ext4 file system in a RAM disk.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::OFlags;

use crate::Scratch;
use crate::system::{load_module, succeed};

const RAM_DISK: &str = "/dev/ram0";
const RAM_DISK_KIB: u32 = 64 << 10;

/// See the module.
pub struct Storage {
    folder: PathBuf,
    is_mounted: bool,
}

impl Storage {
    /// Storage below `scratch`.
    pub fn new(scratch: &Scratch) -> Self {
        let folder = scratch.file("storage");
        std::fs::create_dir(&folder).unwrap();
        let is_mounted = !takes_direct_writes(&folder);
        if is_mounted {
            load_module("ext4", &[]);
            load_module("brd", &["rd_nr=1", &format!("rd_size={RAM_DISK_KIB}")]);
            succeed(Command::new("mkfs.ext4").args(["-q", "-F", RAM_DISK]));
            succeed(Command::new("mount").args(["-t", "ext4", RAM_DISK]).arg(&folder));
        }
        Self { folder, is_mounted }
    }

    /// A disk of zeros.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.folder.join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if self.is_mounted {
            let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
        }
    }
}

fn takes_direct_writes(folder: &Path) -> bool {
    let path = folder.join("direct");
    let flags = OFlags::DIRECT.bits().cast_signed();
    let opened = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(&path);
    let _ = std::fs::remove_file(&path);
    opened.is_ok()
}
