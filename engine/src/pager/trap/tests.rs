//! The trap under memory that may be given back, and what it refuses.

use std::os::fd::AsFd;

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
/// Memory whose trap was made as for another process, and a page of it with content.
fn adopted() -> (GuestMemory, PartTrap) {
    let layout = crate::memory::MemoryLayout::pc(8 << 12, 8 << 12).unwrap();
    let memory = GuestMemory::new(layout).unwrap();
    // SAFETY: a system call without pointers, which gives a new descriptor.
    let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    assert!(opened >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    let opened = unsafe { OwnedFd::from_raw_fd(opened as i32) };
    let trap = Trap::adopt(vec![opened], memory.guest().base() as u64, &memory).unwrap();
    let trap = trap.parts()[0].clone();
    assert!(memory.landing().write(1 << 12, b"content"));
    trap.publish(Run::one(PageIndex(1))).unwrap();
    (memory, trap)
}

/// Gives page 1 back as QEMU does. Returns when the trap has heard of it.
fn give_back(memory: &GuestMemory) {
    use rustix::fs::{FallocateFlags, fallocate};
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(memory.guest().file(), hole, 1 << 12, 1 << 12).unwrap();
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
