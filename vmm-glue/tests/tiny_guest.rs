//! A real guest on this host's KVM: it runs, stops, moves and ends.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::*;
use postcopy_guest::tiny::{TESTED_FROM, TinyGuest, word_at};
use postcopy_vmm::{ExitReason, Vm, VmError};

#[test]
fn it_boots_counts_and_resets_itself() {
    if !kvm_is_there() {
        return;
    }
    let (vm, memory, capture) = boot_tiny(TinyGuest { rounds: 3, ..Default::default() }, &config(1, 4));
    assert_eq!(capture.text(), "");
    vm.start().unwrap();
    assert_eq!(vm.exit_event().wait(PATIENCE), Some(ExitReason::Reset));
    assert_eq!(capture.text(), "tiny: up\ntiny: round 1 ok\ntiny: round 2 ok\ntiny: round 3 ok\n");
    let mut word = [0; 8];
    assert!(memory.guest().read(TESTED_FROM + 512, &mut word));
    assert_eq!(u64::from_le_bytes(word), word_at(TESTED_FROM + 512, 3));
    assert!(matches!(vm.pause(), Err(VmError::Ended(ExitReason::Reset))));
    assert!(matches!(vm.start(), Err(VmError::Ended(_))));
    assert!(matches!(vm.save(), Err(VmError::Ended(_))));
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    if !kvm_is_there() {
        return;
    }
    let (vm, _memory, capture) = boot_tiny(TinyGuest::default(), &config(1, 4));
    vm.start().unwrap();
    for _ in 0..20 {
        capture.wait_for_rounds(1);
        assert!(matches!(vm.save(), Err(VmError::NotPaused(_))));
        vm.pause().unwrap();
        vm.pause().unwrap();
        let before = capture.text();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(capture.text(), before);
        vm.start().unwrap();
    }
    let rounds = good_rounds(&capture.text());
    assert!(rounds.iter().copied().eq(1..=rounds.len() as u64), "{rounds:?}");
}

#[test]
fn it_goes_on_in_another_vm_with_a_copy_of_its_memory() {
    if !kvm_is_there() {
        return;
    }
    let config = config(1, 4);
    let (mut vm, mut memory, mut capture) = boot_tiny(TinyGuest::default(), &config);
    vm.start().unwrap();
    let mut last = capture.wait_for_rounds(2);
    for _ in 0..5 {
        vm.pause().unwrap();
        let state = vm.save().unwrap();
        assert_eq!(vm.save().unwrap().len(), state.len());
        let whole = capture.text();
        let next_memory = copy(&memory);
        let next_capture = common::Capture::default();
        let next = Vm::restore(config.clone(), next_memory.clone(), &state, next_capture.console()).unwrap();
        drop(vm);
        next.start().unwrap();
        next_capture.wait_for_rounds(2);
        let joined = whole.clone() + &next_capture.text();
        let rounds = good_rounds(&joined);
        assert!(rounds.iter().copied().eq(1..=rounds.len() as u64), "{joined}");
        assert!(*rounds.last().unwrap() > last);
        last = *rounds.last().unwrap();
        (vm, memory, capture) = (next, next_memory, next_capture);
        capture.prepend(&whole);
    }
}

#[test]
fn input_is_read_also_when_it_was_typed_before_a_move() {
    if !kvm_is_there() {
        return;
    }
    let config = config(1, 3);
    let (vm, memory, capture) = boot_tiny(TinyGuest::default(), &config);
    assert_eq!(vm.console_input(b"a"), 1);
    vm.start().unwrap();
    capture.wait_for_text("tiny: got a\n");
    vm.pause().unwrap();
    assert_eq!(vm.console_input(b"bt"), 2);
    let state = vm.save().unwrap();
    let capture = Capture::default();
    let vm = Vm::restore(config, copy(&memory), &state, capture.console()).unwrap();
    vm.start().unwrap();
    capture.wait_for_text("tiny: got b\n");
    capture.wait_for_text("tiny: got t\n");
    assert_eq!(vm.exit_event().wait(PATIENCE), Some(ExitReason::TripleFault));
}

#[test]
fn it_notices_memory_that_was_changed() {
    if !kvm_is_there() {
        return;
    }
    let (vm, memory, capture) = boot_tiny(TinyGuest::default(), &config(1, 3));
    vm.start().unwrap();
    capture.wait_for_rounds(1);
    vm.pause().unwrap();
    assert!(memory.guest().write(TESTED_FROM + 8 * 4096, &[0xee; 4096]));
    vm.start().unwrap();
    capture.wait_for_text(&format!("tiny: BAD page {}\n", TESTED_FROM / 4096 + 8));
}

#[test]
fn dropping_a_running_guest_ends_it_at_once() {
    if !kvm_is_there() {
        return;
    }
    let (vm, _memory, capture) = boot_tiny(TinyGuest::default(), &config(1, 3));
    vm.start().unwrap();
    capture.wait_for_rounds(1);
    let start = Instant::now();
    drop(vm);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn several_vcpus_are_made_saved_and_restored() {
    if !kvm_is_there() {
        return;
    }
    let config = config(3, 3);
    let (vm, memory, capture) = boot_tiny(TinyGuest::default(), &config);
    vm.start().unwrap();
    capture.wait_for_rounds(1);
    vm.pause().unwrap();
    let state = vm.save().unwrap();
    let capture = Capture::default();
    let vm = Vm::restore(config, copy(&memory), &state, capture.console()).unwrap();
    vm.start().unwrap();
    capture.wait_for_rounds(2);
}

/// Prints how long each step of a move takes without its memory: `--ignored --nocapture timings`.
#[test]
#[ignore = "a measurement, best of a release build"]
fn timings() {
    let config = config(1, 64);
    let (vm, memory, capture) = boot_tiny(TinyGuest::default(), &config);
    vm.start().unwrap();
    capture.wait_for_rounds(1);
    let mut steps: [Vec<Duration>; 5] = Default::default();
    for _ in 0..50 {
        vm.start().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let mut last = Instant::now();
        let mut lap = |step: usize| {
            let now = Instant::now();
            steps[step].push(now - std::mem::replace(&mut last, now));
        };
        vm.pause().unwrap();
        lap(0);
        let state = vm.save().unwrap();
        lap(1);
        let console = postcopy_vmm::Console::Discard;
        let prepared = Vm::prepare(config.clone(), memory.clone(), console).unwrap();
        lap(2);
        let other = prepared.restore(&state).unwrap();
        lap(3);
        drop(other);
        lap(4);
    }
    for (name, mut times) in ["pause", "save", "prepare", "restore", "drop"].into_iter().zip(steps) {
        times.sort_unstable();
        println!("{name}: median {:?}, longest {:?}", times[times.len() / 2], times.last().unwrap());
    }
}
