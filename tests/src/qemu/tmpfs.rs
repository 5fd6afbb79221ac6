//! A small file system in memory, in which a guest's RAM may have too little room.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;

use crate::Scratch;
use crate::system::succeed;

/// See the module. Unmounted when dropped, once nobody uses it.
pub struct Tmpfs {
    folder: PathBuf,
}

impl Tmpfs {
    /// One of so many MiB.
    pub fn new(scratch: &Scratch, mib: u64) -> Self {
        let folder = scratch.file("small");
        std::fs::create_dir(&folder).unwrap();
        succeed(
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={mib}M"), "none"]).arg(&folder),
        );
        Self { folder }
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Has another file take all that is free.
    pub fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        let filled = std::io::copy(&mut std::io::repeat(1), &mut file);
        assert_eq!(filled.unwrap_err().kind(), ErrorKind::StorageFull);
    }

    /// Takes that file away.
    pub fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.file("another file")
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}
