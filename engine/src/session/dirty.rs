//! What is noted of a guest at the source before it is frozen: what it writes while its memory is read once,
//! in a hybrid migration, and what it touches last.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::PageOrder;
use super::source::SourceGuest;
use super::unpack::MOST_LISTED;
use super::{GuestError, SessionError, blocking};
use crate::page_set::PageSet;
use crate::pagemap::Dirty;
use crate::planner::{MAX_READ_PAGES, Run};
use crate::touched::Touched;

/// How long the guest is watched, twice: what it touches both times it will touch again. Some ticks of its
/// timer.
pub(super) const WATCH: Duration = Duration::from_millis(50);
/// A part of that time in which it is seen what a guest uses again and again: some ticks of its timer.
const LAP: Duration = Duration::from_millis(12);
/// The laps in which it is watched where the order is asked for in which it uses its pages; the last is that time. The longer
/// ago, the longer they are, as the less it says of what comes next. Each costs a guest whose mapping is ours a minor fault
/// for each page that it touches.
pub const RECENCY_LAPS: [Duration; 5] = [
    Duration::from_millis(800),
    Duration::from_millis(400),
    Duration::from_millis(200),
    Duration::from_millis(100),
    WATCH.saturating_mul(2),
];
/// Most pages that are fetched before others, 32 MiB.
const MOST_RECENT: u64 = 8192;
/// So many pages are fetched first in any case, 2 MiB.
const LIKELY: u64 = 512;
/// Most runs of pages in a message, which fits a frame then.
pub(super) const MOST_RUNS: usize = 8192;

/// Notes which pages of a guest are used, until it is dropped: an idea of it is enough.
pub trait UseLog: Send + Sync {
    /// From here on counts what [`UseLog::since_mark`] tells. Called from a blocking thread.
    ///
    /// Errors: nothing can be told.
    fn mark(&mut self) -> Result<(), GuestError>;

    /// What the guest, which runs on, has used since the mark. Called from a blocking thread.
    ///
    /// Errors: it cannot be told.
    fn since_mark(&mut self) -> Result<PageSet, GuestError>;

    /// Whether the guest stands still for a mark.
    fn mark_stops_guest(&self) -> bool {
        false
    }
}

/// Notes which pages of a guest are written, until it is dropped.
pub trait DirtyLog: UseLog {
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
    /// What it uses just before it is frozen, about, if there is no such log and its mapping is not ours. It ends after
    /// the freeze: that takes a while, for which the guest would be held up.
    hint: Option<Box<dyn UseLog>>,
    /// What it touched last, the likeliest to be touched again first.
    recent: Vec<Run>,
    /// What it used, what it used last first, if that was asked for.
    order: Vec<Run>,
}

impl Watched {
    /// Begins to note what the guest writes.
    pub(super) async fn begin(guest: Arc<dyn SourceGuest>) -> Result<Self, SessionError> {
        let operation = "logging what the guest writes (hybrid)";
        let log = blocking(move || guest.log_dirty()).await;
        let log = log.map_err(|source| SessionError::Guest { operation, source })?;
        Ok(Self { log: Some(log), ..Self::default() })
    }

    /// Lets the guest run a little longer, to learn what it touches: that is fetched first. And longer than that, if
    /// it is asked for the order in which it does. Does without where it cannot be seen.
    pub(super) async fn watch(mut self, guest: Arc<dyn SourceGuest>, order: PageOrder) -> Self {
        blocking(move || {
            match self.watch_now(&guest, order) {
                Ok(()) => {}
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

    fn watch_now(&mut self, guest: &Arc<dyn SourceGuest>, order: PageOrder) -> Result<(), GuestError> {
        if self.log.is_none() && !guest.runs_on_our_mapping() {
            self.hint = guest.watch_uses()?;
        }
        let mut laps = if order == PageOrder::Recency { self.earlier(guest)? } else { Vec::new() };
        let Lately { again, all } = self.lately(guest)?;
        self.recent = likeliest(&again);
        if order == PageOrder::Recency {
            laps.push(all);
            self.order = last_first(&laps, guest.memory().layout().total_pages());
        }
        Ok(())
    }

    /// What the guest uses in each of [`RECENCY_LAPS`] but the last, about: of one whose mapping is ours what it touches, of
    /// others what they write.
    fn earlier(&mut self, guest: &Arc<dyn SourceGuest>) -> Result<Vec<PageSet>, GuestError> {
        let earlier = &RECENCY_LAPS[..RECENCY_LAPS.len() - 1];
        if guest.runs_on_our_mapping() {
            let memory = guest.memory();
            // A log is not to be given up for that.
            let watched = Touched::begin(memory.guest()).and_then(|watch| {
                let lap = |lap| {
                    std::thread::sleep(lap);
                    watch.again()
                };
                earlier.iter().copied().map(lap).collect()
            });
            return Ok(watched.unwrap_or_else(|error| {
                tracing::warn!(%error, "in which order the guest uses its pages cannot be seen");
                Vec::new()
            }));
        }
        let Some(log) = self.uses() else { return Ok(Vec::new()) };
        let stopped = [earlier.iter().sum()];
        let laps = if log.mark_stops_guest() { &stopped[..] } else { earlier };
        laps.iter().map(|lap| lap_of(log, *lap)).collect()
    }

    /// What tells of its uses: the log of its writes, if there is one.
    fn uses(&mut self) -> Option<&mut dyn UseLog> {
        match &mut self.log {
            Some(log) => Some(&mut **log),
            None => self.hint.as_mut().map(|hint| &mut **hint as &mut dyn UseLog),
        }
    }

    /// What the guest uses from now on for a while: of one whose mapping is ours what it touches; of one that has a log
    /// what that tells; of one that has both what it touches all the time, and what it writes.
    fn lately(&mut self, guest: &Arc<dyn SourceGuest>) -> Result<Lately, GuestError> {
        let log = match (guest.runs_on_our_mapping(), self.uses()) {
            (true, Some(log)) => log,
            (true, None) => return touched(guest).map(|sets| Lately::of(Vec::from(sets))),
            (false, Some(log)) => {
                let laps = laps(log)?;
                return Ok(Lately { again: more_often_than_not(&laps), all: union(&laps) });
            }
            (false, None) => return Ok(Lately::of(Vec::new())),
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
        Ok(Lately::of(vec![always, written]))
    }

    /// Runs of the blocks that it used, what it used last first. None, if that was not asked for or cannot be seen.
    pub(super) fn order(&self) -> &[Run] {
        &self.order
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

/// What a guest has used just before it is frozen.
struct Lately {
    /// What it will use again, the likeliest first.
    again: Vec<PageSet>,
    all: PageSet,
}

impl Lately {
    fn of(again: Vec<PageSet>) -> Self {
        Self { all: union(&again), again }
    }
}

/// What is used in each of several laps, one if the guest stands still at their beginnings. Of much memory they
/// take longer, and are fewer.
fn laps(log: &mut dyn UseLog) -> Result<Vec<PageSet>, GuestError> {
    let (lap, begun) = (if log.mark_stops_guest() { 2 * WATCH } else { LAP }, Instant::now());
    let mut laps = Vec::new();
    while begun.elapsed() < 2 * WATCH {
        laps.push(lap_of(log, lap)?);
    }
    Ok(laps)
}

/// What is used from now on for so long.
fn lap_of(log: &mut dyn UseLog, lap: Duration) -> Result<PageSet, GuestError> {
    log.mark()?;
    std::thread::sleep(lap);
    log.since_mark()
}

fn union(sets: &[PageSet]) -> PageSet {
    sets.iter().fold(PageSet::default(), |mut all, set| {
        all.add(set);
        all
    })
}

/// The blocks of 64 KiB of which some page was used in laps one after the other, of memory of so many pages: each block once,
/// those of the last lap first, in each by address. As many runs as are told.
pub fn last_first(laps: &[PageSet], pages: u64) -> Vec<Run> {
    let (mut runs, mut later) = (Vec::new(), PageSet::default());
    for lap in laps.iter().rev() {
        let blocks = lap.blocks(pages);
        runs.extend(blocks.without(&later).runs(u32::MAX).take(MOST_LISTED - runs.len()));
        later.add(&blocks);
    }
    runs
}

/// What is in more than half of these laps, what is in most of them first, and as much of the rest as is [`LIKELY`]. A
/// program that walks its memory uses hundreds of pages in a lap, others in each; read first, they would come before the
/// few that the guest stalls for.
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
    // The most often first: what is in more than half of them, and of the others as much as costs next to nothing.
    let kept = often.iter().rposition(|set| set.len() > LIKELY).map_or(0, |last| last + 1);
    let mut sets = often.split_off(kept.min(laps.len() / 2));
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

    impl UseLog for Failing {
        fn mark(&mut self) -> Result<(), GuestError> {
            Err("it is gone".into())
        }

        fn since_mark(&mut self) -> Result<PageSet, GuestError> {
            Ok(PageSet::default())
        }
    }

    impl DirtyLog for Failing {
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
    fn what_is_used_again_and_again_comes_first_and_the_rest_if_it_is_little() {
        // Page 60 in every lap, 40 in five of eight, 20 in half of them, and in each some others.
        let lap = |at: u64, others: u64| {
            let mut used = PageSet::new(10_000, false);
            let often = [(60, 8), (40, 5), (20, 4)].into_iter().filter(|(_, laps)| at < *laps);
            often.for_each(|(page, _)| used.put(page, page + 1, true));
            used.put(100 + at * others, 100 + (at + 1) * others, true);
            used
        };
        let first = |laps: u64, others: u64| {
            let laps: Vec<_> = (0..laps).map(|at| lap(at, others)).collect();
            let runs = likeliest(&more_often_than_not(&laps));
            runs.iter().map(|run| (run.first.0, run.count)).collect::<Vec<_>>()
        };
        assert_eq!(first(8, 1), [(60, 1), (40, 1), (20, 1), (100, 8)]);
        // With those in one lap alone there are 515, which is too many, and with those in two 3.
        assert_eq!(first(8, 64), [(60, 1), (40, 1), (20, 1)]);
        assert_eq!(first(1, 1), [(20, 1), (40, 1), (60, 1), (100, 1)]);
        assert_eq!(first(0, 1), []);
        // What is in more than half of the laps comes however much it is.
        let mut often = PageSet::new(10_000, false);
        often.put(0, 600, true);
        let laps = [often.clone(), often, lap(2, 1)];
        let pages: u64 = more_often_than_not(&laps).iter().map(PageSet::len).sum();
        assert_eq!(pages, 600);
    }

    #[test]
    fn blocks_are_ordered_by_the_last_lap_that_used_them_and_then_by_address() {
        let lap = |pages: &[u64]| {
            let mut set = PageSet::new(200, false);
            pages.iter().for_each(|page| set.put(*page, page + 1, true));
            set
        };
        let runs = last_first(&[lap(&[1, 40, 41, 170]), lap(&[9, 17]), lap(&[]), lap(&[3, 50, 199])], 200);
        let runs: Vec<_> = runs.iter().map(|run| (run.first.0, run.count)).collect();
        assert_eq!(runs, [(0, 16), (48, 16), (192, 8), (16, 16), (32, 16), (160, 16)]);
        assert_eq!(last_first(&[], 200), []);
    }

    #[tokio::test]
    async fn a_log_that_failed_once_is_not_believed_any_more() {
        let guest = Arc::new(Failing);
        let mut watched = Watched::begin(guest.clone()).await.unwrap().watch(guest, PageOrder::Address).await;
        assert!(watched.recent().is_empty());
        assert!(watched.dirty(false).is_none(), "all pages move again");
    }
}
