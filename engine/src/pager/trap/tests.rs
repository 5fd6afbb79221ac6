//! The trap under memory that may be given back, and what it refuses.

use std::os::fd::AsFd;

use postcopy_transport::HostMemory;
use userfaultfd::EventBuffer;

use super::*;
use crate::planner::Run;

#[test]
fn hugetlbfs_is_refused_with_what_to_do() {
    use rustix::fs::{MemfdFlags, memfd_create};
    let plain = memfd_create("plain", MemfdFlags::CLOEXEC).unwrap();
    refuse_hugetlbfs(plain.as_fd()).unwrap();
    // It needs no huge pages as long as nobody maps it.
    let Ok(huge) = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) else { return };
    let said = refuse_hugetlbfs(huge.as_fd()).unwrap_err().to_string();
    assert!(said.contains("hugetlbfs") && said.contains("without hugetlb=on"), "{said}");
}

fn opened_uffd() -> OwnedFd {
    // SAFETY: a system call without pointers, which gives a new descriptor.
    let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    assert!(opened >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { OwnedFd::from_raw_fd(opened as i32) }
}

/// Memory whose trap was made as for another process, and a page of it with content.
fn adopted() -> (GuestMemory, PartTrap) {
    let layout = crate::memory::MemoryLayout::pc(8 << 12, 8 << 12).unwrap();
    let memory = GuestMemory::new(layout).unwrap();
    let place = Places::one(memory.guest().base() as u64, 8 << 12);
    let trap = Trap::adopt(vec![opened_uffd()], &place, &memory).unwrap();
    let trap = trap.parts()[0].clone();
    assert!(memory.landing().write(1 << 12, b"content"));
    trap.publish(Run::one(PageIndex(1))).unwrap();
    (memory, trap)
}

/// Gives page 1 back as QEMU does. Returns when the trap has heard of it.
fn give_back(memory: &GuestMemory) {
    memory.guest().discard(1 << 12..2 << 12).unwrap();
    let page = memory.guest().at(1 << 12, 1 << 12).unwrap();
    // SAFETY: the page lies in the guest mapping, and what it held is not needed.
    let given = unsafe { libc::madvise(page.cast(), 1 << 12, libc::MADV_DONTNEED) };
    assert_eq!(given, 0, "{}", io::Error::last_os_error());
}

/// The first byte of page 1, as the guest sees it.
fn first(memory: &GuestMemory) -> u8 {
    let mut byte = [1];
    assert!(memory.guest().read(1 << 12, &mut byte));
    byte[0]
}

/// The next event.
fn next(trap: &PartTrap) -> TrapEvent {
    let (mut buffer, mut seen) = (EventBuffer::new(1), Vec::new());
    while seen.is_empty() {
        trap.take(&mut buffer, &mut seen).unwrap();
        std::thread::yield_now();
    }
    seen[0]
}

#[test]
fn a_page_that_was_given_back_is_told_of_and_is_zero_when_it_is_touched_again() {
    let (memory, trap) = adopted();
    assert_eq!(first(&memory), b'c');
    std::thread::scope(|scope| {
        scope.spawn(|| give_back(&memory));
        let told = TrapEvent::Discarded { first: PageIndex(1), end: PageIndex(2) };
        assert_eq!(next(&trap), told);
    });
    std::thread::scope(|scope| {
        let touched = scope.spawn(|| first(&memory));
        assert!(matches!(next(&trap), TrapEvent::Fault { page: PageIndex(1), .. }));
        trap.show_again(PageIndex(1)).unwrap();
        assert_eq!(touched.join().unwrap(), 0);
    });
}

#[test]
fn whoever_gives_pages_back_when_the_trap_is_lifted_is_not_left_waiting() {
    let (memory, trap) = adopted();
    std::thread::scope(|scope| {
        let giver = scope.spawn(|| give_back(&memory));
        let pending = rustix::event::PollFd::new(&trap, rustix::event::PollFlags::IN);
        rustix::event::poll(&mut [pending], None).unwrap();
        trap.release().unwrap();
        giver.join().unwrap();
    });
    assert_eq!(first(&memory), 0);
}

#[test]
fn what_is_published_while_pages_are_given_back_is_published_and_both_are_told() {
    let (memory, trap) = adopted();
    assert!(memory.landing().write(2 << 12, b"more"));
    std::thread::scope(|scope| {
        scope.spawn(|| give_back(&memory));
        let pending = rustix::event::PollFd::new(&trap, rustix::event::PollFlags::IN);
        rustix::event::poll(&mut [pending], None).unwrap();
        trap.publish(Run::one(PageIndex(2))).unwrap();
    });
    assert_eq!(next(&trap), TrapEvent::Discarded { first: PageIndex(1), end: PageIndex(2) });
    let mut seen = [0; 4];
    assert!(memory.guest().read(2 << 12, &mut seen));
    assert_eq!(&seen, b"more");
}

#[test]
fn what_landed_in_a_pool_for_a_page_that_was_given_back_since_is_not_shown() {
    let (memory, trap) = adopted();
    let pool = postcopy_transport::HostMemory::anonymous("pool", 4 << 12).unwrap();
    (0..4).for_each(|page| assert!(pool.write(page << 12, &[page as u8 + 1; 1 << 12])));
    std::thread::scope(|scope| {
        // Page 1 was published before, and is free again.
        scope.spawn(|| give_back(&memory));
        let pending = rustix::event::PollFd::new(&trap, rustix::event::PollFlags::IN);
        rustix::event::poll(&mut [pending], None).unwrap();
        trap.copy_in(Run { first: PageIndex(0), count: 4 }, &pool, 0).unwrap();
    });
    // It may have been taken out of the mapping after that; a touch would be a fault, and this the answer.
    trap.show_again(PageIndex(1)).unwrap();
    let mut pages = [9; 4 << 12];
    assert!(memory.guest().read(0, &mut pages));
    let expected: Vec<u8> = [1, 0, 3, 4].iter().flat_map(|byte| [*byte; 1 << 12]).collect();
    assert!(pages[..] == expected[..]);
    assert_eq!(next(&trap), TrapEvent::Discarded { first: PageIndex(1), end: PageIndex(2) });
}

/// As a QEMU has its RAM of two NUMA nodes: two files, mapped anywhere, the second at a lower address or not.
#[test]
fn memory_in_two_mappings_is_one_memory_of_pages() {
    let layout = crate::memory::MemoryLayout::pc(8 << 12, 8 << 12).unwrap();
    let files = [3, 5].map(|pages| HostMemory::anonymous("node", pages << 12).unwrap());
    for order in [[0, 1], [1, 0]] {
        let opened = |at: usize| {
            let (file, len) = files[at].files().next().unwrap();
            (std::fs::File::from(file.try_clone_to_owned().unwrap()), len)
        };
        let memory = GuestMemory::of_files(layout.clone(), order.map(opened)).unwrap();
        let theirs = order.map(|at| files[at].map_again().unwrap());
        let places = theirs.iter().map(|node| (node.base() as u64, node.len() as u64));
        let places = Places::new(places).unwrap();
        let trap = Trap::adopt(vec![opened_uffd()], &places, &memory).unwrap();
        let trap = trap.parts()[0].clone();
        let border = (theirs[0].len() as u64) >> 12;
        for page in 0..8u64 {
            assert!(memory.landing().write(page << 12, &[page as u8 + 1; 4096]));
        }
        // A fault on either side is one of its page.
        std::thread::scope(|scope| {
            let touch = |node: usize, page: u64| {
                let mut byte = [0];
                assert!(theirs[node].read(page << 12, &mut byte));
                u64::from(byte[0])
            };
            for (node, page) in [(0, border - 1), (1, border)] {
                let within = if node == 0 { page } else { page - border };
                let waits = scope.spawn(move || touch(node, within));
                let TrapEvent::Fault { page: faulted, .. } = next(&trap) else { panic!("no fault") };
                assert_eq!(faulted, PageIndex(page));
                trap.publish(Run::one(faulted)).unwrap();
                assert_eq!(waits.join().unwrap(), page + 1);
            }
        });
        // A run over the border, some of it there already.
        trap.publish(Run { first: PageIndex(0), count: 8 }).unwrap();
        for page in 0..8 {
            let (node, within) = if page < border { (0, page) } else { (1, page - border) };
            let mut bytes = [0; 4096];
            assert!(theirs[node].read(within << 12, &mut bytes) && bytes == [page as u8 + 1; 4096]);
        }
        // What the second gives back, to its end.
        let last = theirs[1].len() as u64 - 4096;
        let given = theirs[1].at(last, 4096).unwrap() as usize;
        let gone = std::thread::spawn(move || {
            // SAFETY: the page lies in the mapping, which outlives this thread; what it held is not needed.
            unsafe { libc::madvise(given as *mut libc::c_void, 4096, libc::MADV_REMOVE) }
        });
        let discarded = TrapEvent::Discarded { first: PageIndex(7), end: PageIndex(8) };
        assert_eq!(next(&trap), discarded);
        assert_eq!(gone.join().unwrap(), 0);
        trap.release().unwrap();
    }
}
