//! What ends by a record: dead letters and skips are written here, and letters are handled again or discarded.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::super::dead_letter::answer::{DeadLetter, Entry, WriteRefused, Written};
use super::super::error::ConsumerError;
use super::{Driver, Failed, HaltCause, What};
use crate::clock::wall_now;
use crate::consumer::key_queues::answer::{RecordKind, ToRecord};
use crate::error::{ReadError, WaitError};
use crate::event::{Event, EventId, Key, Offset, Time};

/// Records written with one sync.
const WRITE_MAX: usize = 1024;
/// While there is other work, so long what is to be recorded is gathered for one write.
const GATHER: Duration = Duration::from_millis(2);
/// How long after a look at a log that is not durable yet the next is taken.
const LOOK_AGAIN: Duration = Duration::from_micros(500);
/// Keys that are looked at for a letter that may be handled, in one go.
const LETTERS_LOOKED_AT: usize = 64;
/// How long to wait for the log to become durable where all records must be written before something else.
const DURABLE_TIME: Duration = Duration::from_secs(10);
/// How long after a failed write the next is tried.
const WRITE_AGAIN: Duration = Duration::from_millis(500);

/// A record that is to be written: its event waits for it.
#[derive(Debug)]
pub(super) struct Unwritten {
    pub(super) desk: usize,
    pub(super) record: ToRecord,
    pub(super) letter: DeadLetter,
}

/// A letter that was handled again, or failed again: its key waits for the record.
#[derive(Debug)]
pub(super) struct Tried {
    id: EventId,
    key: Key,
    attempts: u32,
    /// Why it failed, if it did.
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

/// Keys whose letters are handled again, oldest first, each until the first failure.
#[derive(Debug, Default)]
pub(super) struct Reprocessing {
    waiting: VecDeque<Key>,
    /// All of them; which of the key's letters is out, if one is: being handled, or its record waiting to be written.
    keys: BTreeMap<Key, Option<EventId>>,
}

impl Reprocessing {
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The key's next letter has its turn, after those of the others. `false`: it had it already.
    fn add(&mut self, key: Key) -> bool {
        let is_new = !self.keys.contains_key(&key);
        if is_new {
            self.come_back(key);
        }
        is_new
    }

    fn come_back(&mut self, key: Key) {
        self.keys.insert(key, None);
        self.waiting.push_back(key);
    }

    fn take(&mut self) -> Option<Key> {
        self.waiting.pop_front()
    }

    fn is_out(&self, key: Key) -> bool {
        self.keys.get(&key).is_some_and(Option::is_some)
    }

    fn end(&mut self, key: Key) {
        self.keys.remove(&key);
    }

    /// None of these has its turn any more, except those of which one is out. Returns which.
    fn end_where(&mut self, keys: &[Key]) -> Vec<Key> {
        let ended: Vec<Key> = keys.iter().copied().filter(|key| !self.is_out(*key)).collect();
        ended.iter().for_each(|key| self.end(*key));
        let keys = &self.keys;
        self.waiting.retain(|key| keys.contains_key(key));
        ended
    }

    /// The letter is not handled now after all.
    pub(super) fn put_back(&mut self, what: What) {
        if let What::Letter { letter, .. } = what {
            self.keys.insert(letter.key, None);
            self.waiting.push_front(letter.key);
        }
    }
}

/// Which dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Letters {
    /// All of them.
    All,
    /// One key's.
    Of(Key),
}

impl<E: Event> Driver<E> {
    pub(super) fn wants_to_write(&self) -> bool {
        !self.unwritten.is_empty() || !self.tried.is_empty() || self.desks.iter().any(|desk| desk.lanes.has_records())
    }

    pub(super) fn write_due(&self) -> Option<Duration> {
        let may_write = !self.tried.is_empty() || self.halted != Some(HaltCause::DeadLettersFull);
        let durable_at = if self.tried.is_empty() { self.durable_at } else { Duration::ZERO };
        (may_write && self.wants_to_write()).then(|| self.write_at.max(durable_at))
    }

    /// Writes what waits for a record: at once where there is nothing else to do, else many together, since each write is synced.
    /// Returns how many.
    pub(super) fn write_records(&mut self, now: Duration, is_idle: bool) -> usize {
        if now < self.write_at || (!is_idle && now < self.gather_until) || !self.wants_to_write() {
            return 0;
        }
        self.gather_until = now + GATHER;
        let written = self.write_tried().and_then(|tried| Ok(tried + self.write_unwritten(now)?));
        match written {
            Ok(written) => {
                if let Err(error) = self.letters.compact_if_due() {
                    let consumer = &*self.settings.name;
                    tracing::warn!(consumer, %error, "dead letters cannot be compacted; they stay as they are");
                }
                written
            }
            Err(WriteRefused::Full) => {
                self.halt(HaltCause::DeadLettersFull);
                0
            }
            Err(error) => {
                tracing::error!(consumer = &*self.settings.name, %error, "records cannot be written; their keys wait");
                self.saving.record_failures += 1;
                self.write_at = now + WRITE_AGAIN;
                0
            }
        }
    }

    /// Writes what became of letters, and what else waits, without gathering more.
    pub(crate) fn record_tried(&mut self, now: Duration) {
        if !self.tried.is_empty() {
            self.write_records(now, true);
        }
    }

    /// All that became of letters.
    pub(super) fn write_all_tried(&mut self) -> Result<(), WriteRefused> {
        while self.write_tried()? > 0 {}
        Ok(())
    }

    /// What became of letters.
    fn write_tried(&mut self) -> Result<usize, WriteRefused> {
        let count = self.tried.len().min(WRITE_MAX);
        if count == 0 {
            return Ok(0);
        }
        // One may have made room for others meanwhile: failed or not, it is gone.
        let waited: Vec<bool> =
            self.tried.iter().take(count).map(|tried| self.letters.waits(tried.key, tried.id)).collect();
        let entries: Vec<Entry<'_>> = self.tried.iter().take(count).map(Tried::entry).collect();
        self.letters.write(&entries)?;
        self.name_letters()?;
        let tried: Vec<Tried> = self.tried.drain(..count).collect();
        for (Tried { id, key, error, .. }, waited) in tried.into_iter().zip(waited) {
            if error.is_none() || !waited {
                self.unpark(id, key, 1);
            }
            if error.is_some() || self.letters.oldest_of(key).is_none() {
                self.reprocessing.end(key);
            } else {
                self.reprocessing.come_back(key);
            }
        }
        Ok(count)
    }

    /// Dead letters and skips.
    fn write_unwritten(&mut self, now: Duration) -> Result<usize, WriteRefused> {
        if self.halted == Some(HaltCause::DeadLettersFull) || now < self.durable_at {
            return Ok(0);
        }
        self.gather_records()?;
        self.let_go_of_unparked();
        let written = self.write_gathered()?;
        if written == 0 {
            self.durable_at = now + LOOK_AGAIN;
        }
        Ok(written)
    }

    /// Writes the gathered records whose events are durable in the log. Returns how many.
    fn write_gathered(&mut self) -> Result<usize, WriteRefused> {
        // A record speaks of an event that the log cannot lose any more.
        let durable = |unwritten: &&Unwritten| self.desks[unwritten.desk].is_durable(unwritten.record.offset());
        let mut count = self.unwritten.iter().take(WRITE_MAX).take_while(durable).count();
        if count == 0 {
            return Ok(0);
        }
        let written = loop {
            match self.write(count) {
                // There may be room for some of them.
                Err(WriteRefused::Full) if count > 1 => count /= 2,
                written => break written?,
            }
        };
        for (key, id) in written.overflowed {
            // Letters that had to make room: their keys have fewer. While one is being handled, no later event of its key may run.
            if self.reprocessing.keys.get(&key) != Some(&Some(id)) {
                self.unpark(id, key, 1);
            }
        }
        // Before their events end: else the file could be taken away unnoticed.
        self.name_letters()?;
        for _ in 0..count {
            let Some(Unwritten { desk, record, letter }) = self.unwritten.pop_front() else { break };
            let is_parked = record.kind() != RecordKind::Skipped;
            self.desks[desk].lanes.recorded(record);
            if is_parked && !self.letters.waits(letter.key, letter.id) {
                // It was written when the checkpoint could not be, and discarded since.
                self.unpark(letter.id, letter.key, 1);
            }
        }
        Ok(count)
    }

    /// Records everything that was told, and what stands behind it, however long the log takes to become durable. Where there is no
    /// room for it, it halts, and what was told is kept.
    pub(super) fn write_all_told(&mut self) -> Result<(), ConsumerError> {
        self.write_all_tried()?;
        loop {
            self.gather_records()?;
            self.let_go_of_unparked();
            if self.unwritten.is_empty() {
                return Ok(());
            }
            self.await_durable()?;
            match self.write_gathered() {
                Ok(_) => {}
                Err(WriteRefused::Full) => {
                    if self.halted != Some(HaltCause::DeadLettersFull) {
                        self.halt(HaltCause::DeadLettersFull);
                    }
                    // Of what only stands behind a letter nothing was told; it is read again from the log.
                    return if self.told().next().is_some() { Err(WriteRefused::Full.into()) } else { Ok(()) };
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Events that were told to be parked or skipped, and are not recorded yet.
    pub(super) fn told(&self) -> impl Iterator<Item = (usize, Offset)> {
        let is_told = |unwritten: &&Unwritten| unwritten.record.kind() != RecordKind::ParkedBehind;
        self.unwritten.iter().filter(is_told).map(|unwritten| (unwritten.desk, unwritten.record.offset()))
    }

    /// Waits until the log is durable behind the events whose records are to be written.
    fn await_durable(&self) -> Result<(), ConsumerError> {
        let end = Instant::now() + DURABLE_TIME;
        for Unwritten { desk, record, .. } in &self.unwritten {
            let desk = &self.desks[*desk];
            while !desk.is_durable(record.offset()) {
                if let Some(failure) = desk.log.failure() {
                    return Err(WaitError::from(failure.clone()).into());
                }
                if Instant::now() >= end {
                    return Err(WaitError::TimedOut.into());
                }
                crate::sync::nap(LOOK_AGAIN);
            }
        }
        Ok(())
    }

    /// Saves that there is a new file of letters, if there is.
    fn name_letters(&mut self) -> Result<(), WriteRefused> {
        if self.are_letters_named() {
            return Ok(());
        }
        self.save_position().map_err(|error| {
            let (action, path) = ("saving the position beside the dead letters in", self.dir.clone());
            WriteRefused::Io { action, path, source: std::io::Error::other(error) }
        })
    }

    /// Events that were to be recorded behind letters which are gone by now: they run.
    fn let_go_of_unparked(&mut self) {
        let behind = |unwritten: &Unwritten| unwritten.record.kind() == RecordKind::ParkedBehind;
        let is_live = |Unwritten { letter, .. }: &Unwritten| {
            // One that was a letter already, and is discarded, has ended.
            self.letters.oldest_of(letter.key).is_none() && !self.letters.has(letter.key, letter.id)
        };
        if !self.unwritten.iter().any(|unwritten| behind(unwritten) && is_live(unwritten)) {
            return;
        }
        let (live, rest) = self.unwritten.drain(..).partition(|unwritten| behind(unwritten) && is_live(unwritten));
        let live: VecDeque<Unwritten> = live;
        self.unwritten = rest;
        for Unwritten { desk, record, .. } in live {
            self.desks[desk].lanes.not_recorded(record);
        }
    }

    /// Takes what the lanes want recorded.
    fn gather_records(&mut self) -> Result<(), WriteRefused> {
        for at in 0..self.desks.len() {
            while self.unwritten.len() < WRITE_MAX
                && let Some(record) = self.desks[at].lanes.next_record()
            {
                let wall = wall_now();
                match self.desks[at].letter(&record, None, wall, wall) {
                    Ok(letter) => self.unwritten.push_back(Unwritten { desk: at, record, letter }),
                    Err(error) => {
                        self.desks[at].lanes.not_recorded(record);
                        return Err(self.unreadable(error));
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the first `count` records.
    fn write(&mut self, count: usize) -> Result<Written, WriteRefused> {
        let mut archives = Vec::with_capacity(count);
        for unwritten in self.unwritten.iter().take(count) {
            let archive = self.desks[unwritten.desk].archive(unwritten.record.offset());
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

    /// An event that is to be recorded cannot be read.
    fn unreadable(&self, error: ReadError) -> WriteRefused {
        let (action, path) = ("reading an event for", self.dir.clone());
        WriteRefused::Io { action, path, source: std::io::Error::other(error) }
    }

    fn unpark(&mut self, id: EventId, key: Key, letters: u32) {
        if let Err(error) = self.desks[usize::from(id.shard.0)].lanes.unpark(key, letters) {
            // The letter's own record may be under way still; the store of letters is what counts.
            tracing::debug!(consumer = &*self.settings.name, %error, "letters that the lanes did not know of");
        }
    }

    /// Lets the letters be handled again, oldest first per key, each key until its first failure. Returns how many keys.
    pub(crate) fn reprocess(&mut self, which: Letters) -> usize {
        let keys: Vec<Key> = self.keys_of(which);
        keys.into_iter().filter(|key| self.reprocessing.add(*key)).count()
    }

    pub(super) fn keys_of(&self, which: Letters) -> Vec<Key> {
        match which {
            Letters::All => self.letters.keys().map(|(key, _, _)| key).collect(),
            Letters::Of(key) => self.letters.oldest_of(key).map(|_| key).into_iter().collect(),
        }
    }

    /// Whether a key's letters are being gone through.
    pub(super) fn is_reprocessed(&self, key: Key) -> bool {
        self.reprocessing.keys.contains_key(&key)
    }

    /// Whether a letter of the key is being handled at this moment.
    pub(super) fn is_out(&self, key: Key) -> bool {
        self.reprocessing.is_out(key)
    }

    /// Takes letters away unhandled, each with a record. Returns how many.
    pub(crate) fn discard(&mut self, which: Letters) -> Result<u64, ConsumerError> {
        self.discard_of(&self.keys_of(which))
    }

    /// Takes away the letters of these keys, but for keys of which one is being handled at this moment.
    pub(super) fn discard_of(&mut self, keys: &[Key]) -> Result<u64, ConsumerError> {
        // What became of those that were handled comes first.
        self.write_all_tried()?;
        let keys = self.reprocessing.end_where(keys);
        let going: Vec<(Key, EventId)> =
            keys.into_iter().flat_map(|key| self.letters.ids_of(key).map(move |id| (key, id))).collect();
        let time = wall_now();
        for part in going.chunks(WRITE_MAX) {
            let entries: Vec<_> = part.iter().map(|&(key, id)| Entry::Discarded { id, key, time }).collect();
            self.letters.write(&entries)?;
            part.iter().for_each(|&(key, id)| self.unpark(id, key, 1));
        }
        self.name_letters()?;
        Ok(going.len() as u64)
    }

    /// The next letter that is to be handled again.
    pub(super) fn next_letter(&mut self) -> Result<Option<(usize, What)>, ConsumerError> {
        for _ in 0..self.reprocessing.waiting.len().min(LETTERS_LOOKED_AT) {
            let Some(key) = self.reprocessing.take() else { break };
            let id = self.letters.oldest_of(key);
            if id
                .is_some_and(|id| self.halted.is_none() && !self.desks[usize::from(id.shard.0)].is_past(key, id.offset))
            {
                // Older events of the key are to be letters before it: the consumer was set back.
                self.reprocessing.come_back(key);
                continue;
            }
            let found = id.map(|id| self.letters.show(key, id)).transpose();
            let found = found.inspect_err(|_| self.reprocessing.come_back(key))?.flatten();
            let Some((letter, archive)) = found else {
                self.reprocessing.end(key);
                continue;
            };
            let desk = usize::from(letter.id.shard.0);
            self.reprocessing.keys.insert(key, Some(letter.id));
            return Ok(Some((desk, What::Letter { letter: Box::new(letter), archive })));
        }
        Ok(None)
    }

    /// A letter was handled again, or failed again: that is to be written.
    pub(super) fn letter_done(&mut self, letter: &DeadLetter, failed: Option<Failed>) {
        let (error, attempts) = (failed.map(|failed| failed.to_string()), letter.attempts.saturating_add(1));
        self.tried.push_back(Tried { id: letter.id, key: letter.key, attempts, error, time: wall_now() });
    }
}
