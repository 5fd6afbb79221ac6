//! Fuzzes the first bytes of a connection.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| postcopy_engine::fuzz::preamble(bytes));
