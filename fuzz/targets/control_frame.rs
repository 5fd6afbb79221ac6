//! Fuzzes the frames of a control connection.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| postcopy_engine::fuzz::control_frame(bytes));
