//! Follows one shard's log for a consumer: reads it, and offers unfinished events to the key queues.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

use super::job::{Failed, Handler, guarded};
use crate::consumer::assigned_shard::{AssignedShard, start_position};
use crate::consumer::dead_letter::LetterStore;
use crate::consumer::dead_letter::answer::{DeadLetter, LetterKind};
use crate::consumer::effects::Call;
use crate::consumer::error::ConsumerError;
use crate::consumer::key_queues::KeyQueues;
use crate::consumer::key_queues::answer::{InFlight, RecordKind, ToRecord};
use crate::consumer::position_file::Progress;
use crate::consumer::settings::{Filter, Settings, Start};
use crate::error::{ReadError, ShardFailure};
use crate::event::{Event, EventId, Key, Offset, ShardId, Time};
use crate::lane::requests::SyncRequests;
use crate::log::finder::Finder;
use crate::log::holds::Hold;
use crate::log::position::Position;
use crate::log::reader::{Ahead, Reader};
use crate::log::segment::ShardLog;
use crate::storage::Lock;
use crate::sync::Registration;

/// Events read before other shards and other work get their turn.
const READ_MAX: usize = 1024;
/// Events of unwanted types skipped before other work gets its turn.
const UNWANTED_MAX: usize = 1 << 16;
/// Keys kept ready beyond the keys that run, so that no idle worker waits for a read.
const READY_SPARE: usize = 64;

/// One shard of a consumer.
pub(crate) struct ShardFollower<E: Event> {
    log: Arc<ShardLog>,
    syncer: Arc<SyncRequests>,
    lock: Arc<dyn Lock>,
    hold: Arc<Hold>,
    reader: Reader<E>,
    finder: Finder,
    pub(super) queues: KeyQueues,
    /// Progress saved by an earlier run: below the offset, only the listed events are unfinished.
    restored: Option<(Offset, VecDeque<Offset>)>,
    /// Events below this offset may have a record, from an earlier run or from before the consumer was set back.
    records_until: Offset,
    /// Side effects of events below this offset have already run.
    pub(super) effects_from: Offset,
    /// `true` if the log cannot be read at the reader's offset. The error is reported once every event before that
    /// offset has been tried.
    is_stuck: bool,
    /// The outcomes of events below this offset are unknown: the consumer began here, or was set here.
    known_from: Offset,
    /// The consumer's position when it was registered.
    began: Offset,
    /// The furthest position read, as of the last save.
    seen: Position,
}

impl<E: Event> std::fmt::Debug for ShardFollower<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardFollower")
            .field("reader", &self.reader)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// A follower's position, the offset read up to, and the number of unfinished events.
pub(super) type ProgressStamp = (Offset, Offset, usize);

/// Returns the offset below which events may have records. It is 0 if there are no records.
fn records_until(log: &ShardLog, letters: &LetterStore) -> Offset {
    Offset(if letters.has_any() { log.appended.get() } else { 0 })
}

impl<E: Event> ShardFollower<E> {
    pub(super) fn open(
        shard: AssignedShard,
        settings: &Settings,
        letters: &LetterStore,
    ) -> Result<Self, ConsumerError> {
        let AssignedShard { log, syncer, lock, hold, progress } = shard;
        let policy = settings.queues.clone().concurrency(settings.concurrency);
        let reader = Reader::at(Arc::clone(&log), progress.position, Arc::clone(&lock))?;
        let finder = Finder::new(Arc::clone(&log), Arc::clone(&lock));
        let queues = KeyQueues::new(policy, progress.position)?;
        let records_until = records_until(&log, letters);
        let restored = (progress.read > progress.position).then(|| (progress.read, progress.unfinished.into()));
        let Progress { effects_from, began, seen, .. } = progress;
        let (reader, known_from) = (reader.with_sight(settings.sight), progress.position);
        Ok(Self {
            known_from,
            log,
            syncer,
            lock,
            hold,
            reader,
            finder,
            queues,
            restored,
            records_until,
            effects_from,
            is_stuck: false,
            began,
            seen,
        })
    }

    /// Continues with `reader`. Forgets unfinished events: the reader finds them again, or the application has chosen
    /// to leave them behind. No event may be in flight.
    pub(super) fn set_to(&mut self, reader: Reader<E>, settings: &Settings, letters: &LetterStore) {
        let done = self.queues.position();
        self.queues.set_to(reader.offset());
        self.known_from = reader.offset();
        self.reader = reader.with_sight(settings.sight);
        self.restored = None;
        self.records_until = records_until(&self.log, letters);
        self.effects_from = self.effects_from.max(done);
    }

    /// Returns the progress to save.
    pub(super) fn progress(&mut self) -> Progress {
        let (position, read) = (self.queues.position(), self.reader.offset());
        if read > self.seen.offset() {
            let here = self.reader.position_after(&self.seen);
            // If only the log's own records were read since, the older position identifies the log better.
            self.seen = if here.last().0.0 > 0 { here } else { self.seen };
        }
        let restored = self.restored.as_ref();
        // Progress of the earlier run counts until its last event is read.
        let read = restored.map_or(read, |(restored, _)| read.max(*restored));
        let rest = restored.into_iter().flat_map(|(_, unfinished)| unfinished.iter().copied());
        Progress::new(position, read, self.effects_from, (self.began, self.seen), self.queues.unfinished().chain(rest))
    }

    /// Returns values that change whenever the progress changes.
    pub(super) fn progress_stamp(&self) -> ProgressStamp {
        (self.queues.position(), self.reader.offset(), self.queues.statistics().unfinished)
    }

    /// Returns a reader at the position that `start` stands for.
    pub(super) fn reader_at(&self, start: Start) -> Result<Reader<E>, ReadError> {
        let position = start_position::<E>(&self.log, &self.lock, start)?.offset();
        Reader::at(Arc::clone(&self.log), position, Arc::clone(&self.lock))
    }

    /// Lets retention free the log below `position`.
    pub(super) fn hold_from(&self, position: Offset) {
        self.hold.set(position);
    }

    /// Keeps retention from freeing anything more of the log, until the next [`ShardFollower::hold_from`].
    pub(super) fn hold_everything(&self) {
        self.log.holds.lower(&self.hold, Offset(0));
    }

    /// Returns the offset below which the outcomes of events are unknown.
    pub(super) fn known_from(&self) -> Offset {
        self.known_from
    }

    /// Returns the shard's failure, if it has failed.
    pub(super) fn failure(&self) -> Option<&ShardFailure> {
        self.log.failure()
    }

    pub(super) fn id(&self, offset: Offset) -> EventId {
        EventId { shard: self.shard(), offset }
    }

    pub(super) fn shard(&self) -> ShardId {
        self.log.shard
    }

    pub(super) fn restore_parked(&mut self, key: Key, letters: u32) -> Result<(), ConsumerError> {
        self.queues.restore_parked(key, letters).map_err(|_| ConsumerError::TooManyKeys)
    }

    /// Returns `true` if an earlier run finished the event ahead.
    #[inline]
    fn is_done_before(&mut self, key: Key, offset: Offset, letters: &LetterStore) -> bool {
        (self.restored.is_some() || offset < self.records_until) && self.was_done(key, offset, letters)
    }

    #[cold]
    fn was_done(&mut self, key: Key, offset: Offset, letters: &LetterStore) -> bool {
        if let Some((read, unfinished)) = &mut self.restored {
            // Events of a type that was wanted in the earlier run and is not now.
            while unfinished.front().is_some_and(|first| *first < offset) {
                unfinished.pop_front();
            }
            if offset >= *read {
                self.restored = None;
            } else if unfinished.front() == Some(&offset) {
                unfinished.pop_front();
            } else {
                return true;
            }
        }
        offset < self.records_until && letters.has(key, self.id(offset))
    }

    /// Offers events of the log to the queues, until enough are ready, there is no room, or the log ends. Returns the
    /// number of events read.
    ///
    /// # Errors
    /// The log cannot be read further, and no event before that offset is in flight or may run. The position stays.
    pub(super) fn offer(
        &mut self,
        settings: &Settings,
        letters: &LetterStore,
        is_in_place: bool,
    ) -> Result<usize, ReadError> {
        let ready_max = settings.concurrency + READY_SPARE;
        let from = self.reader.offset();
        let (mut read, mut unread) = (0, Ok(()));
        // `run_in_place` reads events that are handled in place.
        while !is_in_place && read < READ_MAX && self.queues.ready() < ready_max && self.queues.has_room() {
            let ahead = match self.wanted(&settings.filter) {
                Ok(Some(ahead)) => ahead,
                Ok(None) => break,
                Err(error) => {
                    unread = Err(error);
                    break;
                }
            };
            let (key, offset) = (ahead.header.key, self.reader.offset());
            if !self.is_done_before(key, offset, letters) && self.queues.offer(key, offset).is_err() {
                break;
            }
            self.reader.pass(&ahead);
            read += 1;
        }
        if self.reader.offset() > from {
            self.read_up_to_here();
            read = read.max(1);
        }
        self.is_stuck = unread.is_err();
        // If other events come first, the error is held back: the next call meets the same error.
        let comes_first = read > 0 || self.queues.ready() > 0 || self.queues.statistics().running > 0;
        unread.or_else(|error| if comes_first { Ok(()) } else { Err(error) })?;
        Ok(read)
    }

    /// Notes that every event below the reader's offset was offered or handled, or is of an unwanted type.
    fn read_up_to_here(&mut self) {
        let here = self.reader.offset();
        self.queues.read_up_to(here);
        if let Some((read, unfinished)) = &mut self.restored {
            // Events of a type that was wanted in the earlier run and is not now.
            while unfinished.front().is_some_and(|first| *first < here) {
                unfinished.pop_front();
            }
            if here >= *read {
                self.restored = None;
            }
        }
    }

    /// Returns the next event that the consumer wants. `None` if there is none, or none among the next
    /// [`UNWANTED_MAX`]: call again.
    #[inline]
    fn wanted(&mut self, filter: &Filter) -> Result<Option<Ahead>, ReadError> {
        let mut read = 0;
        let ahead = self.reader.ahead(|header| {
            read += 1;
            filter.wants(header.event_type) || read > UNWANTED_MAX
        })?;
        Ok(ahead.filter(|ahead| filter.wants(ahead.header.event_type)))
    }

    /// Calls `handler` for events in place, without a queue. Stops at an event whose key has unfinished events, and at
    /// an event that fails. A failed event is returned, and is then in flight.
    pub(super) fn run_in_place(
        &mut self,
        budget: usize,
        settings: &Settings,
        letters: &LetterStore,
        is_called: &mut dyn FnMut() -> bool,
        handler: &mut Handler<'_, E>,
    ) -> Result<(u64, Option<(InFlight, Failed)>), ReadError> {
        if self.queues.may_run() {
            return Ok((0, None));
        }
        let (mut handled, mut failed) = (0, None);
        let from = self.reader.offset();
        while (handled as usize) < budget && self.queues.has_room() && !is_called() {
            let ahead = match self.wanted(&settings.filter) {
                Ok(Some(ahead)) => ahead,
                Ok(None) => break,
                // Events before the error are noted first; the next call returns the same error.
                Err(_) if self.reader.offset() > from => break,
                Err(error) => return Err(error),
            };
            let (key, meta) = (ahead.header.key, self.reader.meta(&ahead));
            if self.is_done_before(key, meta.offset, letters) {
                self.reader.pass(&ahead);
                continue;
            }
            if !self.queues.is_at_rest(key) {
                // The event waits behind the key's unfinished events.
                if self.queues.offer(key, meta.offset).is_err() {
                    break;
                }
                self.reader.pass(&ahead);
                continue;
            }
            let call = Call::new(&settings.name, meta.id(), 1, meta.offset < self.effects_from);
            let outcome = guarded(|| {
                let event = self.reader.event(&ahead).ok_or(Failed::Undecodable)?;
                handler(event, &meta, &call).map_err(Failed::Handler)
            });
            if let Err(why) = outcome {
                let event = self.queues.offer_running(key, meta.offset).expect("there is room for it");
                self.reader.pass(&ahead);
                failed = Some((event, why));
                break;
            }
            self.reader.pass(&ahead);
            handled += 1;
        }
        if self.reader.offset() > from {
            self.read_up_to_here();
            self.queues.handled_at_rest(handled);
        }
        Ok((handled, failed))
    }

    /// Returns `true` if the key's events up to and including `offset` are done.
    pub(super) fn is_done(&self, key: Key, offset: Offset) -> bool {
        let is_unfinished = self.queues.first_of(key).is_some_and(|first| first <= offset);
        let may_be_restored = self.restored.as_ref().is_some_and(|(_, unfinished)| !unfinished.is_empty());
        self.reader.offset() > offset && !is_unfinished && !may_be_restored
    }

    /// Returns `true` if no event of the key at or before `offset` is unread or unfinished.
    pub(super) fn is_past(&self, key: Key, offset: Offset) -> bool {
        self.reader.offset() > offset && self.queues.first_of(key).is_none_or(|first| first > offset)
    }

    /// Returns `true` if every event that is visible now is done.
    pub(super) fn is_caught_up(&self) -> bool {
        self.queues.statistics().unfinished == 0 && self.reader.offset() >= self.reader.horizon()
    }

    /// Returns `true` if the event at `offset` is durable. If not, requests a sync.
    pub(super) fn is_durable(&self, offset: Offset) -> bool {
        let is_durable = self.log.durable.get() > offset.0;
        if !is_durable {
            self.syncer.flush(offset.0 + 1);
        }
        is_durable
    }

    /// Returns the dead letter to record for an event.
    pub(super) fn letter(
        &mut self,
        record: &ToRecord,
        failed: Option<&Failed>,
        first_failed: Time,
        last_failed: Time,
    ) -> Result<DeadLetter, ReadError> {
        let header = self.finder.find(record.offset())?.header;
        let why = match (record.kind(), failed) {
            (_, Some(Failed::Undecodable)) => LetterKind::Undecodable,
            (RecordKind::ParkedBehind, _) => LetterKind::Behind,
            (RecordKind::Parked | RecordKind::Skipped, _) => LetterKind::Failed,
        };
        Ok(DeadLetter {
            id: self.id(record.offset()),
            key: header.key,
            event_type: header.event_type,
            schema_version: header.schema_version,
            version: header.version,
            time: header.time,
            correlation: header.correlation,
            why,
            attempts: record.attempts(),
            error: failed.map(ToString::to_string).unwrap_or_default(),
            first_failed,
            last_failed,
        })
    }

    /// Returns a copy of an event's archive.
    pub(super) fn archive(&mut self, offset: Offset) -> Result<Vec<u8>, ReadError> {
        let record = self.finder.find(offset)?;
        let body = self.finder.body(&record);
        Ok(body.to_vec())
    }

    /// Returns a finder for jobs that run on another thread.
    pub(crate) fn finder(&self) -> Finder {
        Finder::new(Arc::clone(&self.log), Arc::clone(&self.lock))
    }

    /// Returns the log, and the consumer's hold on it.
    pub(crate) fn log_and_hold(&self) -> (Arc<ShardLog>, Arc<Hold>) {
        (Arc::clone(&self.log), Arc::clone(&self.hold))
    }

    /// Returns the offset below which retention may free the log.
    pub(crate) fn held_from(&self) -> Offset {
        self.hold.get()
    }

    /// Returns `true` if there is room for more events.
    pub(super) fn has_room(&self, settings: &Settings) -> bool {
        self.queues.has_room() && self.queues.ready() < settings.concurrency + READY_SPARE
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.is_stuck && self.reader.offset() < self.reader.horizon()
    }

    /// Returns `true` if the next event to read, or an unfinished one, is not in the newest segment.
    #[cfg(feature = "tokio")]
    pub(super) fn is_in_older_segment(&self) -> bool {
        let next = if self.queues.may_run() { self.queues.position() } else { self.reader.offset() };
        let is_wanted = self.queues.may_run() || self.has_unread();
        is_wanted && self.log.segment_of(next) < self.log.segment_of(Offset(self.log.appended.get()))
    }

    /// Registers a task for new events in the log. The caller must check the log again after this call.
    pub(crate) fn register(&self, registration: &mut Registration, waker: &Waker) {
        self.reader.register(registration, waker);
    }

    /// As [`ShardFollower::register`], for a thread.
    pub(crate) fn register_thread(&self, registration: &mut Registration, waker: &Waker) {
        self.reader.register_thread(registration, waker);
    }

    pub(crate) fn queues(&self) -> &KeyQueues {
        &self.queues
    }

    pub(crate) fn log(&self) -> &ShardLog {
        &self.log
    }

    pub(crate) fn reader(&self) -> &Reader<E> {
        &self.reader
    }
}
