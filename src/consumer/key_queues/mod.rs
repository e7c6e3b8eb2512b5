//! Per-key queues: which event of each key may run now, which events wait, what they wait for, and the position below
//! which all events are done.
//!
//! One writer: the owner. The queues call no handler and write no file. One event of a key is in flight at a time, the
//! key's first unfinished one, so a key's events succeed in the order offered. The position never passes an event that
//! is neither handled nor durably recorded.
//!
//! ```text
//!                 ┌───────────────── due ────────────────┐
//!                 ▼                                      │
//!  offer ─▶ Live: next() ─▶ an event in flight ─▶ failed: Retry ─▶ Retrying { due }
//!                 ▲            │    │   │          AwaitGap ─▶ AwaitingGap { since } ─▶ filled or over: Live
//!                 └─ succeeded ┘    │   └─▶ failed: Skip ─▶ recorded ─▶ Live
//!                                   └─────▶ failed: Park ─▶ recorded ─▶ Parked { letters }, later events too
//!                                                                          └─ unpark: the last letter is gone ─▶ Live
//! ```
//!
//! Memory: 24 bytes per unfinished event; 32 bytes and an index of 5 to 12 bytes per key that has an unfinished event
//! or is parked; about 30 more per key that waits for a time. With a million keys: 100 bytes per retrying key with one
//! event, 44 per parked key. A key at rest takes none. Allocations are kept and reused. A table that has just doubled
//! takes twice what it holds, and three times while it doubles.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use crate::error::ConfigError;
use crate::event::{Key, Offset};
use events::NONE;

pub(super) mod answer;
mod events;
mod keys;
mod parking;

#[cfg(test)]
use answer::KeyState;
use answer::{InFlight, QueuePolicy, QueueRefused, QueueStatistics, RecordKind, ToRecord, Verdict};
use events::Events;
use keys::{Keys, Stage};

/// The maximum number of keys that one tick wakes.
const TICK_MAX: usize = 1024;

/// The queues of one consumer on one shard, one per key.
///
/// `now` is the time since a fixed moment on a monotonic clock, the same moment in all calls.
#[derive(Debug)]
pub(crate) struct KeyQueues {
    policy: QueuePolicy,
    keys: Keys,
    events: Events,
    /// Keys in `Ready`, each once.
    ready: VecDeque<u32>,
    /// Keys in `Retrying` or `AwaitingGap`, each once, by `due_ns`.
    timed: BTreeSet<(u64, u32)>,
    /// Keys in `Recording` whose record is not being written, each once.
    to_record: VecDeque<u32>,
    /// Every event below this offset was offered or does not concern this consumer.
    read_to: Offset,
    /// No event below this offset is offered any more.
    offers_from: Offset,
    halted: Option<(Key, Offset)>,
    /// Gauges are filled in by [`KeyQueues::statistics`].
    statistics: QueueStatistics,
}

impl KeyQueues {
    /// Returns empty queues for a log that is read from `position`.
    ///
    /// # Errors
    /// The first value of the policy that is out of range.
    pub(crate) fn new(policy: QueuePolicy, position: Offset) -> Result<Self, ConfigError> {
        policy.check()?;
        Ok(Self {
            policy,
            keys: Keys::new(),
            events: Events::new(),
            ready: VecDeque::new(),
            timed: BTreeSet::new(),
            to_record: VecDeque::new(),
            read_to: position,
            offers_from: position,
            halted: None,
            statistics: QueueStatistics::default(),
        })
    }

    /// Starts again at another position. Unfinished events are forgotten, and letters must be restored. Counts stay.
    ///
    /// # Panics
    /// If an event is in flight.
    pub(crate) fn set_to(&mut self, position: Offset) {
        assert_eq!(self.statistics.running, 0, "the position is set while no event is in flight");
        let (policy, statistics) = (self.policy.clone(), self.statistics);
        *self = Self { statistics, ..Self::new(policy, position).expect("the policy was checked before") };
    }

    /// Adds the next event of the log.
    ///
    /// # Errors
    /// If there is no room. The event must be offered again, before any later one.
    ///
    /// # Panics
    /// If `offset` is below an event that was offered or read before.
    pub(crate) fn offer(&mut self, key: Key, offset: Offset) -> Result<(), QueueRefused> {
        assert!(offset >= self.offers_from, "events are offered in the order of the log");
        if self.events.len() >= self.policy.unfinished_max {
            return Err(QueueRefused::Full);
        }
        let queue = match self.keys.find(key) {
            Some(queue) => queue,
            None if self.keys.len() >= self.policy.keys_max => return Err(QueueRefused::TooManyKeys),
            None => {
                let queue = self.keys.add(key, Stage::Ready);
                self.ready.push_back(queue);
                queue
            }
        };
        let state = self.keys.queue_mut(queue);
        state.tail = self.events.push(offset, state.tail);
        if state.stage == Stage::Parked {
            state.stage = Stage::Recording { is_out: false, is_skip: false };
            self.to_record.push_back(queue);
        }
        self.read_to = offset;
        self.offers_from = Offset(offset.0.saturating_add(1));
        Ok(())
    }

    /// Adds the next event of the log and returns it in flight. Its key must be at rest ([`KeyQueues::is_at_rest`]).
    /// For an owner that handles events as it reads them and queues only those that fail.
    ///
    /// # Errors
    /// The same as for [`KeyQueues::offer`].
    ///
    /// # Panics
    /// The same as for [`KeyQueues::offer`], and if the key is not at rest.
    pub(crate) fn offer_running(&mut self, key: Key, offset: Offset) -> Result<InFlight, QueueRefused> {
        assert!(self.is_at_rest(key), "an event of key {key} is unfinished");
        self.offer(key, offset)?;
        let queue = self.ready.pop_back().expect("a key at rest becomes ready");
        let state = self.keys.queue_mut(queue);
        state.stage = Stage::Running;
        self.statistics.running += 1;
        Ok(InFlight { queue, key, offset, attempt: 1 })
    }

    /// Counts events that were handled as they were read, each of a key at rest.
    pub(crate) fn handled_at_rest(&mut self, events: u64) {
        self.statistics.succeeded += events;
    }

    /// Notes that every event below `position` was offered or does not concern this consumer, for example because of
    /// its filter.
    ///
    /// # Panics
    /// If `position` is below an event that was offered, or below an earlier position.
    pub(crate) fn read_up_to(&mut self, position: Offset) {
        assert!(position >= self.offers_from, "the log is read forwards");
        self.read_to = position;
        self.offers_from = position;
    }

    /// Returns the next event that may run. `None` if `concurrency` events are in flight, if no event may run, or while
    /// halted.
    pub(crate) fn next(&mut self) -> Option<InFlight> {
        if self.statistics.running >= self.policy.concurrency || self.halted.is_some() {
            return None;
        }
        let queue = self.ready.pop_front()?;
        Some(self.take_first(queue))
    }

    /// Does the same as [`KeyQueues::next`], but prefers an event that has not failed yet: the first at or after place
    /// `from` among the ready ones. An event that failed before cannot show whether it or the service is at fault.
    pub(crate) fn next_fresh(&mut self, from: usize) -> Option<InFlight> {
        if !self.may_run() {
            return None;
        }
        let at = self.fresh(from).unwrap_or(0);
        let queue = self.ready.remove(at)?;
        Some(self.take_first(queue))
    }

    /// Returns `true` if an event that has not failed yet may run.
    #[must_use]
    pub(crate) fn has_fresh(&self) -> bool {
        self.may_run() && self.fresh(0).is_some()
    }

    fn fresh(&self, from: usize) -> Option<usize> {
        let count = self.ready.len();
        let mut places = (0..count).map(|i| (from + i) % count);
        places.find(|at| self.keys.queue(self.ready[*at]).failures == 0)
    }

    fn take_first(&mut self, queue: u32) -> InFlight {
        let state = self.keys.queue_mut(queue);
        assert_eq!(state.stage, Stage::Ready);
        state.stage = Stage::Running;
        self.statistics.running += 1;
        let offset = self.events.offset(self.events.first(state.tail));
        InFlight { queue, key: state.key, offset, attempt: state.failures.saturating_add(1) }
    }

    /// Returns `true` if [`KeyQueues::next`] has an event.
    #[must_use]
    pub(crate) fn may_run(&self) -> bool {
        self.statistics.running < self.policy.concurrency && self.halted.is_none() && !self.ready.is_empty()
    }

    /// Returns the number of keys whose first event may run and is not in flight.
    #[must_use]
    pub(crate) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Returns `true` if there is room for one more event, of any key.
    #[must_use]
    pub(crate) fn has_room(&self) -> bool {
        self.events.len() < self.policy.unfinished_max && self.keys.len() < self.policy.keys_max
    }

    /// Returns `true` if the key has no unfinished event and is not parked.
    #[must_use]
    #[inline]
    pub(crate) fn is_at_rest(&self, key: Key) -> bool {
        self.keys.len() == 0 || self.keys.find(key).is_none()
    }

    /// Returns the key's first unfinished event.
    #[must_use]
    pub(crate) fn first_of(&self, key: Key) -> Option<Offset> {
        let state = self.keys.queue(self.keys.find(key)?);
        (state.tail != NONE).then(|| self.events.offset(self.events.first(state.tail)))
    }

    /// Ends an event that was handled.
    ///
    /// # Panics
    /// If the event is not in flight from these queues.
    pub(crate) fn succeeded(&mut self, event: InFlight) {
        self.take_back(&event);
        self.statistics.succeeded += 1;
        self.end_first(event.queue);
    }

    /// Takes back an event that failed. With `Park` and `Skip`, returns the record to write.
    ///
    /// # Panics
    /// If the event is not in flight from these queues.
    pub(crate) fn failed(&mut self, event: InFlight, verdict: Verdict, now: Duration) -> Option<ToRecord> {
        self.take_back(&event);
        let InFlight { queue, key, offset, attempt: attempts } = event;
        if verdict != Verdict::AwaitGap {
            self.keys.queue_mut(queue).failures = attempts;
            self.statistics.failures += 1;
        }
        match verdict {
            Verdict::Retry { after } => self.wait(queue, Stage::Retrying, now.saturating_add(after)),
            Verdict::AwaitGap => {
                self.wait(queue, Stage::AwaitingGap, now.saturating_add(self.policy.gap_wait_max));
            }
            Verdict::Halt => {
                self.keys.queue_mut(queue).stage = Stage::Ready;
                self.ready.push_front(queue);
                self.halted.get_or_insert((key, offset));
            }
            Verdict::Park | Verdict::Skip => {
                let is_skip = verdict == Verdict::Skip;
                self.keys.queue_mut(queue).stage = Stage::Recording { is_out: true, is_skip };
                let kind = if is_skip { RecordKind::Skipped } else { RecordKind::Parked };
                return Some(ToRecord { queue, key, offset, attempts, kind });
            }
        }
        None
    }

    /// Checks that an event is in flight, and takes it back.
    fn take_back(&mut self, event: &InFlight) {
        let state = self.keys.queue(event.queue);
        let is_ours = state.stage == Stage::Running
            && state.key == event.key
            && self.events.offset(self.events.first(state.tail)) == event.offset;
        assert!(is_ours, "an event of key {} that is not in flight", event.key);
        self.statistics.running -= 1;
    }

    fn wait(&mut self, queue: u32, stage: Stage, due: Duration) {
        let due_ns = u64::try_from(due.as_nanos()).unwrap_or(u64::MAX);
        let state = self.keys.queue_mut(queue);
        (state.stage, state.due_ns) = (stage, due_ns);
        self.timed.insert((due_ns, queue));
    }

    /// Ends the key's first event and prepares its next one.
    fn end_first(&mut self, queue: u32) {
        let state = self.keys.queue_mut(queue);
        state.tail = self.events.pop(state.tail);
        state.failures = 0;
        match (state.tail, state.letters) {
            (NONE, 0) => self.keys.remove(queue),
            (NONE, _) => state.stage = Stage::Parked,
            _ => self.enqueue_first(queue),
        }
    }

    /// Makes the key's first event ready to run or, if the key has letters, to be recorded behind them.
    fn enqueue_first(&mut self, queue: u32) {
        let state = self.keys.queue_mut(queue);
        if state.letters == 0 {
            state.stage = Stage::Ready;
            self.ready.push_back(queue);
        } else {
            state.stage = Stage::Recording { is_out: false, is_skip: false };
            self.to_record.push_back(queue);
        }
    }

    /// Makes the keys ready whose time has come: the earliest first, and at most [`TICK_MAX`]. Returns their number.
    pub(crate) fn tick(&mut self, now: Duration) -> usize {
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let mut moved = 0;
        while moved < TICK_MAX
            && let Some((due_ns, queue)) = self.timed.first().copied()
            && due_ns <= now_ns
        {
            self.timed.pop_first();
            let state = self.keys.queue_mut(queue);
            state.stage = Stage::Ready;
            self.ready.push_back(queue);
            moved += 1;
        }
        moved
    }

    /// Returns the time at which the next [`KeyQueues::tick`] has something to do; `None` if no key waits for a time.
    #[must_use]
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.timed.first().map(|(due_ns, _)| Duration::from_nanos(*due_ns))
    }

    /// Lets the key's first event run if it waits for a gap: the missing event has arrived, or the gap is closed.
    /// Returns `true` if it waited.
    pub(crate) fn gap_filled(&mut self, key: Key) -> bool {
        let Some(queue) = self.keys.find(key) else { return false };
        let state = self.keys.queue_mut(queue);
        if state.stage != Stage::AwaitingGap {
            return false;
        }
        state.stage = Stage::Ready;
        self.timed.remove(&(state.due_ns, queue));
        self.ready.push_back(queue);
        true
    }

    /// Returns the offset below which every event is handled or durably recorded.
    #[must_use]
    pub(crate) fn position(&self) -> Offset {
        self.events.oldest().unwrap_or(self.read_to)
    }

    /// Returns the unfinished events, oldest first. A saved position names them, so that a restart repeats no other
    /// event.
    pub(crate) fn unfinished(&self) -> impl Iterator<Item = Offset> + '_ {
        self.events.offsets()
    }

    /// Returns the state of a key.
    #[cfg(test)]
    pub(crate) fn state(&self, key: Key) -> KeyState {
        let Some(queue) = self.keys.find(key) else { return KeyState::Live };
        let state = self.keys.queue(queue);
        let due = Duration::from_nanos(state.due_ns);
        match state.stage {
            Stage::Ready | Stage::Running | Stage::Recording { is_skip: true, .. } => KeyState::Live,
            Stage::Retrying => KeyState::Retrying { due },
            Stage::AwaitingGap => KeyState::AwaitingGap { since: due.saturating_sub(self.policy.gap_wait_max) },
            Stage::Parked | Stage::Recording { .. } => KeyState::Parked { letters: state.letters },
        }
    }

    /// Returns the event that halted the queues.
    #[cfg(test)]
    pub(crate) fn halted(&self) -> Option<(Key, Offset)> {
        self.halted
    }

    /// Ends a halt. The event that halted the queues runs first.
    pub(crate) fn resume(&mut self) {
        self.halted = None;
    }

    /// Returns counts since the start, and current gauges.
    #[must_use]
    pub(crate) fn statistics(&self) -> QueueStatistics {
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
