//! A leaderboard: the keys with the highest scores, over all shards.
//!
//! One writer per part: its shard. The shard knows every key's score and keeps the best scores in a sorted list, down
//! to a floor: the list holds exactly the scores at and above the floor. A score that stays below the floor costs one
//! comparison. When falling scores leave the list shorter than the leaderboard's places, the writer rebuilds it from
//! all scores.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;

use crate::event::{Key, Meta, ShardId};
use crate::state::aggregate::Aggregate;
use crate::state::view::key_numbers::KeyNumbers;
use crate::state::view::parts::{Part, Parts, Progress};
use crate::state::view::{Place, Position, View, ViewWriter};
use crate::sync::{AtomicU64, Ordering, SeqLock};

/// A view of the keys with the highest scores. Among equal scores, the lower key comes first. Scores may fall.
///
/// The result is exact: it equals sorting all keys, each shard at a position that it has published. Handles are cheap
/// to clone.
///
/// ```
/// # use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # struct Scored { points: u32 }
/// # impl Event for Scored {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "scored", 1)];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Player { points: i64 }
/// # impl Aggregate for Player {
/// #     type Event = Scored;
/// #     type Command = ();
/// #     type Rejection = ();
/// #     fn evolve(&mut self, event: &ArchivedScored, _meta: &Meta) {
/// #         self.points += i64::from(event.points.to_native());
/// #     }
/// #     fn decide(&self, (): (), _emit: &mut Emit<Scored>) -> Result<(), ()> { Ok(()) }
/// # }
/// use corelane::view::Leaderboard;
/// use corelane::{Config, Deadline, Engine, Key};
///
/// let best = Leaderboard::new(10, |player: &Player| player.points);
/// # let dir = tempfile::tempdir()?;
/// let engine = Engine::<Player>::builder(Config::new(dir.path())).view(&best).open()?;
/// let mut producer = engine.producer();
/// for (key, points) in [(7, 3), (8, 5), (9, 4)] {
///     producer.publish(Key(key), Scored { points })?;
/// }
/// engine.flush(Deadline::NEVER)?;
/// // The shard answers between two batches, when it has published the views.
/// engine.state(Key(7)).wait()?;
/// let keys: Vec<Key> = best.top(2).into_iter().map(|ranked| ranked.key).collect();
/// assert_eq!(keys, [Key(8), Key(9)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Leaderboard<A>(Arc<Inner<A>>);

struct Inner<A> {
    score_of: Box<dyn Fn(&A) -> i64 + Send + Sync>,
    places: usize,
    parts: Parts<Best>,
}

/// A key and its score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ranked {
    /// The key.
    pub key: Key,
    /// Its score.
    pub score: i64,
}

impl<A: Aggregate> Leaderboard<A> {
    /// Creates a view of the best `places` keys by the score that `score_of` makes of a state.
    ///
    /// `score_of` runs on the shard's thread for every event, so it must be fast. Each batch that changes one of the
    /// best scores writes `places` times 16 bytes. When many of the best scores fall, an occasional batch reads all
    /// scores of the shard (about 2 ms for a million).
    #[must_use]
    pub fn new(places: usize, score_of: impl Fn(&A) -> i64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner { score_of: Box::new(score_of), places, parts: Parts::new() }))
    }

    /// Returns the best `n` keys, best first; at most as many as the view has places.
    #[must_use]
    pub fn top(&self, n: usize) -> Vec<Ranked> {
        let mut best = Vec::new();
        self.0.parts.read(|parts| parts.iter().flatten().for_each(|part| part.copy(&mut best)));
        best.sort_unstable_by_key(|ranked| Reverse(Rank::from(*ranked)));
        best.truncate(n.min(self.0.places));
        best
    }

    /// Returns the position of each shard's part. Ranks read afterwards include everything up to it.
    #[must_use]
    pub fn positions(&self) -> Vec<(ShardId, Position)> {
        self.0.parts.positions()
    }
}

impl<A: Aggregate> View<A> for Leaderboard<A> {
    fn writer(&self, place: &Place) -> Box<dyn ViewWriter<A>> {
        let part = self.0.parts.begin(place, Best::new(self.0.places));
        let ranking = Ranking::new(self.0.places, place.keys_expected);
        Box::new(Writer { view: Arc::clone(&self.0), part, ranking })
    }
}

impl<A> Clone for Leaderboard<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A> fmt::Debug for Leaderboard<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaderboard").field("places", &self.0.places).finish_non_exhaustive()
    }
}

/// One shard's best, as readers see them.
#[derive(Debug)]
struct Best {
    lock: SeqLock,
    count: AtomicU64,
    /// Keys and scores, best first.
    ranked: Box<[(AtomicU64, AtomicU64)]>,
    progress: Progress,
}

impl Best {
    fn new(places: usize) -> Self {
        Self {
            lock: SeqLock::new(),
            count: AtomicU64::new(0),
            ranked: (0..places).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).collect(),
            progress: Progress::new(),
        }
    }

    fn copy(&self, best: &mut Vec<Ranked>) {
        let before = best.len();
        self.lock.read(|| {
            best.truncate(before);
            let count = self.count.load(Ordering::Relaxed) as usize;
            best.extend(self.ranked[..count].iter().map(|(key, score)| Ranked {
                key: Key(key.load(Ordering::Relaxed)),
                score: score.load(Ordering::Relaxed).cast_signed(),
            }));
        });
    }

    /// Replaces the list. Only the writer calls this.
    fn set(&self, best: &[Rank]) {
        self.lock.write(|| {
            self.count.store(best.len() as u64, Ordering::Relaxed);
            for (rank, (key, score)) in best.iter().zip(&self.ranked) {
                key.store(rank.key.0.0, Ordering::Relaxed);
                score.store(rank.score.cast_unsigned(), Ordering::Relaxed);
            }
        });
    }
}

impl Part for Best {
    fn progress(&self) -> &Progress {
        &self.progress
    }
}

/// A score with its key. The better rank compares greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    score: i64,
    key: Reverse<Key>,
}

impl From<Ranked> for Rank {
    fn from(Ranked { key, score }: Ranked) -> Self {
        Self { score, key: Reverse(key) }
    }
}

const LOWEST: Rank = Rank { score: i64::MIN, key: Reverse(Key(u64::MAX)) };
/// The list is this many times as long as the places, so that many scores must fall before it is rebuilt.
const SPARE: usize = 8;
const LIST_MIN: usize = 256;

/// One shard's scores, and the best of them.
#[derive(Debug)]
struct Ranking {
    numbers: KeyNumbers,
    /// Indexed by the key's number.
    scores: Vec<Rank>,
    /// Best first; at most `best_max`, but up to twice as long during a rebuild.
    best: Vec<Rank>,
    best_max: usize,
    places: usize,
    /// `best` holds exactly the ranks from here up; `None` means that it holds none.
    floor: Option<Rank>,
    /// `true` if one of the first `places` ranks has changed since they were last shown.
    is_news: bool,
}

impl Ranking {
    fn new(places: usize, keys_expected: usize) -> Self {
        let best_max = (places * SPARE).max(LIST_MIN);
        Self {
            numbers: KeyNumbers::with_room(keys_expected),
            scores: Vec::with_capacity(keys_expected),
            best: Vec::with_capacity(best_max * 2),
            best_max,
            places,
            floor: None,
            is_news: false,
        }
    }

    #[inline]
    fn set(&mut self, key: Key, score: i64) {
        let new = Rank { score, key: Reverse(key) };
        let Some(number) = self.numbers.find(key) else {
            self.numbers.add(key);
            self.scores.push(new);
            return self.insert(new);
        };
        let old = std::mem::replace(&mut self.scores[number], new);
        if old != new {
            self.remove(old);
            self.insert(new);
        }
    }

    #[inline]
    fn is_above_floor(&self, rank: Rank) -> bool {
        self.floor.is_some_and(|floor| rank >= floor)
    }

    #[inline]
    fn insert(&mut self, rank: Rank) {
        if self.is_above_floor(rank) {
            let at = self.best.partition_point(|better| *better > rank);
            self.best.insert(at, rank);
            self.is_news |= at < self.places;
            self.shorten();
        }
    }

    #[inline]
    fn remove(&mut self, rank: Rank) {
        if self.is_above_floor(rank) {
            let at = self.best.partition_point(|better| *better > rank);
            assert!(self.best.get(at) == Some(&rank), "the list holds exactly the ranks above the floor");
            self.best.remove(at);
            self.is_news |= at < self.places;
        }
    }

    /// If the list is too long, removes the worst ranks and raises the floor above them.
    fn shorten(&mut self) {
        if self.best.len() > self.best_max {
            self.best.truncate(self.best_max);
            self.floor = self.best.last().copied();
        }
    }

    /// Returns the best `places` ranks if one of them has changed since the last call.
    fn news(&mut self) -> Option<&[Rank]> {
        if self.best.len() < self.places.min(self.scores.len()) {
            self.refill();
        }
        std::mem::take(&mut self.is_news).then(|| &self.best[..self.places.min(self.best.len())])
    }

    /// Rebuilds `best` from all scores. The floor rises meanwhile, so most scores cost one comparison.
    fn refill(&mut self) {
        self.best.clear();
        self.floor = Some(LOWEST);
        self.is_news = true;
        for rank in &self.scores {
            if self.floor.is_some_and(|floor| *rank >= floor) {
                self.best.push(*rank);
            }
            if self.best.len() == self.best_max * 2 {
                self.best.select_nth_unstable_by_key(self.best_max - 1, |rank| Reverse(*rank));
                self.best.truncate(self.best_max);
                self.floor = self.best.last().copied();
            }
        }
        self.best.sort_unstable_by_key(|rank| Reverse(*rank));
        self.shorten();
    }
}

struct Writer<A> {
    view: Arc<Inner<A>>,
    part: Arc<Best>,
    ranking: Ranking,
}

impl<A: Aggregate> ViewWriter<A> for Writer<A> {
    /// Loading sorts nothing, because the list stays empty until the first `publish`.
    fn load(&mut self, key: Key, state: &A) {
        self.ranking.set(key, (self.view.score_of)(state));
    }

    fn changed(&mut self, key: Key, state: &A, _meta: &Meta) {
        self.ranking.set(key, (self.view.score_of)(state));
    }

    fn publish(&mut self, at: Position) {
        if let Some(best) = self.ranking.news() {
            self.part.set(best);
        }
        self.part.progress.publish(at);
    }
}
