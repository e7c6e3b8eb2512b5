//! The best: the keys with the highest scores, over all shards.
//!
//! One writer per part: its shard. It knows every key's score, and keeps the best of them sorted down to a floor: above
//! the floor is exactly what the sorted list holds. A score that stays below the floor costs one comparison. When so many
//! have fallen that the list gets shorter than the places, it is made anew from all scores.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;

use crate::event::{Key, Meta, ShardId};
use crate::state::aggregate::Aggregate;
use crate::state::view::index::Index;
use crate::state::view::parts::{Part, Parts, Progress};
use crate::state::view::{Place, Position, View, ViewWriter};
use crate::sync::{AtomicU64, Ordering, SeqLock};

/// The keys with the highest scores. Of equal scores the lower key comes first. Scores may fall.
///
/// Exact: it is what sorting all keys would give, each shard at a position that it has published. Handles are cheap to
/// clone.
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
    /// Who.
    pub key: Key,
    /// How good.
    pub score: i64,
}

impl<A: Aggregate> Leaderboard<A> {
    /// A view of the best `places` keys by what `score_of` makes of their states.
    ///
    /// `score_of` runs on the shard's thread for every event: it must be quick. Each batch that changes one of the best
    /// writes `places` times 16 bytes. When many of the best fall, now and then a batch goes through all scores of the
    /// shard (about 2 ms for a million).
    #[must_use]
    pub fn new(places: usize, score_of: impl Fn(&A) -> i64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner { score_of: Box::new(score_of), places, parts: Parts::new() }))
    }

    /// The best `n`, best first; at most as many as the view has places.
    #[must_use]
    pub fn top(&self, n: usize) -> Vec<Ranked> {
        let mut best = Vec::new();
        self.0.parts.read(|parts| parts.iter().flatten().for_each(|part| part.copy(&mut best)));
        best.sort_unstable_by_key(|ranked| Reverse(Rank::from(*ranked)));
        best.truncate(n.min(self.0.places));
        best
    }

    /// How far each shard's part has come. Read before the ranks, it never says more than they show.
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

    /// Only the one writer calls this.
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

/// Greater is better.
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
/// The list is so many times as long as the places, so that as many must fall before it is made anew.
const SPARE: usize = 8;
const LIST_MIN: usize = 256;

/// One shard's scores, and the best of them.
#[derive(Debug)]
struct Ranking {
    numbers: Index,
    /// By number.
    scores: Vec<Rank>,
    /// Best first; at most `best_max`, but twice as long while it is made anew.
    best: Vec<Rank>,
    best_max: usize,
    places: usize,
    /// Exactly the ranks from here up are in `best`. `None`: none are.
    floor: Option<Rank>,
    /// One of the first `places` is no longer what was shown.
    is_news: bool,
}

impl Ranking {
    fn new(places: usize, keys_expected: usize) -> Self {
        let best_max = (places * SPARE).max(LIST_MIN);
        Self {
            numbers: Index::with_room(keys_expected),
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
            assert!(self.best.get(at) == Some(&rank), "above the floor is exactly what the list holds");
            self.best.remove(at);
            self.is_news |= at < self.places;
        }
    }

    /// Lets the worst go when there are too many, and raises the floor above them.
    fn shorten(&mut self) {
        if self.best.len() > self.best_max {
            self.best.truncate(self.best_max);
            self.floor = self.best.last().copied();
        }
    }

    /// The best `places`, if they are others than last time.
    fn news(&mut self) -> Option<&[Rank]> {
        if self.best.len() < self.places.min(self.scores.len()) {
            self.refill();
        }
        std::mem::take(&mut self.is_news).then(|| &self.best[..self.places.min(self.best.len())])
    }

    /// Makes `best` anew from all scores. The floor rises as it goes, so most scores are looked at only once.
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
    /// The floor is above all until the first `publish`, so loading sorts nothing.
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
