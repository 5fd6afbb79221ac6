//! What a shard hears of the threads that serve their own faults.

use std::time::Instant;

use super::Shard;
use crate::memory::PAGE_SIZE;
use crate::pager::PagerError;
use crate::pager::server::Note;
use crate::planner::{Action, LaneId};

impl Shard {
    /// Hears of the faults that other threads serve, as if it had seen and served them itself.
    pub(super) fn take_notes(&mut self) -> Result<bool, PagerError> {
        let mut any = false;
        while let Ok(note) = self.notes.try_recv() {
            any = true;
            self.hear(note)?;
            self.carry_out()?;
        }
        Ok(any)
    }

    fn hear(&mut self, note: Note) -> Result<(), PagerError> {
        let when = self.nanos(Instant::now());
        match note {
            Note::Serving(page) | Note::Wanted(page) => {
                if !self.elsewhere.contains_key(&page) && !self.planner.fault(page, when, &mut self.actions) {
                    return Err(PagerError::StrayFault(self.shared.part.global(page)));
                }
            }
            Note::Served(page, stamps) => {
                self.timing.served(stamps);
                self.self_served += 1;
                if let Some(lane) = self.elsewhere.remove(&page) {
                    self.bytes[LaneId::Urgent as usize] += PAGE_SIZE;
                    let known = self.planner.landed_elsewhere(lane, page, &mut self.actions);
                    assert!(known, "a page that is brought elsewhere is a flight of its own");
                }
            }
            Note::Prefer(runs) => Self::told_of_its_pages(self.planner.prefer(&runs))?,
            Note::Order(ranks) => Self::told_of_its_pages(self.planner.order(ranks))?,
            Note::Limit(max_bandwidth) => self.planner.limit(max_bandwidth),
            Note::Waited(thread, time) => self.timing.waits.add(thread, time),
            Note::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn told_of_its_pages(inside: bool) -> Result<(), PagerError> {
        if inside { Ok(()) } else { Err(PagerError::Peer("it names pages that are not there")) }
    }

    /// The shard has failed: waits until nobody serves a fault any more, and counts what was served until then.
    pub(super) fn abandon(&mut self) {
        self.shared.claims.abandon();
        self.shared.claims.await_left();
        while let Ok(note) = self.notes.try_recv() {
            // What is wrong now changes nothing.
            let _ = self.hear(note);
            for action in std::mem::take(&mut self.actions) {
                if let Action::Read(why, run) = action {
                    self.read(why, run);
                }
            }
        }
    }

    /// What threads that serve themselves have said since the last page was seen to be here.
    pub(super) fn hear_the_last(&mut self) {
        for note in self.notes.try_iter() {
            if let Note::Waited(thread, time) = note {
                self.timing.waits.add(thread, time);
            }
        }
    }
}
