//! The files of a running QEMU's RAM, found from outside: nothing is preloaded, nothing patched.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use postcopy_engine::places::Places;
use postcopy_engine::proc_pages::is_trapped;

use super::QemuError;
use super::backend::Backend;

/// A file that a process has mapped shared and writable.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapped {
    /// Major and minor number, inode.
    file: (u32, u32, u64),
    /// Address of the mapping.
    start: u64,
    bytes: u64,
    name: String,
}

/// Opens the files of all `backends` that process `pid` has mapped as its guest's RAM, and how long each is.
///
/// Errors: one is not there or cannot be told from others, or not all of it has arrived there, or this process may not look
/// into that one.
pub(super) fn open(pid: i32, backends: &[Backend]) -> Result<Vec<(File, u64)>, QemuError> {
    let there = all_mappings(pid)?;
    // Where its memory arrives, the kernel tells of the mappings in pieces.
    let first = there.iter().map(|each| each.start).min();
    let end = there.iter().map(|each| each.start + each.bytes).max();
    if is_trapped(pid, first.unwrap_or(0)..end.unwrap_or(0)).map_err(looking(pid, "its mappings"))? {
        return Err(QemuError::Unfit(format!(
            "the memory of process {pid} has not all arrived there yet: wait until its move is over"
        )));
    }
    let ram = each_once(there, backends)?;
    ram.into_iter().map(|mapped| Ok((file_of(pid, &mapped)?, mapped.bytes))).collect()
}

/// The mapping of each backend, the first where its file is mapped more than once.
fn each_once(mut there: Vec<Mapped>, backends: &[Backend]) -> Result<Vec<Mapped>, QemuError> {
    let mut files = Vec::new();
    there.retain(|each| {
        let first = !files.contains(&each.file);
        files.push(each.file);
        first
    });
    let told: Vec<_> = there.iter().map(|mapped| (mapped.bytes, mapped.name.as_str())).collect();
    let ram = backends.iter().map(|backend| Ok(there[backend.pick(&told)?].clone()));
    let ram = ram.collect::<Result<Vec<_>, QemuError>>()?;
    let twice = ram.iter().enumerate().any(|(at, one)| ram[..at].iter().any(|other| other.file == one.file));
    if twice {
        return Err(QemuError::Unfit("several backends of its RAM have the same file".into()));
    }
    Ok(ram)
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

/// Where process `pid` has its mappings of these backends.
///
/// Errors: it has none of one, or several, or is gone.
pub(super) fn places(pid: i32, backends: &[Backend]) -> Result<Places, QemuError> {
    let there = all_mappings(pid)?;
    let ram = each_once(there.clone(), backends)?;
    let others = |one: &Mapped| there.iter().any(|other| other.file == one.file && other.start != one.start);
    if let Some(twice) = ram.iter().find(|one| others(one)) {
        return Err(QemuError::Unfit(format!(
            "process {pid} has mapped its RAM ({}) more than once",
            twice.name
        )));
    }
    let places = Places::new(ram.into_iter().map(|one| (one.start, one.bytes)));
    places.map_err(|error| QemuError::Unfit(error.to_string()))
}

pub(super) fn looking(pid: i32, what: &str) -> impl FnOnce(std::io::Error) -> QemuError + use<> {
    QemuError::system(format!("looking into QEMU's process {pid} ({what}; run as the same user, or as root)"))
}

fn all_mappings(pid: i32) -> Result<Vec<Mapped>, QemuError> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(looking(pid, "its mappings"))?;
    Ok(maps.lines().filter_map(mapped).collect())
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
    // It may have spaces.
    let name = line.splitn(6, ' ').nth(5).map(str::trim_start).filter(|name| !name.is_empty());
    let name = name.unwrap_or("without a name").to_owned();
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
        assert_eq!(found.name, "/memfd:memory-backend-memfd (deleted)");
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
        let ram = [Backend { id: "ram0".into(), bytes: 13 << 12, path: None }];
        let this = std::process::id() as i32;
        let [(file, _)] = <[_; 1]>::try_from(open(this, &ram).unwrap()).unwrap();
        assert!(memory.guest().write(4096, b"here"));
        let mut seen = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4096).unwrap();
        assert_eq!(&seen, b"here");
        // Of memory that still arrives another mapping would show zeros.
        let shards = postcopy_engine::pager::Shards::ONE;
        let told = postcopy_engine::pager::FaultsTo::Pager;
        let trap = postcopy_engine::pager::Trap::register(&memory, told, shards).unwrap();
        let refused = open(this, &ram).unwrap_err().to_string();
        assert!(refused.contains("has not all arrived"), "{refused}");
        drop(trap);
        open(this, &ram).unwrap();
    }
}
