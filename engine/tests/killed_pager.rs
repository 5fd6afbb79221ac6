//! A pager's process that is killed, at any moment, and others that go on where it was. The memory is of this process, whose
//! threads touch it all the time, as a QEMU's do; whoever brings it is this program, started again with arguments; so there
//! is no test harness here.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Setup, assert_marked, content, empty, end_of, filled, touch};
use postcopy_engine::export::Export;
use postcopy_engine::import::{Import, Lanes};
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::page_set::PageSet;
use postcopy_engine::pagemap::Dirty;
use postcopy_engine::pager::{
    Landing, Ledger, Pager, PagerConfig, PagerState, Round, RoundWatch, Shards, Trap,
};
use postcopy_engine::places::Places;
use postcopy_transport::{EndpointOptions, Transport};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};

/// 16 MiB.
const PAGES: u64 = 4096;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, given] = &arguments[..]
        && role == "pager"
    {
        return pager(&serde_json::from_str(given).unwrap());
    }
    goes_on_wherever_it_was_killed();
    println!("test goes_on_wherever_it_was_killed ... ok");
}

/// What a pager's process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Given {
    transport: String,
    in_place: bool,
    hybrid: bool,
    /// Whether another was at work before.
    later: bool,
    /// Where the guest's memory is mapped.
    places: Places,
    /// Descriptors that it inherits; of the memory one for each place.
    userfaultfds: Vec<i32>,
    memory: Vec<i32>,
    ledger: i32,
}

/// What a page is in the end: in hybrid some are written while the round goes on, of those some are zero afterwards.
fn moved(page: u64, hybrid: bool) -> Vec<u8> {
    match page % 10 {
        0 if hybrid => vec![0; PAGE_SIZE as usize],
        5 if hybrid => content(2 * page + 1),
        _ => content(page),
    }
}

/// The process that brings the memory, from a source of its own, which is always the same.
fn pager(given: &Given) {
    let transport: Transport = given.transport.parse().unwrap();
    // SAFETY: the numbers are of descriptors that this process has inherited for this, and nobody else uses here.
    let own = |number: &i32| unsafe { OwnedFd::from_raw_fd(*number) };
    let userfaultfds: Vec<_> = given.userfaultfds.iter().map(own).collect();
    let ledger = File::from(own(&given.ledger));
    let files = given.memory.iter().zip(given.places.each());
    let files = files.map(|(file, place)| (File::from(own(file)), place.len));
    let source = filled(PAGES);
    let memory = GuestMemory::of_files(source.layout().clone(), files).unwrap();
    let options = EndpointOptions::default();
    let mut export = Export::new(transport, &source, &options).unwrap();
    let landing = if given.in_place { Landing::InPlace } else { Landing::Pool };
    let setup = Setup { landing, shards: Shards::new(userfaultfds.len()).unwrap() };
    let import = Import::new(transport, &memory, (landing, setup.shards.count()), &options).unwrap();
    let mut shards = import.connect_local(&mut export, setup.shards.count()).unwrap();
    let config = PagerConfig::default();

    // Before anything lands in it.
    let trap = match given.later {
        true => Trap::take_over(userfaultfds, &given.places, Ledger::open(&ledger).unwrap()).unwrap(),
        false => {
            let trap = Trap::adopt(userfaultfds, &given.places, &memory).unwrap();
            trap.noted_in(Ledger::begin(&ledger, PAGES).unwrap()).unwrap()
        }
    };
    let mut round = Round::none();
    if given.hybrid && !given.later {
        export.describe_running().unwrap();
        round = import.pre_copy(&mut shards[0], export.regions(), None, &RoundWatch::default()).unwrap();
    }
    let mut dirty = PageSet::new(PAGES, false);
    for page in (0..PAGES).step_by(5).filter(|_| given.hybrid) {
        assert!(source.guest().write(page * PAGE_SIZE, &moved(page, true)));
        dirty.put(page, page + 1, true);
    }
    let log = Dirty { tell: Box::new(|| Some(dirty)), discards: false };
    export.describe_pages(given.hybrid.then_some(log)).unwrap();

    let pager = if given.later {
        let mut pager = Pager::of_another(trap, &memory);
        let lanes = Lanes { shards, servers: Vec::new() };
        import.go_on(&mut pager, lanes, export.regions(), config).unwrap();
        pager
    } else {
        import.start(trap, shards, export.regions(), round, config).unwrap()
    };
    println!("at work");
    let end = end_of(&pager);
    assert!(matches!(end.state, PagerState::Resident), "{given:?}: {:?}", end.state);
}

fn userfaultfd() -> OwnedFd {
    // SAFETY: a system call without pointers, which gives a new descriptor or -1.
    let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    assert!(opened >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { OwnedFd::from_raw_fd(opened as i32) }
}

/// Runs pagers and kills them, a little later each time, until one brings the last page. How many were killed.
fn outlive(mut given: Given) -> u32 {
    for killed in 0.. {
        let mut process = Command::new(std::env::current_exe().unwrap());
        process.arg("pager").arg(serde_json::to_string(&given).unwrap()).stdout(Stdio::piped());
        let mut process = process.spawn().unwrap();
        let mut said = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert!(said == "at work\n", "{given:?}: it has failed");
        std::thread::sleep(Duration::from_micros(u64::from(killed) * 1500));
        process.kill().unwrap();
        if process.wait().unwrap().success() {
            return killed;
        }
        given.later = true;
    }
    unreachable!("one is left alone long enough")
}

/// Empty memory of files of so many pages.
fn made_of(lens: &[u64]) -> GuestMemory {
    let file = |pages: &u64| {
        let file = File::from(memfd_create("part", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE_SIZE).unwrap();
        (file, pages * PAGE_SIZE)
    };
    GuestMemory::of_files(empty(PAGES).layout().clone(), lens.iter().map(file)).unwrap()
}

fn goes_on_wherever_it_was_killed() {
    let mut killed = 0;
    for (in_place, shards, hybrid, lens) in [
        (false, 1, false, &[PAGES][..]),
        (false, 3, false, &[PAGES]),
        (true, 3, false, &[PAGES]),
        (true, 1, true, &[PAGES]),
        (true, 3, true, &[PAGES]),
        (false, 1, false, &[1000, 7, PAGES - 1007]),
        (true, 3, true, &[1500, PAGES - 1500]),
    ] {
        let memory = made_of(lens);
        let mut end = memory.guest().addresses().start;
        let mapping = |(_, len)| {
            end += len;
            (end - len, len)
        };
        let places = Places::new(memory.guest().files().map(mapping)).unwrap();
        let ledger = memfd_create("ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        // They stay open here, so that the guest waits.
        let userfaultfds: Vec<_> = (0..shards).map(|_| userfaultfd()).collect();
        let files = || memory.guest().files().map(|(file, _)| file);
        let inherited = userfaultfds.iter().map(AsFd::as_fd).chain(files()).chain([ledger.as_fd()]);
        inherited.for_each(|descriptor| fcntl_setfd(descriptor, FdFlags::empty()).unwrap());
        let given = Given {
            transport: "tcp".into(),
            in_place,
            hybrid,
            later: false,
            places,
            userfaultfds: userfaultfds.iter().map(AsRawFd::as_raw_fd).collect(),
            memory: files().map(|file| file.as_raw_fd()).collect(),
            ledger: ledger.as_raw_fd(),
        };
        std::thread::scope(|scope| {
            let pagers = scope.spawn(|| outlive(given));
            // Before the trap is there, holes would be seen.
            let begun =
                || std::fs::metadata(format!("/proc/self/fd/{}", ledger.as_raw_fd())).unwrap().len() > 0;
            while !begun() || !is_trapped(&memory) {
                std::thread::sleep(Duration::from_micros(200));
            }
            let memory = &memory;
            let touching: Vec<_> = (0..2)
                .map(|thread| scope.spawn(move || touch(memory, |page| moved(page, hybrid), thread)))
                .collect();
            touching.into_iter().for_each(|thread| thread.join().unwrap());
            killed += pagers.join().unwrap();
        });
        assert_marked(&memory, |page| moved(page, hybrid));
    }
    assert!(killed > 20, "only {killed} were killed");
}

/// Whether all of the guest's mapping is registered.
fn is_trapped(memory: &GuestMemory) -> bool {
    let addresses = memory.guest().addresses();
    let mut at = addresses.start;
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((start, end)) = line.split_whitespace().next().and_then(|range| range.split_once('-'))
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            inside = start == at && end <= addresses.end;
            at = if inside { end } else { at };
        } else if inside && line.starts_with("VmFlags:") && !line.split_whitespace().any(|flag| flag == "um")
        {
            return false;
        }
    }
    at == addresses.end
}
