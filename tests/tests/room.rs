//! Guests that a host has no room for: refused before anything stops. Of a stock QEMU: `stock_room.rs`.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::path::Path;

use postcopy_e2e::{Pcvm, Scratch, assert_refused, free_port};

/// The guest has 8 MiB.
fn refused(name: &str, more: &[&str], prepare: impl FnOnce(&Pcvm), words: &[&str]) {
    let scratch = Scratch::new(name);
    let port = free_port();
    let source = Pcvm::run_tiny(&scratch, "a");
    let destination = Pcvm::receive(&scratch, "b", port, more);
    prepare(&destination);
    let out = source.try_migrate(&format!("127.0.0.1:{port}"), &[]);
    assert_refused(&out, &[words, &["8388608 bytes of guest memory", "the guest runs on here"]].concat());
    source.assert_runs();
}

#[test]
fn a_guest_that_is_larger_than_is_allowed() {
    refused("room-limit", &["--memory-limit", "7M"], |_| {}, &["at most 7340032 bytes", "--memory-limit"]);
}

#[test]
#[ignore = "needs cgroup 2: run by scripts/test in the lab"]
fn a_guest_that_its_cgroup_has_no_room_for() {
    let root = Path::new("/sys/fs/cgroup");
    let own = root.join(format!("postcopy-room-{}", std::process::id()));
    let limit = |destination: &Pcvm| {
        std::fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
        std::fs::create_dir(&own).unwrap();
        std::fs::write(own.join("memory.max"), "7M").unwrap();
        std::fs::write(own.join("cgroup.procs"), destination.pid().to_string()).unwrap();
    };
    refused("room-cgroup", &[], limit, &["this host has ", " bytes left", "--memory-limit"]);
    std::fs::remove_dir(&own).unwrap();
}
