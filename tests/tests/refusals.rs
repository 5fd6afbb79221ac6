//! Wrong input and broken peers: one clear line with the remedy, a failing exit status, and the
//! guest, where there is one, runs on at the side that owns it.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use postcopy_e2e::cutter::{assert_cut, cut_after};
use postcopy_e2e::strangers::Strangers;
use postcopy_e2e::{Pcvm, Scratch, assert_refused, free_port, pcvm, program, receive_args, run, stderr};

/// Messages before the one that hands the guest over: Offer, Accept, Granted, LanesReady, one piece of
/// state, Recent, StateEnd, StateLoaded.
const BEFORE_COMMIT: i64 = 8;

fn run_args(scratch: &Scratch, kernel: &Path, memory: &str) -> Vec<String> {
    let (control, kernel) = (scratch.file("refused.sock"), kernel.to_str().unwrap());
    [
        "run",
        "--kernel",
        kernel,
        "--memory",
        memory,
        "--console",
        "none",
        "--control",
        control.to_str().unwrap(),
    ]
    .map(str::to_owned)
    .to_vec()
}

#[test]
fn a_port_in_use() {
    let scratch = Scratch::new("port-in-use");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let out =
        run(Command::new(program("pcvm"))
            .args(receive_args(&scratch, &taken.local_addr().unwrap().to_string())));
    assert_refused(&out, &["cannot listen on 127.0.0.1:", "in use", "choose another port"]);
}

#[test]
fn an_address_that_is_none() {
    let scratch = Scratch::new("no-address");
    let out = run(Command::new(program("pcvm")).args(receive_args(&scratch, "nowhere")));
    assert_refused(&out, &["`nowhere` is no address", "HOST:PORT"]);
}

#[test]
fn a_kernel_that_is_none() {
    let scratch = Scratch::new("no-kernel");
    let file = scratch.file("vmlinuz");
    std::fs::write(&file, b"#!/bin/sh\necho I am no kernel\n".repeat(100)).unwrap();
    let out = run(Command::new(program("pcvm")).args(run_args(&scratch, &file, "64M")));
    assert_refused(&out, &["is no kernel", "bzImage"]);
    let out = run(Command::new(program("pcvm")).args(run_args(&scratch, &scratch.file("missing"), "64M")));
    assert_refused(&out, &["cannot read kernel", "missing"]);
}

#[test]
fn too_little_memory() {
    let scratch = Scratch::new("too-little");
    let kernel = scratch.tiny_kernel();
    let out = run(Command::new(program("pcvm")).args(run_args(&scratch, &kernel, "64K")));
    assert_refused(&out, &["memory", "at least"]);
}

#[test]
fn no_kvm() {
    let scratch = Scratch::new("no-kvm");
    let kernel = scratch.tiny_kernel();
    for args in [run_args(&scratch, &kernel, "8M"), receive_args(&scratch, "127.0.0.1:0")] {
        // A mount namespace whose /dev has userfaultfd and nothing else.
        let script = "mkdir -p /run/postcopy-dev && mount -t tmpfs none /run/postcopy-dev && \
                      cp -a /dev/userfaultfd /dev/null /run/postcopy-dev/ && \
                      mount --move /run/postcopy-dev /dev && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(program("pcvm")).args(args);
        assert_refused(&run(&mut command), &["/dev/kvm is missing", "load kvm-intel or kvm-amd"]);
    }
}

#[test]
fn userfaultfd_refused() {
    let scratch = Scratch::new("no-uffd");
    // Where anybody may execute it.
    let copy = scratch.file("pcvm");
    std::fs::copy(program("pcvm"), &copy).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(copy);
    let out = run(command.args(receive_args(&scratch, "127.0.0.1:0")));
    assert_refused(&out, &["userfaultfd is refused", "CAP_SYS_PTRACE", "/dev/userfaultfd"]);
}

#[test]
fn no_rdma_device() {
    if std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some()) {
        println!("this machine has an RDMA device: there is nothing to refuse");
        return;
    }
    let scratch = Scratch::new("no-rdma");
    let mut args = receive_args(&scratch, "127.0.0.1:0");
    args.extend(["--transport", "verbs"].map(str::to_owned));
    let out = run(Command::new(program("pcvm")).args(args));
    assert_refused(&out, &["transport verbs is not available here"]);

    let source = Pcvm::run_tiny(&scratch, "a");
    let out = source.try_migrate("127.0.0.1:1", &["--transport", "verbs"]);
    assert_refused(&out, &["transport verbs is not available here", "the guest runs on here"]);
    source.wait_for_progress();
}

#[test]
fn a_peer_that_is_not_there() {
    let scratch = Scratch::new("unreachable");
    let source = Pcvm::run_tiny(&scratch, "a");
    let out = source.try_migrate(&format!("127.0.0.1:{}", free_port()), &[]);
    assert_refused(&out, &["cannot reach 127.0.0.1:", "is the destination listening there?", "runs on here"]);
    source.wait_for_progress();
    assert_eq!(source.status()["state"], "running");
}

/// A peer that answers the greeting with `answer`.
fn impostor(answer: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut greeting = [0; 32];
        stream.read_exact(&mut greeting)?;
        stream.write_all(&answer)
    });
    port
}

#[test]
fn a_peer_of_another_version_or_of_another_kind() {
    let scratch = Scratch::new("version");
    let source = Pcvm::run_tiny(&scratch, "a");
    let mut newer = [0u8; 32];
    newer[..8].copy_from_slice(b"PCOPYMIG");
    let ours = postcopy_engine::session::PROTOCOL_VERSION;
    newer[8..10].copy_from_slice(&(ours + 1).to_le_bytes());
    let out = source.try_migrate(&format!("127.0.0.1:{}", impostor(newer.to_vec())), &[]);
    let versions = format!("speaks protocol version {}, this program {ours}", ours + 1);
    assert_refused(&out, &[&versions, "same release", "runs on here"]);
    let web = b"HTTP/1.1 400 Bad Request\r\n\r\n and more".to_vec();
    let out = source.try_migrate(&format!("127.0.0.1:{}", impostor(web)), &[]);
    assert_refused(&out, &["does not speak this protocol", "runs on here"]);
    source.wait_for_progress();
}

#[test]
fn a_stranger_does_not_disturb_a_receiver() {
    let scratch = Scratch::new("stranger");
    let port = free_port();
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    for said in
        [&b"GET / HTTP/1.1\r\n\r\n                  "[..], b"PCOPYMIG\x09\0                      ", b""]
    {
        let mut stranger = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stranger.write_all(said).unwrap();
    }
    let source = Pcvm::run_tiny(&scratch, "a");
    source.migrate(&format!("127.0.0.1:{port}"), &[]);
    destination.wait_for_progress();
}

#[test]
fn strangers_who_say_nothing_do_not_keep_a_source_waiting() {
    let scratch = Scratch::new("silent");
    let port = free_port();
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    let source = Pcvm::run_tiny(&scratch, "a");
    let _strangers = Strangers::at(port);
    source.migrate(&format!("127.0.0.1:{port}"), &["--transport", "tcp"]);
    destination.wait_for_progress();
}

#[test]
fn a_source_that_is_gone_before_it_has_offered_anything_is_not_missed() {
    let scratch = Scratch::new("gone");
    let port = free_port();
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    let source = Pcvm::run_tiny(&scratch, "a");
    let out = source.try_migrate(&format!("127.0.0.1:{}", cut_after(0, port)), &[]);
    assert_refused(&out, &["the guest runs on here"]);
    source.migrate(&format!("127.0.0.1:{port}"), &[]);
    destination.wait_for_progress();
}

#[test]
fn a_connection_cut_at_each_step_before_the_handover() {
    let scratch = Scratch::new("cut");
    let source = Pcvm::run_tiny(&scratch, "a");
    for messages in 1..BEFORE_COMMIT {
        let port = free_port();
        let destination = Pcvm::receive(&scratch, &format!("b{messages}"), port, &[]);
        let out = source.try_migrate(&format!("127.0.0.1:{}", cut_after(messages, port)), &[]);
        assert_cut(&out);
        source.wait_for_progress();
        assert_eq!(source.status()["state"], "running", "cut after {messages}");
        let (ended_well, log) = destination.wait();
        assert!(!ended_well && log.contains("no guest was taken in"), "cut after {messages}: {log}");
        assert_eq!(log.lines().filter(|line| line.starts_with("pcvm:")).count(), 1, "{log}");
    }
    // Unharmed: it can still be moved.
    let port = free_port();
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    source.migrate(&format!("127.0.0.1:{port}"), &[]);
    destination.wait_for_progress();
    assert!(!destination.console().contains("BAD"));
}

#[test]
fn a_handover_that_does_not_arrive_is_in_doubt_and_can_be_taken_back() {
    let scratch = Scratch::new("doubt-here");
    let source = Pcvm::run_tiny(&scratch, "a");
    let port = free_port();
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    let cut = format!("127.0.0.1:{}", cut_after(BEFORE_COMMIT, port));
    let out = source.try_migrate(&cut, &["--patience", "1"]);
    assert_refused(&out, &["in doubt", "not reached again", "stays stopped here", "pcvm resolve"]);
    assert_eq!(source.status()["state"], "in-doubt");
    let (ended_well, _) = destination.wait();
    assert!(!ended_well, "the destination never got the guest");
    let printed = source.console();

    let control = source.control().to_str().unwrap();
    let out = pcvm(&["resolve", "--control", control, "--guest", "here"]);
    assert!(out.status.success(), "{}", stderr(&out));
    source.wait_for_progress();
    assert!(source.console().len() > printed.len() && !source.console().contains("BAD"));
    let out = pcvm(&["resolve", "--control", control, "--guest", "here"]);
    assert_refused(&out, &["nothing is in doubt"]);
}

#[test]
fn a_confirmation_that_does_not_arrive_leaves_the_guest_at_the_destination() {
    let scratch = Scratch::new("doubt-there");
    let source = Pcvm::run_tiny(&scratch, "a");
    let port = free_port();
    let destination = Pcvm::receive(&scratch, "b", port, &[]);
    let cut = format!("127.0.0.1:{}", cut_after(BEFORE_COMMIT + 1, port));
    let out = source.try_migrate(&cut, &["--patience", "0"]);
    assert_refused(&out, &["in doubt"]);
    // It runs there, and gets its memory, since the lanes do not need the control connection.
    destination.wait_for_progress();
    assert!(!destination.console().contains("BAD"));
    let stopped = source.console();
    let out = pcvm(&["resolve", "--control", source.control().to_str().unwrap(), "--guest", "there"]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert_eq!(source.status()["state"], "kept");
    assert_eq!(source.console(), stopped, "it must not run at both sides");
}

#[test]
fn a_limit_that_would_let_nothing_cross() {
    for (limit, said) in [("0", "nothing would come"), ("fast", "use K, M or G")] {
        let limit = ["--max-bandwidth", limit];
        let receive = ["receive", "--listen", "127.0.0.1:0", "--control", "/none"];
        let migrate = ["migrate", "--qmp", "/none", "--to", "127.0.0.1:1"];
        for command in [receive, migrate] {
            let out = pcvm(&[&command[..], &limit].concat());
            assert!(!out.status.success() && stderr(&out).contains(said), "{}", stderr(&out));
        }
    }
}

#[test]
fn a_control_socket_that_is_not_there_or_taken() {
    let scratch = Scratch::new("control");
    let out = pcvm(&["status", "--control", scratch.file("none.sock").to_str().unwrap()]);
    assert_refused(&out, &["cannot reach", "none.sock", "pcvm run"]);
    let source = Pcvm::run_tiny(&scratch, "refused");
    let out = run(Command::new(program("pcvm")).args(run_args(&scratch, &scratch.tiny_kernel(), "8M")));
    assert_refused(&out, &["another process is controlled by"]);
    source.wait_for_progress();
}

#[test]
fn a_round_of_pre_copy_where_pages_land_in_a_pool() {
    let scratch = Scratch::new("pool-hybrid");
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, &["--again", "--landing", "pool"]);
    let out = source.try_migrate(&format!("127.0.0.1:{port}"), &["--mode", "hybrid"]);
    assert_refused(&out, &["--landing in-place"]);
    source.wait_for_progress();
    assert_eq!(source.status()["state"], "running");
    source.migrate(&format!("127.0.0.1:{port}"), &["--mode", "postcopy"]);
    destination.wait_for_progress();
}
