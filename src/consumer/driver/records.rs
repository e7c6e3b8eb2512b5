//! What ends by a record: dead letters and skips are written here, and letters are handled again or discarded.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::super::dead_letter::answer::{DeadLetter, Entry, WriteRefused, Written};
use super::super::error::ConsumerError;
use super::super::lanes::answer::{RecordKind, ToRecord};
use super::{Driver, Failed, HaltCause, What};
use crate::clock::wall_now;
use crate::error::ReadError;
use crate::event::{Event, EventId, Key};

/// Records written with one sync.
const WRITE_MAX: usize = 1024;
/// How long after a failed write the next is tried.
const WRITE_AGAIN: Duration = Duration::from_millis(500);

/// A record that is to be written: its event waits for it.
#[derive(Debug)]
pub(super) struct Unwritten {
    pub(super) desk: usize,
    pub(super) record: ToRecord,
    pub(super) letter: DeadLetter,
}

/// Keys whose letters are handled again, oldest first, each until the first failure.
#[derive(Debug, Default)]
pub(super) struct Reprocessing {
    waiting: VecDeque<Key>,
    /// Waiting or out.
    keys: BTreeSet<Key>,
}

impl Reprocessing {
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn add(&mut self, key: Key) -> bool {
        let is_new = self.keys.insert(key);
        if is_new {
            self.waiting.push_back(key);
        }
        is_new
    }

    fn end(&mut self, key: Key) {
        self.keys.remove(&key);
        self.waiting.retain(|waiting| *waiting != key);
    }

    /// The letter is not handled now after all.
    pub(super) fn put_back(&mut self, what: What) {
        if let What::Letter { letter, .. } = what {
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
        !self.unwritten.is_empty() || self.desks.iter().any(|desk| desk.lanes.has_records())
    }

    /// Writes what waits for a record, if its time has come. Returns how many.
    pub(super) fn write_records(&mut self, now: Duration) -> usize {
        if now < self.write_at || self.halted == Some(HaltCause::DeadLettersFull) {
            return 0;
        }
        if let Err(error) = self.gather_records() {
            tracing::error!(consumer = &*self.settings.name, %error, "an event that is to be recorded cannot be read");
            self.write_at = now + WRITE_AGAIN;
        }
        // A record speaks of an event that the log cannot lose any more.
        let durable = |unwritten: &&Unwritten| self.desks[unwritten.desk].is_durable(unwritten.record.offset());
        let mut count = self.unwritten.iter().take(WRITE_MAX).take_while(durable).count();
        if count == 0 {
            if !self.unwritten.is_empty() {
                self.write_at = self.write_at.max(now + Duration::from_micros(500));
            }
            return 0;
        }
        let written = loop {
            match self.write(count) {
                // There may be room for some of them.
                Err(WriteRefused::Full) if count > 1 => count /= 2,
                written => break written,
            }
        };
        match written {
            Ok(written) => {
                for _ in 0..count {
                    let Some(Unwritten { desk, record, .. }) = self.unwritten.pop_front() else { break };
                    self.desks[desk].lanes.recorded(record);
                }
                // Letters that had to make room: their keys have fewer.
                written.overflowed.into_iter().for_each(|(key, id)| self.unpark(id, key, 1));
                count
            }
            Err(WriteRefused::Full) => {
                self.halt(HaltCause::DeadLettersFull);
                0
            }
            Err(WriteRefused::Io { action, path, source }) => {
                let consumer = &*self.settings.name;
                tracing::error!(consumer, action, path = %path.display(), %source, "dead letters cannot be written; their keys wait");
                self.saving.record_failures += 1;
                self.write_at = now + WRITE_AGAIN;
                0
            }
        }
    }

    /// Takes what the lanes want recorded.
    fn gather_records(&mut self) -> Result<(), ReadError> {
        for at in 0..self.desks.len() {
            while self.unwritten.len() < WRITE_MAX
                && let Some(record) = self.desks[at].lanes.next_record()
            {
                let wall = wall_now();
                match self.desks[at].letter(&record, None, wall, wall) {
                    Ok(letter) => self.unwritten.push_back(Unwritten { desk: at, record, letter }),
                    Err(error) => {
                        self.desks[at].lanes.not_recorded(record);
                        return Err(error);
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
            archives.push(archive.map_err(|error| WriteRefused::Io {
                action: "reading an event for",
                path: self.dir.clone(),
                source: std::io::Error::other(error),
            })?);
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

    fn keys_of(&self, which: Letters) -> Vec<Key> {
        match which {
            Letters::All => self.letters.keys().map(|(key, _, _)| key).collect(),
            Letters::Of(key) => (self.letters.letters_of(key) > 0).then_some(key).into_iter().collect(),
        }
    }

    /// Takes letters away unhandled, each with a record. Returns how many.
    pub(crate) fn discard(&mut self, which: Letters) -> Result<u64, ConsumerError> {
        let mut discarded = 0;
        for key in self.keys_of(which) {
            while let Some(id) = self.letters.oldest_of(key) {
                if self.reprocessing.keys.contains(&key) && !self.reprocessing.waiting.contains(&key) {
                    // One of them is being handled at this moment.
                    break;
                }
                self.reprocessing.end(key);
                self.letters.write(&[Entry::Discarded { id, key, time: wall_now() }])?;
                self.unpark(id, key, 1);
                discarded += 1;
            }
        }
        Ok(discarded)
    }

    /// The next letter that is to be handled again.
    pub(super) fn next_letter(&mut self) -> Result<Option<(usize, What)>, ConsumerError> {
        for _ in 0..self.reprocessing.waiting.len() {
            let Some(key) = self.reprocessing.waiting.pop_front() else { break };
            let id = self.letters.oldest_of(key);
            if id
                .is_some_and(|id| self.halted.is_none() && !self.desks[usize::from(id.shard.0)].is_past(key, id.offset))
            {
                // Older events of the key are to be letters before it: the consumer was set back.
                self.reprocessing.waiting.push_back(key);
                continue;
            }
            let found = id.map(|id| self.letters.show(key, id)).transpose();
            let found = found.inspect_err(|_| self.reprocessing.waiting.push_front(key))?.flatten();
            let Some((letter, archive)) = found else {
                self.reprocessing.end(key);
                continue;
            };
            let desk = usize::from(letter.id.shard.0);
            return Ok(Some((desk, What::Letter { letter: Box::new(letter), archive })));
        }
        Ok(None)
    }

    /// A letter was handled again, or failed again.
    pub(super) fn letter_done(&mut self, letter: &DeadLetter, failed: Option<Failed>) {
        let DeadLetter { id, key, attempts, .. } = *letter;
        let time = wall_now();
        let error = failed.as_ref().map(ToString::to_string);
        let entry = match &error {
            None => Entry::Handled { id, key, time },
            Some(error) => Entry::FailedAgain { id, key, attempts: attempts.saturating_add(1), error, time },
        };
        // It may have made room for others meanwhile; then its key has fewer already.
        let is_there = self.letters.waits(key, id);
        let written = self.letters.write(&[entry]);
        match written {
            Ok(_) if error.is_none() => {
                if is_there {
                    self.unpark(id, key, 1);
                }
                self.reprocessing.waiting.push_back(key);
            }
            Ok(_) => self.reprocessing.end(key),
            Err(why) => {
                // It stays a letter: if it was handled, it is handled once more when it is asked for again.
                tracing::error!(consumer = &*self.settings.name, %why, %id, "what became of a dead letter cannot be written");
                self.saving.record_failures += 1;
                self.reprocessing.end(key);
            }
        }
        if let Err(error) = self.letters.compact_if_due() {
            tracing::warn!(consumer = &*self.settings.name, %error, "dead letters cannot be compacted; they stay as they are");
        }
    }
}
