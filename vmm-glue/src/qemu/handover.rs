//! The pager's side of the handover from `libpostcopy_handover.so`.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use postcopy_engine::pager::MAX_SHARDS;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

use super::QemuError;

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
