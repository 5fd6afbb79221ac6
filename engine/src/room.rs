//! How much memory there is room for. A guest that runs out of it after its handover waits, or is killed, so
//! that is asked before anything stops.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use postcopy_transport::HostMemory;

/// Where cgroups of version 2 are, as every distribution mounts them.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Bytes of memory and swap that this process may still use: what the machine has left, and what the cgroups that it is in
/// (version 2) leave it. `None`: the system does not tell.
pub fn of_machine() -> Option<u64> {
    let meminfo = read_to_string("/proc/meminfo").ok()?;
    let (memory, swap) =
        (of_meminfo(&meminfo, "MemAvailable:")?, of_meminfo(&meminfo, "SwapFree:").unwrap_or(0));
    let cgroup = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let folder = folder_of(&cgroup).unwrap_or_default();
    let cgroups = folder.ancestors().filter(|folder| folder.starts_with(CGROUPS));
    Some(cgroups.filter_map(|folder| of_cgroup(folder, swap)).fold(memory + swap, u64::min))
}

/// A file system with too little room for those of the memory's files that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lacking {
    /// Bytes that they need.
    pub(crate) needed: u64,
    /// Bytes that there is room for.
    pub(crate) room: u64,
}

/// The first file system that has too little room for its files of `memory`, what they have already included. A file without
/// a limit of its own (memfd_create(2)) lacks none, nor one of which the system does not tell.
pub(crate) fn lacking(memory: &HostMemory) -> Option<Lacking> {
    let mut systems: Vec<(u64, Lacking)> = Vec::new();
    for (file, needed) in memory.files() {
        let (Ok(found), Ok(system)) = (rustix::fs::fstat(file), rustix::fs::fstatfs(file)) else { continue };
        let own = u64::try_from(found.st_blocks).unwrap_or_default() * 512;
        if system.f_blocks == 0 {
            continue;
        }
        match systems.iter_mut().find(|(device, _)| *device == found.st_dev) {
            Some((_, lacking)) => {
                lacking.needed += needed;
                lacking.room += own;
            }
            None => {
                let left = system.f_bavail.saturating_mul(u64::try_from(system.f_bsize).unwrap_or_default());
                systems.push((found.st_dev, Lacking { needed, room: left.saturating_add(own) }));
            }
        }
    }
    systems.into_iter().map(|(_, lacking)| lacking).find(|lacking| lacking.room < lacking.needed)
}

/// Bytes that a line of /proc/meminfo says.
fn of_meminfo(text: &str, name: &str) -> Option<u64> {
    Some(kib(text.lines().find_map(|line| line.strip_prefix(name))?)? << 10)
}

fn kib(field: &str) -> Option<u64> {
    field.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// The folder of a process's cgroup, by its /proc/PID/cgroup.
fn folder_of(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(CGROUPS).join(path))
}

/// What a cgroup has left: its limit without what it uses, but for files that it can forget, and of `swap` what it may
/// have. `None`: no limit.
fn of_cgroup(folder: &Path, swap: u64) -> Option<u64> {
    let number = |name| read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (number("memory.max")?, number("memory.current")?);
    let allowed = number("memory.swap.max").zip(number("memory.swap.current"));
    let swap = allowed.map_or(swap, |(limit, used)| limit.saturating_sub(used).min(swap));
    let text = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    Some(limit.saturating_sub(used.saturating_sub(files(&text))) + swap)
}

/// Bytes of files in memory, as memory.stat has them.
fn files(text: &str) -> u64 {
    let of = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        ["active_file", "inactive_file"].contains(&name).then(|| value.parse::<u64>().ok()).flatten()
    };
    text.lines().filter_map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says_is_read() {
        let meminfo =
            "MemTotal:        8000 kB\nMemFree:  10 kB\nMemAvailable:    5000 kB\nSwapFree:   100 kB\n";
        assert_eq!(of_meminfo(meminfo, "MemAvailable:"), Some(5000 << 10));
        assert_eq!(of_meminfo(meminfo, "SwapFree:"), Some(100 << 10));
        assert_eq!(of_meminfo("MemTotal: 8000 kB\n", "MemAvailable:"), None);
        assert_eq!(folder_of("1:cpu:/x\n0::/a/b\n"), Some(PathBuf::from("/sys/fs/cgroup/a/b")));
        assert_eq!(folder_of("0::/\n"), Some(PathBuf::from("/sys/fs/cgroup/")));
        assert_eq!(folder_of("7:memory:/a\n"), None);
        assert_eq!(files("anon 5\ninactive_file 7\nactive_file 8\nfile 100\n"), 15);
        let room = of_machine().expect("Linux tells");
        assert!(room > 16 << 20, "{room}");
    }

    #[test]
    fn a_cgroup_with_a_limit_leaves_what_it_does_not_use() {
        let folder = std::env::temp_dir().join(format!("postcopy-cgroup-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name, text: &str| std::fs::write(folder.join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "1000\n");
        assert_eq!(of_cgroup(&folder, 0), None, "no limit");
        write("memory.max", "5000\n");
        write("memory.stat", "anon 500\ninactive_file 300\nactive_file 200\n");
        assert_eq!([0, 30].map(|swap| of_cgroup(&folder, swap)), [Some(4500), Some(4530)]);
        write("memory.swap.max", "70\n");
        write("memory.swap.current", "20\n");
        assert_eq!([30, 90].map(|swap| of_cgroup(&folder, swap)), [Some(4530), Some(4550)]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_memfd_has_no_limit_of_its_own() {
        let memory = HostMemory::anonymous("room", 4096).unwrap();
        assert_eq!(lacking(&memory), None);
    }
}
