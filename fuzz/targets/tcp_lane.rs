//! Fuzzes what the server of a TCP lane answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| postcopy_transport::fuzz::tcp_lane(bytes));
