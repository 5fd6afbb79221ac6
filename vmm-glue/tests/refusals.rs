//! What must be refused, with a message that helps: files, amounts of memory, saved states.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use postcopy_guest::tiny::{TinyGuest, tiny_elf};
use postcopy_vmm::{BootSource, Console, STATE_VERSION, StateError, Vm, VmConfig, VmError};
use proptest::prelude::*;

fn boot(source: &BootSource, config: &VmConfig) -> VmError {
    let memory = memory(&VmConfig { memory_bytes: config.memory_bytes.max(4096), ..config.clone() });
    Vm::boot(config.clone(), memory, source, Console::Discard).map(drop).unwrap_err()
}

#[test]
fn a_file_that_is_no_kernel() {
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 8192], b"\x7fELF", &tiny_elf()[..100]] {
        let file = TempFile::new(bytes);
        let error = boot(&file.source(), &config(1, 16));
        assert!(matches!(error, VmError::NotAKernel(_)), "{error}");
        assert!(error.to_string().contains("bzImage"), "{error}");
    }
    let missing = BootSource { kernel: "/no/such/kernel".into(), initrd: None, cmdline: String::new() };
    let error = boot(&missing, &config(1, 16));
    assert!(matches!(error, VmError::BootFile { what: "kernel", .. }), "{error}");
}

/// The start of a bzImage that wants `init_size` bytes from 16 MiB.
fn bzimage(init_size: u32, version: u16, xloadflags: u16) -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    bytes[0x1f1] = 1;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&version.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    bytes[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
    bytes[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    bytes[0x258..0x260].copy_from_slice(&(16u64 << 20).to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    bytes
}

#[test]
fn a_kernel_that_cannot_be_entered_here() {
    for (bytes, word) in [(bzimage(0, 0x20a, 1), "2.10"), (bzimage(0, 0x20f, 0), "64-bit")] {
        let error = boot(&TempFile::new(&bytes).source(), &config(1, 64));
        assert!(matches!(error, VmError::BadKernel { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn too_little_memory_says_how_much_would_do() {
    let kernel = TempFile::new(&bzimage(48 << 20, 0x20f, 1));
    let initrd = TempFile::new(&vec![0; 1 << 20]);
    let source = BootSource { initrd: Some(initrd.0.clone()), ..kernel.source() };
    let error = boot(&source, &config(1, 32));
    let VmError::TooLittleMemory { have_mib: 32, need_mib } = error else { panic!("{error}") };
    assert_eq!(need_mib, 16 + 48 + 24 + 4);
    assert!(!matches!(boot(&source, &config(1, need_mib - 1)), VmError::Kvm { .. }));
}

#[test]
fn a_command_line_that_does_not_fit() {
    let kernel = TempFile::new(&bzimage(1 << 20, 0x20f, 1));
    let source = BootSource { cmdline: "x".repeat(3000), ..kernel.source() };
    let error = boot(&source, &config(1, 64));
    assert!(matches!(error, VmError::CommandLine { have: 3000, limit: 2047 }), "{error}");
}

#[test]
fn a_configuration_that_makes_no_sense() {
    let file = TempFile::new(&tiny_elf());
    for (cpus, memory_bytes) in [(0, 4 << 20), (33, 4 << 20), (1, 4 << 10)] {
        let error = boot(&file.source(), &VmConfig { cpus, memory_bytes });
        assert!(matches!(error, VmError::Config(_)), "{error}");
    }
    let error = Vm::boot(config(1, 8), memory(&config(1, 4)), &file.source(), Console::Discard).unwrap_err();
    assert!(matches!(error, VmError::Config(_)), "{error}");
}

fn restore(config: &VmConfig, state: &[u8]) -> Result<(), VmError> {
    Vm::restore(config.clone(), memory(config), state, Console::Discard).map(drop)
}

fn refusal(config: &VmConfig, state: &[u8]) -> StateError {
    match restore(config, state) {
        Err(VmError::State(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn saved() -> Option<(VmConfig, Vec<u8>)> {
    if !kvm_is_there() {
        return None;
    }
    let config = config(1, 3);
    let (vm, _memory, capture) = boot_tiny(TinyGuest::default(), &config);
    vm.start().unwrap();
    capture.wait_for_rounds(1);
    vm.pause().unwrap();
    Some((config, vm.save().unwrap()))
}

/// A state with its checksum put right again.
fn resealed(mut state: Vec<u8>) -> Vec<u8> {
    let checksum = crc32fast::hash(&state[24..]).to_le_bytes();
    state[16..20].copy_from_slice(&checksum);
    let len = (state.len() as u32 - 24).to_le_bytes();
    state[12..16].copy_from_slice(&len);
    state
}

#[test]
fn damaged_states_and_those_of_other_machines() {
    let Some((config, state)) = saved() else { return };
    assert!(restore(&config, &state).is_ok());
    assert_eq!(refusal(&config, b""), StateError::Magic);
    assert_eq!(refusal(&config, &vec![0; 17 << 20]), StateError::TooLong(17 << 20));
    assert!(matches!(refusal(&config, &state[..10]), StateError::Length { .. }));
    let mut other = state.clone();
    other[8] += 1;
    assert_eq!(
        refusal(&config, &other),
        StateError::Version { found: STATE_VERSION + 1, known: STATE_VERSION }
    );
    let longer = [&state[..], &[0]].concat();
    assert!(matches!(refusal(&config, &longer), StateError::Length { .. }));
    assert!(matches!(refusal(&config, &resealed(longer)), StateError::Contents(_)));
    for wrong in [VmConfig { cpus: 2, ..config.clone() }, common::config(1, 4)] {
        assert!(matches!(refusal(&wrong, &state), StateError::Machine { .. }));
    }
}

#[test]
fn no_truncation_and_no_flipped_bit_is_taken_for_a_state() {
    let Some((config, state)) = saved() else { return };
    for len in 0..state.len() {
        refusal(&config, &state[..len]);
    }
    for at in 0..state.len() {
        let mut flipped = state.clone();
        flipped[at] ^= 1 << (at % 8);
        refusal(&config, &flipped);
    }
}

#[test]
fn a_damaged_state_with_a_right_checksum_never_panics() {
    let Some((config, state)) = saved() else { return };
    let cases = ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() };
    proptest!(cases, |(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
                       cut in any::<prop::sample::Index>(), truncate in any::<bool>())| {
        let mut bad = state.clone();
        for (at, value) in damage {
            let at = 24 + at.index(bad.len() - 24);
            bad[at] = value;
        }
        if truncate {
            bad.truncate(24 + cut.index(bad.len() - 24));
        }
        // It may be refused, by us or by KVM, or describe another guest; it must not panic.
        let _ = restore(&config, &resealed(bad));
    });
}
