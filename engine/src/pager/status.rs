//! What is told of a pager while it works and at its end.

use std::sync::Arc;
use std::time::Instant;

use super::{PagerError, Waited};
use crate::stats::PagerReport;

/// Where the pager stands.
#[derive(Clone, Debug, Default)]
pub enum PagerState {
    /// At work.
    #[default]
    Running,
    /// Every page is here.
    Resident,
    /// It was told to stop.
    Stopped,
    /// It failed; the guest waits.
    Failed(Arc<PagerError>),
}

/// What the watch channel carries.
#[derive(Clone, Debug, Default)]
pub struct PagerStatus {
    /// Where it stands.
    pub state: PagerState,
    /// What it has done, up to a tenth of a second ago. Stage percentiles are filled in at the end.
    pub report: PagerReport,
    /// When the last page was published, once it was.
    pub last_page: Option<Instant>,
    /// Who waited for pages and how long, at the end. A wait that ends with the last page may be missing.
    pub waited: Vec<Waited>,
}
