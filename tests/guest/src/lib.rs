//! Guests for tests.
//!
//! * [`tiny`]: a few hundred instructions that need no operating system, for hosts where booting
//!   one takes too long.
//! * Everything else is the program of the test initramfs (`main.rs`), which runs as process 1 of
//!   a virtual machine or as a plain process: it walks memory that it can verify to the last byte,
//!   and where it is told to, writes a journal to a disk and answers on the network.

pub mod audit;
pub mod clocks;
pub mod console;
pub mod disk;
pub mod init;
pub mod journal;
pub mod network;
pub mod order;
pub mod params;
pub mod pattern;
pub mod stats;
pub mod tiny;
pub mod walker;
