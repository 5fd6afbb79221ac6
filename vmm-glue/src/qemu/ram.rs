//! The RAM file of a QEMU that runs, found from outside: nothing is preloaded, nothing patched.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use postcopy_engine::proc_pages::is_trapped;

use super::QemuError;

/// A file that a process has mapped shared and writable.
#[derive(Debug, PartialEq, Eq)]
struct Mapped {
    /// Major and minor number, inode.
    file: (u32, u32, u64),
    /// Address of the mapping.
    start: u64,
    bytes: u64,
    name: String,
}

/// Opens the file of exactly `bytes` that process `pid` has mapped as its guest's RAM.
///
/// Errors: there is none, or several, or not all of it has arrived there, or this process may not look into that
/// one.
pub(super) fn open(pid: i32, bytes: u64) -> Result<File, QemuError> {
    for each in mappings(pid, bytes)? {
        let trapped = is_trapped(pid, each.start..each.start + each.bytes);
        if trapped.map_err(looking(pid, "its mappings"))? {
            return Err(QemuError::Unfit(format!(
                "the memory of process {pid} has not all arrived there yet: wait until its move is over"
            )));
        }
    }
    let mut found = mappings(pid, bytes)?;
    found.dedup_by(|one, other| one.file == other.file);
    file_of(pid, only(pid, bytes, &found)?)
}

/// Opens the file that process `pid` has mapped at `base`. Where its memory still arrives the kernel tells of the mapping in pieces,
/// as it is trapped.
pub(super) fn open_at(pid: i32, base: u64) -> Result<File, QemuError> {
    let there = all_mappings(pid)?.into_iter().find(|each| each.start == base);
    let none = || QemuError::Unfit(format!("process {pid} has no shared mapping at {base:#x} any more"));
    file_of(pid, &there.ok_or_else(none)?)
}

fn file_of(pid: i32, wanted: &Mapped) -> Result<File, QemuError> {
    let look = |what: &str| looking(pid, what);
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(look("its files"))?.flatten() {
        let Ok(metadata) = std::fs::metadata(entry.path()) else { continue };
        let device = metadata.dev();
        let file = (rustix::fs::major(device), rustix::fs::minor(device), metadata.ino());
        if file == wanted.file {
            return File::options().read(true).write(true).open(entry.path()).map_err(look("its RAM"));
        }
    }
    Err(QemuError::Unfit(format!("process {pid} has closed the file of its RAM ({})", wanted.name)))
}

/// Where process `pid` has its one mapping of so many bytes of its guest's RAM.
///
/// Errors: it has none or several, or is gone.
pub(super) fn address(pid: i32, bytes: u64) -> Result<u64, QemuError> {
    Ok(only(pid, bytes, &mappings(pid, bytes)?)?.start)
}

pub(super) fn looking(pid: i32, what: &str) -> impl FnOnce(std::io::Error) -> QemuError + use<> {
    QemuError::system(format!("looking into QEMU's process {pid} ({what}; run as the same user, or as root)"))
}

fn mappings(pid: i32, bytes: u64) -> Result<Vec<Mapped>, QemuError> {
    Ok(all_mappings(pid)?.into_iter().filter(|each| each.bytes == bytes).collect())
}

fn all_mappings(pid: i32) -> Result<Vec<Mapped>, QemuError> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(looking(pid, "its mappings"))?;
    Ok(maps.lines().filter_map(mapped).collect())
}

fn only(pid: i32, bytes: u64, found: &[Mapped]) -> Result<&Mapped, QemuError> {
    let many = match found {
        [one] => return Ok(one),
        [] => "no shared mapping",
        _ => "several shared mappings",
    };
    Err(QemuError::Unfit(format!("process {pid} has {many} of {bytes} bytes")))
}

/// A line of /proc/PID/maps, if it is a shared writable mapping of a file.
fn mapped(line: &str) -> Option<Mapped> {
    let mut words = line.split_whitespace();
    let (range, protection, _offset) = (words.next()?, words.next()?, words.next()?);
    let (device, inode) = (words.next()?, words.next()?.parse().ok()?);
    if !protection.starts_with("rw") || !protection.ends_with('s') || inode == 0 {
        return None;
    }
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = range.split_once('-')?;
    let (major, minor) = device.split_once(':')?;
    let file = (hex(major)? as u32, hex(minor)? as u32, inode);
    let name = words.next().unwrap_or("without a name").to_owned();
    let (start, end) = (hex(start)?, hex(end)?);
    Some(Mapped { file, start, bytes: end.checked_sub(start)?, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_mappings_of_files_count() {
        let ram = "7f0000000000-7f0010000000 rw-s 00000000 00:01 77 /memfd:memory-backend-memfd (deleted)";
        let found = mapped(ram).unwrap();
        assert_eq!((found.file, found.bytes), ((0, 1, 77), 256 << 20));
        for other in [
            "7f0000000000-7f0010000000 rw-p 00000000 00:00 0",
            "7f0000000000-7f0010000000 r--s 00000000 00:01 77 /memfd:x",
            "7f0000000000-7f0010000000 rw-s 00000000 00:00 0",
            "nonsense",
            "",
        ] {
            assert_eq!(mapped(other), None, "{other}");
        }
    }

    #[test]
    fn the_file_of_a_mapping_of_this_process_is_found() {
        // A size that no other mapping has.
        let layout = crate::qemu::host::layout(13 << 12).unwrap();
        let memory = postcopy_engine::memory::GuestMemory::new(layout).unwrap();
        let file = open(std::process::id() as i32, 13 << 12).unwrap();
        assert!(memory.guest().write(4096, b"here"));
        let mut seen = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4096).unwrap();
        assert_eq!(&seen, b"here");
        // Of memory that still arrives another mapping would show zeros.
        let shards = postcopy_engine::pager::Shards::ONE;
        let told = postcopy_engine::pager::FaultsTo::Pager;
        let trap = postcopy_engine::pager::Trap::register(&memory, told, shards).unwrap();
        let refused = open(std::process::id() as i32, 13 << 12).unwrap_err().to_string();
        assert!(refused.contains("has not all arrived"), "{refused}");
        drop(trap);
        open(std::process::id() as i32, 13 << 12).unwrap();
    }
}
