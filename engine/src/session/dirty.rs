//! What is noted of a guest at the source before it is frozen: what it writes while its memory is read once,
//! in a hybrid migration, and what it touches last.

use std::sync::Arc;
use std::time::Duration;

use super::source::SourceGuest;
use super::{GuestError, SessionError, blocking};
use crate::page_set::PageSet;
use crate::pagemap::Dirty;
use crate::planner::{MAX_READ_PAGES, Run};
use crate::touched::Touched;

/// How long the guest is watched, twice: what it touches both times it will touch again. Some ticks of its
/// timer.
pub(super) const WATCH: Duration = Duration::from_millis(50);
/// Parts of that time in which it is seen what a guest writes again and again.
const LAPS: usize = 8;
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
            let seen = lately(&guest, self.log.as_deref_mut());
            match seen {
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

    /// Runs of pages to fetch first.
    pub(super) fn recent(&self) -> &[Run] {
        &self.recent
    }

    /// What is told to the thread that fills the page map. `discards`: see [`Dirty::discards`].
    pub(super) fn into_dirty(self, discards: bool) -> Option<Dirty> {
        let log = self.log?;
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

/// What a guest touches from now on for a while, the likeliest to be touched again first: of one whose memory has
/// been read once, what it writes, and what it touches all the time; of another whose mapping is ours, what it
/// touches, and of the rest what they write.
fn lately(
    guest: &Arc<dyn SourceGuest>,
    log: Option<&mut (dyn DirtyLog + 'static)>,
) -> Result<Vec<PageSet>, GuestError> {
    let Some(log) = log else {
        return match guest.runs_on_our_mapping() {
            true => touched(guest).map(Vec::from),
            false => guest.watch_writes()?.map_or_else(|| Ok(Vec::new()), |mut log| in_laps(log.as_mut())),
        };
    };
    if !guest.runs_on_our_mapping() {
        return in_laps(log);
    }
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

/// What it writes again and again, most often first. What it writes once in a while is left out, where laps can tell:
/// a program that walks its memory writes thousands of pages in a lap, and they would come before the few that
/// stall it.
fn in_laps(log: &mut dyn DirtyLog) -> Result<Vec<PageSet>, GuestError> {
    let laps = if log.mark_stops_guest() { 1 } else { LAPS };
    // What was written in so many laps, or in more: in at least one, in at least two, ...
    let mut often = vec![PageSet::default(); laps];
    for lap in 0..laps {
        log.mark()?;
        std::thread::sleep(2 * WATCH / laps as u32);
        let written = log.since_mark()?;
        for times in (1..=lap).rev() {
            let once_more = often[times - 1].common(&written);
            often[times].add(&once_more);
        }
        often[0].add(&written);
    }
    let mut sets = often.split_off(laps / 4);
    sets.reverse();
    for at in (1..sets.len()).rev() {
        sets[at] = sets[at].without(&sets[at - 1]);
    }
    Ok(sets)
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
    use std::time::Instant;

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

    /// Page 0 is written in every lap, 1 in half of them, 2 in two, and one of the others in one.
    struct Walking {
        lap: u64,
    }

    impl DirtyLog for Walking {
        fn mark(&mut self) -> Result<(), GuestError> {
            self.lap += 1;
            Ok(())
        }

        fn since_mark(&mut self) -> Result<PageSet, GuestError> {
            let mut written = PageSet::new(64, false);
            let seldom = [self.lap.is_multiple_of(2).then_some(1), self.lap.is_multiple_of(4).then_some(2)];
            for page in [0, 2 + self.lap].into_iter().chain(seldom.into_iter().flatten()) {
                written.put(page, page + 1, true);
            }
            Ok(written)
        }

        fn dirty(self: Box<Self>) -> Result<PageSet, GuestError> {
            Err("it is not asked".into())
        }
    }

    #[test]
    fn what_is_written_again_and_again_comes_first_and_the_rest_not_at_all() {
        let runs = likeliest(&in_laps(&mut Walking { lap: 0 }).unwrap());
        let pages: Vec<u64> = runs.iter().map(|run| run.first.0).collect();
        assert_eq!(pages, [0, 1], "{runs:?}");
    }

    #[tokio::test]
    async fn a_log_that_failed_once_is_not_believed_any_more() {
        let guest = Arc::new(Failing);
        let watched = Watched::begin(guest.clone()).await.unwrap().watch(guest).await;
        assert!(watched.recent().is_empty());
        assert!(watched.into_dirty(false).is_none(), "all pages move again");
    }
}
