//! What a source says, taken out of its messages and checked.

use postcopy_transport::{RemoteRegion, Transport};

use super::SessionError;
use super::channel::unexpected;
use super::message::{GuestDescription, Message, Mode};
use crate::memory::PageIndex;
use crate::planner::{Bandwidth, Run};

/// What a source offers.
pub(super) struct Offered {
    pub(super) guest: GuestDescription,
    pub(super) transports: Vec<Transport>,
    pub(super) mode: Mode,
    pub(super) max_bandwidth: Option<Bandwidth>,
}

pub(super) fn offered(message: Message) -> Result<Offered, SessionError> {
    match message {
        Message::Offer { guest, transports, mode, max_bandwidth } => {
            Ok(Offered { guest, transports: known(&transports), mode, max_bandwidth })
        }
        other => Err(unexpected(&other, "Offer")),
    }
}

/// The transports over which a source that has come back would serve, and what may cross a second.
pub(super) fn rejoins(message: Message) -> Result<(Vec<Transport>, Option<Bandwidth>), SessionError> {
    match message {
        Message::Rejoin { transports, max_bandwidth } => Ok((known(&transports), max_bandwidth)),
        other => Err(unexpected(&other, "Rejoin")),
    }
}

/// Those that this side knows: a newer source may offer others.
fn known(transports: &[String]) -> Vec<Transport> {
    transports.iter().filter_map(|name| name.parse().ok()).collect()
}

pub(super) type Granted = (Vec<Vec<u8>>, [RemoteRegion; 2]);

pub(super) fn granted(message: Message) -> Result<Granted, SessionError> {
    match message {
        Message::Granted { lanes, regions } => Ok((lanes, regions.map(RemoteRegion::from_bytes))),
        other => Err(unexpected(&other, "Granted")),
    }
}

/// Most runs of an order. They are kept until all have come, 4 MiB.
pub(super) const MOST_LISTED: usize = 1 << 18;

/// An order of pages that comes in pieces.
#[derive(Default)]
pub(super) struct Listed(Vec<Run>);

impl Listed {
    /// Takes the next piece; all of it, once there is no more.
    pub(super) fn take(
        &mut self,
        runs: &[(u64, u32)],
        more: bool,
        pages: u64,
    ) -> Result<Option<Vec<Run>>, SessionError> {
        if self.0.len() + runs.len() > MOST_LISTED {
            return Err(SessionError::Protocol("its order of pages is longer than 262144 runs"));
        }
        self.0.extend(runs_of(runs, pages)?);
        Ok((!more).then(|| std::mem::take(&mut self.0)))
    }
}

/// Runs of pages, all of them among the guest's `pages`.
pub(super) fn runs_of(runs: &[(u64, u32)], pages: u64) -> Result<Vec<Run>, SessionError> {
    let inside = |(first, count): &(u64, u32)| {
        *count > 0 && first.checked_add(u64::from(*count)).is_some_and(|end| end <= pages)
    };
    if !runs.iter().all(inside) {
        return Err(SessionError::Protocol("it named pages that its guest has not"));
    }
    Ok(runs.iter().map(|&(first, count)| Run { first: PageIndex(first), count }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_a_guest_has_not_are_refused() {
        let said = |runs: &[(u64, u32)]| runs_of(runs, 100);
        let run = |first, count| Run { first: PageIndex(first), count };
        assert_eq!(said(&[(99, 1), (0, 100)]).unwrap(), [run(99, 1), run(0, 100)]);
        for wrong in [(100, 1), (99, 2), (5, 0), (u64::MAX, 1), (u64::MAX - 3, u32::MAX)] {
            assert!(said(&[(0, 1), wrong]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_order_comes_in_pieces_and_has_an_end() {
        let mut listed = Listed::default();
        assert_eq!(listed.take(&[(7, 2)], true, 100).unwrap(), None);
        let run = |first, count| Run { first: PageIndex(first), count };
        assert_eq!(listed.take(&[(1, 1)], false, 100).unwrap(), Some(vec![run(7, 2), run(1, 1)]));
        assert_eq!(listed.take(&[], false, 100).unwrap(), Some(vec![]), "none is left of it");
        assert!(listed.take(&[(100, 1)], true, 100).is_err());
        assert!(listed.take(&vec![(3, 1); MOST_LISTED], true, 100).is_ok());
        assert!(listed.take(&[(3, 1)], false, 100).is_err());
    }
}
