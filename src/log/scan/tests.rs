//! Simulates an engine that writes, retires and damages files while they are read.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};

use proptest::prelude::*;

use super::*;
use crate::event::{Correlation, Key, Meta, Version};
use crate::log::format::tests::sealed;
use crate::log::format::{RECORD_HEADER_BYTES, RecordHeader};
use crate::log::manifest::StoredType;
use crate::storage::memory::{ALIGN, padded};

const SEGMENT_BYTES: u64 = 64 << 10;

/// Simulates the engine: writes a shard's files in the same order as the engine.
struct Engine {
    dir: tempfile::TempDir,
    index: u64,
    span: Span,
    at: usize,
    salt: u32,
    /// The end of the last segment, and its salt.
    before: (u64, u32),
    sequence: u64,
    chains: HashMap<u64, (u64, u64)>,
}

impl Engine {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let types = vec![StoredType { id: EventTypeId(1), schema_version: 1, name: "moved".into() }];
        let root = crate::event::Root::default();
        Manifest { store_id: 1, shards: 1, segment_bytes: SEGMENT_BYTES, root, placement: None, types }
            .save(&Files::open(dir.path()).expect("opened"), dir.path())
            .expect("saved");
        fs::create_dir(shard_dir(dir.path(), ShardId(0))).expect("made");
        Self {
            dir,
            index: 0,
            span: Span { first: 0, last: 0 },
            at: 0,
            salt: 0,
            before: (0, 0),
            sequence: 0,
            chains: HashMap::new(),
        }
    }

    fn store(&self) -> Store {
        Store::open(self.dir.path()).expect("a store")
    }

    fn path(&self, index: u64) -> PathBuf {
        shard_dir(self.dir.path(), ShardId(0)).join(segment_name(index))
    }

    fn file(&self, index: u64) -> File {
        OpenOptions::new().read(true).write(true).open(self.path(index)).expect("a segment")
    }

    fn save_span(&self) {
        // Renamed over the old file as the engine does, but without the sync, because no power failure is simulated
        // here.
        let (new, span) = (self.dir.path().join("span.new"), shard_dir(self.dir.path(), ShardId(0)).join("span"));
        fs::write(&new, self.span.encode()).and_then(|()| fs::rename(&new, span)).expect("saved");
    }

    /// Prepares a blank segment, from the file `old` if given.
    fn prepare(&mut self, index: u64, old: Option<&Path>) {
        match old {
            Some(old) => {
                let file = OpenOptions::new().write(true).open(old).expect("an old segment");
                let mut page = [0; HEADER_BYTES];
                crate::log::format::encode_prepared(7 + index as u32, &mut page);
                file.write_all_at(&page, 0).expect("blanked");
                fs::rename(old, self.path(index)).expect("renamed");
            }
            None => File::create_new(self.path(index)).and_then(|file| file.set_len(SEGMENT_BYTES)).expect("made"),
        }
        self.span.last = index;
        self.save_span();
    }

    fn begin(&mut self, index: u64) {
        if self.at > 0 {
            self.before = (self.index * SEGMENT_BYTES + self.at as u64, self.salt);
        }
        (self.index, self.at, self.salt) = (index, HEADER_BYTES, 7 + index as u32);
        let header = SegmentHeader {
            schema: 1,
            shard: ShardId(0),
            index,
            segment_bytes: SEGMENT_BYTES,
            previous_end: Offset(self.before.0),
            previous_salt: self.before.1,
            first_sequence: self.sequence,
            created: Time(1),
            salt: self.salt,
        };
        let mut page = vec![0; HEADER_BYTES + 4];
        crate::log::format::encode_prepared(self.salt, &mut page);
        header.encode(&mut page);
        self.file(index).write_all_at(&page, 0).expect("written");
    }

    fn put(&mut self, event_type: EventTypeId, key: u64, previous: u64, version: u64, body: &[u8]) -> u64 {
        let len = RECORD_HEADER_BYTES + body.len();
        let header = RecordHeader {
            time: Time(key),
            key: Key(key),
            previous: Offset(previous),
            event_type,
            correlation: Correlation(0),
            version: Version(version),
            schema_version: u16::from(event_type.0 != 0),
            more: false,
        };
        let mut record = sealed(&header, body, self.salt);
        record.extend([0; 4]);
        let file = self.file(self.index);
        let end = record.len().min(SEGMENT_BYTES as usize - self.at);
        file.write_all_at(&record[4..end], self.at as u64 + 4).expect("written");
        file.write_all_at(&(len as u32).to_le_bytes(), self.at as u64).expect("committed");
        let offset = self.index * SEGMENT_BYTES + self.at as u64;
        self.at += padded(len);
        offset
    }

    fn append(&mut self, key: u64, body: &[u8]) {
        if self.at == 0 {
            self.prepare(0, None);
            self.begin(0);
        }
        if self.at + padded(RECORD_HEADER_BYTES + body.len()) > SEGMENT_BYTES as usize {
            let next = self.index + 1;
            if self.span.last < next {
                self.prepare(next, None);
            }
            self.begin(next);
        }
        let (previous, version) = self.chains.get(&key).copied().unwrap_or((0, 0));
        let offset = self.put(EventTypeId(1), key, previous, version + 1, body);
        self.chains.insert(key, (offset, version + 1));
        self.sequence += 1;
    }

    /// Appends `events` events and keeps at most `kept` segments: each freed one is written again as the next.
    fn append_many(&mut self, events: u64, kept: u64) {
        for i in 0..events {
            self.append(i % 3, &[7; 2000]);
            if i % 5 == 0 {
                self.mark();
            }
            while self.index - self.span.first >= kept {
                let old = self.path(self.span.first);
                self.span.first += 1;
                self.save_span();
                let spare = old.with_file_name("spare-000000.seg");
                fs::rename(&old, &spare).expect("renamed");
                if self.span.last == self.index {
                    self.prepare(self.index + 1, Some(&spare));
                } else {
                    fs::remove_file(&spare).expect("removed");
                }
            }
        }
    }

    fn mark(&mut self) {
        if self.at + RECORD_HEADER_BYTES <= SEGMENT_BYTES as usize {
            let durable = self.index * SEGMENT_BYTES + self.at as u64;
            self.put(EventTypeId(0), durable, 0, 0, &[]);
        }
    }
}

fn body(i: u64) -> Vec<u8> {
    (0..i % 97).map(|byte| (byte ^ i) as u8).collect()
}

fn drain(records: &mut Records) -> Vec<(Meta, Vec<u8>)> {
    let mut all = Vec::new();
    while let Some(record) = records.next().expect("a sound log") {
        assert_eq!(record.body.as_ptr() as usize % ALIGN, 0, "bodies are aligned");
        all.push((record.meta, record.body.to_vec()));
    }
    all
}

#[test]
fn all_events_are_read_across_segments_and_marks() {
    let mut engine = Engine::new();
    for i in 0..3000 {
        engine.append(i % 10, &body(i));
        if i % 7 == 0 {
            engine.mark();
        }
    }
    let store = engine.store();
    let all = drain(&mut store.records(ShardId(0)).buffered(4096));
    assert_eq!(all.len(), 3000);
    for (i, (meta, bytes)) in (0..).zip(&all) {
        assert_eq!((meta.sequence.get(), meta.key.get(), meta.version.get()), (i, i % 10, i / 10 + 1));
        assert_eq!(bytes, &body(i));
    }
    assert_eq!(drain(&mut store.records(ShardId(0))), all, "with any buffer size");
    let files = store.shard(ShardId(0)).expect("listed");
    assert_eq!(files.segments.len() as u64, engine.index + 1);
    assert!(files.segments.iter().all(|segment| matches!(segment.state, SegmentState::Used { .. })));

    let mut places = Vec::new();
    let mut records = store.records(ShardId(0));
    while let Some(record) = records.next().expect("a sound log") {
        places.push(record.place());
    }
    let mut lookup = store.lookup();
    for step in [1, 7, 1999] {
        for i in 0..3000 {
            let i = i * step % 3000;
            let record = lookup.get(&places[i]).expect("still held");
            assert_eq!((record.meta, record.body.to_vec()), all[i]);
        }
    }
    let wrong = RecordPosition { offset: Offset(places[5].offset.get() + 16), ..places[5] };
    assert!(matches!(lookup.get(&wrong), Err(ReadError::NotARecord { .. })));
}

#[test]
fn an_end_is_read_again_before_the_reader_moves_to_the_next_segment() {
    let mut engine = Engine::new();
    engine.append(1, b"a");
    let store = engine.store();
    let mut records = store.records(ShardId(0));
    assert_eq!(drain(&mut records).len(), 1);
    // The reader's buffer holds the old end. Meanwhile this segment is filled and the next one begun.
    let mut written = 1;
    while engine.index < 2 {
        engine.append(1, &body(96));
        written += 1;
        if written % 100 == 0 {
            engine.mark();
        }
    }
    assert_eq!(drain(&mut records).len(), written - 1, "no event between the two ends is skipped");
    engine.append(1, b"b");
    assert_eq!(drain(&mut records).len(), 1);
    let half = store.records(ShardId(0)).until(Offset(SEGMENT_BYTES));
    assert_eq!(drain(&mut { half }).iter().filter(|(meta, _)| meta.offset.get() >= SEGMENT_BYTES).count(), 0);
    assert_eq!(store.horizon(ShardId(0)).expect("a span"), Offset(3 * SEGMENT_BYTES));
    assert_eq!(records.tail().expect("readable").events, 0);
}

#[test]
fn events_freed_while_being_read_are_reported_as_a_gap() {
    let mut engine = Engine::new();
    while engine.index < 3 {
        engine.append(1, &body(96));
    }
    let store = engine.store();
    for reuse in [false, true] {
        let mut records = store.records(ShardId(0)).buffered(4096);
        let start = records.next().expect("a sound log").expect("a record").meta.sequence.get();
        let seen = 20;
        for _ in 1..seen {
            assert!(records.next().expect("a sound log").is_some());
        }
        let from = records.offset();
        let first = engine.span.first;
        // Two segments are freed; the file being read is written again under a new name.
        engine.span.first = first + 2;
        engine.save_span();
        for index in first..first + 2 {
            let old = engine.path(index);
            if reuse {
                let next = engine.span.last + 1;
                engine.prepare(next, Some(&old));
                while engine.index < next {
                    engine.append(1, &body(96));
                }
            } else {
                fs::remove_file(&old).expect("removed");
            }
        }
        let rest = drain(&mut records);
        assert_eq!(rest.last().map(|(meta, _)| meta.sequence.get() + 1), Some(engine.sequence));
        let [gap] = records.gaps() else { panic!("one gap, not {:?}", records.gaps()) };
        assert!(gap.from >= from && gap.until == Offset(engine.span.first * SEGMENT_BYTES + 4096), "{gap:?}");
        let mut next = start + seen;
        for (meta, _) in &rest {
            if meta.offset == gap.until {
                next += gap.events;
            }
            assert_eq!(meta.sequence.get(), next, "every event outside the gap is read");
            next += 1;
        }
        while engine.index < engine.span.first + 3 {
            engine.append(1, &body(96));
        }
    }
}

#[test]
fn the_end_of_a_file_written_again_is_not_the_end_of_the_old_segment() {
    let mut engine = Engine::new();
    while engine.index < 3 {
        engine.append(1, &body(96));
    }
    let mut records = engine.store().records(ShardId(0)).buffered(4096);
    // Exactly the events that fit into the buffer, so the next read is from the file.
    let seen = (4096 / 144) as u64;
    for _ in 0..seen {
        assert!(records.next().expect("a sound log").is_some());
    }
    let from = records.offset();
    engine.span.first = 2;
    let old = engine.path(0);
    engine.prepare(4, Some(&old));
    fs::remove_file(engine.path(1)).expect("removed");
    engine.begin(4);
    for _ in 0..seen {
        engine.append(1, &body(96));
    }
    assert!(records.next().expect("a sound log").is_some());
    let per_segment = (SEGMENT_BYTES - 4096) / 144;
    let gap = MissedEvents {
        shard: ShardId(0),
        from,
        until: Offset(2 * SEGMENT_BYTES + 4096),
        events: 2 * per_segment - seen,
    };
    assert_eq!(records.gaps(), [gap]);
    assert_eq!(drain(&mut records).last().map(|(meta, _)| meta.sequence.get() + 1), Some(engine.sequence));
}

#[test]
fn damage_is_reported_and_the_next_segment_can_still_be_read() {
    let mut engine = Engine::new();
    while engine.index < 2 {
        engine.append(1, &body(96));
    }
    engine.file(0).write_all_at(b"x", HEADER_BYTES as u64 + 60).expect("damaged");
    let store = engine.store();
    let mut records = store.records(ShardId(0));
    let error = records.next().expect_err("damage");
    assert!(matches!(&error, ReadError::Corruption(c) if c.segment == 0 && c.offset == Offset(4096)), "{error}");
    assert!(records.next().is_err(), "the position does not move");
    assert!(records.skip_segment().expect("a span"));
    assert!(!drain(&mut records).is_empty());
    assert!(!records.skip_segment().expect("a span"));
}

#[test]
fn a_hole_in_the_log_is_not_its_end() {
    let mut engine = Engine::new();
    for i in 0..100 {
        engine.append(i, &body(40));
    }
    let end = engine.at as u64;
    engine.file(0).write_all_at(&[0; 512], HEADER_BYTES as u64 + 960).expect("zeroed");
    let store = engine.store();
    let mut records = store.records(ShardId(0));
    assert_eq!(drain(&mut records).len(), 10);
    let tail = records.tail().expect("readable");
    assert_eq!((tail.offset, tail.end, tail.was_durable), (Offset(4096 + 960), Offset(end), false));
    assert_eq!(tail.events, 84);
    engine.mark();
    assert!(records.tail().expect("readable").was_durable);
    let mut early = store.records(ShardId(0));
    assert!(early.next().expect("a sound log").is_some());
    assert_eq!(early.tail().expect("readable").events, 0, "readable records are not a tail");

    // A hole followed by another segment is damage.
    while engine.index < 1 {
        engine.append(1, &body(40));
    }
    let error = records.next().expect_err("a hole");
    assert!(matches!(&error, ReadError::Corruption(c) if c.offset == Offset(4096 + 960)), "{error}");
    assert!(records.skip_segment().expect("a span"));
    assert!(!drain(&mut records).is_empty());
}

#[test]
fn damaged_and_missing_segments_are_not_an_end() {
    let mut engine = Engine::new();
    while engine.index < 2 {
        engine.append(1, &body(96));
    }
    let store = engine.store();
    let last_error = |store: &Store| {
        let mut records = store.records(ShardId(0));
        loop {
            match records.next() {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(ReadError::Corruption(corruption)) => return Some(corruption),
                Err(error) => panic!("{error}"),
            }
        }
    };
    assert_eq!(last_error(&store), None);
    engine.file(2).write_all_at(b"x", 50).expect("damaged");
    assert_eq!(last_error(&store).map(|c| c.segment), Some(2));
    engine.file(2).write_all_at(&[0; HEADER_BYTES], 0).expect("blanked");
    assert_eq!(last_error(&store).map(|c| c.segment), Some(2), "a record without a header");
    let mut prepared = [0; HEADER_BYTES];
    crate::log::format::encode_prepared(7, &mut prepared);
    engine.file(2).write_all_at(&prepared, 0).expect("blanked");
    assert_eq!(last_error(&store), None, "prepared and never begun");
    engine.file(1).write_all_at(&prepared, 0).expect("blanked");
    assert_eq!(last_error(&store), None);
    engine.begin(2);
    assert_eq!(last_error(&store).map(|c| c.segment), Some(1), "a blank segment before a used one");
    fs::remove_file(engine.path(1)).expect("removed");
    assert_eq!(last_error(&store).map(|c| c.segment), Some(1));
    let states: Vec<_> = store.shard(ShardId(0)).expect("listed").segments.into_iter().map(|s| s.state).collect();
    assert!(
        matches!(states[..], [SegmentState::Used { .. }, SegmentState::Missing, SegmentState::Used { .. }]),
        "{states:?}"
    );
    engine.file(0).set_len(5000).expect("cut short");
    assert_eq!(last_error(&store).map(|c| c.segment), Some(0));
}

#[test]
fn a_store_without_records_is_empty_and_a_folder_without_a_manifest_is_not_a_store() {
    let mut engine = Engine::new();
    let store = engine.store();
    assert!(store.records(ShardId(0)).next().expect("empty").is_none());
    engine.prepare(0, None);
    let mut records = store.records(ShardId(0));
    assert!(records.next().expect("empty").is_none());
    assert_eq!(records.tail().expect("readable").events, 0);
    engine.begin(0);
    assert!(records.next().expect("empty").is_none());
    engine.append(1, b"a");
    assert!(records.next().expect("one").is_some());
    assert!(matches!(Store::open(engine.dir.path().join("none")), Err(OpenError::Io { .. })));
}

/// Reads to the end, starting at sequence `next` if events were read before. Checks that every missing event was freed
/// and counted in a gap. Returns the next sequence, if any event was ever read.
fn read_all(records: &mut Records, engine: &std::cell::RefCell<Engine>, mut next: Option<u64>) -> Option<u64> {
    let (mut seen, mut gaps) = (0, records.gaps().len());
    loop {
        let found = records.next().expect("a sound log");
        let found = found.map(|record| (record.meta.sequence.get(), record.meta.offset));
        while let Some(gap) = records.gaps().get(gaps) {
            assert!(gap.events <= (gap.until.get() - gap.from.get()) / 2048, "more events than fit: {gap:?}");
            // Accounts for the gap of a segment that was opened but freed before its first event was read.
            next = next.map(|next| next + gap.events);
            gaps += 1;
        }
        let Some((sequence, _)) = found else { break };
        assert_eq!(sequence, *next.get_or_insert(sequence), "every event outside a gap is read");
        next = Some(sequence + 1);
        seen += 1;
        if seen % 40 == 0 {
            assert_eq!(records.tail().expect("readable").events, 0, "readable records are not a tail");
        }
    }
    let tail = records.tail().expect("readable");
    assert_eq!((tail.events, tail.was_durable), (0, false), "an intact log has no torn tail");
    if let Some(next) = next {
        assert!(next <= engine.borrow().sequence);
    }
    next
}

#[test]
fn a_log_that_grows_between_any_two_reads_is_neither_damaged_nor_torn() {
    const SEGMENT_EVENTS: u64 = (SEGMENT_BYTES - 4096) / 2048;
    for segments in [1, 4] {
        let mut looks = 1;
        for moves_at in 0.. {
            if looks < moves_at {
                break;
            }
            let mut engine = Engine::new();
            engine.append_many(2 * SEGMENT_EVENTS + 9, 3);
            let engine = std::rc::Rc::new(std::cell::RefCell::new(engine));
            let mut records = engine.borrow().store().records(ShardId(0)).buffered(16384);
            let count = std::rc::Rc::new(std::cell::Cell::new(0));
            let (writer, counted) = (std::rc::Rc::clone(&engine), std::rc::Rc::clone(&count));
            *records.between_looks.0.borrow_mut() = Some(Box::new(move || {
                if counted.replace(counted.get() + 1) == moves_at {
                    writer.borrow_mut().append_many(segments * SEGMENT_EVENTS + moves_at % 5, 3);
                }
            }));
            let next = read_all(&mut records, &engine, None);
            looks = count.get();
            // The events appended during the last reads.
            let next = read_all(&mut records, &engine, next);
            assert_eq!(next, Some(engine.borrow().sequence), "{segments} segments at read {moves_at}");
        }
    }
}

#[test]
fn a_reader_slower_than_retention_loses_only_the_events_it_reports() {
    for seed in 0..6_u64 {
        let mut engine = Engine::new();
        engine.append_many(70, 3);
        let engine = std::rc::Rc::new(std::cell::RefCell::new(engine));
        let mut records = engine.borrow().store().records(ShardId(0)).buffered(4096);
        let (writer, mut looks, mut random) = (std::rc::Rc::clone(&engine), 0, seed * 2 + 1);
        *records.between_looks.0.borrow_mut() = Some(Box::new(move || {
            looks += 1;
            random = random.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) | 1;
            // Bounded, so that the reader eventually reaches the end.
            if looks < 200 {
                writer.borrow_mut().append_many((random >> 40) % (4 + 6 * seed), 3);
            }
        }));
        // Reads until the writer has stopped.
        let mut next = None;
        while next != Some(engine.borrow().sequence) {
            next = read_all(&mut records, &engine, next);
        }
    }
}

#[test]
fn events_freed_before_the_first_read_are_not_a_gap() {
    let mut engine = Engine::new();
    engine.append_many(90, 3);
    let engine = std::rc::Rc::new(std::cell::RefCell::new(engine));
    let mut records = engine.borrow().store().records(ShardId(0));
    let (writer, mut looks) = (std::rc::Rc::clone(&engine), 0);
    *records.between_looks.0.borrow_mut() = Some(Box::new(move || {
        looks += 1;
        // Runs between reading the span and reading its first segment.
        if looks == 2 {
            writer.borrow_mut().append_many(300, 3);
        }
    }));
    assert_eq!(read_all(&mut records, &engine, None), Some(engine.borrow().sequence));
    assert_eq!(records.gaps(), []);
}

#[test]
fn a_gap_after_damage_begins_at_the_damage() {
    let mut engine = Engine::new();
    engine.append_many(50, 9);
    let mut records = engine.store().records(ShardId(0)).buffered(4096);
    for _ in 0..5 {
        assert!(records.next().expect("a sound log").is_some());
    }
    engine.file(0).write_all_at(b"x", records.offset().get() + 2048 + 60).expect("damaged");
    assert!(records.next().expect("a valid record").is_some());
    let read = records.sequence().get();
    let Err(ReadError::Corruption(corruption)) = records.next() else { panic!("damage") };
    let from = corruption.offset;
    assert!(records.skip_segment().expect("a span"));
    engine.append_many(100, 3);
    let record = records.next().expect("the rest is valid").expect("a record").meta;
    let [gap] = records.gaps() else { panic!("{:?}", records.gaps()) };
    assert_eq!((gap.from, gap.until, gap.events), (from, record.offset, record.sequence.get() - read));
}

#[test]
fn a_segment_begun_again_under_its_own_name_is_damage_and_not_an_end() {
    let mut engine = Engine::new();
    engine.append(1, b"a");
    let mut records = engine.store().records(ShardId(0));
    assert_eq!(drain(&mut records).len(), 1);
    // The state after recovery has cut a torn tail in an earlier segment.
    let mut page = [0; HEADER_BYTES];
    crate::log::format::encode_prepared(99, &mut page);
    engine.file(0).write_all_at(&page, 0).expect("blanked");
    assert!(matches!(records.next(), Err(ReadError::Corruption(_))));
    assert!(matches!(records.next(), Err(ReadError::Corruption(_))), "the position does not move");
}

#[test]
fn a_position_in_a_file_written_again_is_beyond_retention() {
    let mut engine = Engine::new();
    engine.append_many(60, 9);
    let store = engine.store();
    let (mut records, mut places) = (store.records(ShardId(0)), Vec::new());
    while let Some(record) = records.next().expect("a sound log") {
        places.push(record.place());
    }
    let mut lookup = store.lookup();
    lookup.get(&places[3]).expect("still held");
    engine.append_many(200, 3);
    for place in &places[..20] {
        assert!(matches!(lookup.get(place), Err(ReadError::BeyondRetention { .. })), "{place:?}");
    }
}

#[test]
fn a_reader_follows_a_concurrent_writer() {
    let mut engine = Engine::new();
    engine.append(1, b"a");
    let store = engine.store();
    const EVENTS: u64 = 20_000;
    let writer = std::thread::spawn(move || {
        for i in 1..EVENTS {
            engine.append(i % 5, &body(i));
        }
        engine
    });
    let mut records = store.records(ShardId(0)).buffered(8192);
    let mut next = 0;
    while next < EVENTS {
        match records.next().expect("a sound log") {
            Some(record) => {
                assert_eq!(record.meta.sequence.get(), next);
                assert!(next == 0 || record.body == body(next));
                next += 1;
            }
            None => std::thread::yield_now(),
        }
    }
    drop(writer.join().expect("a writer"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_flipped_bit_is_detected(at in 0_u64..14_000, bit in 0_u8..8) {
        let mut engine = Engine::new();
        for i in 0..100 {
            engine.append(i, &body(96));
        }
        let end = engine.at as u64;
        let at = at.min(end - 1);
        let file = engine.file(0);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("in the file");
        file.write_all_at(&[byte[0] ^ (1_u8 << bit)], at).expect("flipped");
        let mut records = engine.store().records(ShardId(0));
        let mut seen = 0;
        let damaged = loop {
            match records.next() {
                Ok(Some(_)) => seen += 1,
                Ok(None) => break records.tail().expect("readable").events > 0,
                Err(_) => break true,
            }
        };
        prop_assert!(damaged, "byte {} of {}, {} seen", at, end, seen);
    }
}
