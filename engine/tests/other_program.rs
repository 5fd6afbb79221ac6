//! Memory that another program owns: anonymous, trapped by userfaultfds that it has made and handed over
//! with the layout, in the form that Firecracker uses, and filled through the same engine.
//!
//! The other program is this one, started again with arguments; so there is no test harness here.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::Duration;

use common::{available, content, end_of, filled};
use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::PAGE_SIZE;
use postcopy_engine::pager::{Pager, PagerConfig, PagerState, Round, Trap};
use postcopy_transport::{EndpointOptions, HUGE_PAGE, Transport};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

/// 16 MiB.
const PAGES: u64 = 4096;
/// What the other program gives back while its memory arrives.
const GIVEN_BACK: std::ops::Range<u64> = 1000..1300;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, socket, userfaultfds] = &arguments[..]
        && role == "other-program"
    {
        return other_program(socket, userfaultfds.parse().unwrap());
    }
    let tests: [(&str, fn()); 2] = [
        (
            "anonymous_memory_of_another_program_arrives_and_what_it_gives_back_is_zero",
            anonymous_memory_of_another_program_arrives_and_what_it_gives_back_is_zero,
        ),
        ("it_waits_when_its_source_is_lost", it_waits_when_its_source_is_lost),
    ];
    for (name, test) in tests {
        test();
        println!("test {name} ... ok");
    }
}

/// The other program, whose memory is elsewhere. With no userfaultfds to make it makes one as Firecracker
/// does, set up and registered.
fn other_program(socket: &str, userfaultfds: usize) {
    let len = (PAGES * PAGE_SIZE) as usize;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping, at no address that anybody uses.
    let at = unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) };
    let at = at.unwrap();
    let descriptors: Vec<OwnedFd> = match userfaultfds {
        0 => vec![of_firecracker(at, len)],
        count => (0..count).map(|_| fresh()).collect(),
    };
    let mut pager = UnixStream::connect(socket).unwrap();
    let layout = json!([{"base_host_virt_addr": at as u64, "size": len, "offset": 0, "page_size": 4096}]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let sent: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    assert!(control.push(SendAncillaryMessage::ScmRights(&sent)));
    sendmsg(&pager, &[IoSlice::new(layout.to_string().as_bytes())], &mut control, SendFlags::empty())
        .unwrap();
    pager.read_exact(&mut [0]).unwrap();

    // SAFETY: the mapping is of so many bytes, and lives as long as this program; nobody else in it has
    // a reference into it, and the pager fills a page before it is first seen.
    let memory = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), len) };
    let mut check = |page: u64, write: bool| {
        let bytes = &mut memory[(page * PAGE_SIZE) as usize..][..PAGE_SIZE as usize];
        let zeros = GIVEN_BACK.contains(&page);
        let right = if zeros { bytes.iter().all(|byte| *byte == 0) } else { *bytes == content(page) };
        assert!(right, "page {page}");
        if write {
            // Whoever copied it once more would be seen.
            bytes[..8].copy_from_slice(&[0xaa; 8]);
            let mut expected = if zeros { vec![0; PAGE_SIZE as usize] } else { content(page) };
            expected[..8].copy_from_slice(&[0xaa; 8]);
            assert!(*bytes == expected, "page {page} after it was written");
        }
    };
    let first = at.wrapping_byte_add((GIVEN_BACK.start * PAGE_SIZE) as usize);
    let given = ((GIVEN_BACK.end - GIVEN_BACK.start) * PAGE_SIZE) as usize;
    // SAFETY: the range lies in the mapping, and its content is not needed.
    unsafe { madvise(first, given, Advice::LinuxDontNeed) }.unwrap();
    (0..PAGES).map(|step| step * 1_009 % PAGES).for_each(|page| check(page, page % 5 == 4));
    pager.write_all(&[1]).unwrap();
    // Until all of it is here.
    pager.read_exact(&mut [0]).unwrap();
    (0..PAGES).filter(|page| page % 5 != 4).for_each(|page| check(page, false));
    for page in (4..PAGES).step_by(5) {
        assert!(memory[(page * PAGE_SIZE) as usize..][..8] == [0xaa; 8], "page {page} was written over");
    }
}

/// As Firecracker's is made.
fn of_firecracker(at: *mut std::ffi::c_void, len: usize) -> OwnedFd {
    let features = FeatureFlags::EVENT_REMOVE;
    let mut made = UffdBuilder::new();
    let uffd: Uffd =
        made.require_features(features).non_blocking(true).user_mode_only(false).create().unwrap();
    uffd.register_with_mode(at, len, RegisterMode::MISSING).unwrap();
    // SAFETY: the descriptor is open, and the borrow ends before `uffd` does.
    let copy = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) }.try_clone_to_owned().unwrap();
    // Open for ever: the program must not run on without it.
    std::mem::forget(uffd);
    copy
}

fn fresh() -> OwnedFd {
    // SAFETY: a system call without pointers, which gives a new descriptor or -1.
    let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    assert!(opened >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { OwnedFd::from_raw_fd(opened as i32) }
}

/// The other program, and its memory's trap.
fn start(userfaultfds: usize) -> (Child, UnixStream, Trap) {
    let socket = std::env::temp_dir().join(format!("postcopy-other-{}", std::process::id()));
    drop(std::fs::remove_file(&socket));
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let mut child = command.arg("other-program").arg(&socket).arg(userfaultfds.to_string()).spawn().unwrap();
    listener.set_nonblocking(true).unwrap();
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}"),
        }
        assert!(child.try_wait().unwrap().is_none(), "the other program has ended");
        std::thread::sleep(Duration::from_millis(1));
    };
    // It ends within that, or not at all.
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    std::fs::remove_file(&socket).unwrap();
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut text)];
    let received = recvmsg(&stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            descriptors.extend(sent);
        }
    }
    let layout: Value = serde_json::from_slice(&text[..received.bytes]).unwrap();
    let base = layout[0]["base_host_virt_addr"].as_u64().unwrap();
    let trap = Trap::adopt_anonymous(descriptors, base, PAGES).unwrap();
    (child, stream, trap)
}

fn fill(transport: Transport, trap: Trap, export: &mut Export) -> Pager {
    let shards = trap.shards();
    let import = Import::for_others(transport, PAGES, shards, &EndpointOptions::default()).unwrap();
    let lanes = import.connect_local(export, shards).unwrap();
    import.start(trap, lanes, export.regions(), Round::none(), PagerConfig::default()).unwrap()
}

fn anonymous_memory_of_another_program_arrives_and_what_it_gives_back_is_zero() {
    const { assert!(PAGES * PAGE_SIZE >= 4 * HUGE_PAGE as u64, "room for three parts") };
    for transport in available() {
        for userfaultfds in [0, 1, 3] {
            let source = filled(PAGES);
            let mut export = Export::new(transport, &source, &EndpointOptions::default()).unwrap();
            let (mut child, mut other, trap) = start(userfaultfds);
            assert_eq!(trap.shards(), userfaultfds.max(1));
            let pager = fill(transport, trap, &mut export);
            export.describe_pages(None).unwrap();
            other.write_all(&[1]).unwrap();
            let end = end_of(&pager);
            assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
            let counts = end.report.pages;
            let brought = counts.fault_pages + counts.prepage_pages + counts.drain_pages;
            assert_eq!(brought + counts.zero_pages + counts.discarded_pages, PAGES, "{counts:?}");
            other.read_exact(&mut [0]).unwrap();
            // The pager and its descriptors are gone: the program needs them no more.
            drop((pager, export));
            other.write_all(&[1]).unwrap();
            assert!(child.wait().unwrap().success(), "{transport}: it has seen the wrong bytes");
        }
    }
}

fn it_waits_when_its_source_is_lost() {
    let source = filled(PAGES);
    let mut export = Export::new(Transport::Tcp, &source, &EndpointOptions::default()).unwrap();
    let (mut child, mut other, trap) = start(0);
    let pager = fill(Transport::Tcp, trap, &mut export);
    drop(export);
    other.write_all(&[1]).unwrap();
    let PagerState::Failed(error) = end_of(&pager).state else { panic!("its source is lost") };
    assert!(error.to_string().contains("the guest waits"), "{error}");
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it went on, or read zeros and said so");
    child.kill().unwrap();
    child.wait().unwrap();
}
