//! Fuzzes the source's page map.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| postcopy_engine::fuzz::page_map(bytes));
