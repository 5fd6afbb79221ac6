//! Threads that serve their own faults, over real userfaultfd in its SIGBUS mode and every transport
//! that this machine has.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use common::{Setup, available_setups, check, content, empty, end_of, filled};
use postcopy_engine::export::Export;
use postcopy_engine::import::Import;
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::pager::{
    FaultsTo, Landing, Pager, PagerConfig, PagerError, PagerState, PagerStatus, Round, SelfService, Shards,
    Trap,
};
use postcopy_transport::{AnyLane, Completion, EndpointOptions, Lane, LaneError, Read, Transport};

/// 16 MiB.
const PAGES: u64 = 4096;

fn source(transport: Transport) -> (Export, GuestMemory) {
    let memory = filled(PAGES);
    (Export::new(transport, &memory, &EndpointOptions::default()).unwrap(), memory)
}

/// The destination, and lanes for so many threads.
struct Destination {
    memory: GuestMemory,
    pager: Pager,
    lanes: Vec<AnyLane>,
}

fn destination(transport: Transport, export: &mut Export, threads: usize, setup: Setup) -> Destination {
    let memory = empty(PAGES);
    let trap = Trap::register(&memory, FaultsTo::Threads, setup.shards).unwrap();
    let import =
        Import::new(transport, &memory, (setup.landing, setup.shards.count()), &EndpointOptions::default())
            .unwrap();
    let lanes = import.connect_local(export, setup.shards.count()).unwrap();
    let pager = import.start(trap, lanes, export.regions(), Round::none(), PagerConfig::default()).unwrap();
    let lanes = (0..threads).map(|_| import.connect_one_local(export).unwrap()).collect();
    Destination { memory, pager, lanes }
}

#[test]
fn threads_serve_themselves_while_it_drains_and_see_every_byte_right() {
    for (transport, setup) in available_setups() {
        for round in 0..3u64 {
            let (mut export, _memory) = source(transport);
            let Destination { memory, pager, lanes } = destination(transport, &mut export, 2, setup);
            export.describe_pages(None).unwrap();
            std::thread::scope(|scope| {
                // Two threads with a lane each, and one that the shard serves.
                let lanes = lanes.into_iter().map(Some).chain([None]);
                for (thread, lane) in lanes.enumerate() {
                    let (guest, server) =
                        (memory.guest().clone(), lane.map(|lane| pager.server(lane).unwrap()));
                    scope.spawn(move || {
                        let _service = server.map(SelfService::of_this_thread);
                        for step in 0..PAGES {
                            let page = (step * 1_009 + thread as u64 * 777 + round) % PAGES;
                            check(&guest, page);
                            if page % 5 == 4 {
                                assert!(guest.write(page * PAGE_SIZE, &content(page)));
                            }
                        }
                    });
                }
            });
            let end = end_of(&pager);
            assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
            let counts = end.report.pages;
            assert_eq!(
                counts.fault_pages + counts.prepage_pages + counts.drain_pages + counts.zero_pages,
                PAGES,
                "{counts:?}"
            );
            assert!(counts.network_faults > 0 && end.report.stages.total.count > 0, "{counts:?}");
            (0..PAGES).for_each(|page| check(memory.guest(), page));
        }
    }
}

#[test]
fn what_a_serving_thread_wrote_is_never_overwritten() {
    let (mut export, _memory) = source(Transport::Tcp);
    let Destination { memory, pager, mut lanes } =
        destination(Transport::Tcp, &mut export, 1, Setup::default());
    let service = SelfService::of_this_thread(pager.server(lanes.pop().unwrap()).unwrap());
    export.describe_pages(None).unwrap();
    for page in (0..PAGES).step_by(7) {
        assert!(memory.guest().write(page * PAGE_SIZE + 100, b"written at the destination"));
    }
    let PagerStatus { state, waited, .. } = end_of(&pager);
    assert!(matches!(state, PagerState::Resident));
    // The only thread that touched its memory served itself.
    let this = rustix::thread::gettid().as_raw_nonzero().get();
    assert_eq!(waited.iter().map(|waited| waited.thread).collect::<Vec<_>>(), [this]);
    for page in 0..PAGES {
        let mut expected = content(page);
        if page % 7 == 0 {
            expected[100..126].copy_from_slice(b"written at the destination");
        }
        let mut bytes = vec![0u8; PAGE_SIZE as usize];
        assert!(memory.guest().read(page * PAGE_SIZE, &mut bytes));
        assert!(bytes == expected, "page {page}");
    }
    drop(service);
}

#[test]
fn a_page_that_the_kernel_takes_out_of_the_mapping_is_shown_again_to_who_serves_itself_and_to_who_does_not() {
    for (transport, setup) in available_setups() {
        let (mut export, _memory) = source(transport);
        let Destination { memory, pager, mut lanes } = destination(transport, &mut export, 1, setup);
        for server in [lanes.pop().map(|lane| pager.server(lane).unwrap()), None] {
            let guest = memory.guest().clone();
            let (said, heard) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let _service = server.map(SelfService::of_this_thread);
                check(&guest, 7);
                guest.unmap_pages().unwrap();
                check(&guest, 7);
                said.send(()).unwrap();
            });
            heard.recv_timeout(Duration::from_secs(10)).expect("it is here: nobody need wait for it");
        }
        drop(pager.stop());
    }
}

/// Asserts that a touch of `page` gets no answer: a reader of zeros would be heard at once.
fn assert_waits(memory: &GuestMemory, page: u64, server: Option<postcopy_engine::pager::FaultServer>) {
    let guest = memory.guest().clone();
    let (said, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _service = server.map(SelfService::of_this_thread);
        let mut byte = [0u8];
        let touched = guest.read(page * PAGE_SIZE, &mut byte);
        let _ = said.send((touched, byte));
    });
    let seen = heard.recv_timeout(Duration::from_millis(300));
    assert!(seen.is_err(), "the guest read {seen:?} in place of its memory");
}

#[test]
fn a_lost_source_lets_no_thread_read_zeros() {
    let (mut export, _memory) = source(Transport::Tcp);
    let Destination { memory, pager, mut lanes } =
        destination(Transport::Tcp, &mut export, 1, Setup::default());
    check(memory.guest(), 1);
    let server = pager.server(lanes.pop().unwrap()).unwrap();
    drop(export);
    let PagerState::Failed(error) = end_of(&pager).state else { panic!("the lanes are gone") };
    assert!(error.to_string().contains("the guest waits"), "{error}");
    assert_waits(&memory, 2, Some(server));
    assert_waits(&memory, 4, None);
    // Ending the process ends the waiting threads; the pager, and its trap, live until then.
    std::mem::forget(pager);
}

/// A lane that panics when it is asked for what has arrived.
struct Panics(AnyLane);

impl Lane for Panics {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        self.0.post(reads)
    }

    fn poll(&mut self, _: &mut Vec<Completion>) -> Result<(), LaneError> {
        panic!("on purpose, as a defect would");
    }

    fn room(&self) -> usize {
        self.0.room()
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        self.0.arm()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.descriptor()
    }
}

#[test]
fn a_pager_thread_that_panics_lets_no_thread_read_zeros() {
    for (told, shards) in
        [(FaultsTo::Pager, 1), (FaultsTo::Threads, 1), (FaultsTo::Pager, 2), (FaultsTo::Threads, 2)]
    {
        let (mut export, _memory) = source(Transport::Tcp);
        let memory = empty(PAGES);
        let trap = Trap::register(&memory, told, Shards::new(shards).unwrap()).unwrap();
        let import =
            Import::new(Transport::Tcp, &memory, (Landing::InPlace, 1), &EndpointOptions::default()).unwrap();
        let mut lanes = import.connect_local(&mut export, shards).unwrap();
        let [urgent, bulk] = lanes.remove(0);
        lanes.insert(0, [AnyLane::Other(Box::new(Panics(urgent))), bulk]);
        let pager =
            import.start(trap, lanes, export.regions(), Round::none(), PagerConfig::default()).unwrap();
        let PagerState::Failed(error) = end_of(&pager).state else { panic!("its lane panics") };
        assert!(matches!(*error, PagerError::Panicked(_)), "{error}");
        assert!(error.to_string().contains("the guest waits"), "{error}");
        assert_waits(&memory, 2, None);
        // What another thread has is still served.
        if shards > 1 {
            check(memory.guest(), PAGES - 2);
        }
        std::mem::forget(pager);
    }
}
