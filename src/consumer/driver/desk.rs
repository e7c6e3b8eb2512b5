//! One shard of a consumer: reads the log, and offers what is not done to the lanes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

use super::super::dead_letter::Letters;
use super::super::dead_letter::answer::{DeadLetter, LetterKind};
use super::super::effects::Call;
use super::super::error::ConsumerError;
use super::super::position_file::Progress;
use super::super::settings::{Filter, Settings};
use super::execute::{Failed, Handler, guarded};
use crate::consumer::key_queues::KeyQueues;
use crate::consumer::key_queues::answer::{InFlight, RecordKind, ToRecord};
use crate::error::ReadError;
use crate::event::{Event, EventId, Key, Offset, ShardId, Time};
use crate::lane::requests::SyncRequests;
use crate::log::finder::Finder;
use crate::log::holds::Hold;
use crate::log::position::Position;
use crate::log::reader::{Ahead, Reader};
use crate::log::segment::ShardLog;
use crate::storage::Lock;

/// Events read in one go, before other shards and other work have their turn.
const READ_MAX: usize = 1024;
/// Events of other types that are passed over in one go.
const UNWANTED_MAX: usize = 1 << 16;
/// Keys that are kept ready beyond those that run, so that none who could run waits for a read.
const READY_SPARE: usize = 64;

/// A shard's log as a consumer is given it, and how far it has come there.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) syncer: Arc<SyncRequests>,
    pub(crate) lock: Arc<dyn Lock>,
    pub(crate) hold: Arc<Hold>,
    pub(crate) progress: Progress,
}

/// One shard of a consumer.
pub(crate) struct Desk<E: Event> {
    pub(crate) log: Arc<ShardLog>,
    syncer: Arc<SyncRequests>,
    pub(super) lock: Arc<dyn Lock>,
    pub(super) hold: Arc<Hold>,
    pub(super) reader: Reader<E>,
    finder: Finder,
    pub(super) lanes: KeyQueues,
    /// From the last life: of what lies below `read`, only `unfinished` is not done.
    pub(super) restored: Option<(Offset, VecDeque<Offset>)>,
    /// Events below may have a record of the last life, or of before the consumer was set back.
    records_until: Offset,
    /// Side effects below were had once.
    pub(super) effects_from: Offset,
    /// The log cannot be read on; that is said once everything before has been given a try.
    is_stuck: bool,
    /// How events before this ended is not known here: it began there, or was set there.
    pub(super) known_from: Offset,
    /// Where it began when it was registered.
    pub(super) began: Offset,
    /// The furthest that was read, as it was saved last.
    pub(super) seen: Position,
}

impl<E: Event> std::fmt::Debug for Desk<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("reader", &self.reader).field("lanes", &self.lanes).finish_non_exhaustive()
    }
}

/// Up to where events may have records already: nowhere, where there are none.
fn records_until(log: &ShardLog, letters: &Letters) -> Offset {
    Offset(if letters.has_any() { log.appended.get() } else { 0 })
}

impl<E: Event> Desk<E> {
    pub(super) fn open(place: Place, settings: &Settings, letters: &Letters) -> Result<Self, ConsumerError> {
        let Place { log, syncer, lock, hold, progress } = place;
        let policy = settings.lanes.clone().concurrency(settings.concurrency);
        let reader = Reader::at(Arc::clone(&log), progress.position, Arc::clone(&lock))?;
        let finder = Finder::new(Arc::clone(&log), Arc::clone(&lock));
        let lanes = KeyQueues::new(policy, progress.position)?;
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
            lanes,
            restored,
            records_until,
            effects_from,
            is_stuck: false,
            began,
            seen,
        })
    }

    /// Goes elsewhere; what is unfinished is forgotten here, since it lies there or is left behind on purpose. Nothing is out.
    pub(super) fn set_to(&mut self, reader: Reader<E>, settings: &Settings, letters: &Letters) {
        let done = self.lanes.checkpoint();
        self.lanes.set_to(reader.offset());
        self.known_from = reader.offset();
        self.reader = reader.with_sight(settings.sight);
        self.restored = None;
        self.records_until = records_until(&self.log, letters);
        self.effects_from = self.effects_from.max(done);
    }

    pub(super) fn id(&self, offset: Offset) -> EventId {
        EventId { shard: self.shard(), offset }
    }

    pub(super) fn shard(&self) -> ShardId {
        self.log.shard
    }

    pub(super) fn restore_parked(&mut self, key: Key, letters: u32) -> Result<(), ConsumerError> {
        self.lanes.restore_parked(key, letters).map_err(|_| ConsumerError::TooManyKeys)
    }

    /// Whether the event ahead was done in a former life.
    #[inline]
    fn is_done_before(&mut self, key: Key, offset: Offset, letters: &Letters) -> bool {
        (self.restored.is_some() || offset < self.records_until) && self.was_done(key, offset, letters)
    }

    #[cold]
    fn was_done(&mut self, key: Key, offset: Offset, letters: &Letters) -> bool {
        if let Some((read, unfinished)) = &mut self.restored {
            // Of a type that was wanted then, and is not now.
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

    /// Offers events of the log to the lanes, until enough are ready, there is no room, or the log ends. Returns how many it looked at.
    ///
    /// # Errors
    /// Where the log cannot be read on, once no event before that place is out or may run. The position stays.
    pub(super) fn offer(
        &mut self,
        settings: &Settings,
        letters: &Letters,
        is_in_place: bool,
    ) -> Result<usize, ReadError> {
        let ready_max = settings.concurrency + READY_SPARE;
        let from = self.reader.offset();
        let (mut read, mut unread) = (0, Ok(()));
        // What can be handled where it lies is not read here.
        while !is_in_place && read < READ_MAX && self.lanes.ready() < ready_max && self.lanes.has_room() {
            let ahead = match self.wanted(&settings.filter) {
                Ok(Some(ahead)) => ahead,
                Ok(None) => break,
                Err(error) => {
                    unread = Err(error);
                    break;
                }
            };
            let (key, offset) = (ahead.header.key, self.reader.offset());
            if !self.is_done_before(key, offset, letters) && self.lanes.offer(key, offset).is_err() {
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
        // The next look says the same.
        let comes_first = read > 0 || self.lanes.ready() > 0 || self.lanes.statistics().running > 0;
        unread.or_else(|error| if comes_first { Ok(()) } else { Err(error) })?;
        Ok(read)
    }

    /// What was read is offered, handled, or of a type that is not wanted.
    fn read_up_to_here(&mut self) {
        let here = self.reader.offset();
        self.lanes.read_up_to(here);
        if let Some((read, unfinished)) = &mut self.restored {
            // Of a type that was wanted in the last life, and is not now.
            while unfinished.front().is_some_and(|first| *first < here) {
                unfinished.pop_front();
            }
            if here >= *read {
                self.restored = None;
            }
        }
    }

    /// The next event that the consumer wants. `None`: there is none, or none among very many; ask again.
    #[inline]
    fn wanted(&mut self, filter: &Filter) -> Result<Option<Ahead>, ReadError> {
        let mut looked = 0;
        let ahead = self.reader.ahead(|header| {
            looked += 1;
            filter.wants(header.event_type) || looked > UNWANTED_MAX
        })?;
        Ok(ahead.filter(|ahead| filter.wants(ahead.header.event_type)))
    }

    /// Calls `handler` for events where they lie. Ends at one whose key is not at rest (the lanes' turn), or that failed; that is
    /// out then.
    pub(super) fn run_in_place(
        &mut self,
        budget: usize,
        settings: &Settings,
        letters: &Letters,
        is_called: &mut dyn FnMut() -> bool,
        handler: &mut Handler<'_, E>,
    ) -> Result<(u64, Option<(InFlight, Failed)>), ReadError> {
        if self.lanes.may_run() {
            return Ok((0, None));
        }
        let (mut handled, mut failed) = (0, None);
        let from = self.reader.offset();
        while (handled as usize) < budget && self.lanes.has_room() && !is_called() {
            let ahead = match self.wanted(&settings.filter) {
                Ok(Some(ahead)) => ahead,
                Ok(None) => break,
                // What was done before it is noted first; the next look says the same.
                Err(_) if self.reader.offset() > from => break,
                Err(error) => return Err(error),
            };
            let (key, meta) = (ahead.header.key, self.reader.meta(&ahead));
            if self.is_done_before(key, meta.offset, letters) {
                self.reader.pass(&ahead);
                continue;
            }
            if !self.lanes.is_at_rest(key) {
                // Behind what is unfinished of it.
                if self.lanes.offer(key, meta.offset).is_err() {
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
                let run = self.lanes.offer_running(key, meta.offset).expect("there is room for it");
                self.reader.pass(&ahead);
                failed = Some((run, why));
                break;
            }
            self.reader.pass(&ahead);
            handled += 1;
        }
        if self.reader.offset() > from {
            self.read_up_to_here();
            self.lanes.handled_at_rest(handled);
        }
        Ok((handled, failed))
    }

    /// Whether the key's events up to `offset` are done.
    pub(super) fn is_done(&self, key: Key, offset: Offset) -> bool {
        let is_unfinished = self.lanes.first_of(key).is_some_and(|first| first <= offset);
        let may_be_restored = self.restored.as_ref().is_some_and(|(_, unfinished)| !unfinished.is_empty());
        self.reader.offset() > offset && !is_unfinished && !may_be_restored
    }

    /// Whether of the key nothing at or before `offset` is unread or unfinished.
    pub(super) fn is_past(&self, key: Key, offset: Offset) -> bool {
        self.reader.offset() > offset && self.lanes.first_of(key).is_none_or(|first| first > offset)
    }

    /// Whether everything that may be seen now is done.
    pub(super) fn is_caught_up(&self) -> bool {
        self.lanes.statistics().unfinished == 0 && self.reader.offset() >= self.reader.horizon()
    }

    /// Whether the event at `offset` is durable; if not, asks for it.
    pub(super) fn is_durable(&self, offset: Offset) -> bool {
        let is_durable = self.log.durable.get() > offset.0;
        if !is_durable {
            self.syncer.flush(offset.0 + 1);
        }
        is_durable
    }

    /// What is recorded of an event.
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

    /// An event's archive.
    pub(super) fn archive(&mut self, offset: Offset) -> Result<Vec<u8>, ReadError> {
        let place = self.finder.find(offset)?;
        let body = self.finder.body(&place);
        Ok(body.to_vec())
    }

    /// A finder and what else a job needs that is run elsewhere.
    pub(crate) fn finder(&self) -> Finder {
        Finder::new(Arc::clone(&self.log), Arc::clone(&self.lock))
    }

    /// Its log, and its hold on it.
    pub(crate) fn place(&self) -> (Arc<ShardLog>, Arc<Hold>) {
        (Arc::clone(&self.log), Arc::clone(&self.hold))
    }

    /// Up to where retention may free.
    pub(crate) fn held_from(&self) -> Offset {
        self.hold.get()
    }

    /// Whether it would read on, if the log did.
    pub(super) fn may_read(&self, settings: &Settings) -> bool {
        self.lanes.has_room() && self.lanes.ready() < settings.concurrency + READY_SPARE
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.is_stuck && self.reader.offset() < self.reader.horizon()
    }

    /// Lets the log wake somebody when it goes on. To be looked at again afterwards.
    pub(crate) fn register(&self, waker: &Waker) {
        self.reader.register(waker);
    }

    pub(crate) fn lanes(&self) -> &KeyQueues {
        &self.lanes
    }

    pub(crate) fn reader(&self) -> &Reader<E> {
        &self.reader
    }
}
