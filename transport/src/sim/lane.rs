//! One lane of a simulated link.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};

use super::{Wire, lock};
use crate::error::{LaneError, ReadError};
use crate::lane::{Completion, Lane, Read};
use crate::memory::HostMemory;

/// A lane in virtual time. Dropping it takes its reads off the wire.
pub struct SimLane {
    shared: Arc<Mutex<Wire>>,
    index: usize,
    /// The source's memory and the landing memory, where bytes are moved.
    memory: Option<[HostMemory; 2]>,
    /// Never readable: virtual time passes only when the caller says so.
    never: OwnedFd,
}

impl SimLane {
    pub(super) fn new(shared: Arc<Mutex<Wire>>, index: usize, memory: Option<[HostMemory; 2]>) -> Self {
        let never = eventfd(0, EventfdFlags::CLOEXEC).expect("this process may open one more descriptor");
        Self { shared, index, memory, never }
    }

    fn land(&self, read: &Read) -> Result<(), ReadError> {
        let Some([source, landing]) = &self.memory else { return Ok(()) };
        let mut bytes = vec![0; read.remote().len() as usize];
        let moved = source.read(read.remote().addr, &mut bytes) && landing.write(read.local().offset, &bytes);
        moved.then_some(()).ok_or(ReadError::Refused)
    }
}

impl Lane for SimLane {
    fn post(&mut self, reads: &[Read]) -> Result<usize, LaneError> {
        let mut wire = lock(&self.shared);
        if wire.broken() {
            return Err(LaneError::Closed);
        }
        let room = wire.options.depth.saturating_sub(wire.lanes[self.index].len());
        let mut accepted = reads.len().min(room);
        if wire.options.partial {
            accepted = wire.random.below(accepted as u64 + 1) as usize;
        }
        for read in &reads[..accepted] {
            wire.send(self.index, *read);
        }
        Ok(accepted)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LaneError> {
        let mut wire = lock(&self.shared);
        if wire.broken() {
            return Err(LaneError::Closed);
        }
        let (now, flying) = (wire.now, &mut wire.lanes[self.index]);
        while let Some(next) = flying.first_entry().filter(|next| next.key().0 <= now) {
            let read = next.remove();
            completions.push(Completion { token: read.token(), result: self.land(&read) });
        }
        Ok(())
    }

    fn room(&self) -> usize {
        let wire = lock(&self.shared);
        wire.options.depth.saturating_sub(wire.lanes[self.index].len())
    }

    fn in_flight(&self) -> usize {
        lock(&self.shared).lanes[self.index].len()
    }

    fn arm(&mut self) -> Result<bool, LaneError> {
        let wire = lock(&self.shared);
        Ok(wire.lanes[self.index].keys().next().is_none_or(|(due, _)| *due > wire.now))
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.never.as_fd()
    }
}

impl Drop for SimLane {
    fn drop(&mut self) {
        lock(&self.shared).lanes[self.index].clear();
    }
}

#[cfg(test)]
mod tests {
    use crate::lane::Token;
    use crate::sim::{Countdown, SimLink, SimOptions};

    use super::*;

    fn read(token: u64, page: u64) -> Read {
        let (remote, local) = SimLink::regions(1 << 20);
        let slices = (local.slice(page * 4096, 4096).unwrap(), remote.slice(page * 4096, 4096).unwrap());
        Read::new(Token(token), slices.0, slices.1).unwrap()
    }

    /// Tokens in the order in which they complete, and when the last one did.
    fn run(options: SimOptions, count: u64) -> (Vec<u64>, u64) {
        let link = SimLink::new(options);
        let mut lane = link.lane();
        let (mut waiting, mut done): (Vec<Read>, _) = ((0..count).map(|n| read(n, n)).collect(), vec![]);
        while (done.len() as u64) < count {
            let posted = lane.post(&waiting).unwrap();
            waiting.drain(..posted);
            if let Some(next) = link.next_completion() {
                link.advance_to(next);
            }
            lane.poll(&mut done).unwrap();
        }
        (done.iter().map(|completion| completion.token.0).collect(), link.now())
    }

    #[test]
    fn the_wire_takes_its_time_and_a_seed_gives_the_same_run() {
        let gigabit = SimOptions { bytes_per_s: 125_000_000, one_way_ns: 30_000, ..SimOptions::default() };
        assert_eq!(run(gigabit, 10), ((0..10).collect(), 60_000 + 10 * 32_768));
        let rough = SimOptions { jitter_ns: 200_000, loss: 0.1, partial: true, depth: 8, ..gigabit };
        let (order, end) = run(rough, 50);
        assert_eq!((order.clone(), end), run(rough, 50));
        assert_ne!(order, run(SimOptions { seed: 2, ..rough }, 50).0);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>(), "each once");
        assert_ne!(order, sorted, "and not in order");
    }

    #[test]
    fn bytes_land_when_the_read_completes_and_not_before() {
        let link = SimLink::new(SimOptions::default());
        let [source, landing] =
            ["source", "landing"].map(|name| HostMemory::anonymous(name, 1 << 20).unwrap());
        assert!(source.write(3 * 4096, b"moved"));
        let mut lane = link.lane_between(source, landing.clone());
        let landed = || {
            let mut bytes = [0; 5];
            assert!(landing.read(3 * 4096, &mut bytes));
            &bytes == b"moved"
        };
        assert_eq!(lane.post(&[read(1, 3)]).unwrap(), 1);
        let mut done = vec![];
        lane.poll(&mut done).unwrap();
        assert!(done.is_empty() && lane.arm().unwrap() && !landed());
        link.advance_to(link.next_completion().unwrap());
        assert!(!lane.arm().unwrap(), "there is something to poll");
        lane.poll(&mut done).unwrap();
        assert!(done.len() == 1 && landed());
        assert_eq!(lane.post(&[read(2, 4)]).unwrap(), 1);
        drop(lane);
        assert_eq!(link.next_completion(), None, "a dropped lane reads no more");
    }

    #[test]
    fn a_countdown_fails_the_call_it_was_told_to_and_all_after() {
        let link = SimLink::new(SimOptions::default());
        let mut lane = Countdown::new(link.lane(), 3);
        assert!(lane.post(&[read(1, 1)]).is_ok() && lane.arm().is_ok());
        assert!(lane.poll(&mut vec![]).is_err() && lane.post(&[]).is_err());
    }
}
