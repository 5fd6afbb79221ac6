//! The pager's side of the handover from `libpostcopy_handover.so`.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use postcopy_engine::pager::MAX_SHARDS;
use postcopy_engine::places::Places;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

use super::QemuError;
use super::backend::Backend;

/// The longest layout that is read.
const LONGEST: usize = 4096;

/// A mapping in another process, and the descriptors that trap its faults.
pub(super) struct Handover {
    /// One for each shard.
    pub(super) userfaultfds: Vec<OwnedFd>,
    /// Their numbers there.
    pub(super) numbers: Vec<i32>,
    pub(super) file: File,
    /// Empty, for what is known of the pages: it is held open there.
    pub(super) ledger: File,
    /// Address there.
    pub(super) base: u64,
    pub(super) bytes: u64,
}

/// All of a guest's RAM.
pub(super) struct HandedOver {
    /// One for each shard.
    pub(super) userfaultfds: Vec<OwnedFd>,
    /// Their numbers there.
    pub(super) numbers: Vec<i32>,
    /// Empty, for what is known of the pages: it is held open there.
    pub(super) ledger: File,
    /// In the order of the backends, and how long each is.
    pub(super) files: Vec<(File, u64)>,
    /// Where they are mapped there.
    pub(super) places: Places,
}

impl HandedOver {
    /// That of these backends, of all that a QEMU has handed over.
    ///
    /// Errors: one is missing, or cannot be told from others, or has not the descriptors of the others.
    pub(super) fn of(handed: Vec<Handover>, backends: &[Backend]) -> Result<Self, QemuError> {
        let link = |handover: &Handover| {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", handover.file.as_raw_fd()));
            link.map(|link| link.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let mut handed: Vec<(String, Handover)> =
            handed.into_iter().map(|each| (link(&each), each)).collect();
        if handed.is_empty() {
            let none = "QEMU did not hand its RAM over: it must be a file on tmpfs (/dev/shm), not on a disk or of huge pages, \
                        and QEMU must not be a static program";
            return Err(QemuError::Unfit(none.into()));
        }
        let mut ram = Vec::new();
        for backend in backends {
            let told: Vec<_> = handed.iter().map(|(name, each)| (each.bytes, name.as_str())).collect();
            let at = backend.pick(&told)?;
            ram.push(handed.swap_remove(at).1);
        }
        let places = Places::new(ram.iter().map(|each| (each.base, each.bytes)));
        let places = places.map_err(|error| QemuError::Unfit(error.to_string()))?;
        let mut files = Vec::new();
        let mut first = None;
        for Handover { userfaultfds, numbers, file, ledger, bytes, .. } in ram {
            files.push((file, bytes));
            let (_, known, _) = first.get_or_insert((userfaultfds, numbers.clone(), ledger));
            if *known != numbers {
                let text = "its libpostcopy_handover.so is of an earlier version, which knows memory of one file only";
                return Err(QemuError::Unfit(text.into()));
            }
        }
        let none = || QemuError::Unfit("it has no RAM".into());
        let (userfaultfds, numbers, ledger) = first.ok_or_else(none)?;
        Ok(Self { userfaultfds, numbers, ledger, files, places })
    }
}

/// A mapping as Firecracker describes it.
#[derive(Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    userfaultfds: Vec<i32>,
}

/// Takes what one connection hands over, and says so.
pub(super) fn take(listener: &UnixListener) -> Result<Handover, QemuError> {
    let failed = || QemuError::system("taking QEMU's memory over");
    let (stream, _) = listener.accept().map_err(failed())?;
    stream.set_nonblocking(false).map_err(failed())?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(failed())?;
    let handover = receive(&stream).map_err(failed())?;
    (&stream).write_all(&[1]).map_err(failed())?;
    Ok(handover)
}

fn receive(stream: &UnixStream) -> std::io::Result<Handover> {
    let mut text = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SHARDS + 2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            files.extend(sent);
        }
    }
    let mut mappings: Vec<Mapping> = serde_json::from_slice(&text[..received.bytes])?;
    let whole = |what: &str| std::io::Error::other(format!("the handover has {what}"));
    let mapping = mappings.pop().filter(|_| mappings.is_empty());
    let Mapping { base_host_virt_addr: base, size: bytes, offset, userfaultfds: numbers } =
        mapping.ok_or_else(|| whole("more than one mapping"))?;
    if offset != 0 {
        return Err(whole("a mapping that does not start with its file"));
    }
    let (ledger, file) = (files.pop(), files.pop());
    let named = !numbers.is_empty() && numbers.len() == files.len();
    let (file, ledger) = file
        .zip(ledger)
        .filter(|_| named)
        .ok_or_else(|| whole("not the userfaultfds that it names, the memory's file and a ledger"))?;
    Ok(Handover { userfaultfds: files, numbers, file: file.into(), ledger: ledger.into(), base, bytes })
}
