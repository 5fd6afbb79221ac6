//! Huge pages that are the system's to give, for a guest's RAM.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Scratch;
use crate::system::succeed;

/// A file system of reserved huge pages. Unmounted, and the pages given back, when dropped, once nobody uses it.
pub struct HugePages {
    folder: PathBuf,
    setting: PathBuf,
    before: u64,
}

impl HugePages {
    /// So many MiB in pages of so many, besides those that are reserved already; `None` if the system has not so many.
    pub fn reserve(scratch: &Scratch, page_mib: u64, mib: u64) -> Option<Self> {
        let kib = page_mib << 10;
        let setting = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"));
        let reserved = || std::fs::read_to_string(&setting).ok()?.trim().parse::<u64>().ok();
        let before = reserved()?;
        let wanted = before + mib.div_ceil(page_mib);
        std::fs::write(&setting, wanted.to_string()).ok()?;
        if reserved()? < wanted {
            std::fs::write(&setting, before.to_string()).unwrap();
            return None;
        }
        let folder = scratch.file(&format!("huge-{page_mib}"));
        std::fs::create_dir(&folder).unwrap();
        let option = format!("pagesize={page_mib}M");
        succeed(Command::new("mount").args(["-t", "hugetlbfs", "-o", &option, "none"]).arg(&folder));
        Some(Self { folder, setting, before })
    }

    /// Where files are of them.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
        let _ = std::fs::write(&self.setting, self.before.to_string());
    }
}
