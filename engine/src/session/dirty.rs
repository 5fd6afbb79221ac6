//! What is noted of a guest at the source before it is frozen: what it writes while its memory is read once,
//! in a hybrid migration, and what it touches last.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::source::SourceGuest;
use super::{GuestError, SessionError, blocking};
use crate::page_set::PageSet;
use crate::pagemap::Dirty;
use crate::planner::{MAX_READ_PAGES, Run};
use crate::touched::Touched;

/// How long the guest is watched, twice: what it touches both times it will touch again. Some ticks of its
/// timer.
pub(super) const WATCH: Duration = Duration::from_millis(50);
/// A part of that time in which it is seen what a guest writes again and again: some ticks of its timer.
const LAP: Duration = Duration::from_millis(12);
/// Most pages that are fetched before others, 32 MiB.
const MOST_RECENT: u64 = 8192;
/// Most runs of them; a message with as many fits a frame.
const MOST_RUNS: usize = 8192;

/// Notes which pages of a guest are written, until it is dropped.
pub trait DirtyLog: Send + Sync {
    /// From here on counts what [`DirtyLog::since_mark`] tells. Called from a blocking thread.
    ///
    /// Errors: nothing can be told.
    fn mark(&mut self) -> Result<(), GuestError>;

    /// What the guest, which runs on, has written since the mark; an idea of it is enough. Called from a
    /// blocking thread.
    ///
    /// Errors: it cannot be told.
    fn since_mark(&mut self) -> Result<PageSet, GuestError>;

    /// Whether the guest stands still for a mark.
    fn mark_stops_guest(&self) -> bool {
        false
    }

    /// Pages that were written since the log began; more are no harm, one less is a lost write. The guest
    /// is frozen, and may already run elsewhere. Called from a blocking thread.
    ///
    /// Errors: it cannot be told. Then all of them may have been.
    fn dirty(self: Box<Self>) -> Result<PageSet, GuestError>;
}

/// What is noted of a guest before it is frozen.
#[derive(Default)]
pub(super) struct Watched {
    /// What it writes, from the beginning of a round of pre-copy on.
    log: Option<Box<dyn DirtyLog>>,
    /// What it writes just before it is frozen, about, if there is no such log. It ends after the freeze: that takes
    /// a while, for which the guest would be held up.
    hint: Option<Box<dyn DirtyLog>>,
    /// What it touched last, the likeliest to be touched again first.
    recent: Vec<Run>,
}

impl Watched {
    /// Begins to note what the guest writes.
    pub(super) async fn begin(guest: Arc<dyn SourceGuest>) -> Result<Self, SessionError> {
        let operation = "logging what the guest writes (hybrid)";
        let log = blocking(move || guest.log_dirty()).await;
        let log = log.map_err(|source| SessionError::Guest { operation, source })?;
        Ok(Self { log: Some(log), ..Self::default() })
    }

    /// Lets the guest run a little longer, to learn what it touches: that is fetched first. Does without
    /// where it cannot be seen.
    pub(super) async fn watch(mut self, guest: Arc<dyn SourceGuest>) -> Self {
        blocking(move || {
            match self.lately(&guest) {
                Ok(sets) => self.recent = likeliest(&sets),
                // What a log had told and could not hand over is lost: it is not believed any more, and without
                // one all of the memory moves again.
                Err(error) => {
                    tracing::warn!(%error, "what the guest touches last is not known");
                    self.log = None;
                }
            }
            self
        })
        .await
    }

    /// What the guest touches from now on for a while, the likeliest to be touched again first: of one whose mapping is
    /// ours what it touches; of one that has a log what it writes; of one that has both what it touches all the time,
    /// and what it writes.
    fn lately(&mut self, guest: &Arc<dyn SourceGuest>) -> Result<Vec<PageSet>, GuestError> {
        if self.log.is_none() && !guest.runs_on_our_mapping() {
            self.hint = guest.watch_writes()?;
        }
        let log = match (guest.runs_on_our_mapping(), self.log.as_mut().or(self.hint.as_mut())) {
            (true, Some(log)) => log,
            (true, None) => return touched(guest).map(Vec::from),
            (false, Some(log)) => return Ok(more_often_than_not(&laps(log.as_mut())?)),
            (false, None) => return Ok(Vec::new()),
        };
        log.mark()?;
        // The log is not to be given up for that.
        let always = touched(guest).map_or_else(
            |error| {
                tracing::debug!(%error, "what the guest touches cannot be seen");
                PageSet::default()
            },
            |[always, ..]| always,
        );
        let written = log.since_mark()?.without(&always);
        Ok(vec![always, written])
    }

    /// Runs of pages to fetch first.
    pub(super) fn recent(&self) -> &[Run] {
        &self.recent
    }

    /// What is told to the thread that fills the page map. `discards`: see [`Dirty::discards`].
    pub(super) fn dirty(&mut self, discards: bool) -> Option<Dirty> {
        let log = self.log.take()?;
        let tell = move || match log.dirty() {
            Ok(dirty) => Some(dirty),
            Err(error) => {
                tracing::warn!(%error, "what the guest has written is not known; all of its memory moves again");
                None
            }
        };
        Some(Dirty { tell: Box::new(tell), discards })
    }
}

/// What is written in each of several laps, one if the guest stands still at their beginnings. Of much memory they
/// take longer, and are fewer.
fn laps(log: &mut dyn DirtyLog) -> Result<Vec<PageSet>, GuestError> {
    let (lap, begun) = (if log.mark_stops_guest() { 2 * WATCH } else { LAP }, Instant::now());
    let mut laps = Vec::new();
    while begun.elapsed() < 2 * WATCH {
        log.mark()?;
        std::thread::sleep(lap);
        laps.push(log.since_mark()?);
    }
    Ok(laps)
}

/// What is in more than half of these laps, what is in most of them first. A program that walks its memory writes
/// hundreds of pages in a lap, others in each; read first, they would come before the few that the guest stalls for.
fn more_often_than_not(laps: &[PageSet]) -> Vec<PageSet> {
    // What is in at least one, in at least two, ...
    let mut often = vec![PageSet::default(); laps.len()];
    for (lap, written) in laps.iter().enumerate() {
        for times in (1..=lap).rev() {
            let once_more = often[times - 1].common(written);
            often[times].add(&once_more);
        }
        often[0].add(written);
    }
    let mut sets = often.split_off(laps.len() / 2);
    sets.reverse();
    for at in (1..sets.len()).rev() {
        sets[at] = sets[at].without(&sets[at - 1]);
    }
    sets
}

/// What it touches in both of two times, what in the second only, and what in the first only.
fn touched(guest: &Arc<dyn SourceGuest>) -> Result<[PageSet; 3], GuestError> {
    let memory = guest.memory();
    let watch = Touched::begin(memory.guest())?;
    std::thread::sleep(WATCH);
    let earlier = watch.again()?;
    std::thread::sleep(WATCH);
    let later = watch.pages()?;
    Ok([later.common(&earlier), later.without(&earlier), earlier.without(&later)])
}

/// Runs of the pages of these sets, one after the other, as many as are worth it.
fn likeliest(sets: &[PageSet]) -> Vec<Run> {
    let mut pages = 0;
    let runs = sets.iter().flat_map(|set| set.runs(MAX_READ_PAGES)).take(MOST_RUNS);
    let runs = runs.take_while(|run| {
        pages += u64::from(run.count);
        pages <= MOST_RECENT
    });
    runs.collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::{GuestMemory, MemoryLayout};

    /// Its log fails at the mark, after it has forgotten what it had noted.
    struct Failing;

    impl DirtyLog for Failing {
        fn mark(&mut self) -> Result<(), GuestError> {
            Err("it is gone".into())
        }

        fn since_mark(&mut self) -> Result<PageSet, GuestError> {
            Ok(PageSet::default())
        }

        fn dirty(self: Box<Self>) -> Result<PageSet, GuestError> {
            Ok(PageSet::default())
        }
    }

    impl SourceGuest for Failing {
        fn memory(&self) -> GuestMemory {
            GuestMemory::new(MemoryLayout::pc(4096, 4096).unwrap()).unwrap()
        }

        fn describe(&self) -> Result<(String, Vec<u8>), GuestError> {
            Err("it is not asked".into())
        }

        fn freeze(&self, _state: &mut dyn Write) -> Result<Instant, GuestError> {
            Err("it is not asked".into())
        }

        fn log_dirty(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
            Ok(Box::new(Failing))
        }

        fn thaw(&self) -> Result<(), GuestError> {
            Ok(())
        }
    }

    #[test]
    fn what_is_written_again_and_again_comes_first_and_the_rest_not_at_all() {
        // Page 60 in every lap, 40 in five of eight, 20 in half of them, and one other in each.
        let lap = |at: u64| {
            let mut written = PageSet::new(64, false);
            let often = [(60, 8), (40, 5), (20, 4)].into_iter().filter(|(_, laps)| at < *laps);
            often.map(|(page, _)| page).chain([at]).for_each(|page| written.put(page, page + 1, true));
            written
        };
        let first = |count: u64| {
            let runs = likeliest(&more_often_than_not(&(0..count).map(lap).collect::<Vec<_>>()));
            runs.iter().map(|run| (run.first.0, run.count)).collect::<Vec<_>>()
        };
        assert_eq!(first(8), [(60, 1), (40, 1)]);
        assert_eq!(first(1), [(0, 1), (20, 1), (40, 1), (60, 1)]);
        assert_eq!(first(0), []);
    }

    #[tokio::test]
    async fn a_log_that_failed_once_is_not_believed_any_more() {
        let guest = Arc::new(Failing);
        let mut watched = Watched::begin(guest.clone()).await.unwrap().watch(guest).await;
        assert!(watched.recent().is_empty());
        assert!(watched.dirty(false).is_none(), "all pages move again");
    }
}
