//! Memory for which there is no room any more while it arrives: a file in a file system in memory that is full. Whoever
//! needs a page waits, and all goes on when there is room.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Setup, available, check, content, end_of, filled};
use postcopy_engine::export::Export;
use postcopy_engine::import::{Import, Lanes};
use postcopy_engine::memory::{GuestMemory, PAGE_SIZE};
use postcopy_engine::pager::{
    FaultsTo, Landing, PagerConfig, PagerError, PagerState, Round, SelfService, Trap,
};
use postcopy_transport::{EndpointOptions, Transport};

/// 8 MiB, of which a third is zero.
const PAGES: u64 = 2048;
const MARK: &[u8] = b"written at the destination";

/// A file system in memory. Unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(name: &str, mib: u64) -> Self {
        let folder = std::env::temp_dir().join(format!("postcopy-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let size = format!("size={mib}M");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&folder));
        Self(folder)
    }

    fn resize(&self, mib: u64) {
        run(Command::new("mount").args(["-o", &format!("remount,size={mib}M")]).arg(&self.0));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// Memory as large as `source`'s in a file of its own.
fn memory_in(folder: &Path, source: &GuestMemory) -> GuestMemory {
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(folder.join("ram")).unwrap();
    file.set_len(PAGES * PAGE_SIZE).unwrap();
    GuestMemory::of_file(source.layout().clone(), file).unwrap()
}

/// What was written before room ran out is there, and all else as it was.
fn assert_marked(memory: &GuestMemory) {
    for page in 0..PAGES {
        let mut now = vec![0; PAGE_SIZE as usize];
        assert!(memory.guest().read(page * PAGE_SIZE, &mut now));
        let expected = [MARK, &content(page)[MARK.len()..]].concat();
        assert!(now == expected, "page {page}");
    }
}

fn outlive(transport: Transport, told: FaultsTo) {
    let setup = Setup { landing: Landing::Pool, ..Setup::default() };
    let (source, small) =
        (filled(PAGES), Tmpfs::new(&format!("{transport}-{}", told == FaultsTo::Threads), 2));
    let memory = memory_in(&small.0, &source);
    let trap = Trap::register(&memory, told, setup.shards).unwrap();
    let options = EndpointOptions::default();
    let export = || {
        let mut export = Export::new(transport, &source, &options).unwrap();
        export.describe_pages(None).unwrap();
        export
    };
    let mut offered = export();
    let import = Import::new(transport, &memory, (setup.landing, setup.shards.count()), &options).unwrap();
    let lanes = |export: &mut Export| Lanes {
        shards: import.connect_local(export, setup.shards.count()).unwrap(),
        servers: match told {
            FaultsTo::Threads => vec![import.connect_one_local(export).unwrap()],
            FaultsTo::Pager => Vec::new(),
        },
    };
    let config = PagerConfig::default();
    let Lanes { shards, servers } = lanes(&mut offered);
    let mut pager = import.start(trap, shards, offered.regions(), Round::none(), config).unwrap();
    let server = servers.into_iter().next().map(|lane| pager.server(lane).unwrap());
    let seen = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _service = server.map(SelfService::of_this_thread);
            for page in 0..PAGES {
                check(memory.guest(), page);
                assert!(memory.guest().write(page * PAGE_SIZE, MARK));
                seen.store(page, Ordering::Relaxed);
            }
        });
        for _ in 0..3 {
            let state = end_of(&pager).state;
            let PagerState::Failed(error) = state else { panic!("{transport}: there is no room: {state:?}") };
            assert!(matches!(*error, PagerError::NoRoom { .. }), "{transport}: {error}");
            assert!(seen.load(Ordering::Relaxed) < PAGES - 1, "it waits");
            pager.part();
            offered = export();
            let more = lanes(&mut offered);
            import.go_on(&mut pager, more, offered.regions(), config).unwrap();
        }
        end_of(&pager);
        pager.part();
        small.resize(64);
        offered = export();
        let more = lanes(&mut offered);
        import.go_on(&mut pager, more, offered.regions(), config).unwrap();
        let end = end_of(&pager);
        assert!(matches!(end.state, PagerState::Resident), "{transport}: {:?}", end.state);
    });
    assert_marked(&memory);
}

#[test]
fn whoever_needs_a_page_waits_until_there_is_room() {
    for transport in available() {
        for told in [FaultsTo::Pager, FaultsTo::Threads] {
            outlive(transport, told);
        }
    }
}
