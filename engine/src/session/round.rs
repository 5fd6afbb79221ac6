//! The round of pre-copy of a hybrid migration, at the destination: see [`crate::pager::Round`].

use std::sync::Arc;

use postcopy_transport::RemoteRegion;

use super::channel::Channel;
use super::drain::PROGRESS;
use super::message::Message;
use super::{SessionError, blocking};
use crate::import::{Import, Lanes};
use crate::pager::{Round, RoundWatch};
use crate::planner::Bandwidth;
use crate::stats::PagerReport;

/// Everything that the pager needs of the way to the source.
pub(super) struct Connected {
    pub(super) import: Import,
    pub(super) lanes: Lanes,
    /// The source's memory and page map.
    pub(super) regions: [RemoteRegion; 2],
    /// What is here already.
    pub(super) round: Round,
}

/// Ends the round when nobody waits for it any more.
struct EndsWith(Arc<RoundWatch>);

impl Drop for EndsWith {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What this side waits for meanwhile.
const ROUND: &str = "the end of the round of pre-copy";

/// Reads the memory of the running guest once, at this bandwidth at most, and tells the source how far it is.
pub(super) async fn pre_copy(
    channel: &mut Channel,
    mut connected: Connected,
    max_bandwidth: Option<Bandwidth>,
) -> Result<Connected, SessionError> {
    let total_pages = connected.import.total_pages();
    let watch = Arc::new(RoundWatch::default());
    let watched = EndsWith(watch.clone());
    let work = blocking(move || {
        let Connected { import, lanes, regions, round } = &mut connected;
        let first = lanes.shards.first_mut().ok_or(SessionError::Protocol("no lanes"))?;
        *round = import.pre_copy(first, *regions, max_bandwidth, &watch)?;
        Ok(connected)
    });
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            // It says nothing meanwhile, unless it is to call the migration off.
            error = channel.broken_into(ROUND) => return Err(error),
            () = tokio::time::sleep(PROGRESS) => {
                let outstanding_pages = total_pages.saturating_sub(watched.0.pages_done());
                let max_bandwidth = max_bandwidth.map_or(0, Bandwidth::bytes);
                let report =
                    PagerReport { total_pages, outstanding_pages, max_bandwidth, ..PagerReport::default() };
                channel.send(&Message::Progress(report)).await?;
            }
        }
    }
}
