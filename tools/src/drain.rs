//! The flags of the background drain that both programs have.

use clap::Args;
use postcopy_engine::planner::{Bandwidth, PlannerConfig, Policy};

use crate::size;

/// How the drain gets out of the way of faults, and of other traffic.
#[derive(Clone, Copy, Debug, Args)]
pub struct DrainArgs {
    /// How long a fault may wait for the wire behind bulk reads, in microseconds. More drains faster
    /// where the link's speed varies.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    #[arg(value_name = "US")]
    bulk_wait: u32,
    /// How much it may have.
    #[command(flatten)]
    pub limit: LimitArgs,
}

/// How much may cross. Each side of a move may say it.
#[derive(Clone, Copy, Debug, Args)]
pub struct LimitArgs {
    /// How many bytes may cross a second where nobody waits for them: a number with K, M, G or none. Faults are never held
    /// back; what crosses for them is taken off the rest. The other side of a move may allow less. Default: as many as the
    /// link carries.
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    pub max_bandwidth: Option<Bandwidth>,
}

impl DrainArgs {
    /// A planner's configuration with it, and this policy.
    pub fn planner(self, policy: Policy) -> PlannerConfig {
        let Self { bulk_wait, limit: LimitArgs { max_bandwidth } } = self;
        PlannerConfig { policy, bulk_wait_ns: u64::from(bulk_wait) * 1000, max_bandwidth }
    }
}

/// Bytes a second, as people write them.
///
/// Errors: one line that says what to write instead.
pub fn bandwidth(text: &str) -> Result<Bandwidth, String> {
    let none = || "with 0 bytes a second nothing would come; leave it out for no limit".to_owned();
    Bandwidth::new(size::parse(text)?).ok_or_else(none)
}
