//! The paper's evaluation in virtual time: traces of guests, and the engine's planner under them.
//!
//! A [`Trace`] says which pages a guest touches first after it was moved, and what it computes in
//! between; [`run`] gives that guest to the planner over a simulated link. Only first touches
//! count: a page that is there stays there. Nothing here reads a clock, so a seed gives the same
//! figures on every machine.

mod guest;
mod quicksort;
mod recorded;
mod trace;
mod traces;

pub use guest::{Outcome, run, run_in_order};
use postcopy_transport::sim::SimOptions;
pub use quicksort::quicksort;
pub use recorded::recorded;
pub use trace::{PageOrder, Touch, Trace, TraceError, Used};
pub use traces::{descending, random, sequential, streams, strided, suite_traces, zipf};

/// A link to simulate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wire {
    /// What reports call it.
    pub name: &'static str,
    /// Its rate in bytes a second.
    pub bytes_per_s: u64,
    /// Its round trip in nanoseconds, without the bytes' own time.
    pub rtt_ns: u64,
}

impl Wire {
    /// The paper's gigabit Ethernet. It reports no latency; the same group's MemX fetched 4 KiB in
    /// 85 to 115 µs over such a link, of which the page itself takes 33.
    pub const GIGABIT: Wire = Wire { name: "1 Gb/s, 67 µs", bytes_per_s: 125_000_000, rtt_ns: 67_000 };
    /// RDMA in one rack today.
    pub const RDMA: Wire = Wire { name: "100 Gb/s, 3 µs", bytes_per_s: 12_500_000_000, rtt_ns: 3_000 };

    /// The simulator's options.
    pub fn options(self, seed: u64) -> SimOptions {
        SimOptions {
            seed,
            bytes_per_s: self.bytes_per_s,
            one_way_ns: self.rtt_ns / 2,
            ..SimOptions::default()
        }
    }
}
