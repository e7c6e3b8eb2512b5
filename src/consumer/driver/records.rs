//! The consumer's records: writes dead letters and skips, and handles letters again or discards them.
//!
//! An event that ends by a record ends when the record is durable.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::follower::ShardFollower;
use super::job::{Failed, Work};
use super::reprocessing::Reprocessing;
use super::saving::PositionSaver;
use super::suspension::Suspension;
use super::waiters::HandledWaiters;
use crate::clock::wall_now;
use crate::consumer::dead_letter::LetterStore;
use crate::consumer::dead_letter::answer::{DeadLetter, Entry, WriteRefused, Written};
use crate::consumer::dead_letter::selector::LetterSelector;
use crate::consumer::error::ConsumerError;
use crate::consumer::key_queues::answer::{RecordKind, ToRecord};
use crate::consumer::outcome::HaltCause;
use crate::error::{ReadError, WaitError};
use crate::event::{Event, EventId, Key, Offset, Time};

/// Records written with one sync.
const WRITE_MAX: usize = 1024;
/// The time for which records are gathered for one write while there is other work.
const GATHER: Duration = Duration::from_millis(2);
/// The pause before the log's durable offset is read again.
const DURABLE_AGAIN: Duration = Duration::from_micros(500);
/// Keys checked in one call for a letter that may be handled.
const KEYS_CHECKED_MAX: usize = 64;
/// The time that a call which must write all records waits for the log to become durable.
const DURABLE_TIME: Duration = Duration::from_secs(10);
/// The pause after a failed write.
const WRITE_AGAIN: Duration = Duration::from_millis(500);

/// A record that is not written yet. Its event waits for it.
#[derive(Debug)]
struct Unwritten {
    shard: usize,
    record: ToRecord,
    letter: DeadLetter,
}

impl Unwritten {
    fn is_behind(&self) -> bool {
        self.record.kind() == RecordKind::ParkedBehind
    }
}

/// A letter that was handled again, or failed again. Its key waits for the record.
#[derive(Debug)]
struct Tried {
    id: EventId,
    key: Key,
    attempts: u32,
    /// The error, if it failed again.
    error: Option<String>,
    time: Time,
}

impl Tried {
    fn entry(&self) -> Entry<'_> {
        let Self { id, key, attempts, time, .. } = *self;
        match &self.error {
            None => Entry::Handled { id, key, time },
            Some(error) => Entry::FailedAgain { id, key, attempts, error, time },
        }
    }
}

/// The other parts of a driver that writing records involves.
pub(super) struct RecordContext<'a, E: Event> {
    pub(super) followers: &'a mut [ShardFollower<E>],
    pub(super) saver: &'a mut PositionSaver,
    pub(super) waiters: &'a HandledWaiters,
    pub(super) suspension: &'a mut Suspension,
}

/// The store of dead letters, and the records on their way to it.
#[derive(Debug)]
pub(super) struct Records {
    consumer: Arc<str>,
    dir: PathBuf,
    letters: LetterStore,
    unwritten: VecDeque<Unwritten>,
    tried: VecDeque<Tried>,
    /// No write before this time: the last one failed.
    write_at: Duration,
    /// The time of the next check whether the events to be recorded are durable in the log.
    durable_at: Duration,
    /// No write before this time while there is other work.
    gather_until: Duration,
    reprocessing: Reprocessing,
    failures: u64,
}

impl Records {
    pub(super) fn new(consumer: &Arc<str>, dir: PathBuf, letters: LetterStore) -> Self {
        Self {
            consumer: Arc::clone(consumer),
            dir,
            letters,
            unwritten: VecDeque::new(),
            tried: VecDeque::new(),
            write_at: Duration::ZERO,
            durable_at: Duration::ZERO,
            gather_until: Duration::ZERO,
            reprocessing: Reprocessing::default(),
            failures: 0,
        }
    }

    pub(super) fn letters(&self) -> &LetterStore {
        &self.letters
    }

    /// Returns the number of failed writes.
    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    /// Returns `true` if no record waits to be written, not counting those still in the key queues.
    pub(super) fn is_empty(&self) -> bool {
        self.unwritten.is_empty() && self.tried.is_empty()
    }

    /// Returns `true` if a key's letters wait for their turn to be handled again.
    pub(super) fn has_letters_to_handle(&self) -> bool {
        self.reprocessing.is_waiting()
    }

    /// Adds a record to be written.
    pub(super) fn add(&mut self, shard: usize, record: ToRecord, letter: DeadLetter) {
        self.unwritten.push_back(Unwritten { shard, record, letter });
    }

    fn has_work<E: Event>(&self, followers: &[ShardFollower<E>]) -> bool {
        !self.is_empty() || followers.iter().any(|follower| follower.queues.has_records())
    }

    /// Returns the time of the next write, if there is something to write.
    pub(super) fn due<E: Event>(&self, followers: &[ShardFollower<E>], suspension: &Suspension) -> Option<Duration> {
        let may_write = !self.tried.is_empty() || !suspension.is_full();
        let durable_at = if self.tried.is_empty() { self.durable_at } else { Duration::ZERO };
        (may_write && self.has_work(followers)).then(|| self.write_at.max(durable_at))
    }

    /// Writes waiting records: at once if the consumer is idle, otherwise many together, since each write is synced.
    /// Returns the number written.
    pub(super) fn write<E: Event>(
        &mut self,
        now: Duration,
        is_idle: bool,
        context: &mut RecordContext<'_, E>,
    ) -> usize {
        if now < self.write_at || (!is_idle && now < self.gather_until) || !self.has_work(context.followers) {
            return 0;
        }
        self.gather_until = now + GATHER;
        let written = self.write_tried(context).and_then(|tried| Ok(tried + self.write_unwritten(now, context)?));
        match written {
            Ok(written) => {
                if let Err(error) = self.letters.compact_if_due() {
                    let consumer = &*self.consumer;
                    tracing::warn!(
                        consumer,
                        error = crate::error::with_sources(&error),
                        "dead letters cannot be compacted; the files stay unchanged"
                    );
                }
                written
            }
            Err(WriteRefused::Full) => {
                context.suspension.halt(HaltCause::DeadLettersFull);
                0
            }
            Err(error) => {
                tracing::error!(
                    consumer = &*self.consumer,
                    error = crate::error::with_sources(&error),
                    "records cannot be written; their keys wait"
                );
                self.failures += 1;
                self.write_at = now + WRITE_AGAIN;
                0
            }
        }
    }

    /// Writes the outcomes of letters, and other waiting records with them, without gathering more.
    pub(super) fn write_outcomes<E: Event>(&mut self, now: Duration, context: &mut RecordContext<'_, E>) {
        if !self.tried.is_empty() {
            self.write(now, true, context);
        }
    }

    /// Writes the outcomes of all letters.
    fn write_all_tried<E: Event>(&mut self, context: &mut RecordContext<'_, E>) -> Result<(), WriteRefused> {
        while self.write_tried(context)? > 0 {}
        Ok(())
    }

    /// Writes the outcomes of up to [`WRITE_MAX`] letters.
    fn write_tried<E: Event>(&mut self, context: &mut RecordContext<'_, E>) -> Result<usize, WriteRefused> {
        let count = self.tried.len().min(WRITE_MAX);
        if count == 0 {
            return Ok(0);
        }
        // A letter that was discarded to make room meanwhile is gone, whatever its outcome.
        let waited: Vec<bool> =
            self.tried.iter().take(count).map(|tried| self.letters.waits(tried.key, tried.id)).collect();
        let entries: Vec<Entry<'_>> = self.tried.iter().take(count).map(Tried::entry).collect();
        self.letters.write(&entries)?;
        self.name_letters(context)?;
        let tried: Vec<Tried> = self.tried.drain(..count).collect();
        for (Tried { id, key, error, .. }, waited) in tried.into_iter().zip(waited) {
            if error.is_none() || !waited {
                self.unpark(id, key, context.followers);
            }
            if error.is_some() || self.letters.oldest_of(key).is_none() {
                self.reprocessing.end(key);
            } else {
                self.reprocessing.requeue(key);
            }
        }
        Ok(count)
    }

    /// Writes dead letters and skips.
    fn write_unwritten<E: Event>(
        &mut self,
        now: Duration,
        context: &mut RecordContext<'_, E>,
    ) -> Result<usize, WriteRefused> {
        if context.suspension.is_full() || now < self.durable_at {
            return Ok(0);
        }
        self.gather(context.followers)?;
        self.release_unparked(context.followers);
        let written = self.write_gathered(context)?;
        if written == 0 {
            self.durable_at = now + DURABLE_AGAIN;
        }
        Ok(written)
    }

    /// Writes the gathered records whose events are durable in the log. Returns the number written.
    fn write_gathered<E: Event>(&mut self, context: &mut RecordContext<'_, E>) -> Result<usize, WriteRefused> {
        // A record must not outlive its event, so the event must first be safe from a crash.
        let followers = &mut *context.followers;
        let durable = |unwritten: &&Unwritten| followers[unwritten.shard].is_durable(unwritten.record.offset());
        let mut count = self.unwritten.iter().take(WRITE_MAX).take_while(durable).count();
        if count == 0 {
            return Ok(0);
        }
        let written = loop {
            match self.write_first(count, followers) {
                // There may be room for fewer records.
                Err(WriteRefused::Full) if count > 1 => count /= 2,
                written => break written?,
            }
        };
        for (key, id) in written.overflowed {
            // While a discarded letter is being handled, no later event of its key may run.
            if !self.reprocessing.is_in_flight(key, id) {
                self.unpark(id, key, followers);
            }
        }
        // Name the file before the events end: otherwise the new file of letters could vanish unnoticed.
        self.name_letters(context)?;
        for _ in 0..count {
            let Some(Unwritten { shard, record, letter }) = self.unwritten.pop_front() else { break };
            let is_parked = record.kind() != RecordKind::Skipped;
            context.followers[shard].queues.recorded(record);
            if is_parked && !self.letters.waits(letter.key, letter.id) {
                // An earlier write recorded the letter, but saving the position failed, and the letter has been
                // discarded since.
                self.unpark(letter.id, letter.key, context.followers);
            }
        }
        Ok(count)
    }

    /// Records every event that was judged to be parked or skipped, and the events behind them. Waits for the log to
    /// become durable. If there is no room, the consumer halts and the judgements are kept.
    pub(super) fn write_all<E: Event>(&mut self, context: &mut RecordContext<'_, E>) -> Result<(), ConsumerError> {
        self.write_all_tried(context)?;
        loop {
            self.gather(context.followers)?;
            self.release_unparked(context.followers);
            if self.unwritten.is_empty() {
                return Ok(());
            }
            self.await_durable(context.followers)?;
            match self.write_gathered(context) {
                Ok(_) => {}
                Err(WriteRefused::Full) => {
                    if !context.suspension.is_full() {
                        context.suspension.halt(HaltCause::DeadLettersFull);
                    }
                    // An event behind a letter was not judged, so it may be read from the log again.
                    return if self.judged().next().is_some() { Err(WriteRefused::Full.into()) } else { Ok(()) };
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns the events that were judged to be parked or skipped and are not recorded yet, each with its shard's
    /// index.
    pub(super) fn judged(&self) -> impl Iterator<Item = (usize, Offset)> {
        let is_judged = |unwritten: &&Unwritten| !unwritten.is_behind();
        self.unwritten.iter().filter(is_judged).map(|unwritten| (unwritten.shard, unwritten.record.offset()))
    }

    /// Waits until the events to be recorded are durable in the log.
    fn await_durable<E: Event>(&self, followers: &[ShardFollower<E>]) -> Result<(), ConsumerError> {
        let end = Instant::now() + DURABLE_TIME;
        for Unwritten { shard, record, .. } in &self.unwritten {
            let follower = &followers[*shard];
            while !follower.is_durable(record.offset()) {
                if let Some(failure) = follower.failure() {
                    return Err(WaitError::from(failure.clone()).into());
                }
                if Instant::now() >= end {
                    return Err(WaitError::TimedOut.into());
                }
                crate::sync::nap(DURABLE_AGAIN);
            }
        }
        Ok(())
    }

    /// Saves the position if there is a new file of letters, so that the position file names it.
    fn name_letters<E: Event>(&mut self, context: &mut RecordContext<'_, E>) -> Result<(), WriteRefused> {
        if context.saver.names_file_of(self.letters.durable()) {
            return Ok(());
        }
        self.save_position(context).map_err(|error| {
            let (action, path) = ("saving the position beside the dead letters in", self.dir.clone());
            WriteRefused::Io { action, path, source: std::io::Error::other(error) }
        })
    }

    /// Saves the position, and forgets records below it. Durable when it returns.
    pub(super) fn save_position<E: Event>(&mut self, context: &mut RecordContext<'_, E>) -> Result<(), ConsumerError> {
        context.saver.save(context.followers, self.letters.durable())?;
        for follower in &*context.followers {
            // A waiter needs the record of its event until it is answered.
            let from = context.waiters.lowest(follower.shard(), follower.queues.position());
            self.letters.forget_below(follower.shard(), from);
        }
        Ok(())
    }

    /// Returns events that were to be recorded behind letters to their queues if those letters are gone: the events can
    /// then run.
    fn release_unparked<E: Event>(&mut self, followers: &mut [ShardFollower<E>]) {
        let is_live = |unwritten: &Unwritten| {
            let letter = &unwritten.letter;
            // A discarded letter has ended and must not run.
            unwritten.is_behind()
                && self.letters.oldest_of(letter.key).is_none()
                && !self.letters.has(letter.key, letter.id)
        };
        if !self.unwritten.iter().any(is_live) {
            return;
        }
        let (live, rest): (VecDeque<_>, VecDeque<_>) = self.unwritten.drain(..).partition(is_live);
        self.unwritten = rest;
        for Unwritten { shard, record, .. } in live {
            followers[shard].queues.not_recorded(record);
        }
    }

    /// Takes records from the key queues.
    fn gather<E: Event>(&mut self, followers: &mut [ShardFollower<E>]) -> Result<(), WriteRefused> {
        for (shard, follower) in followers.iter_mut().enumerate() {
            while self.unwritten.len() < WRITE_MAX
                && let Some(record) = follower.queues.next_record()
            {
                let wall = wall_now();
                match follower.letter(&record, None, wall, wall) {
                    Ok(letter) => self.unwritten.push_back(Unwritten { shard, record, letter }),
                    Err(error) => {
                        follower.queues.not_recorded(record);
                        return Err(self.unreadable(error));
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the first `count` records.
    fn write_first<E: Event>(
        &mut self,
        count: usize,
        followers: &mut [ShardFollower<E>],
    ) -> Result<Written, WriteRefused> {
        let mut archives = Vec::with_capacity(count);
        for unwritten in self.unwritten.iter().take(count) {
            let archive = followers[unwritten.shard].archive(unwritten.record.offset());
            archives.push(archive.map_err(|error| self.unreadable(error))?);
        }
        let entries: Vec<Entry<'_>> = self
            .unwritten
            .iter()
            .zip(&archives)
            .map(|(Unwritten { record, letter, .. }, archive)| match record.kind() {
                RecordKind::Skipped => Entry::Skipped { letter, archive },
                RecordKind::Parked | RecordKind::ParkedBehind => Entry::Parked { letter, archive },
            })
            .collect();
        self.letters.write(&entries)
    }

    /// The error for an event that is to be recorded and cannot be read.
    fn unreadable(&self, error: ReadError) -> WriteRefused {
        let (action, path) = ("reading an event for", self.dir.clone());
        WriteRefused::Io { action, path, source: std::io::Error::other(error) }
    }

    /// Tells the key's queue that one letter is gone.
    fn unpark<E: Event>(&self, id: EventId, key: Key, followers: &mut [ShardFollower<E>]) {
        if let Err(error) = followers[usize::from(id.shard.0)].queues.unpark(key, 1) {
            // The letter's own record may still be unwritten. The store of letters is authoritative.
            tracing::debug!(consumer = &*self.consumer, %error, "a letter that the key queues did not know of");
        }
    }

    /// Starts handling letters again: oldest first per key, each key until its first failure. Returns the number of
    /// keys started.
    pub(super) fn reprocess(&mut self, selector: LetterSelector) -> usize {
        let keys: Vec<Key> = self.keys_of(selector);
        keys.into_iter().filter(|key| self.reprocessing.add(*key)).count()
    }

    /// Returns the selected keys that have letters.
    pub(super) fn keys_of(&self, selector: LetterSelector) -> Vec<Key> {
        match selector {
            LetterSelector::All => self.letters.keys().map(|(key, _, _)| key).collect(),
            LetterSelector::Of(key) => self.letters.oldest_of(key).map(|_| key).into_iter().collect(),
        }
    }

    /// Returns `true` while the key's letters are being handled again.
    pub(super) fn is_reprocessed(&self, key: Key) -> bool {
        self.reprocessing.contains(key)
    }

    /// Returns `true` if a letter of the key is in flight.
    pub(super) fn has_in_flight(&self, key: Key) -> bool {
        self.reprocessing.has_in_flight(key)
    }

    /// Discards letters, each with a record. Returns the number discarded.
    pub(super) fn discard<E: Event>(
        &mut self,
        selector: LetterSelector,
        context: &mut RecordContext<'_, E>,
    ) -> Result<u64, ConsumerError> {
        self.discard_of(&self.keys_of(selector), context)
    }

    /// Discards the letters of these keys, except keys with a letter in flight.
    pub(super) fn discard_of<E: Event>(
        &mut self,
        keys: &[Key],
        context: &mut RecordContext<'_, E>,
    ) -> Result<u64, ConsumerError> {
        // The outcomes of letters that were handled come first.
        self.write_all_tried(context)?;
        let keys = self.reprocessing.end_where(keys);
        let letters: Vec<(Key, EventId)> =
            keys.into_iter().flat_map(|key| self.letters.ids_of(key).map(move |id| (key, id))).collect();
        let time = wall_now();
        for part in letters.chunks(WRITE_MAX) {
            let entries: Vec<_> = part.iter().map(|&(key, id)| Entry::Discarded { id, key, time }).collect();
            self.letters.write(&entries)?;
            part.iter().for_each(|&(key, id)| self.unpark(id, key, context.followers));
        }
        self.name_letters(context)?;
        Ok(letters.len() as u64)
    }

    /// Takes the next letter that is to be handled again, with its shard's index.
    pub(super) fn next_letter<E: Event>(
        &mut self,
        followers: &[ShardFollower<E>],
        suspension: &Suspension,
    ) -> Result<Option<(usize, Work)>, ConsumerError> {
        for _ in 0..self.reprocessing.waiting().min(KEYS_CHECKED_MAX) {
            let Some(key) = self.reprocessing.take() else { break };
            let id = self.letters.oldest_of(key);
            let is_past = |id: EventId| followers[usize::from(id.shard.0)].is_past(key, id.offset);
            if id.is_some_and(|id| !suspension.is_halted() && !is_past(id)) {
                // The consumer was set back: older events of the key must become letters before this one is handled.
                self.reprocessing.requeue(key);
                continue;
            }
            let found = id.map(|id| self.letters.show(key, id)).transpose();
            let found = found.inspect_err(|_| self.reprocessing.requeue(key))?.flatten();
            let Some((letter, archive)) = found else {
                self.reprocessing.end(key);
                continue;
            };
            let shard = usize::from(letter.id.shard.0);
            self.reprocessing.set_in_flight(key, letter.id);
            return Ok(Some((shard, Work::Letter { letter: Box::new(letter), archive })));
        }
        Ok(None)
    }

    /// Puts back a letter that was taken and is not handled now.
    pub(super) fn put_back(&mut self, work: &Work) {
        if let Work::Letter { letter, .. } = work {
            self.reprocessing.put_back(letter.key);
        }
    }

    /// Notes that a letter was handled again, or failed again. The outcome waits to be written.
    pub(super) fn letter_done(&mut self, letter: &DeadLetter, failed: Option<Failed>) {
        let (error, attempts) = (failed.map(|failed| failed.to_string()), letter.attempts.saturating_add(1));
        self.tried.push_back(Tried { id: letter.id, key: letter.key, attempts, error, time: wall_now() });
    }

    /// Forgets unwritten records: the consumer reads their events again.
    pub(super) fn forget_unwritten(&mut self) {
        self.unwritten.clear();
    }

    /// Forgets which events ended by a record, except waiting letters. The position must be durable.
    pub(super) fn forget_ended(&mut self) -> Result<(), ConsumerError> {
        self.letters.forget_ended().map_err(Into::into)
    }
}
