//! The lanes: of every key what may run now, what waits and for what, and how far all of it is done.
//!
//! One writer: whoever owns it; it runs nothing and writes nothing. Of a key one event is out at a time, the first
//! unfinished one; so events of a key succeed in the order offered. The checkpoint never passes an event that is
//! neither handled nor durably recorded.
//!
//! ```text
//!                 ┌───────────────── due ────────────────┐
//!                 ▼                                      │
//!  offer ─▶ Live: next() ─▶ a InFlight is out ─▶ failed: Retry ─▶ Retrying { due }
//!                 ▲            │    │   │          AwaitGap ─▶ AwaitingGap { since } ─▶ filled or over: Live
//!                 └─ succeeded ┘    │   └─▶ failed: Skip ─▶ recorded ─▶ Live
//!                                   └─────▶ failed: Park ─▶ recorded ─▶ Parked { letters }: what comes is recorded behind it
//!                                                                          └─ unpark: the last letter is gone ─▶ Live
//! ```
//!
//! Memory: 24 bytes per unfinished event; 32 and 5 to 12 of index per key that has one or is parked; and about 30 more per
//! key that waits for a time. With a million keys: 100 bytes per retrying key with one event, 44 per parked one.
//! A key at rest takes none. What was allocated once is kept and used again. A table that has just doubled takes twice
//! what it holds, and while it doubles three times.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use crate::error::ConfigError;
use crate::event::{Key, Offset};
use events::NONE;

pub(super) mod answer;
mod events;
mod keys;
mod parking;

use answer::{InFlight, KeyState, QueuePolicy, QueueRefused, QueueStatistics, RecordKind, ToRecord, Verdict};
use events::Events;
use keys::{Keys, Stage};

/// Keys that one tick moves at most.
const TICK_MAX: usize = 1024;

/// The state of every key of one consumer on one shard.
///
/// `now` is the time since any fixed moment on a monotonic clock, the same in all calls.
///
/// ```
/// # use corelane::consumer::{KeyQueues, QueuePolicy, Verdict};
/// # use corelane::{Key, Offset};
/// # use std::time::Duration;
/// let mut lanes = KeyQueues::new(QueuePolicy::default().concurrency(64), Offset(0))?;
/// let (alice, bob) = (Key::new(1), Key::new(2));
/// lanes.offer(alice, Offset(0))?;
/// lanes.offer(alice, Offset(100))?;
/// lanes.offer(bob, Offset(200))?;
/// lanes.read_up_to(Offset(300));
///
/// let first = lanes.next().expect("alice's first");
/// let other = lanes.next().expect("bob's; alice's second waits for her first");
/// assert_eq!((first.offset(), other.offset(), lanes.next()), (Offset(0), Offset(200), None));
/// lanes.succeeded(other);
/// let after = Duration::from_millis(100);
/// assert!(lanes.failed(first, Verdict::Retry { after }, Duration::ZERO).is_none());
/// assert_eq!((lanes.next(), lanes.next_due()), (None, Some(after)));
///
/// lanes.tick(after);
/// let first = lanes.next().expect("alice's first again");
/// assert_eq!((first.attempt(), lanes.checkpoint()), (2, Offset(0)));
/// lanes.succeeded(first);
/// assert_eq!(lanes.checkpoint(), Offset(100));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct KeyQueues {
    policy: QueuePolicy,
    keys: Keys,
    events: Events,
    /// Keys in `Ready`, each once.
    ready: VecDeque<u32>,
    /// Keys in `Retrying` or `AwaitingGap`, each once, by `due_ns`.
    timed: BTreeSet<(u64, u32)>,
    /// Keys in `Recording` whose event is not out, each once.
    to_record: VecDeque<u32>,
    /// Everything below was offered or is nobody's.
    position: Offset,
    /// Nothing below is offered any more.
    offers_from: Offset,
    halted: Option<(Key, Offset)>,
    /// Gauges are filled in when asked for.
    statistics: QueueStatistics,
}

impl KeyQueues {
    /// KeyQueues without events; the log is read from `position`.
    ///
    /// # Errors
    /// The first value of the policy that cannot be used.
    pub fn new(policy: QueuePolicy, position: Offset) -> Result<Self, ConfigError> {
        policy.check()?;
        Ok(Self {
            policy,
            keys: Keys::new(),
            events: Events::new(),
            ready: VecDeque::new(),
            timed: BTreeSet::new(),
            to_record: VecDeque::new(),
            position,
            offers_from: position,
            halted: None,
            statistics: QueueStatistics::default(),
        })
    }

    /// Begins anew at another position: what is unfinished is offered again or left behind, letters are to be restored. Counts
    /// stay.
    ///
    /// # Panics
    /// When an event is out.
    pub fn set_to(&mut self, position: Offset) {
        assert_eq!(self.statistics.running, 0, "lanes are set elsewhere while nothing of them is out");
        let (policy, statistics) = (self.policy.clone(), self.statistics);
        *self = Self { statistics, ..Self::new(policy, position).expect("the policy was taken before") };
    }

    /// Takes in the next event of the log.
    ///
    /// # Errors
    /// When there is no room. The event is to be offered again, before any later one.
    ///
    /// # Panics
    /// When `offset` does not lie above all that was offered and read.
    pub fn offer(&mut self, key: Key, offset: Offset) -> Result<(), QueueRefused> {
        assert!(offset >= self.offers_from, "events are offered in the order of the log");
        if self.events.len() >= self.policy.unfinished_max {
            return Err(QueueRefused::Full);
        }
        let lane = match self.keys.find(key) {
            Some(lane) => lane,
            None if self.keys.len() >= self.policy.keys_max => return Err(QueueRefused::TooManyKeys),
            None => {
                let lane = self.keys.add(key, Stage::Ready);
                self.ready.push_back(lane);
                lane
            }
        };
        let state = self.keys.lane_mut(lane);
        state.tail = self.events.push(offset, state.tail);
        if state.stage == Stage::Parked {
            state.stage = Stage::Recording { is_out: false, is_skip: false };
            self.to_record.push_back(lane);
        }
        self.position = offset;
        self.offers_from = Offset(offset.0.saturating_add(1));
        Ok(())
    }

    /// Takes in the next event of the log and gives it out at once: its key must be at rest ([`KeyQueues::is_at_rest`]). For
    /// an owner that runs events as it reads them, and brings here only those that fail.
    ///
    /// # Errors
    /// As [`KeyQueues::offer`].
    ///
    /// # Panics
    /// As [`KeyQueues::offer`], and when the key is not at rest.
    pub fn offer_running(&mut self, key: Key, offset: Offset) -> Result<InFlight, QueueRefused> {
        assert!(self.is_at_rest(key), "an event of key {key} is unfinished");
        self.offer(key, offset)?;
        let lane = self.ready.pop_back().expect("a key at rest becomes ready");
        let state = self.keys.lane_mut(lane);
        state.stage = Stage::Running;
        self.statistics.running += 1;
        Ok(InFlight { lane, key, offset, attempt: 1, is_gap_over: false })
    }

    /// So many events were handled as they were read, each of a key at rest.
    pub fn handled_at_rest(&mut self, events: u64) {
        self.statistics.succeeded += events;
    }

    /// Everything below `position` was offered or does not concern this consumer: its filter left it out, say.
    ///
    /// # Panics
    /// When `position` does not lie above all that was offered, or below what was read before.
    pub fn read_up_to(&mut self, position: Offset) {
        assert!(position >= self.offers_from, "reading goes on");
        self.position = position;
        self.offers_from = position;
    }

    /// The next event that may run now. `None` when `concurrency` are out, when nothing may run, or while halted.
    #[expect(clippy::should_implement_trait, reason = "None is not the end")]
    pub fn next(&mut self) -> Option<InFlight> {
        if self.statistics.running >= self.policy.concurrency || self.halted.is_some() {
            return None;
        }
        let lane = self.ready.pop_front()?;
        Some(self.give_out(lane))
    }

    /// As [`KeyQueues::next`], but rather an event that has not failed yet, the first from place `from` of those that may run: by one
    /// that has, nobody can tell whether it or the service is at fault.
    pub fn next_fresh(&mut self, from: usize) -> Option<InFlight> {
        if !self.may_run() {
            return None;
        }
        let at = self.fresh(from).unwrap_or(0);
        let lane = self.ready.remove(at)?;
        Some(self.give_out(lane))
    }

    /// Whether an event may run that has not failed yet.
    #[must_use]
    pub fn has_fresh(&self) -> bool {
        self.may_run() && self.fresh(0).is_some()
    }

    fn fresh(&self, from: usize) -> Option<usize> {
        let count = self.ready.len();
        let mut places = (0..count).map(|i| (from + i) % count);
        places.find(|at| self.keys.lane(self.ready[*at]).failures == 0)
    }

    fn give_out(&mut self, lane: u32) -> InFlight {
        let state = self.keys.lane_mut(lane);
        assert_eq!(state.stage, Stage::Ready);
        state.stage = Stage::Running;
        self.statistics.running += 1;
        let offset = self.events.offset(self.events.first(state.tail));
        let is_gap_over = std::mem::take(&mut state.is_gap_over);
        InFlight { lane, key: state.key, offset, attempt: state.failures.saturating_add(1), is_gap_over }
    }

    /// Whether [`KeyQueues::next`] has an event.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.statistics.running < self.policy.concurrency && self.halted.is_none() && !self.ready.is_empty()
    }

    /// Keys whose first event may run and is not out.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Whether there is room for one more event, of any key.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.events.len() < self.policy.unfinished_max && self.keys.len() < self.policy.keys_max
    }

    /// Whether nothing of the key is unfinished or parked.
    #[must_use]
    #[inline]
    pub fn is_at_rest(&self, key: Key) -> bool {
        self.keys.len() == 0 || self.keys.find(key).is_none()
    }

    /// The key's first unfinished event.
    #[must_use]
    pub fn first_of(&self, key: Key) -> Option<Offset> {
        let state = self.keys.lane(self.keys.find(key)?);
        (state.tail != NONE).then(|| self.events.offset(self.events.first(state.tail)))
    }

    /// The event was handled: it ends.
    ///
    /// # Panics
    /// When the run is not of these lanes.
    pub fn succeeded(&mut self, run: InFlight) {
        self.take_back(&run);
        self.statistics.succeeded += 1;
        self.end_first(run.lane);
    }

    /// The event failed. With `Park` and `Skip`, returns what is to be recorded.
    ///
    /// # Panics
    /// When the run is not of these lanes.
    pub fn failed(&mut self, run: InFlight, verdict: Verdict, now: Duration) -> Option<ToRecord> {
        self.take_back(&run);
        let InFlight { lane, key, offset, attempt: attempts, .. } = run;
        if verdict != Verdict::AwaitGap {
            self.keys.lane_mut(lane).failures = attempts;
            self.statistics.failures += 1;
        }
        match verdict {
            Verdict::Retry { after } => self.wait(lane, Stage::Retrying, now.saturating_add(after)),
            Verdict::AwaitGap => {
                self.wait(lane, Stage::AwaitingGap, now.saturating_add(self.policy.gap_wait_max));
            }
            Verdict::Halt => {
                self.keys.lane_mut(lane).stage = Stage::Ready;
                self.ready.push_front(lane);
                self.halted.get_or_insert((key, offset));
            }
            Verdict::Park | Verdict::Skip => {
                let is_skip = verdict == Verdict::Skip;
                self.keys.lane_mut(lane).stage = Stage::Recording { is_out: true, is_skip };
                let kind = if is_skip { RecordKind::Skipped } else { RecordKind::Parked };
                return Some(ToRecord { lane, key, offset, attempts, kind });
            }
        }
        None
    }

    /// A run comes back.
    fn take_back(&mut self, run: &InFlight) {
        let state = self.keys.lane(run.lane);
        let is_ours = state.stage == Stage::Running
            && state.key == run.key
            && self.events.offset(self.events.first(state.tail)) == run.offset;
        assert!(is_ours, "a run of key {} that is not out", run.key);
        self.statistics.running -= 1;
    }

    fn wait(&mut self, lane: u32, stage: Stage, due: Duration) {
        let due_ns = u64::try_from(due.as_nanos()).unwrap_or(u64::MAX);
        let state = self.keys.lane_mut(lane);
        (state.stage, state.due_ns) = (stage, due_ns);
        self.timed.insert((due_ns, lane));
    }

    /// The key's first event has ended; whatever is next for the key.
    fn end_first(&mut self, lane: u32) {
        let state = self.keys.lane_mut(lane);
        state.tail = self.events.pop(state.tail);
        state.failures = 0;
        match (state.tail, state.letters) {
            (NONE, 0) => self.keys.remove(lane),
            (NONE, _) => state.stage = Stage::Parked,
            _ => self.line_up(lane),
        }
    }

    /// The key's first event is to run or, where letters lie before it, to be recorded.
    fn line_up(&mut self, lane: u32) {
        let state = self.keys.lane_mut(lane);
        if state.letters == 0 {
            state.stage = Stage::Ready;
            self.ready.push_back(lane);
        } else {
            state.stage = Stage::Recording { is_out: false, is_skip: false };
            self.to_record.push_back(lane);
        }
    }

    /// Makes keys whose time has come ready, the earliest first and at most 1,024 of them. Returns how many.
    pub fn tick(&mut self, now: Duration) -> usize {
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let mut moved = 0;
        while moved < TICK_MAX
            && let Some((due_ns, lane)) = self.timed.first().copied()
            && due_ns <= now_ns
        {
            self.timed.pop_first();
            let state = self.keys.lane_mut(lane);
            state.is_gap_over = state.stage == Stage::AwaitingGap;
            state.stage = Stage::Ready;
            self.ready.push_back(lane);
            moved += 1;
        }
        moved
    }

    /// When the next [`KeyQueues::tick`] has something to do; `None` when nothing waits for a time.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.timed.first().map(|(due_ns, _)| Duration::from_nanos(*due_ns))
    }

    /// What was missing before the key's first event is there, or its gap is closed. Returns whether the event waited
    /// for that; it may run now.
    pub fn gap_filled(&mut self, key: Key) -> bool {
        let Some(lane) = self.keys.find(key) else { return false };
        let state = self.keys.lane_mut(lane);
        if state.stage != Stage::AwaitingGap {
            return false;
        }
        state.stage = Stage::Ready;
        self.timed.remove(&(state.due_ns, lane));
        self.ready.push_back(lane);
        true
    }

    /// How far all is done: every event below is handled or durably recorded.
    #[must_use]
    pub fn checkpoint(&self) -> Offset {
        self.events.oldest().unwrap_or(self.position)
    }

    /// The events that are offered and not ended, oldest first. With them a checkpoint can name what above it is
    /// not done, so that a restart repeats nothing else.
    pub fn unfinished(&self) -> impl Iterator<Item = Offset> + '_ {
        self.events.offsets()
    }

    /// Where a key stands.
    #[must_use]
    pub fn state(&self, key: Key) -> KeyState {
        let Some(lane) = self.keys.find(key) else { return KeyState::Live };
        let state = self.keys.lane(lane);
        let due = Duration::from_nanos(state.due_ns);
        match state.stage {
            Stage::Ready | Stage::Running | Stage::Recording { is_skip: true, .. } => KeyState::Live,
            Stage::Retrying => KeyState::Retrying { due },
            Stage::AwaitingGap => KeyState::AwaitingGap { since: due.saturating_sub(self.policy.gap_wait_max) },
            Stage::Parked | Stage::Recording { .. } => KeyState::Parked { letters: state.letters },
        }
    }

    /// The event that halted everything.
    #[must_use]
    pub fn halted(&self) -> Option<(Key, Offset)> {
        self.halted
    }

    /// Goes on after a halt, with the event that halted first.
    pub fn resume(&mut self) {
        self.halted = None;
    }

    /// What was done so far, and what waits.
    #[must_use]
    pub fn statistics(&self) -> QueueStatistics {
        QueueStatistics {
            unfinished: self.events.len(),
            ready: self.ready.len(),
            waiting: self.timed.len(),
            keys: self.keys.len(),
            ..self.statistics
        }
    }
}

#[cfg(test)]
mod tests;
