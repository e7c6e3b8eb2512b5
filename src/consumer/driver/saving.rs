//! Saves how far a consumer has come, and lets retention go on behind that.

use std::sync::Arc;
use std::time::Duration;

use super::super::dead_letter::FileEnd;
use super::super::dead_letter::answer::WriteRefused;
use super::super::error::ConsumerError;
use super::super::position_file::{ConsumerPosition, Progress};
use super::super::settings::Start;
use super::{Desk, Driver};
use crate::error::{OpenError, ReadError};
use crate::event::{Event, Offset};
use crate::log::position::Position;
use crate::log::reader::Reader;
use crate::log::segment::ShardLog;
use crate::storage::Lock;

/// When the next checkpoint is due, and what became of the last ones.
#[derive(Debug)]
pub(super) struct Saving {
    every: Duration,
    due: Duration,
    /// Positions as they were saved last.
    saved: Vec<(Offset, Offset, usize)>,
    /// How far letters reached then.
    saved_letters: FileEnd,
    pub(super) failures: u64,
    pub(super) record_failures: u64,
}

impl Saving {
    pub(super) fn new(every: Duration, saved_letters: FileEnd) -> Self {
        Self { every, due: Duration::ZERO, saved: Vec::new(), saved_letters, failures: 0, record_failures: 0 }
    }
}

impl<E: Event> Desk<E> {
    fn progress(&mut self) -> Progress {
        let (position, read) = (self.lanes.checkpoint(), self.reader.offset());
        if read > self.seen.offset() {
            let here = self.reader.position_after(&self.seen);
            // Where all that was passed since is the log's own, what was known before says more.
            self.seen = if here.last().0.0 > 0 { here } else { self.seen };
        }
        let restored = self.restored.as_ref();
        // What of the last life is still unread counts on, after what was read of it.
        let read = restored.map_or(read, |(restored, _)| read.max(*restored));
        let rest = restored.into_iter().flat_map(|(_, unfinished)| unfinished.iter().copied());
        Progress::new(position, read, self.effects_from, (self.began, self.seen), self.lanes.unfinished().chain(rest))
    }

    fn reader_at(&self, start: Start) -> Result<Reader<E>, ReadError> {
        let position = start_position::<E>(&self.log, &self.lock, start)?.offset();
        Reader::at(Arc::clone(&self.log), position, Arc::clone(&self.lock))
    }

    /// What changes when anything was done.
    fn mark(&self) -> (Offset, Offset, usize) {
        (self.lanes.checkpoint(), self.reader.offset(), self.lanes.statistics().unfinished)
    }
}

impl<E: Event> Driver<E> {
    fn is_saved(&self) -> bool {
        // Letters are dealt with where nothing else is done; what is not named by a checkpoint could be taken away unnoticed.
        self.letters.durable() == self.saving.saved_letters
            && self.desks.iter().map(Desk::mark).eq(self.saving.saved.iter().copied())
    }

    /// Whether the checkpoint names the newest file of letters, so that it is missed where it is gone.
    pub(super) fn are_letters_named(&self) -> bool {
        self.letters.durable().number == self.saving.saved_letters.number
    }

    pub(super) fn save_due(&self) -> Option<Duration> {
        (!self.is_saved()).then_some(self.saving.due)
    }

    pub(super) fn save_if_due(&mut self, now: Duration) -> bool {
        if now < self.saving.due || self.is_saved() {
            return false;
        }
        self.saving.due = now + self.saving.every;
        if let Err(error) = self.save_position() {
            // What was done since the last one is done again after a restart; retention waits.
            self.saving.failures += 1;
            tracing::error!(consumer = &*self.settings.name, %error, "a consumer's checkpoint cannot be written");
        }
        true
    }

    /// Saves the position, the records of parked and skipped events, and how letters ended; durable when it returns.
    pub(crate) fn save(&mut self) -> Result<(), ConsumerError> {
        let told = self.write_all_told();
        // What is not recorded is not passed.
        self.save_position()?;
        told
    }

    pub(super) fn save_position(&mut self) -> Result<(), ConsumerError> {
        let marks = self.desks.iter().map(Desk::mark).collect();
        let shards = self.desks.iter_mut().map(Desk::progress).collect();
        let checkpoint = ConsumerPosition { shards, letters: self.letters.durable() };
        checkpoint.save(&*self.storage, &self.dir).map_err(|source| OpenError::Io {
            action: "writing the checkpoint in",
            path: self.dir.clone(),
            source,
        })?;
        for (desk, progress) in self.desks.iter().zip(&checkpoint.shards) {
            desk.hold.set(progress.position);
            // A waiter for an event asks how it ended when its answer comes.
            let waited = self.waiting.iter().filter(|waiting| waiting.desk == usize::from(desk.shard().0));
            let asked = waited.map(|waiting| waiting.offset).min().unwrap_or(progress.position);
            let from = self.watches.lowest(desk.shard(), progress.position.min(asked));
            self.letters.forget_below(desk.shard(), from);
        }
        (self.saving.saved, self.saving.saved_letters) = (marks, checkpoint.letters);
        Ok(())
    }

    /// Failed attempts to save, and to write records.
    pub(crate) fn write_failures(&self) -> (u64, u64) {
        (self.saving.failures, self.saving.record_failures)
    }

    /// Sets the consumer elsewhere. Nothing may be out. Events before where it was have no side effects again; dead letters stay.
    pub(crate) fn seek(&mut self, start: Start) -> Result<(), ConsumerError> {
        assert_eq!(self.running, 0, "a consumer is set while nothing of it runs");
        self.tell_waiting();
        let told = match self.write_all_told() {
            full @ (Ok(()) | Err(ConsumerError::Records(WriteRefused::Full))) => full,
            Err(error) => return Err(error),
        };
        // What records say of events that ended, the checkpoint says from here on; set back, they come again.
        self.save_position()?;
        self.letters.forget_ended()?;
        // Nothing is freed from here on, so the positions stay what they are.
        self.desks.iter().for_each(|desk| desk.log.holds.lower(&desk.hold, Offset(0)));
        let found: Result<Vec<_>, ReadError> = self.desks.iter().map(|desk| desk.reader_at(start)).collect();
        // What was told and could not be recorded comes again, or it may not be left behind.
        let leaves = |readers: &[Reader<E>]| self.told().any(|(desk, offset)| offset < readers[desk].offset());
        let found = found.map_err(ConsumerError::from).and_then(|readers| match told {
            Err(full) if leaves(&readers) => Err(full),
            _ => Ok(readers),
        });
        let readers = match found {
            Ok(readers) => readers,
            Err(error) => {
                // It stays where it is.
                self.desks.iter().for_each(|desk| desk.hold.set(desk.lanes.checkpoint()));
                return Err(error);
            }
        };
        // What is to be recorded is read again from the log.
        self.unwritten.clear();
        self.failing.clear();
        for (desk, reader) in self.desks.iter_mut().zip(readers) {
            // What is saved counts until the new position is.
            desk.hold.set(desk.lanes.checkpoint().min(reader.offset()));
            desk.set_to(reader, &self.settings, &self.letters);
        }
        for (key, shard, count) in self.letters.keys() {
            self.desks[usize::from(shard.0)].restore_parked(key, count)?;
        }
        self.save_position()
    }
}

/// Where a start lies in a shard's log.
pub(crate) fn start_position<E: Event>(
    log: &Arc<ShardLog>,
    lock: &Arc<dyn Lock>,
    start: Start,
) -> Result<Position, ReadError> {
    let mut reader = match start {
        Start::Latest => {
            let end = Offset(log.appended.get());
            Reader::<E>::at(Arc::clone(log), end, Arc::clone(lock))?
        }
        Start::Beginning | Start::Time(_) => Reader::earliest(Arc::clone(log), Arc::clone(lock)),
    };
    if let Start::Time(time) = start {
        reader.seek(|header| header.time >= time)?;
    }
    reader.position()
}
