//! Guests of a stock QEMU, moved by our engine: `pcvm receive --vmm qemu`, `pcvm migrate --qmp`.
//!
//! What needs a Linux guest is ignored unless asked for: it needs POSTCOPY_KERNEL and
//! POSTCOPY_INITRD (`scripts/test` sets them), and takes POSTCOPY_ACCELERATOR (`tcg` if not set) and
//! POSTCOPY_TRANSPORTS (`tcp` if not set).
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use postcopy_e2e::authority::Authority;
use postcopy_e2e::cutter::{Line, assert_cut, cut_after};
use postcopy_e2e::qemu::{LOOPBACK, NOBODY, Place, Plain, QemuGuest, address, library, transports};
use postcopy_e2e::{Scratch, assert_refused, free_port, pcvm, run, stderr, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// Messages before the one that hands the guest over; its state is in one or more pieces.
const BEFORE_STATE: i64 = 4;

fn runs(guest: &QemuGuest) -> bool {
    guest.status() == "running"
}

/// Moves a guest to a new place, there and back.
fn moves(name: &str, transport: &str, count: usize) {
    let scratch = Scratch::new(name);
    let machine = Plain::linux("pcguest.mb=64 pcguest.access=write");
    let mut guest = machine.start(&scratch, "q0");
    guest.wait_for_reports(2);
    for at in 1..=count {
        let shards = 1 + at % 3;
        let options = ["--shards", &shards.to_string(), "--landing", ["in-place", "pool"][at % 2]];
        let (next, to) = machine.receive(&scratch, &format!("q{at}"), address(), &options);
        let report = guest.migrate(&next, to, transport);
        assert_eq!(report["pager"]["shards"], shards, "{report}");
        let pages = &report["pager"]["pages"];
        assert!(pages["network_faults"].as_u64().unwrap() > 0, "{report}");
        let waited: Vec<u64> = serde_json::from_value(report["vcpu_blocktime_us"].clone()).unwrap();
        assert!(waited.len() == 2 && waited.iter().sum::<u64>() > 0, "its vCPUs waited for pages: {report}");
        let crossed = pages["fault_pages"].as_u64().unwrap() + pages["drain_pages"].as_u64().unwrap();
        assert!(crossed > 0 && report["state_bytes"].as_u64().unwrap() < 4 << 20, "{report}");
        println!(
            "{transport} move {at}: downtime {} µs, resident {} µs, {} faults",
            report["downtime_us"], report["resident_us"], pages["network_faults"]
        );
        next.wait_for_reports(1);
        next.verify();
        guest = next;
    }
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_stock_guest_moves_from_qemu_to_qemu_and_on() {
    let count = std::env::var("POSTCOPY_MOVES").map_or(4, |count| count.parse().unwrap());
    for transport in transports() {
        moves(&format!("stock-{transport}"), &transport, count);
    }
}

/// What QEMU copies itself: more than a side would hold at once, had it to.
#[test]
fn a_guest_whose_devices_have_much_memory_of_their_own_moves() {
    const BYTES: u64 = 80 << 20;
    let scratch = Scratch::new("stock-device-memory");
    let rom = scratch.file("device.rom");
    std::fs::write(&rom, vec![0xa5; BYTES as usize]).unwrap();
    let device = format!("e1000,romfile={}", rom.to_str().unwrap());
    let machine = Plain { more: vec!["-device".into(), device], ..Plain::firmware() };
    let guest = machine.start(&scratch, "q0");
    let (next, to) = machine.receive(&scratch, "q1", LOOPBACK, &[]);
    let report = guest.migrate(&next, to, "tcp");
    assert!(report["state_bytes"].as_u64().unwrap() > BYTES, "{report}");
    assert!(runs(&next));
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_stock_guest_moves_between_hosts_that_know_each_other() {
    let scratch = Scratch::new("stock-tls");
    let folder = Authority::default().folder(&scratch, "certificates", &LOOPBACK.to_string());
    let tls = ["--tls", folder.to_str().unwrap()];
    let machine = Plain::linux("pcguest.mb=64 pcguest.access=write pcguest.pace_us=100");
    let guest = machine.start(&scratch, "q0");
    guest.wait_for_reports(1);
    let (next, to) = machine.receive(&scratch, "q1", LOOPBACK, &tls);
    assert_refused(&guest.try_migrate(to, "tcp"), &["the peer is set up for TLS", "the guest runs on here"]);
    assert!(runs(&guest));
    let out = guest.try_migrate_with(to, &[&["--transport", "tcp"][..], &tls].concat());
    assert!(out.status.success(), "{}", stderr(&out));
    next.wait_for_reports(1);
    next.verify();
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_stock_guest_outlives_a_lost_network() {
    let scratch = Scratch::new("stock-lost");
    let machine = Plain::linux("pcguest.mb=64 pcguest.access=write");
    let source = machine.start(&scratch, "q0");
    source.wait_for_reports(2);
    let (next, to) = machine.receive(&scratch, "q1", LOOPBACK, &["--shards", "2"]);
    let line = Line::to(to, 8 << 20);
    let report = std::thread::scope(|scope| {
        let moving = scope.spawn(|| source.migrate(&next, line.address(), "tcp"));
        let arrived = || next.status_of_pcvm()["arrival"]["total_pages"].as_u64().unwrap_or(0);
        wait_until("it runs there", || next.status_of_pcvm()["state"] == "running" && arrived() > 0);
        line.cut();
        wait_until("it is stranded", || next.status_of_pcvm()["state"] == "stranded");
        let printed = next.console();
        std::thread::sleep(Duration::from_secs(1));
        assert!(!printed.contains("BAD") && !next.console().contains("BAD"));
        line.mend();
        moving.join().unwrap()
    });
    assert_eq!(report["pager"]["outstanding_pages"], 0, "{report}");
    next.wait_for_reports(1);
    next.verify();
}

/// Starts a migration whose source stands still as soon as the guest runs at the destination: most
/// of its memory never comes.
fn stranded(scratch: &Scratch) -> (QemuGuest, QemuGuest, std::process::Child) {
    let machine = Plain::linux("pcguest.mb=160 pcguest.access=write");
    let source = machine.start(scratch, "a");
    source.wait_for_reports(2);
    let (destination, to) = machine.receive(scratch, "b", LOOPBACK, &[]);
    let moving = source.migrate_until(to, "postcopy", "runs at the destination");
    kill_process(Pid::from_child(&moving), Signal::STOP).unwrap();
    (source, destination, moving)
}

#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_dead_pager_never_shows_a_stock_guest_zeros() {
    let scratch = Scratch::new("dead-pager");
    let (_source, destination, mut moving) = stranded(&scratch);
    let qemu = Orphan(destination.qemu());
    let arrival = || destination.status_of_pcvm()["arrival"].clone();
    wait_until("the pager has told of its pages", || arrival()["total_pages"].as_u64().unwrap() > 0);
    assert!(arrival()["outstanding_pages"].as_u64().unwrap() > 0, "all of it came: {}", arrival());
    kill_process(Pid::from_raw(destination.pid() as i32).unwrap(), Signal::KILL).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let printed = destination.console();
    assert!(!printed.contains("BAD") && !printed.contains("panic"), "{printed}");
    std::thread::sleep(Duration::from_secs(2));
    let lives = std::path::Path::new(&format!("/proc/{}", qemu.0)).exists();
    assert!(lives, "QEMU waits: {}", destination.log());
    assert_eq!(destination.console(), printed, "the guest waits");
    kill_process(Pid::from_child(&moving), Signal::KILL).unwrap();
    moving.wait().unwrap();
}

/// A process without a parent. Ended when dropped.
struct Orphan(i32);

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_raw(self.0).unwrap(), Signal::KILL);
    }
}

#[test]
fn a_connection_cut_before_the_handover_leaves_the_guest_running() {
    let scratch = Scratch::new("stock-cut");
    let machine = Plain::firmware();
    let source = machine.start(&scratch, "a");
    let before = source.settings();
    for messages in [1, BEFORE_STATE - 1, BEFORE_STATE, BEFORE_STATE + 1, BEFORE_STATE + 6] {
        let (destination, to) = machine.receive(&scratch, &format!("b{messages}"), LOOPBACK, &[]);
        let cut = SocketAddr::new(LOOPBACK, cut_after(messages, to.port()));
        let out = source.try_migrate(cut, "tcp");
        assert_cut(&out);
        assert!(runs(&source), "cut after {messages}");
        assert_eq!(source.settings(), before, "cut after {messages}");
        destination.wait_until("it has let go", || destination.log().contains("no guest was taken in"));
        destination.wait_until("it has ended", || !destination.lives());
    }
    // Unharmed: it can still be moved, and from there by QEMU itself.
    let (destination, to) = machine.receive(&scratch, "b", LOOPBACK, &[]);
    source.migrate(&destination, to, "tcp");
    assert!(runs(&destination));
    wait_until("QEMU is set up for moves of its own", || destination.settings() == before);
}

/// As whoever manages it may have left it: of these some would have its migration wait for them, and others have it begin one
/// that carries memory.
#[test]
fn a_guest_whose_migration_is_set_to_other_ends_moves_and_is_set_back() {
    let scratch = Scratch::new("stock-other-ends");
    let machine = Plain::firmware();
    let source = machine.start(&scratch, "a");
    let set = |others: &[&str], on: bool| {
        let each: Vec<_> = others.iter().map(|name| json!({"capability": name, "state": on})).collect();
        source.qmp("migrate-set-capabilities", json!({"capabilities": each}));
    };
    source.qmp("migrate-set-parameters", json!({"tls-creds": "theirs", "max-bandwidth": 1 << 20}));
    for other in ["pause-before-switchover", "postcopy-ram", "return-path", "multifd", "background-snapshot"]
    {
        set(&[other], true);
        let before = source.settings();
        let (_destination, to) = machine.receive(&scratch, &format!("cut-{other}"), LOOPBACK, &[]);
        let cut = SocketAddr::new(LOOPBACK, cut_after(BEFORE_STATE + 1, to.port()));
        assert_cut(&source.try_migrate(cut, "tcp"));
        assert!(runs(&source), "{other}");
        assert_eq!(source.settings(), before, "{other}");
        set(&[other], false);
    }
    set(&["pause-before-switchover", "return-path"], true);
    let (destination, to) = machine.receive(&scratch, "b", LOOPBACK, &[]);
    source.migrate(&destination, to, "tcp");
    assert!(runs(&destination));
}

#[test]
fn a_guest_that_qemu_itself_is_moving_is_left_to_it() {
    let scratch = Scratch::new("stock-moving");
    let machine = Plain::firmware();
    let source = machine.start(&scratch, "a");
    let (_destination, to) = machine.receive(&scratch, "b", LOOPBACK, &[]);
    let elsewhere = TcpListener::bind((LOOPBACK, 0)).unwrap();
    // So slow that it does not end.
    source.qmp("migrate-set-parameters", json!({"max-bandwidth": 4096}));
    source.qmp("migrate", json!({"uri": format!("tcp:{}", elsewhere.local_addr().unwrap())}));
    let is_moving = || source.qmp("query-migrate", json!({}))["status"] == "active";
    wait_until("QEMU moves it", is_moving);
    assert_refused(
        &source.try_migrate(to, "tcp"),
        &["QEMU is moving it already", "active", "migrate_cancel"],
    );
    assert!(is_moving() && runs(&source));
}

/// Its devices touch memory as they are loaded, and that does not come.
#[test]
#[ignore = "needs a Linux kernel: run by scripts/test"]
fn a_source_that_is_lost_while_the_state_is_loaded_leaves_the_guest_running() {
    let scratch = Scratch::new("stock-lost-early");
    let machine = Plain::linux("pcguest.mb=64 pcguest.access=write pcguest.pace_us=100");
    let source = machine.start(&scratch, "a");
    source.wait_for_reports(1);
    let (destination, to) = machine.receive(&scratch, "b", LOOPBACK, &[]);
    let line = Line::to(to, u64::MAX);
    line.hush_lanes();
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| source.try_migrate(line.address(), "tcp"));
        wait_until("all of the state is there", || line.still_for() > Duration::from_secs(1));
        assert!(!moving.is_finished(), "it did not wait for memory: {}", stderr(&moving.join().unwrap()));
        line.cut();
        assert_refused(&moving.join().unwrap(), &["the guest runs on here"]);
    });
    assert!(runs(&source));
    // It was the source that it did not wait for any longer, and not its QEMU.
    destination.wait_until("it has let go", || destination.log().contains("no guest was taken in"));
    assert!(destination.log().contains("the peer closed the connection"), "{}", destination.log());
    destination.wait_until("it has ended", || !destination.lives());
    let (destination, to) = machine.receive(&scratch, "c", LOOPBACK, &[]);
    source.migrate(&destination, to, "tcp");
    destination.wait_for_reports(1);
    destination.verify();
}

#[test]
fn a_guest_whose_memory_cannot_be_reached() {
    let scratch = Scratch::new("stock-ram");
    for (name, backend, words) in [
        ("none", None, ["not shared", "memory-backend-file"]),
        ("private", Some("memory-backend-ram,id=ram0,size=MIBM"), ["not shared", "share=on"]),
        (
            "anonymous",
            Some("memory-backend-ram,id=ram0,size=MIBM,share=on"),
            ["memory-backend-ram", "share=on"],
        ),
    ] {
        let machine = Plain { backend: backend.map(str::to_owned), ..Plain::firmware() };
        let source = machine.start(&scratch, name);
        let refused = source.try_migrate(NOBODY, "tcp");
        assert_refused(&refused, &[&["this guest cannot be moved"], &words[..]].concat());
        assert!(runs(&source));
        let out = machine.receive_to_the_end(&scratch, &format!("{name}-there"));
        assert_refused(&out, &[&["this guest cannot be moved"], &words[..]].concat());
    }
}

#[test]
fn a_memfd_serves_as_well_as_a_file_where_qemu_lets_it() {
    let scratch = Scratch::new("stock-memfd");
    let machine = Plain::in_a_memfd();
    let source = machine.start(&scratch, "a");
    if source.version() >= (8, 1) {
        assert_refused(
            &source.try_migrate(NOBODY, "tcp"),
            &["a memfd, which QEMU from 8.1 on", "memory-backend-file"],
        );
        return;
    }
    let (destination, to) = machine.receive(&scratch, "b", LOOPBACK, &[]);
    source.migrate(&destination, to, "tcp");
    assert!(runs(&destination));
}

#[test]
fn arguments_that_are_pcvms_own() {
    let scratch = Scratch::new("stock-arguments");
    for (more, word) in
        [("-incoming defer", "-incoming"), ("-daemonize", "-daemonize"), ("-loadvm x", "-loadvm")]
    {
        let more = more.split(' ').map(str::to_owned).collect();
        let machine = Plain { more, ..Plain::firmware() };
        let out = machine.receive_to_the_end(&scratch, "b");
        assert_refused(&out, &["leave", word, "out of QEMU's arguments"]);
    }
    let control = scratch.file("refused.sock");
    let fixed = ["receive", "--listen", "127.0.0.1:0", "--control", control.to_str().unwrap()];
    assert_refused(&pcvm(&[&fixed[..], &["--vmm", "qemu"]].concat()), &["QEMU's command line", "--"]);
    assert_refused(&pcvm(&[&fixed[..], &["--", "qemu"]].concat()), &["--vmm qemu"]);
    let itself = ["--vmm", "qemu", "--self-service", "on", "--", "qemu"];
    assert_refused(&pcvm(&[&fixed[..], &itself].concat()), &["cannot serve their own faults"]);
    let library = ["--vmm", "qemu", "--handover-library", "/nowhere.so", "--", "qemu"];
    assert_refused(
        &pcvm(&[&fixed[..], &library].concat()),
        &["/nowhere.so is missing", "--handover-library"],
    );
}

#[test]
fn machines_that_do_not_fit() {
    let scratch = Scratch::new("stock-unlike");
    let here = Plain { kind: "pc-q35-7.2".into(), ..Plain::firmware() };
    let source = here.start(&scratch, "a");
    type Change = fn(&mut Plain);
    let unlike: [(&str, Change, [&str; 2]); 3] = [
        ("kind", |there| there.kind = "pc-q35-7.1".into(), ["pc-q35-7.2", "pc-q35-7.1"]),
        ("cpus", |there| there.cpus = 1, ["2 vCPUs", "-smp 2"]),
        ("size", |there| there.mib = 128, ["bytes of RAM", "-m 256M"]),
    ];
    for (name, change, words) in unlike {
        let mut there = here.clone();
        change(&mut there);
        let (destination, to) = there.receive(&scratch, name, LOOPBACK, &[]);
        let out = source.try_migrate(to, "tcp");
        assert_refused(&out, &[&["does not fit this side"], &words[..]].concat());
        assert!(runs(&source));
        drop(destination);
    }
    // An alias of the machine type is that type.
    let alias = Plain { kind: "q35".into(), ..here };
    if source.version().0 == 7 {
        let (destination, to) = alias.receive(&scratch, "alias", LOOPBACK, &[]);
        source.migrate(&destination, to, "tcp");
        assert!(runs(&destination));
    }
}

#[test]
fn a_guest_that_does_not_run_and_a_monitor_that_is_taken() {
    let scratch = Scratch::new("stock-monitor");
    let machine = Plain { more: vec!["-S".into()], ..Plain::firmware() };
    let source = machine.start(&scratch, "a");
    assert_refused(&source.try_migrate(NOBODY, "tcp"), &["does not run", "cont"]);
    // Somebody else is at the monitor.
    let mut other = std::os::unix::net::UnixStream::connect(&source.place().qmp).unwrap();
    other.read_exact(&mut [0]).unwrap();
    assert_refused(&source.try_migrate(NOBODY, "tcp"), &["cannot reach QEMU's monitor", "other client"]);
    let nobody = pcvm(&["migrate", "--qmp", "/nowhere.qmp", "--to", "127.0.0.1:9"]);
    assert_refused(&nobody, &["cannot reach QEMU's monitor", "-qmp"]);
}

#[test]
fn a_balloon_that_is_not_there_or_says_nothing() {
    let scratch = Scratch::new("stock-balloon");
    for (at, (more, said)) in [
        (vec![], "has no balloon (-device virtio-balloon-pci,deflate-on-oom=on)"),
        (vec!["-device", "virtio-balloon-pci"], "does the guest have the driver"),
    ]
    .into_iter()
    .enumerate()
    {
        let more = more.into_iter().map(str::to_owned).collect();
        let machine = Plain { more, ..Plain::firmware() };
        let source = machine.start(&scratch, &format!("a{at}"));
        let (monitor, nobody) = (source.place().qmp.to_str().unwrap(), NOBODY.to_string());
        let out = pcvm(&["migrate", "--quiet", "--balloon", "95", "--qmp", monitor, "--to", &nobody]);
        assert_refused(&out, &["cannot be taken", said, "leave --balloon out", "the guest runs on here"]);
        assert!(runs(&source));
    }
}

#[test]
fn a_guest_whose_qemu_is_another_users() {
    let scratch = Scratch::new("stock-user");
    let machine = Plain::firmware();
    let theirs = Plain { more: ["-runas", "nobody"].map(str::to_owned).into(), ..machine.clone() };
    let source = theirs.start(&scratch, "a");
    let (destination, to) = machine.receive(&scratch, "b", LOOPBACK, &[]);
    source.migrate(&destination, to, "tcp");
    assert!(runs(&destination));
}

#[test]
fn a_guest_of_another_vmm_is_refused() {
    let scratch = Scratch::new("stock-other");
    let source = Plain::firmware().start(&scratch, "a");
    let port = free_port();
    let ours = postcopy_e2e::Pcvm::receive(&scratch, "b", port, &[]);
    let out = source.try_migrate(SocketAddr::new(LOOPBACK, port), "tcp");
    assert_refused(&out, &["qemu/2", "postcopy-vmm/1", "the guest runs on here"]);
    assert!(runs(&source));
    drop(ours);
}

#[test]
fn the_library_leaves_other_programs_alone_and_refuses_without_a_pager() {
    let scratch = Scratch::new("stock-library");
    let library = library();
    let preloaded = |command: &str| {
        let mut process = Command::new("sh");
        process.args(["-c", command]).env("LD_PRELOAD", &library);
        run(process.env("POSTCOPY_HANDOVER", scratch.file("nobody")))
    };
    let other = preloaded("echo as always");
    assert!(other.status.success() && other.stdout == b"as always\n" && other.stderr.is_empty(), "{other:?}");
    let what_it_has = preloaded("ls -l /proc/self/fd && ls /proc/self/task | wc -l");
    let listed = String::from_utf8_lossy(&what_it_has.stdout).into_owned();
    assert_eq!(listed.lines().last(), Some("1"), "one thread: {listed}");
    assert!(!listed.contains("postcopy") && !listed.contains("userfaultfd"), "{listed}");
    let private = preloaded("qemu-system-x86_64 --version");
    assert!(private.status.success() && private.stderr.is_empty(), "{private:?}");
    let place = Place::apart(&scratch, "alone");
    let line = Plain::firmware().command_line(&place);
    let mut qemu = Command::new(&line[0]);
    qemu.args(&line[1..]).env("LD_PRELOAD", &library).env("POSTCOPY_HANDOVER", scratch.file("nobody"));
    assert_refused(&run(&mut qemu), &["no pager takes this guest's memory", "pcvm receive --vmm qemu"]);
}
