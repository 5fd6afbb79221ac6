//! Fuzzes what the client of a TCP lane asks.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| postcopy_transport::fuzz::tcp_responder(bytes));
