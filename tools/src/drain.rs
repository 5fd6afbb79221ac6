//! The flag of the background drain that both programs have.

use clap::Args;
use postcopy_engine::planner::{PlannerConfig, Policy};

/// How the drain gets out of the way of faults.
#[derive(Clone, Copy, Debug, Args)]
pub struct BulkWaitArgs {
    /// How long a fault may wait for the wire behind bulk reads, in microseconds. More drains faster
    /// where the link's speed varies.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    #[arg(value_name = "US")]
    bulk_wait: u32,
}

impl BulkWaitArgs {
    /// A planner's configuration with it, and this policy.
    pub fn planner(self, policy: Policy) -> PlannerConfig {
        PlannerConfig { policy, bulk_wait_ns: u64::from(self.bulk_wait) * 1000 }
    }
}
