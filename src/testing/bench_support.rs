//! Access to the hot path for `benches/`: thin wrappers without logic of their own. Not part of the API: everything
//! here may change at any time.

use std::io;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::queue::ArrayQueue;

use crate::clock::NOT_DUE;
use crate::consumer::{InFlight, KeyQueues, QueuePolicy, Verdict};
use crate::event::{Correlation, Event, Key, KeyHash, Offset, Router, Scratch, ShardId, Time, Version};
use crate::lane::ring::{Slot, push_chunk};
use crate::log::format::{RecordHeader, encode_prepared, schema_fingerprint};
use crate::log::segment::ShardLog;
use crate::log::writer::{GROUP, Prepared, PreparedQueue, Refused, Resume, Writer};
use crate::state::keys::KeyTable;
use crate::state::view::Place;
use crate::storage::memory::{ALIGN, padded};
use crate::storage::memory::{Heap, Memory, WriteHalf};
use crate::storage::{Files, Storage as _};

/// Returns the place of the only shard of an engine with one shard.
#[must_use]
pub fn only_place(keys_expected: usize) -> Place {
    Place::new(ShardId(0), Router::new(1, None), keys_expected)
}

/// Both ends of a lane's ring.
#[derive(Debug)]
pub struct Ring<E> {
    tx: rtrb::Producer<Slot<E>>,
    rx: rtrb::Consumer<Slot<E>>,
}

impl<E> Ring<E> {
    /// Creates a ring of `capacity` slots.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let (tx, rx) = rtrb::RingBuffer::new(capacity);
        Self { tx, rx }
    }

    /// Pushes up to `count` events as one chunk. Returns the number pushed.
    #[inline]
    pub fn push(&mut self, count: usize, events: impl Iterator<Item = (Key, E)>) -> usize {
        push_chunk(&mut self.tx, count, events.map(|(key, event)| Slot::new(key, 1, NOT_DUE, event)))
    }

    /// Pops up to `count` events as one chunk and passes them to `see`. Returns the number popped.
    #[inline]
    pub fn pop(&mut self, count: usize, mut see: impl FnMut(Key, &E)) -> usize {
        let ready = self.rx.slots().min(count);
        let Ok(chunk) = self.rx.read_chunk(ready) else { return 0 };
        let (front, back) = chunk.as_slices();
        front.iter().chain(back).for_each(|slot| see(slot.key, &slot.event));
        chunk.commit_all();
        ready
    }
}

/// A shard's key table.
#[derive(Debug)]
pub struct Keys(KeyTable<()>);

impl Keys {
    /// Creates a table with room for `keys_expected` keys.
    #[must_use]
    pub fn new(keys_expected: usize) -> Self {
        Self(KeyTable::new(keys_expected))
    }

    /// Prefetches the slot of this key.
    #[inline]
    pub fn prefetch(&self, key: Key) {
        self.0.look(KeyHash::of(key));
    }

    /// Does the table's work for one event: finds the key, increments its version, and moves its chain's head.
    #[inline]
    pub fn append(&mut self, key: Key, head: Offset) -> (Version, Offset) {
        let hash = KeyHash::of(key);
        let seen = self.0.look(hash);
        let known = self.0.slot(key, hash, seen);
        let (version, previous) = (Version(known.version.0 + 1), known.head);
        (known.version, known.head) = (version, head);
        (version, previous)
    }
}

/// Archives in a segment's memory, as the process that wrote them reads them: without validation.
#[derive(Debug)]
pub struct Archives<E> {
    memory: Arc<Memory>,
    places: Vec<(usize, usize)>,
    event: PhantomData<fn() -> E>,
}

impl<E: Event> Archives<E> {
    /// Archives `events` one after the other.
    ///
    /// # Panics
    /// If an event takes more than 4 KiB.
    #[must_use]
    pub fn new(events: &[E]) -> Self {
        let mut half = WriteHalf::new(Memory::heap(Arc::new(Heap::new(vec![0; (events.len() + 1) << 12]))), 0);
        let mut scratch = Scratch::new(1 << 14);
        let places = events.iter().map(|event| {
            let at = half.at();
            let len = event.encode(&mut half.tail()[..1 << 12], &mut scratch).expect("an event takes at most 4 KiB");
            half.skip(len.next_multiple_of(ALIGN));
            (at, len)
        });
        let places = places.collect();
        half.publish();
        Self { memory: Arc::clone(half.memory()), places, event: PhantomData }
    }

    /// Iterates over all events in order, without validation.
    pub fn unchecked(&self) -> impl Iterator<Item = &E::Archived> {
        self.places.iter().filter_map(|&(at, len)| self.memory.archived::<E>(at, len))
    }

    /// Iterates over the bytes of all archives in order.
    pub fn bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.places.iter().filter_map(|&(at, len)| self.memory.read(at, len))
    }
}

/// A shard's writer over two files, which it writes alternately. It has no shard, no key table and no thread.
#[derive(Debug)]
pub struct LogWriter<E> {
    writer: Writer,
    log: Arc<ShardLog>,
    prepared: Arc<PreparedQueue>,
    files: Files,
    paths: [PathBuf; 2],
    next_index: u64,
    left: u64,
    event: PhantomData<fn(E)>,
}

impl<E: Event> LogWriter<E> {
    /// Creates a writer over two new files of `segment_bytes` in `dir`, with all pages present.
    ///
    /// # Errors
    /// The error of the file system.
    pub fn new(dir: PathBuf, segment_bytes: u64) -> io::Result<Self> {
        let log = Arc::new(ShardLog::new(
            (1, ShardId(0)),
            dir.clone(),
            segment_bytes,
            Offset(0),
            0,
            std::collections::VecDeque::new(),
            &Arc::default(),
        ));
        let prepared = Arc::new(ArrayQueue::new(1));
        let files = Files::open(&dir)?;
        let dir = files.root();
        let paths = [dir.join("0"), dir.join("1")];
        for path in &paths {
            drop(files.create_segment(path, segment_bytes)?);
        }
        let resume = Resume { segment: None, next_index: 0, sequence: 0, marked: 0 };
        let event_bytes_max = 64 << 10;
        let writer =
            Writer::new(Arc::clone(&log), Arc::clone(&prepared), resume, schema_fingerprint::<E>(), event_bytes_max);
        Ok(Self { writer, log, prepared, files, paths, next_index: 0, left: 0, event: PhantomData })
    }

    /// Makes room for `bytes` of records; begins the next segment if need be.
    ///
    /// # Errors
    /// The error of the file system.
    ///
    /// # Panics
    /// If a segment is too small.
    pub fn make_room(&mut self, bytes: u64) -> io::Result<()> {
        if bytes <= self.left {
            return Ok(());
        }
        // The log lists at most one segment, and that is the other file.
        let memory = self.files.open_segment(&self.paths[(self.next_index % 2) as usize], true)?;
        memory.prefault(0..memory.len())?;
        let mut half = WriteHalf::new(memory, 0);
        encode_prepared(0x5a17, half.tail());
        let prepared = Prepared { index: self.next_index, salt: 0x5a17, memory: half.into_memory() };
        assert!(
            self.prepared.push(prepared).is_ok() && self.writer.roll(Time(1)).is_ok(),
            "the prepared segment is taken"
        );
        self.log.pop_oldest();
        self.next_index += 1;
        self.left = self.log.segment_bytes - (self.log.first_offset(0).0);
        assert!(bytes <= self.left, "a segment is too small");
        Ok(())
    }

    /// Appends events (archive, header and CRC) and publishes them to readers. Returns the log's new end.
    ///
    /// # Panics
    /// If there is no room.
    #[inline]
    pub fn append(&mut self, events: &[(Key, E)]) -> Offset {
        let mut staged = [0; GROUP];
        let mut appender = self.writer.appender(&mut staged);
        for (key, event) in events {
            let header = RecordHeader {
                time: Time(1),
                key: *key,
                previous: Offset(0),
                event_type: event.event_type(),
                correlation: Correlation(0),
                version: Version(1),
                schema_version: 1,
                more: false,
            };
            match appender.append(&header, event) {
                Ok(appended) => self.left = self.left.saturating_sub(padded(appended.len) as u64),
                Err(Refused::NeedsSegment | Refused::TooLarge { .. }) => panic!("room was not made"),
            }
        }
        let appended = appender.finish();
        self.writer.advance(appended, events.len() as u64);
        Offset(self.writer.publish())
    }
}

/// A consumer's queues of events, one per key.
#[derive(Debug)]
pub struct Queues(KeyQueues);

/// An event that was taken from its queue and is being handled.
#[derive(Debug)]
pub struct QueuedEvent(InFlight);

impl QueuedEvent {
    /// The number of this attempt; the first is 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.0.attempt()
    }
}

impl Queues {
    /// Empty queues.
    ///
    /// # Panics
    /// If a value of the policy is out of range.
    #[must_use]
    pub fn new(policy: QueuePolicy) -> Self {
        Self(KeyQueues::new(policy, Offset(0)).expect("the policy is valid"))
    }

    /// Adds the next event of the log.
    ///
    /// # Panics
    /// If there is no room.
    #[inline]
    pub fn offer(&mut self, key: Key, offset: Offset) {
        self.0.offer(key, offset).expect("there is room");
    }

    /// Takes the next event that may run.
    #[inline]
    #[expect(clippy::should_implement_trait, reason = "None is not the end")]
    pub fn next(&mut self) -> Option<QueuedEvent> {
        self.0.next().map(QueuedEvent)
    }

    /// Ends an event that was handled.
    #[inline]
    pub fn succeeded(&mut self, event: QueuedEvent) {
        self.0.succeeded(event.0);
    }

    /// Tries a failed event again later.
    #[inline]
    pub fn retry(&mut self, event: QueuedEvent, after: Duration, now: Duration) {
        let record = self.0.failed(event.0, Verdict::Retry { after }, now);
        assert!(record.is_none(), "a retry needs no record");
    }

    /// Parks a failed event's key.
    pub fn park(&mut self, event: QueuedEvent, now: Duration) {
        let record = self.0.failed(event.0, Verdict::Park, now);
        self.0.recorded(record.expect("a parked event is recorded"));
    }

    /// Parks a key with one dead letter.
    ///
    /// # Panics
    /// If there is no room.
    pub fn restore_parked(&mut self, key: Key) {
        self.0.restore_parked(key, 1).expect("there is room");
    }

    /// Removes one dead letter of a key. Returns the number left.
    ///
    /// # Panics
    /// If the key has none.
    pub fn unpark(&mut self, key: Key) -> u32 {
        self.0.unpark(key, 1).expect("the key has a letter")
    }

    /// Makes the keys runnable whose time has come. Returns their number.
    #[inline]
    pub fn tick(&mut self, now: Duration) -> usize {
        self.0.tick(now)
    }

    /// The offset below which all events are done.
    #[must_use]
    pub fn position(&self) -> Offset {
        self.0.position()
    }

    /// Keys that wait for a retry.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.statistics().waiting
    }

    /// Keys that have unfinished events or are parked.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.0.statistics().keys
    }

    /// Events offered and not done.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        self.0.statistics().unfinished
    }
}
