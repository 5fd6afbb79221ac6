//! One-sided reads on one host: the exporter passes its memfd, a read is a copy.
//!
//! The floor against which the other transports are read. The descriptors travel over a Unix
//! socket in the abstract namespace whose name, with a secret, is the grant; they are opened
//! read-only, so the importer can not write the exporter's memory.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{LaneError, ReadError, SetupError};
use crate::lane::{Completion, Lane, Read};
use crate::memory::HostMemory;
use crate::region::{LocalSlice, RemoteRegion, RemoteSlice};

/// Most memories that one exporter passes.
const MAX_MEMORIES: usize = 8;
/// Completions that may wait to be polled: bounds `post`.
const DEPTH: usize = 64;
/// How long either side waits for the other while descriptors are passed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where to fetch the descriptors, and the secret that opens them.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Grant {
    name: [u8; 16],
    secret: [u8; 16],
}

impl Grant {
    fn random() -> Result<Self, SetupError> {
        let mut grant = Self { name: [0; 16], secret: [0; 16] };
        getrandom::fill(grant.as_mut_bytes()).map_err(|error| SetupError::io("getrandom")(error.into()))?;
        Ok(grant)
    }

    fn address(&self) -> io::Result<SocketAddr> {
        let hex: String = self.name.iter().map(|byte| format!("{byte:02x}")).collect();
        SocketAddr::from_abstract_name(format!("postcopy-{hex}"))
    }
}

/// Exports memory to importers on the same host.
pub struct ShmExporter {
    grant: Grant,
    lens: Vec<usize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ShmExporter {
    /// Offers read-only descriptors of `memories`.
    ///
    /// Errors: more than 8 memories, one of several files, or the system refuses a socket, a descriptor or a thread.
    pub fn new(memories: &[HostMemory]) -> Result<Self, SetupError> {
        let failed = SetupError::io("offering shared memory");
        Self::offer(memories, Grant::random()?).map_err(failed)
    }

    fn offer(memories: &[HostMemory], grant: Grant) -> io::Result<Self> {
        if memories.len() > MAX_MEMORIES {
            return Err(io::Error::other("more memories than one message carries"));
        }
        let read_only = |memory: &HostMemory| {
            let mut files = memory.files();
            let (Some((file, _)), None) = (files.next(), files.next()) else {
                return Err(io::Error::other("a memory of several files"));
            };
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            std::fs::File::open(path).map(OwnedFd::from)
        };
        let files = memories.iter().map(read_only).collect::<io::Result<Vec<_>>>()?;
        let listener = UnixListener::bind_addr(&grant.address()?)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("shm-offer".into()).spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                let passed = stream.and_then(|stream| pass(stream, &grant.secret, &files));
                if let Err(error) = passed {
                    tracing::warn!(%error, "a process asked for shared memory and did not get it");
                }
            }
        })?;
        let lens = memories.iter().map(HostMemory::len).collect();
        Ok(Self { grant, lens, stop, thread: Some(thread) })
    }

    /// The capabilities to give to the importer, in the order of the memories.
    pub fn regions(&self) -> Vec<RemoteRegion> {
        let region = |(index, len): (usize, &usize)| RemoteRegion::new(0, *len as u64, index as u64);
        self.lens.iter().enumerate().map(region).collect()
    }

    /// What an importer needs for [`ShmLane::connect`].
    pub fn grant(&self) -> Vec<u8> {
        self.grant.as_bytes().to_vec()
    }
}

impl Drop for ShmExporter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // The thread waits in accept(2): a connection of our own wakes it.
        drop(self.grant.address().and_then(|address| UnixStream::connect_addr(&address)));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Passes `files` to a peer that knows the secret.
fn pass(mut stream: UnixStream, secret: &[u8; 16], files: &[OwnedFd]) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut said = [0; 16];
    stream.read_exact(&mut said)?;
    if said != *secret {
        return Err(io::Error::other("it did not know the secret"));
    }
    let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MEMORIES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&borrowed));
    rustix::net::sendmsg(&stream, &[IoSlice::new(&[files.len() as u8])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Fetches the descriptors that `grant` stands for.
fn fetch(grant: &Grant) -> io::Result<Vec<OwnedFd>> {
    let mut stream = UnixStream::connect_addr(&grant.address()?)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&grant.secret)?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MEMORIES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut count = [0u8];
    rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut count)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds);
        }
    }
    if files.is_empty() || files.len() != usize::from(count[0]) {
        return Err(io::Error::other("the exporter passed no memory"));
    }
    Ok(files)
}

/// Reads that are copies between two mappings of this process.
pub struct ShmLane {
    local: Vec<HostMemory>,
    peer: Vec<HostMemory>,
    done: Vec<Completion>,
    never: OwnedFd,
}

impl ShmLane {
    /// Maps the memory that `grant` stands for.
    ///
    /// Errors: the grant is malformed, the exporter is gone or on another host, its memory is
    /// shorter than it said.
    pub fn connect(grant: &[u8], local: Vec<HostMemory>) -> Result<Self, SetupError> {
        let grant =
            Grant::read_from_bytes(grant).map_err(|_| SetupError::Malformed { what: "memory grant" })?;
        Self::map(&grant, local).map_err(SetupError::io("mapping the peer's memory (is it on this host?)"))
    }

    fn map(grant: &Grant, local: Vec<HostMemory>) -> io::Result<Self> {
        let map = |fd: OwnedFd| {
            let file = std::fs::File::from(fd);
            let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
            HostMemory::map_peer(file, len)
        };
        let peer = fetch(grant)?.into_iter().map(map).collect::<io::Result<_>>()?;
        let never = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { local, peer, done: Vec::with_capacity(DEPTH), never })
    }

    fn copy(&self, to: LocalSlice, from: RemoteSlice) -> Result<(), ReadError> {
        let len = from.len as usize;
        let source = usize::try_from(from.key).ok().and_then(|index| self.peer.get(index));
        let source = source.and_then(|memory| memory.at(from.addr, len)).ok_or(ReadError::Refused)?;
        let target = self.local[usize::from(to.region)].at(to.offset, len);
        let target = target.expect("a LocalSlice lies in its region by construction");
        // SAFETY: `at` checked both ranges against their mappings, which live as long as `self`.
        // They are different mappings of different files, so they do not overlap; the source may
        // change meanwhile, and bytes are only moved, never interpreted.
        unsafe { std::ptr::copy_nonoverlapping(source, target, len) };
        Ok(())
    }
}

impl Lane for ShmLane {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        let accepted = reads.len().min(self.room());
        for read in &reads[..accepted] {
            let result = self.copy(read.local(), read.remote());
            self.done.push(Completion { token: read.token(), result });
        }
        Ok(accepted)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        completions.append(&mut self.done);
        Ok(())
    }

    fn room(&self) -> usize {
        DEPTH - self.done.len()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        Ok(self.done.is_empty())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        // A copy is complete when `post` returns: there is never anything to wait for.
        self.never.as_fd()
    }
}
