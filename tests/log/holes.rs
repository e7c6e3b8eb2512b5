//! Holes in the log: a zero word, zeroed pages, an older copy of a segment, a segment of another store. Every reader of
//! the log gets every event, or exactly those before the hole and then a typed error. No position is saved behind a
//! hole.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use crate::common::{ArchivedNote, Note, PAGE, SEGMENT, segment_path, small, soon, until};
use corelane::consumer::{Batch, Call, Consumer, ConsumerError, Judgement, Sink, Start, outside};
use corelane::error::{GateOpenError, HistoryError};
use corelane::ingress::GatePolicy;
use corelane::log::Position;
use corelane::log::scan::Store;
use corelane::{
    Aggregate, Bounded, Engine, HandlerError, Key, Meta, Offset, OpenError, ReadError, ShardId, Time, Version,
};
use rkyv::{Archive, Deserialize, Serialize};

/// The number and sum of a key's events.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Total {
    events: u64,
    sum: u64,
}

impl Aggregate for Total {
    type Event = Note;
    type Command = ();
    type Rejection = ();

    fn evolve(&mut self, event: &ArchivedNote, _: &Meta) {
        self.events += 1;
        self.sum += event.n.to_native();
    }

    fn decide(&self, (): (), _: &mut corelane::Emit<Note>) -> Result<(), ()> {
        Ok(())
    }
}

const EVENTS: u64 = 3000;
const KEYS: u64 = 10;
/// The active segment.
const LAST: u64 = 3;

fn open(dir: &Path) -> Result<Engine<Total>, OpenError> {
    Engine::<Total>::open(small(dir))
}

/// A record of the undamaged log.
#[derive(Debug, Clone, Copy)]
struct RecordPlace {
    segment: u64,
    at: usize,
    len: usize,
    /// Events before it.
    events: u64,
}

impl RecordPlace {
    fn offset(&self) -> Offset {
        Offset(self.segment * SEGMENT + self.at as u64)
    }
}

/// An undamaged store that a checkpoint covers, and the segments that replace its own.
struct Sound {
    dir: tempfile::TempDir,
    segments: Vec<Vec<u8>>,
    records: Vec<RecordPlace>,
    /// Segment 1 as it was while events were appended to it.
    older: Vec<u8>,
    /// The segments of another store, with as many events of the same lengths.
    other: Vec<Vec<u8>>,
}

fn publish(engine: &Engine<Total>, range: std::ops::Range<u64>) {
    let mut producer = engine.producer();
    for n in range {
        drop(producer.publish(Key(n % KEYS), Note::new(n)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

fn segments(dir: &Path) -> Vec<Vec<u8>> {
    (0..4).map(|index| std::fs::read(segment_path(dir, index)).unwrap()).collect()
}

fn sound() -> &'static Sound {
    static SOUND: OnceLock<Sound> = OnceLock::new();
    SOUND.get_or_init(|| {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut older = Vec::new();
        for store in [dir.path(), other.path()] {
            let engine = open(store).unwrap();
            publish(&engine, 0..1200);
            older = if older.is_empty() { std::fs::read(segment_path(store, 1)).unwrap() } else { older };
            publish(&engine, 1200..EVENTS);
            engine.checkpoint(soon()).unwrap();
            engine.shutdown(soon()).unwrap();
        }
        let segments_of_it = segments(dir.path());
        let (mut records, mut events) = (Vec::new(), 0);
        for (segment, bytes) in (0..).zip(&segments_of_it) {
            let mut at = PAGE;
            while at + 48 <= bytes.len() {
                let len = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
                if len == 0 {
                    break;
                }
                records.push(RecordPlace { segment, at, len, events });
                events += u64::from(bytes[at + 30..at + 32] != [0, 0]);
                at += len.next_multiple_of(16);
            }
        }
        assert_eq!(events, EVENTS);
        let other_segments = segments(other.path());
        Sound { dir, segments: segments_of_it, records, older, other: other_segments }
    })
}

impl Sound {
    /// Copies the store and damages one segment. Opening always reads the records of the last segment, so
    /// [`Damaged::open`] damages that one later.
    fn damaged(&self, segment: u64, damage: impl FnOnce(&mut Vec<u8>)) -> Damaged {
        let dir = tempfile::tempdir().unwrap();
        crate::common::copy(self.dir.path(), dir.path());
        let mut bytes = self.segments[segment as usize].clone();
        damage(&mut bytes);
        if segment < LAST {
            std::fs::write(segment_path(dir.path(), segment), &bytes).unwrap();
        }
        let was = &self.segments[segment as usize];
        let is_changed = |place: &&RecordPlace| {
            let range = place.at..place.at + place.len;
            place.segment == segment && bytes[range.clone()] != was[range]
        };
        Damaged { hole: self.records.iter().find(is_changed).copied(), late: (segment == LAST).then_some(bytes), dir }
    }

    /// The records that are events.
    fn events(&self) -> Vec<RecordPlace> {
        let mut events: Vec<RecordPlace> = Vec::new();
        for (i, place) in self.records.iter().enumerate() {
            let until = self.records.get(i + 1).map_or(EVENTS, |next| next.events);
            if until > place.events {
                events.push(*place);
            }
        }
        events
    }
}

struct Damaged {
    dir: tempfile::TempDir,
    /// The first changed record.
    hole: Option<RecordPlace>,
    /// The contents that the last segment gets while the store is open.
    late: Option<Vec<u8>>,
}

/// The events that a reader returned, in order, and the error that ended it.
type Got = (Vec<u64>, Option<ReadError>);

impl Damaged {
    fn open(&self) -> Engine<Total> {
        let engine = open(self.dir.path()).unwrap();
        if let Some(bytes) = &self.late {
            let path = segment_path(self.dir.path(), LAST);
            let (file, was) =
                (std::fs::OpenOptions::new().write(true).open(&path).unwrap(), std::fs::read(&path).unwrap());
            let end = sound().records.last().unwrap().at;
            (0..end)
                .filter(|at| was[*at] != bytes[*at])
                .for_each(|at| file.write_all_at(&bytes[at..=at], at as u64).unwrap());
        }
        engine
    }

    fn check(&self, way: &str, (got, error): Got) {
        let Some(hole) = self.hole else {
            assert!(error.is_none() && got.len() as u64 == EVENTS, "{way}: {} events, {error:?}", got.len());
            return;
        };
        assert_eq!(got, (0..hole.events).collect::<Vec<_>>(), "{way}: exactly the events before {hole:?}");
        self.is_named(way, error.as_ref());
    }

    fn is_named(&self, way: &str, error: Option<&ReadError>) {
        let Some(ReadError::Corruption(corruption)) = error else { panic!("{way}: {error:?} at {:?}", self.hole) };
        let hole = self.hole.unwrap();
        assert_eq!((corruption.segment, corruption.offset), (hole.segment, hole.offset()), "{way}: {corruption}");
    }
}

fn n_of(record: &corelane::Record<'_, Note>) -> u64 {
    record.event.n.to_native()
}

/// Reads with a `Reader`. Asked again after an error, it returns the same error and never the next record.
fn read(engine: &Engine<Total>) -> Got {
    let mut reader = engine.reader(ShardId(0));
    let mut got = Vec::new();
    loop {
        match reader.next() {
            Ok(Some(record)) => got.push(n_of(&record)),
            Ok(None) => return (got, None),
            Err(error) => {
                let at = reader.offset();
                for _ in 0..3 {
                    assert_eq!(reader.next().err().map(|again| again.to_string()), Some(error.to_string()));
                    assert_eq!(reader.offset(), at, "the position stays");
                }
                return (got, Some(error));
            }
        }
    }
}

fn between(engine: &Engine<Total>) -> Got {
    let mut events = engine.events_between(Time(0), Time(u64::MAX));
    let mut got = Vec::new();
    loop {
        match events.next() {
            Ok(Some(record)) => got.push(n_of(&record)),
            Ok(None) => return (got, None),
            Err(error) => {
                assert_eq!(events.next().err().map(|again| again.to_string()), Some(error.to_string()));
                return (got, Some(error));
            }
        }
    }
}

fn from_outside(dir: &Path) -> Got {
    let mut records = Store::open(dir).unwrap().records(ShardId(0)).buffered(8192);
    let mut got = Vec::new();
    loop {
        match records.next() {
            Ok(Some(record)) => got.push(record.meta.sequence.0),
            Ok(None) => return (got, None),
            Err(error) => {
                assert_eq!(records.next().err().map(|again| again.to_string()), Some(error.to_string()));
                return (got, Some(error));
            }
        }
    }
}

fn read_error(error: HistoryError) -> ReadError {
    match error {
        HistoryError::Read(error) => error,
        error => panic!("{error}"),
    }
}

/// Checks everything that reads the log once on the caller's thread.
fn check_readers(damaged: &Damaged) {
    let engine = damaged.open();
    damaged.check("a reader", read(&engine));
    damaged.check("events between times", between(&engine));
    let counts = engine.counts();
    let compared = engine.compare().map_err(read_error);
    let rebuilt = engine.rebuild_all(|_, _, _| {}).map_err(read_error);
    let gate = engine.gated("in", GatePolicy::default(), |note| Some((0, note.n.to_native())));
    match damaged.hole {
        None => {
            assert_eq!(counts.unwrap().events, EVENTS);
            assert_eq!(compared.unwrap().differing, []);
            rebuilt.unwrap();
            assert_eq!(gate.unwrap().expected(0), Some(EVENTS));
        }
        Some(_) => {
            damaged.is_named("counts", counts.err().as_ref());
            damaged.is_named("compare", compared.err().as_ref());
            damaged.is_named("rebuild_all", rebuilt.err().as_ref());
            let Err(GateOpenError::Read(error)) = gate else { panic!("a gate: {gate:?}") };
            damaged.is_named("a gate", Some(&error));
        }
    }
    check_keys(damaged, &engine);
    check_starts(damaged, &engine);
    drop(engine);
}

/// Checks each key's stream: it returns all of the key's events, or an error at or behind the hole.
fn check_keys(damaged: &Damaged, engine: &Engine<Total>) {
    for key in 0..KEYS {
        let wanted: Vec<u64> = (key..EVENTS).step_by(KEYS as usize).collect();
        let streamed = engine.stream(Key(key), Version(1)).map_err(read_error).and_then(|mut stream| {
            let mut got = Vec::new();
            while let Some(record) = stream.next()? {
                got.push(n_of(&record));
            }
            Ok(got)
        });
        let rebuilt = engine.rebuild(Key(key)).map_err(read_error);
        match streamed {
            Ok(got) => {
                assert_eq!(got, wanted, "key {key}");
                assert_eq!(rebuilt.unwrap().0, Total { events: wanted.len() as u64, sum: wanted.iter().sum() });
            }
            Err(ReadError::Corruption(corruption)) => {
                assert!(damaged.hole.is_some_and(|hole| corruption.offset >= hole.offset()), "{corruption}");
                assert!(matches!(rebuilt, Err(ReadError::Corruption(_))), "{rebuilt:?}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Checks readers that begin at a given event: none begins behind a hole of its own segment.
fn check_starts(damaged: &Damaged, engine: &Engine<Total>) {
    let events = sound().events();
    for place in events.iter().step_by(131).chain(events.last()) {
        let reader = engine.reader_at(ShardId(0), place.offset());
        match damaged.hole {
            Some(hole) if hole.segment == place.segment && place.offset() > hole.offset() => {
                damaged.is_named("a reader behind the hole", reader.err().as_ref());
            }
            Some(hole) if hole.offset() == place.offset() => {}
            _ => assert_eq!(n_of(&reader.unwrap().next().unwrap().unwrap()), place.events),
        }
    }
}

/// A sink that keeps the applied events with its position.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<(Vec<u64>, Option<Position>)>>);

impl Sink<Note> for Kept {
    fn position(&mut self, _: ShardId) -> Result<Option<Position>, HandlerError> {
        Ok(self.0.lock().unwrap().1)
    }

    fn apply(&mut self, batch: &mut Batch<'_, Note>) -> Result<(), HandlerError> {
        let mut taken = Vec::new();
        while let Some(record) = batch.next()? {
            taken.push(n_of(&record));
        }
        let mut kept = self.0.lock().unwrap();
        kept.0.append(&mut taken);
        kept.1 = Some(batch.end());
        Ok(())
    }
}

/// Checks everything that follows the log with a position of its own.
fn check_followers(damaged: &Damaged) {
    let engine = damaged.open();
    let (kept, seen, many) = (Kept::default(), Kept::default(), Kept::default());
    let note = |kept: &Kept| {
        let kept = kept.clone();
        move |event: &ArchivedNote, _: &Meta| {
            kept.0.lock().unwrap().0.push(event.n.to_native());
            Ok::<_, HandlerError>(())
        }
    };
    let sink = engine.consumer("sink").start_at(Start::Beginning).start_sink(500, kept.clone()).unwrap();
    let one = engine.consumer("one").start_at(Start::Beginning).start(note(&seen)).unwrap();
    let four = engine.consumer("four").start_at(Start::Beginning).concurrency(4).start(note(&many)).unwrap();
    let mut poller = engine.consumer("poller").start_at(Start::Beginning).poller().unwrap();
    let mut polled = Vec::new();
    let ended = loop {
        match poller.next() {
            Ok(Some(delivery)) => {
                polled.push(poller.event(&delivery).unwrap().0.n.to_native());
                poller.succeeded(delivery).unwrap();
            }
            Ok(None) => break None,
            Err(ConsumerError::Read(error)) => {
                assert!(matches!(poller.next(), Err(ConsumerError::Read(ReadError::Corruption(_)))));
                break Some(error);
            }
            Err(error) => panic!("{error}"),
        }
    };
    polled.sort_unstable();
    damaged.check("a poller", (polled, ended));
    drop(poller);
    let Some(hole) = damaged.hole else {
        engine.drain_consumers(soon()).unwrap();
        return;
    };
    let names = ["four", "one", "sink"];
    let failures = || {
        let reports = engine.consumers();
        names.map(|name| reports.iter().find(|report| report.name == name).and_then(|report| report.failure.clone()))
    };
    until("all three have failed", || failures().iter().all(Option::is_some));
    let drained = engine.drain_consumers(soon());
    assert!(matches!(drained, Err(ConsumerError::Ended { failure: Some(_) })), "{drained:?}");
    for (name, failure) in names.iter().zip(failures()) {
        let failure = failure.unwrap().to_string();
        assert!(failure.contains(&format!("offset {}:", hole.offset())), "{name}: {failure}");
    }
    for (name, kept) in names.iter().zip([&many, &seen, &kept]) {
        let mut got = kept.0.lock().unwrap().0.clone();
        got.sort_unstable();
        assert_eq!(got, (0..hole.events).collect::<Vec<_>>(), "{name}: exactly the events before {hole:?}");
    }
    drop((sink, one, four));
    assert!(
        engine.consumers().iter().all(|report| report.positions[0] <= hole.offset()),
        "no position is saved behind the hole"
    );
    engine.shutdown(soon()).unwrap();
    let store = Store::open(damaged.dir.path()).unwrap();
    for name in outside::names(&store).unwrap() {
        let registered = outside::registered(&store, &name).unwrap().unwrap();
        assert!(registered.positions.iter().all(|at| *at <= hole.offset()), "{name}: {registered:?}");
    }
}

fn zero_pages(bytes: &mut [u8], pages: std::ops::Range<usize>) {
    bytes[pages.start * PAGE..pages.end * PAGE].fill(0);
}

#[test]
fn every_reader_reports_a_zeroed_length() {
    let sound = sound();
    for (i, place) in sound.records.iter().enumerate().step_by(211).chain([(0, &sound.records[0])]) {
        let is_last_of_the_log = i + 3 > sound.records.len();
        if is_last_of_the_log {
            continue;
        }
        let damaged = sound.damaged(place.segment, |bytes| bytes[place.at..place.at + 4].fill(0));
        check_readers(&damaged);
        damaged_outside(&damaged);
    }
}

/// For a tool, a hole in the last segment is an end of the log with records behind it.
fn damaged_outside(damaged: &Damaged) {
    if damaged.hole.is_some_and(|hole| hole.segment == LAST) {
        let mut records = Store::open(damaged.dir.path()).unwrap().records(ShardId(0));
        while records.next().unwrap().is_some() {}
        let hole = damaged.hole.unwrap();
        assert_eq!((records.sequence().0, records.offset()), (hole.events, hole.offset()));
        assert!(records.tail().unwrap().was_durable);
        return;
    }
    damaged.check("a tool", from_outside(damaged.dir.path()));
}

#[test]
fn every_reader_reports_zeroed_pages() {
    let sound = sound();
    for (segment, pages) in [(0, 1..2), (1, 1..2), (1, 3..4), (1, 5..9), (1, 1..16), (2, 15..16), (3, 1..2), (2, 9..10)]
    {
        let damaged = sound.damaged(segment, |bytes| zero_pages(bytes, pages.clone()));
        assert!(damaged.hole.is_some());
        check_readers(&damaged);
        damaged_outside(&damaged);
    }
}

#[test]
fn every_reader_reports_an_older_copy_of_a_segment() {
    let sound = sound();
    let damaged = sound.damaged(1, |bytes| bytes.clone_from(&sound.older));
    assert!(damaged.hole.is_some_and(|hole| (960..1300).contains(&hole.events)), "{:?}", damaged.hole);
    check_readers(&damaged);
    damaged_outside(&damaged);
    check_followers(&damaged);
}

#[test]
fn every_follower_of_the_log_stops_at_a_hole_with_an_error() {
    let sound = sound();
    check_followers(&sound.damaged(0, |_| {}));
    let flipped = sound.records[1200];
    check_followers(&sound.damaged(flipped.segment, |bytes| bytes[flipped.at] &= !0x40));
    check_followers(&sound.damaged(0, |bytes| zero_pages(bytes, 1..2)));
    check_followers(&sound.damaged(2, |bytes| zero_pages(bytes, 15..16)));
    check_followers(&sound.damaged(3, |bytes| zero_pages(bytes, 1..2)));
}

#[test]
fn a_segment_of_another_store_is_refused() {
    let sound = sound();
    for segment in 0..4 {
        let damaged = sound.damaged(segment, |bytes| bytes.clone_from(&sound.other[segment as usize]));
        std::fs::write(segment_path(damaged.dir.path(), segment), &sound.other[segment as usize]).unwrap();
        let error = open(damaged.dir.path()).map(drop).unwrap_err();
        assert!(matches!(error, OpenError::Corruption(_)), "segment {segment}: {error}");
        // A tool finds it at the boundary to a neighbouring segment, although every record in it is valid.
        let mut records = Store::open(damaged.dir.path()).unwrap().records(ShardId(0));
        let error = loop {
            match records.next() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("segment {segment} of another store is accepted"),
                Err(error) => break error,
            }
        };
        let ReadError::Corruption(corruption) = error else { panic!("{error}") };
        assert_eq!(corruption.segment, segment.saturating_sub(1), "{corruption}");
    }
}

#[test]
fn the_tools_report_the_offset_of_a_hole() {
    let sound = sound();
    let place = sound.records[1200];
    let damaged = sound.damaged(place.segment, |bytes| bytes[place.at..place.at + 4].fill(0));
    for command in ["verify", "dump", "inspect"] {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_corelane"))
            .arg(command)
            .arg(damaged.dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert_eq!(out.status.code(), Some(1), "{command}: {text}");
        assert!(text.contains(&place.offset().to_string()), "{command}: {text}");
    }
}

#[test]
fn a_batch_of_deliveries_ends_before_a_hole_and_the_next_call_reports_it() {
    let sound = sound();
    let (i, place) = sound.records.iter().enumerate().find(|(_, place)| place.events == 5).unwrap();
    let damaged = sound.damaged(0, |bytes| bytes[place.at..place.at + 4].fill(0));
    let engine = damaged.open();
    let mut poller = engine.consumer("poller").start_at(Start::Beginning).concurrency(64).poller().unwrap();
    let batch = poller.next_batch(100).unwrap();
    assert_eq!(batch.len(), 5, "record {i}");
    assert!(poller.next_batch(100).unwrap().is_empty(), "the events before the hole are still in flight");
    batch.into_iter().for_each(|delivery| poller.succeeded(delivery).unwrap());
    for _ in 0..2 {
        let Err(ConsumerError::Read(error)) = poller.next_batch(100) else { panic!("the hole is reported") };
        damaged.is_named("a batch", Some(&error));
    }
    poller.save().unwrap();
    assert_eq!(poller.report().positions, [place.offset()]);
}

/// These records fill a segment to its last byte unless a mark lies among them; then no zero word ends the segment.
#[test]
fn a_reader_crosses_every_segment_boundary_and_can_begin_at_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Total>::open(crate::common::os_cache(dir.path())).unwrap();
    let (mut producer, mut follower) = (engine.producer(), engine.reader(ShardId(0)));
    let mut seen = 0;
    for n in 0..EVENTS {
        let receipt = producer.publish(Key(n % KEYS), Note::new(n)).unwrap();
        if n % 300 != 299 {
            continue;
        }
        receipt.appended().wait().unwrap();
        while let Some(record) = follower.next().unwrap() {
            assert_eq!(n_of(&record), seen);
            seen += 1;
        }
    }
    assert_eq!(seen, EVENTS);
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    for (segment, bytes) in (0..).zip(&segments(dir.path())).skip(1) {
        let (previous_end, first_sequence) = (word(bytes, 48), word(bytes, 56));
        assert!(((segment * SEGMENT - 112)..=segment * SEGMENT).contains(&previous_end), "{previous_end}");
        for offset in [previous_end, segment * SEGMENT + PAGE as u64] {
            let mut reader = engine.reader_at(ShardId(0), Offset(offset)).unwrap();
            let record = reader.next().unwrap().unwrap();
            assert_eq!((n_of(&record), record.meta.sequence.0), (first_sequence, first_sequence));
        }
    }
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop((producer, follower, engine));
    let end = word(&segments(dir.path())[2], 48);
    // The last record of segment 1, an event or a mark.
    let last = (1..).map(|back| end - 16 * back).find(|at| {
        let bytes = &segments(dir.path())[1][(at % SEGMENT) as usize..];
        u64::from(u32::from_le_bytes(bytes[..4].try_into().unwrap())).next_multiple_of(16) == end - at
    });
    let last = last.unwrap();
    let mut bytes = segments(dir.path())[1].clone();
    bytes[(last % SEGMENT) as usize..][..4].fill(0);
    std::fs::write(segment_path(dir.path(), 1), bytes).unwrap();
    let engine = Engine::<Total>::open(crate::common::os_cache(dir.path())).unwrap();
    let Some(ReadError::Corruption(corruption)) = read(&engine).1 else { panic!("the hole is reported") };
    assert_eq!((corruption.segment, corruption.offset), (1, Offset(last)));
    // The end of that segment is behind the hole.
    assert!(matches!(engine.reader_at(ShardId(0), Offset(end)), Err(ReadError::Corruption(_))));
}

#[test]
fn opening_refuses_a_hole_in_the_last_segment() {
    let sound = sound();
    let mut bytes = sound.segments[LAST as usize].clone();
    zero_pages(&mut bytes, 1..2);
    let dir = tempfile::tempdir().unwrap();
    crate::common::copy(sound.dir.path(), dir.path());
    std::fs::write(segment_path(dir.path(), LAST), bytes).unwrap();
    let error = open(dir.path()).map(drop).unwrap_err();
    let OpenError::Corruption(corruption) = error else { panic!("{error}") };
    assert_eq!((corruption.segment, corruption.offset), (LAST, Offset(LAST * SEGMENT + PAGE as u64)));
}

#[test]
fn failures_before_a_hole_are_recorded_although_the_consumer_ends_there() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Total>::open(crate::common::os_cache(dir.path())).unwrap();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let start = || {
        let calls = Arc::clone(&calls);
        let builder = engine.consumer("c").before_durable().judge(|_, _| Judgement::Park);
        let builder = builder.start_with(move |event: &ArchivedNote, _: &Meta, call: &Call<'_>| {
            calls.lock().unwrap().push((event.n.to_native(), call.attempt()));
            Err("not this one".into())
        });
        builder.unwrap()
    };
    let consumer = start();
    // A folder in place of the letters file makes every write of a letter fail.
    let obstacle = dir.path().join("consumers/c/letters-000001.log");
    std::fs::create_dir(&obstacle).unwrap();
    publish(&engine, 1..2);
    until("the failure cannot be recorded", || consumer.report().write_failures.1 > 0);
    consumer.pause().unwrap();
    publish(&engine, 2..3);
    let offset = {
        let mut reader = engine.reader(ShardId(0));
        let mut offsets = std::iter::from_fn(|| reader.next().unwrap().map(|record| record.meta.offset));
        offsets.nth(1).unwrap()
    };
    let file = std::fs::OpenOptions::new().write(true).open(segment_path(dir.path(), 0)).unwrap();
    file.write_all_at(&[0; 4], offset.0).unwrap();
    // The next attempt comes half a second after the last one.
    let failures = consumer.report().write_failures.1;
    until("an attempt has just failed", || consumer.report().write_failures.1 > failures);
    std::fs::remove_dir(&obstacle).unwrap();
    consumer.resume().unwrap();
    let is_at_the_hole = |consumer: &Consumer<Note>| {
        until("the consumer fails", || consumer.report().failure.is_some());
        let failure = consumer.report().failure.unwrap();
        assert!(matches!(failure.error(), ConsumerError::Read(ReadError::Corruption(_))), "{failure}");
    };
    is_at_the_hole(&consumer);
    drop(consumer);
    let report = engine.consumers().remove(0);
    assert_eq!((report.letters.letters, &report.positions[..]), (1, &[offset][..]));
    is_at_the_hole(&start());
    assert_eq!(*calls.lock().unwrap(), [(1, 1)], "the event does not come again");
}
