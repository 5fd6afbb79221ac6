//! Fuzzes the saved state of a machine.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| postcopy_vmm::fuzz_state(bytes));
