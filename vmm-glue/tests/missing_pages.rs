//! A guest restored over memory that has not arrived: nothing is touched before the start, and
//! what happens to a vCPU that waits for a page.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::pager::{Pager, missing, next_fault, serve};
use common::*;
use postcopy_engine::memory::GuestMemory;
use postcopy_guest::tiny::TinyGuest;
use postcopy_vmm::{Console, Vm, VmError};

/// A paused guest's memory and state.
fn source() -> (GuestMemory, Vec<u8>) {
    let (vm, memory, capture) = boot_tiny(TinyGuest::default(), &config(1, 4));
    vm.start().unwrap();
    capture.wait_for_rounds(2);
    vm.pause().unwrap();
    (memory, vm.save().unwrap())
}

#[test]
fn restore_and_save_touch_no_page_and_the_guest_fetches_each_once() {
    if !kvm_is_there() {
        return;
    }
    let (source, state) = source();
    let memory = memory(&config(1, 4));
    let pager = Pager::start(missing(&memory), source, memory.clone());
    let capture = Capture::default();
    let vm = Vm::restore(config(1, 4), memory.clone(), &state, capture.console()).unwrap();
    vm.save().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(pager.served(), 0, "restore touched guest memory");
    vm.start().unwrap();
    capture.wait_for_rounds(2);
    vm.pause().unwrap();
    let served = pager.served();
    assert!((512..=1024).contains(&served), "{served} pages served");
    vm.start().unwrap();
    capture.wait_for_rounds(1);
    assert_eq!(pager.served(), served);
    drop(vm);
}

#[test]
fn a_vcpu_that_waits_for_a_page_can_be_paused_and_goes_on() {
    if !kvm_is_there() {
        return;
    }
    let (source, state) = source();
    let memory = memory(&config(1, 4));
    let uffd = missing(&memory);
    let capture = Capture::default();
    let vm = Vm::restore(config(1, 4), memory.clone(), &state, capture.console()).unwrap();
    vm.start().unwrap();
    let fault = next_fault(&uffd, PATIENCE).unwrap();
    let start = Instant::now();
    let result = vm.pause_within(Duration::from_millis(500));
    println!("pause of a vCPU that waits for a page: {result:?} after {:?}", start.elapsed());
    serve(&uffd, &source, &memory, fault);
    if let Err(error) = result {
        assert!(matches!(error, VmError::PauseTimeout { .. }), "{error}");
    }
    let _pager = Pager::start(uffd, source, memory);
    vm.start().unwrap();
    capture.wait_for_rounds(2);
}

#[test]
fn a_vcpu_that_waits_for_a_page_can_be_ended() {
    if !kvm_is_there() {
        return;
    }
    let (_source, state) = source();
    let memory = memory(&config(1, 4));
    let uffd = missing(&memory);
    let vm = Vm::restore(config(1, 4), memory, &state, Console::Discard).unwrap();
    vm.start().unwrap();
    next_fault(&uffd, PATIENCE).unwrap();
    let start = Instant::now();
    drop(vm);
    println!("end of a vCPU that waits for a page: {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(6));
}
