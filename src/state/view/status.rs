//! The server's status: the number of keys online, the number of all keys, and the load.
//!
//! One writer per part: its shard. The shard counts privately and publishes all figures together with the position, so
//! a shard's figures are exactly those at its published position.

use std::fmt;
use std::sync::Arc;

use crate::event::{Key, Meta, Sequence, ShardId, Time};
use crate::state::aggregate::Aggregate;
use crate::state::view::key_numbers::KeyNumbers;
use crate::state::view::leaderboard::{Leaderboard, Ranked};
use crate::state::view::parts::Parts;
use crate::state::view::{Place, Position, View, ViewWriter};
use crate::sync::{AtomicU64, Ordering, SeqLock};

/// A view with the figures of the whole server, read from any thread. Handles are cheap to clone.
///
/// ```
/// # use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # enum Session { Joined, Left }
/// # impl Event for Session {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "joined", 1), EventType::new(2, "left", 1)];
/// #     fn event_type(&self) -> EventTypeId {
/// #         match self { Session::Joined => EventTypeId(1), Session::Left => EventTypeId(2) }
/// #     }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Player { is_online: bool }
/// # impl Aggregate for Player {
/// #     type Event = Session;
/// #     type Command = ();
/// #     type Rejection = ();
/// #     fn evolve(&mut self, event: &ArchivedSession, _meta: &Meta) {
/// #         self.is_online = matches!(event, ArchivedSession::Joined);
/// #     }
/// #     fn decide(&self, (): (), _emit: &mut Emit<Session>) -> Result<(), ()> { Ok(()) }
/// # }
/// use corelane::view::{Presence, ServerStatus};
/// use corelane::{Config, Deadline, Engine, Key};
///
/// let presence = |player: &Player| if player.is_online { Presence::Online } else { Presence::Offline };
/// let server = ServerStatus::new(presence);
/// # let dir = tempfile::tempdir()?;
/// let engine = Engine::<Player>::builder(Config::new(dir.path())).view(&server).open()?;
/// let mut producer = engine.producer();
/// producer.publish(Key(7), Session::Joined)?;
/// producer.publish(Key(8), Session::Joined)?;
/// producer.publish(Key(7), Session::Left)?;
/// engine.flush(Deadline::NEVER)?;
/// // The shard answers between two batches, when it has published the views.
/// engine.state(Key(7)).wait()?;
/// assert_eq!((server.get().online, server.get().total), (1, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ServerStatus<A>(Arc<Inner<A>>, Option<Leaderboard<A>>);

struct Inner<A> {
    presence_of: Box<dyn Fn(&A) -> Presence + Send + Sync>,
    parts: Parts<Figures>,
}

/// A key's presence, read from the key's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Counted as online.
    Online,
    /// Counted, but not as online.
    Offline,
}

/// The sum over all shards, each exactly as it was at its published position.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Status {
    /// Keys that are online.
    pub online: u64,
    /// Keys that have a state.
    pub total: u64,
    /// Events in the log.
    pub events: u64,
    /// The load: the average number of events per second in the five whole seconds before the second asked about.
    /// Counts only events appended since the engine opened.
    pub events_per_s: f64,
    /// The newest time among the positions: the time at which the newest counted event was appended.
    pub time: Time,
}

impl<A: Aggregate> ServerStatus<A> {
    /// Creates a view that counts keys by the presence that `presence_of` reads from their states.
    ///
    /// `presence_of` runs on the shard's thread for every event, so it must be fast.
    #[must_use]
    pub fn new(presence_of: impl Fn(&A) -> Presence + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner { presence_of: Box::new(presence_of), parts: Parts::new() }), None)
    }

    /// Adds a leaderboard of the best `places` keys by the score that `score_of` makes of a state.
    #[must_use]
    pub fn with_top(self, places: usize, score_of: impl Fn(&A) -> i64 + Send + Sync + 'static) -> Self {
        Self(self.0, Some(Leaderboard::new(places, score_of)))
    }

    /// Returns the best keys of the server: at most `n`, and at most the places of [`ServerStatus::with_top`]; none
    /// without it.
    #[must_use]
    pub fn top(&self, n: usize) -> Vec<Ranked> {
        self.1.as_ref().map(|best| best.top(n)).unwrap_or_default()
    }

    /// Returns the status, with the load at the newest position's time.
    #[must_use]
    pub fn get(&self) -> Status {
        self.status(None)
    }

    /// Returns the status, with the load at `now`: the load of a quiet server falls to 0.
    #[must_use]
    pub fn get_at(&self, now: Time) -> Status {
        self.status(Some(now))
    }

    /// Returns the position of each shard's part. Figures read afterwards include everything up to it.
    #[must_use]
    pub fn positions(&self) -> Vec<(ShardId, Position)> {
        self.0.parts.read(|parts| {
            let opened = (0..).zip(parts).filter_map(|(shard, part)| Some((ShardId(shard), part.as_ref()?)));
            opened.map(|(shard, part)| (shard, part.get().at)).collect()
        })
    }

    fn status(&self, now: Option<Time>) -> Status {
        let shards: Vec<Tally> = self.0.parts.read(|parts| parts.iter().flatten().map(|part| part.get()).collect());
        let time = shards.iter().map(|tally| tally.at.time).max().unwrap_or_default();
        let second = second_of(now.unwrap_or(time));
        let recent: u64 = shards.iter().map(|tally| tally.load.before(second)).sum();
        Status {
            online: shards.iter().map(|tally| tally.online).sum(),
            total: shards.iter().map(|tally| tally.total).sum(),
            events: shards.iter().map(|tally| tally.at.sequence.0).sum(),
            events_per_s: recent as f64 / LOAD_SECONDS as f64,
            time,
        }
    }
}

impl<A: Aggregate> View<A> for ServerStatus<A> {
    fn writer(&self, place: &Place) -> Box<dyn ViewWriter<A>> {
        let part = self.0.parts.begin(place, Figures::new());
        let numbers = KeyNumbers::with_room(place.keys_expected);
        let presences = Vec::with_capacity(place.keys_expected);
        let status =
            Writer { view: Arc::clone(&self.0), part, numbers, presences, changed: 0, tally: Tally::default() };
        match &self.1 {
            None => Box::new(status),
            Some(best) => Box::new(Both { status, best: best.writer(place) }),
        }
    }
}

impl<A> Clone for ServerStatus<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0), self.1.clone())
    }
}

impl<A> fmt::Debug for ServerStatus<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerStatus").finish_non_exhaustive()
    }
}

/// The writer of a status and its leaderboard.
struct Both<A: Aggregate> {
    status: Writer<A>,
    best: Box<dyn ViewWriter<A>>,
}

impl<A: Aggregate> ViewWriter<A> for Both<A> {
    fn load(&mut self, key: Key, state: &A) {
        self.status.load(key, state);
        self.best.load(key, state);
    }

    fn changed(&mut self, key: Key, state: &A, meta: &Meta) {
        self.status.changed(key, state, meta);
        self.best.changed(key, state, meta);
    }

    fn publish(&mut self, at: Position) {
        self.best.publish(at);
        self.status.publish(at);
    }
}

/// Whole seconds over which the load is averaged.
const LOAD_SECONDS: u64 = 5;
/// Seconds kept: one more for the current second, rounded up to a power of two.
const SECONDS: usize = 8;
const _: () = assert!(SECONDS > LOAD_SECONDS as usize);

fn second_of(time: Time) -> u64 {
    time.0 / 1_000_000_000
}

/// Events by second: those of second `s` are at `s % SECONDS` until a later second overwrites them.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    events: [u64; SECONDS],
    newest: u64,
}

impl Load {
    /// Counts events that were appended at about `time`. If `time` goes back, they count at the newest time.
    fn add(&mut self, events: u64, time: Time) {
        let second = second_of(time).max(self.newest);
        for passed in (self.newest + 1..=second).rev().take(SECONDS) {
            self.events[passed as usize % SECONDS] = 0;
        }
        self.newest = second;
        self.events[second as usize % SECONDS] += events;
    }

    /// Returns the events of the [`LOAD_SECONDS`] before `second`.
    fn before(&self, second: u64) -> u64 {
        let from = second.saturating_sub(LOAD_SECONDS);
        let kept = (self.newest + 1).saturating_sub(SECONDS as u64);
        (from.max(kept)..second.min(self.newest + 1)).map(|second| self.events[second as usize % SECONDS]).sum()
    }
}

/// A shard's figures, published together.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    at: Position,
    online: u64,
    total: u64,
    load: Load,
}

const WORDS: usize = 5 + SECONDS;

impl Tally {
    fn to_words(self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let (figures, seconds) = words.split_at_mut(5);
        figures.copy_from_slice(&[self.at.sequence.0, self.at.time.0, self.online, self.total, self.load.newest]);
        seconds.copy_from_slice(&self.load.events);
        words
    }

    fn from_words(words: [u64; WORDS]) -> Self {
        let [sequence, time, online, total, newest, events @ ..] = words;
        let at = Position { sequence: Sequence(sequence), time: Time(time) };
        Self { at, online, total, load: Load { events, newest } }
    }
}

#[derive(Debug)]
struct Figures(SeqLock, [AtomicU64; WORDS]);

impl Figures {
    fn new() -> Self {
        Self(SeqLock::new(), std::array::from_fn(|_| AtomicU64::new(0)))
    }

    fn get(&self) -> Tally {
        Tally::from_words(self.0.read(|| std::array::from_fn(|at| self.1[at].load(Ordering::Relaxed))))
    }

    /// Publishes the figures. Only the writer calls this.
    fn set(&self, tally: Tally) {
        self.0.write(|| {
            self.1.iter().zip(tally.to_words()).for_each(|(shown, word)| shown.store(word, Ordering::Relaxed));
        });
    }
}

struct Writer<A> {
    view: Arc<Inner<A>>,
    part: Arc<Figures>,
    numbers: KeyNumbers,
    /// Indexed by the key's number.
    presences: Vec<Presence>,
    /// Events since the last position.
    changed: u64,
    tally: Tally,
}

impl<A: Aggregate> Writer<A> {
    fn put(&mut self, key: Key, state: &A) {
        let presence = (self.view.presence_of)(state);
        let before = match self.numbers.find(key) {
            Some(number) => std::mem::replace(&mut self.presences[number], presence),
            None => {
                self.numbers.add(key);
                self.presences.push(presence);
                self.tally.total += 1;
                Presence::Offline
            }
        };
        match (before, presence) {
            (Presence::Offline, Presence::Online) => self.tally.online += 1,
            (Presence::Online, Presence::Offline) => self.tally.online -= 1,
            (Presence::Online, Presence::Online) | (Presence::Offline, Presence::Offline) => {}
        }
    }
}

impl<A: Aggregate> ViewWriter<A> for Writer<A> {
    fn load(&mut self, key: Key, state: &A) {
        self.put(key, state);
    }

    fn changed(&mut self, key: Key, state: &A, _meta: &Meta) {
        self.changed += 1;
        self.put(key, state);
    }

    fn publish(&mut self, at: Position) {
        self.tally.load.add(std::mem::take(&mut self.changed), at.time);
        self.tally.at = at;
        self.part.set(self.tally);
    }
}
