//! Fuzzes lane requests and grants.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| postcopy_transport::fuzz::lane_setup(bytes));
