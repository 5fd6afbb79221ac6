//! What a QEMU's RAM is made of: one backend, or one for each of its NUMA nodes; and which file is whose.

use std::path::Path;

use postcopy_engine::memory::MAX_REGIONS;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::QemuError;
use super::facts::text;
use super::qmp::Qmp;

/// A part of a guest's RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// What it is called.
    pub id: String,
    /// Its size.
    pub bytes: u64,
    /// Its file, or the folder of that, where it is one with a name. Each side has one of its own.
    #[serde(skip)]
    pub path: Option<String>,
}

impl Backend {
    /// Whether two guests' RAM is made of the same: names and sizes, and whatever files.
    pub(super) fn are_alike(one: &[Self], other: &[Self]) -> bool {
        let alike = |(one, other): (&Self, &Self)| (&one.id, one.bytes) == (&other.id, other.bytes);
        one.len() == other.len() && one.iter().zip(other).all(alike)
    }

    /// Whether its file may have this name, as the kernel tells that.
    fn is_called(&self, name: &str) -> bool {
        let Some(path) = &self.path else { return false };
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        let in_folder = |folder: &str| {
            // As QEMU names a file that it makes in a folder: by the name of its memory, and something of its own.
            let rest = name.strip_prefix(folder)?.trim_start_matches('/').strip_prefix("qemu_back_mem.")?;
            let (memory, _) = rest.rsplit_once('.')?;
            Some(memory.strip_prefix("_objects_").unwrap_or(memory) == self.id)
        };
        let is_at = |path: &Path| {
            let by_itself =
                if path.is_absolute() { Path::new(name) == path } else { Path::new(name).ends_with(path) };
            by_itself || path.to_str().and_then(in_folder).unwrap_or(false)
        };
        let path = Path::new(path);
        is_at(path) || path.canonicalize().is_ok_and(|path| is_at(&path))
    }

    /// Which of these files is its own, of which is told how long each is mapped and what it is called: the only one of its size,
    /// or of several the one with its name.
    ///
    /// Errors: there is none, or it cannot be told which it is.
    pub(super) fn pick(&self, files: &[(u64, &str)]) -> Result<usize, QemuError> {
        let mut ours: Vec<usize> = (0..files.len()).filter(|at| files[*at].0 == self.bytes).collect();
        if ours.len() > 1 {
            ours.retain(|at| self.is_called(files[*at].1));
        }
        let Self { id, bytes, .. } = self;
        match ours[..] {
            [one] => Ok(one),
            [] => Err(QemuError::Unfit(format!(
                "no shared mapping of QEMU's can be told to be its RAM ({id}, {bytes} bytes): that must be a file on tmpfs \
                 (/dev/shm), not on a disk or of huge pages, and of several of one size each must have a mem-path"
            ))),
            _ => Err(QemuError::Unfit(format!("QEMU has mapped several files that may be its RAM ({id})"))),
        }
    }
}

/// Backends and their sizes in words.
pub(super) fn named(backends: &[Backend]) -> String {
    let size = |bytes: u64| match bytes.is_multiple_of(1 << 20) {
        true => format!("{} MiB", bytes >> 20),
        false => format!("{bytes} bytes"),
    };
    let named = |Backend { id, bytes, .. }: &Backend| format!("{id} ({})", size(*bytes));
    backends.iter().map(named).collect::<Vec<_>>().join(", ")
}

const REMEDY: &str = "start it with -object memory-backend-file,id=ram0,mem-path=/dev/shm/NAME,share=on,size=SIZE \
                      -machine memory-backend=ram0";

/// What the guest's RAM is made of: each part must be a shared file.
pub(super) fn all(qmp: &mut Qmp, version: [u32; 3]) -> Result<Vec<Backend>, QemuError> {
    let unfit = |text: String| Err(QemuError::Unfit(text));
    let size = qmp.execute("query-memory-size-summary", &json!({}))?;
    let bytes = size["base-memory"].as_u64().unwrap_or_default();
    if size["plugged-memory"].as_u64().unwrap_or_default() > 0 {
        return unfit("it has memory that was plugged in; unplug it first".into());
    }
    let listed = qmp.execute("query-memdev", &json!({}))?;
    let listed = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    let each = |name: &str| listed.iter().filter_map(|each| each[name].as_u64()).sum::<u64>();
    match listed.len() {
        0 => return unfit(format!("its RAM is no file that others can map; {REMEDY}")),
        1..=MAX_REGIONS if each("size") == bytes => {}
        1..=MAX_REGIONS => return unfit(format!("its backends are more or less than its RAM; {REMEDY}")),
        _ => return unfit(format!("its RAM is in more than {MAX_REGIONS} backends; {REMEDY}")),
    }
    let mut all = listed.iter().map(|each| one(qmp, each, version)).collect::<Result<Vec<_>, _>>()?;
    all.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(all)
}

/// A backend as `query-memdev` lists it.
fn one(qmp: &mut Qmp, listed: &Value, version: [u32; 3]) -> Result<Backend, QemuError> {
    let id = listed["id"].as_str().unwrap_or_default();
    let unfit = |text: String| Err(QemuError::Unfit(format!("its RAM ({id}) {text}; {REMEDY}")));
    if listed["share"] != true {
        return unfit("is not shared".into());
    }
    let object = format!("/objects/{id}");
    let path = match text(qmp, &object, "type")?.as_str() {
        "memory-backend-file" => Some(text(qmp, &object, "mem-path")?),
        "memory-backend-memfd" if (version[0], version[1]) < (8, 1) => None,
        "memory-backend-memfd" => {
            let why = "is a memfd, which QEMU from 8.1 on copies by itself whatever it is told (x-ignore-shared is for named \
                       files)";
            return unfit(why.into());
        }
        other => return unfit(format!("is a {other}")),
    };
    Ok(Backend { id: id.to_owned(), bytes: listed["size"].as_u64().unwrap_or_default(), path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram0(bytes: u64) -> Backend {
        Backend { id: "ram0".into(), bytes, path: None }
    }

    #[test]
    fn a_file_is_known_by_its_name() {
        let called = |path: &str, name: &str| Backend { path: Some(path.into()), ..ram0(1) }.is_called(name);
        for (path, name) in [
            ("/dev/shm/a b", "/dev/shm/a b"),
            ("/dev/shm/a", "/dev/shm/a (deleted)"),
            ("shm/a", "/dev/shm/a"),
            ("/dev/shm", "/dev/shm/qemu_back_mem.ram0.Ab12Cd (deleted)"),
            ("/dev/shm/", "/dev/shm/qemu_back_mem._objects_ram0.Ab12Cd"),
            ("/proc/self/../../dev/shm/", "/dev/shm/qemu_back_mem.ram0.Ab12Cd"),
        ] {
            assert!(called(path, name), "{path} {name}");
        }
        for (path, name) in [
            ("/dev/shm/a", "/dev/shm/ab"),
            ("/dev/shm", "/dev/shm/qemu_back_mem.ram01.Ab12Cd"),
            ("/dev/shm", "/dev/shm/qemu_back_mem.a_ram0.Ab12Cd"),
            ("/dev/shm", "/dev/shm/ram0"),
            ("/x", "/memfd:memory-backend-memfd (deleted)"),
        ] {
            assert!(!called(path, name), "{path} {name}");
        }
    }

    #[test]
    fn a_file_is_picked_by_size_or_else_by_name() {
        let files = [(1, "/dev/shm/a"), (2, "/dev/shm/b"), (1, "/dev/shm/c")];
        let pick =
            |backend: Backend| backend.pick(&files).map(|at| files[at].1).map_err(|error| error.to_string());
        assert_eq!(pick(ram0(2)), Ok("/dev/shm/b"));
        assert_eq!(pick(Backend { path: Some("/dev/shm/c".into()), ..ram0(1) }), Ok("/dev/shm/c"));
        assert!(pick(ram0(1)).unwrap_err().contains("each must have a mem-path"));
        assert!(pick(ram0(3)).unwrap_err().contains("tmpfs"));
    }
}
