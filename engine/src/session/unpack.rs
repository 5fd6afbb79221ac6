//! What a source says, taken out of its messages and checked.

use postcopy_transport::{RemoteRegion, Transport};

use super::channel::{Channel, unexpected};
use super::message::{GuestDescription, MAX_STATE, Message, Mode};
use super::{SessionError, WORK_PATIENCE};
use crate::memory::PageIndex;
use crate::planner::Run;

pub(super) fn offered(message: Message) -> Result<(GuestDescription, Vec<Transport>, Mode), SessionError> {
    match message {
        Message::Offer { guest, transports, mode } => Ok((guest, known(&transports), mode)),
        other => Err(unexpected(&other, "Offer")),
    }
}

/// The transports over which a source that has come back would serve.
pub(super) fn rejoins(message: Message) -> Result<Vec<Transport>, SessionError> {
    match message {
        Message::Rejoin { transports } => Ok(known(&transports)),
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

/// The runs of pages to read first, all of them among the guest's `pages`.
pub(super) fn recent(message: Message, pages: u64) -> Result<Vec<Run>, SessionError> {
    match message {
        Message::Recent(runs) => {
            let inside = |(first, count): &(u64, u32)| {
                *count > 0 && first.checked_add(u64::from(*count)).is_some_and(|end| end <= pages)
            };
            if !runs.iter().all(inside) {
                return Err(SessionError::Protocol("it named pages that its guest has not"));
            }
            Ok(runs.into_iter().map(|(first, count)| Run { first: PageIndex(first), count }).collect())
        }
        other => Err(unexpected(&other, "Recent")),
    }
}

/// Collects the pieces of device state.
pub(super) async fn receive_state(channel: &mut Channel) -> Result<Vec<u8>, SessionError> {
    let mut state = Vec::new();
    loop {
        match channel.receive("the guest's state", WORK_PATIENCE).await? {
            Message::State(piece) if state.len() + piece.len() <= MAX_STATE => state.extend(piece),
            Message::State(_) => {
                return Err(SessionError::Protocol("its device state is longer than 64 MiB"));
            }
            // Each piece has had its checksum.
            Message::StateEnd { length } => {
                let whole = length == state.len() as u64;
                return whole.then_some(state).ok_or(SessionError::Protocol("its device state is damaged"));
            }
            other => return Err(unexpected(&other, "State")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_a_guest_has_not_are_refused() {
        let said = |runs: &[(u64, u32)]| recent(Message::Recent(runs.to_vec()), 100);
        let run = |first, count| Run { first: PageIndex(first), count };
        assert_eq!(said(&[(99, 1), (0, 100)]).unwrap(), [run(99, 1), run(0, 100)]);
        for wrong in [(100, 1), (99, 2), (5, 0), (u64::MAX, 1), (u64::MAX - 3, u32::MAX)] {
            assert!(said(&[(0, 1), wrong]).is_err(), "{wrong:?}");
        }
        assert!(recent(Message::Commit, 100).is_err());
    }
}
