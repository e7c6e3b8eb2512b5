//! Live feeds as threads read them: where they begin, what they return, what they miss, and how they end.

use std::time::Duration;

use crate::common::{Note, PATIENCE, SEGMENT, os_cache, read_shard, small, soon, until};
use corelane::error::{LiveError, PositionError};
use corelane::event::{EventId, deserialize};
use corelane::log::{Live, LiveFrom};
use corelane::{
    Bounded, Event, EventLog, EventType, EventTypeId, Key, Offset, OpenError, ReadError, Retention, ShardId, Time,
    WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

fn open(dir: &tempfile::TempDir, shards: u16) -> EventLog<Note> {
    EventLog::open(small(dir.path()).shards(shards)).unwrap()
}

/// Publishes notes to their keys, and waits until they are durable.
fn publish(engine: &EventLog<Note>, events: impl IntoIterator<Item = (u64, u64)>) {
    let mut producer = engine.producer();
    for (key, n) in events {
        drop(producer.publish(Key::new(key), Note::new(n)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

/// Publishes 2,000-byte notes of one key, `from` and later numbers, until retention has freed `segments` more segments
/// and frees no more. Returns the next number.
fn publish_until_freed(engine: &EventLog<Note>, from: u64, segments: u64) -> u64 {
    let mut producer = engine.producer();
    let freed = || engine.shard_metrics()[0].segments_freed;
    let (before, mut n) = (freed(), from);
    while freed() < before + segments {
        drop(producer.publish(Key::new(1), Note::sized(n, 2000)).unwrap());
        n += 1;
        assert!(n < from + 100_000, "nothing was freed");
    }
    engine.flush(soon()).unwrap();
    until("retention has done its work", || engine.shard_metrics()[0].segments <= 2);
    n
}

/// The numbers of all events that the feed can return now.
fn numbers(feed: &mut Live<Note>) -> Vec<u64> {
    let mut numbers = Vec::new();
    loop {
        match feed.next_until(Duration::ZERO) {
            Ok(Some(record)) => numbers.push(record.event.n.to_native()),
            Err(LiveError::Wait(WaitError::TimedOut)) => return numbers,
            Ok(None) => panic!("the feed has ended"),
            Err(error) => panic!("{error}"),
        }
    }
}

fn missed(feed: &mut Live<Note>) -> u64 {
    match feed.next_until(Duration::ZERO) {
        Err(LiveError::Lagged { shard: ShardId(0), missed }) => missed,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_feed_begins_with_the_next_event_and_returns_each_shard_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir, 3);
    publish(&engine, (0..50).map(|n| (n, n)));
    let mut feed = engine.live().start().unwrap();
    assert_eq!(numbers(&mut feed), [0; 0], "events from before are not returned");
    publish(&engine, (50..250).map(|n| (n % 20, n)));
    let mut seen = vec![Vec::new(); 3];
    while let Ok(Some(record)) = feed.next_until(Duration::ZERO) {
        let (meta, n) = (record.meta, record.event.n.to_native());
        seen[usize::from(meta.shard.0)].push((meta.sequence.0, meta.offset.0, meta.key.0, meta.version.0, n));
    }
    for (shard, seen) in seen.into_iter().enumerate() {
        let all = read_shard(&engine, shard as u16).into_iter().filter(|note| note.n >= 50);
        let all: Vec<_> = all.map(|note| (note.sequence, note.offset, note.key, note.version, note.n)).collect();
        assert!(!all.is_empty() && seen == all, "shard {shard}");
    }
}

#[test]
fn a_feed_begins_where_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir, 1);
    // More than one segment.
    let mut producer = engine.producer();
    (0..100).for_each(|n| drop(producer.publish(Key::new(n % 3), Note::sized(n, 1500)).unwrap()));
    engine.flush(soon()).unwrap();
    let all = read_shard(&engine, 0);
    assert!(all[99].offset > 2 * SEGMENT);
    let rest = |from: LiveFrom| numbers(&mut engine.live().from(from).start().unwrap());
    assert_eq!(rest(LiveFrom::Beginning), (0..100).collect::<Vec<_>>());
    for n in [0, 1, 43, 44, 45, 98, 99_u64] {
        let id = EventId { shard: ShardId(0), offset: Offset(all[n as usize].offset) };
        assert_eq!(rest(LiveFrom::At(id)), (n..100).collect::<Vec<_>>(), "at {n}");
        assert_eq!(rest(LiveFrom::After(id)), (n + 1..100).collect::<Vec<_>>(), "after {n}");
        let mut reader = engine.reader_at(ShardId(0), id.offset).unwrap();
        let time = reader.next().unwrap().unwrap().meta.time;
        assert_eq!(rest(LiveFrom::Position(reader.position().unwrap())), (n + 1..100).collect::<Vec<_>>());
        // Events published together may have the same time.
        let from_time = rest(LiveFrom::Time(time));
        assert!(from_time.contains(&n) && from_time.ends_with(&[99]), "{from_time:?}");
        let mut before = engine.reader(ShardId(0));
        let earlier = std::iter::from_fn(|| before.next().unwrap().map(|record| record.meta.time));
        assert_eq!(from_time.len(), 100 - earlier.take_while(|earlier| *earlier < time).count());
    }
    assert_eq!(rest(LiveFrom::Time(Time::END)), [0; 0]);
    assert_eq!(rest(LiveFrom::Latest), [0; 0]);
    let sequences = |from| {
        let mut feed = engine.live().from(from).start().unwrap();
        feed.next_until(Duration::ZERO).unwrap().unwrap().meta.sequence.0
    };
    let id = |n: usize| EventId { shard: ShardId(0), offset: Offset(all[n].offset) };
    assert_eq!((sequences(LiveFrom::At(id(77))), sequences(LiveFrom::After(id(77)))), (77, 78));
    // The last call that is about a shard counts.
    let mut feed = engine.live().from(LiveFrom::At(id(3))).from(LiveFrom::At(id(98))).start().unwrap();
    assert_eq!(numbers(&mut feed), [98, 99]);
    let mut feed = engine.live().from(LiveFrom::At(id(3))).from(LiveFrom::Latest).start().unwrap();
    assert_eq!(numbers(&mut feed), [0; 0]);
}

#[test]
fn a_place_that_is_none_is_refused() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (engine, other) = (open(&dir, 2), open(&other_dir, 2));
    publish(&engine, (0..20).map(|n| (n, n)));
    publish(&other, (0..20).map(|n| (n, n)));
    let refused = |from| engine.live().from(from).start().unwrap_err();
    let first = read_shard(&engine, 1)[0].offset;
    let id = |shard, offset| EventId { shard: ShardId(shard), offset: Offset(offset) };
    for from in [LiveFrom::At(id(1, first + 16)), LiveFrom::After(id(1, first + 16)), LiveFrom::After(id(1, 1 << 40))] {
        let error = refused(from);
        assert!(matches!(error, LiveError::Read(ReadError::NotARecord { .. })), "{error:?}");
    }
    let end = engine.shard_metrics()[1].appended_to.0;
    assert!(engine.live().from(LiveFrom::At(id(1, end))).start().is_ok(), "the end of the log is a place");
    assert!(matches!(refused(LiveFrom::After(id(1, end))), LiveError::Read(ReadError::NotARecord { .. })));
    let of_shard = |error| matches!(error, LiveError::Read(ReadError::Position(PositionError::OtherShard { .. })));
    assert!(of_shard(refused(LiveFrom::At(id(2, first)))), "there is no shard 2");
    let key = (0..).map(Key::new).find(|key| key.shard(2) == ShardId(0)).unwrap();
    let error = engine.live().key(key).from(LiveFrom::At(id(1, first))).start().unwrap_err();
    assert!(of_shard(error), "the feed does not read shard 1");
    let position = other.reader(ShardId(0)).position().unwrap();
    let error = refused(LiveFrom::Position(position));
    assert!(matches!(error, LiveError::Read(ReadError::Position(PositionError::OtherStore { .. }))), "{error:?}");
}

/// Events of two types.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
enum Game {
    Moved(u64),
    Said(u64),
}

impl Event for Game {
    const TYPES: &'static [EventType] = &[EventType::new(1, "moved", 1), EventType::new(7, "said", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(if matches!(self, Self::Moved(_)) { 1 } else { 7 })
    }
}

#[test]
fn a_feed_returns_only_the_key_and_the_types_that_it_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Game>::open(small(dir.path()).shards(2)).unwrap();
    let builder = || engine.live().from(LiveFrom::Beginning);
    let mut feeds = [
        builder().key(Key::new(3)).start().unwrap(),
        builder().types(["said"]).start().unwrap(),
        builder().types(["said"]).key(Key::new(3)).start().unwrap(),
        builder().types(["said", "moved"]).start().unwrap(),
    ];
    let mut producer = engine.producer();
    for n in 0..5000 {
        let event = if n % 3 == 0 { Game::Said(n) } else { Game::Moved(n) };
        drop(producer.publish(Key::new(n % 10), event).unwrap());
    }
    engine.flush(soon()).unwrap();
    let wants: [fn(&u64) -> bool; 4] = [|n| n % 10 == 3, |n| n % 3 == 0, |n| n % 30 == 3, |_| true];
    for (i, (feed, wants)) in feeds.iter_mut().zip(wants).enumerate() {
        let mut seen = Vec::new();
        for _ in (0..5000).filter(wants) {
            let record = feed.next_until(PATIENCE).unwrap().unwrap();
            let event = deserialize::<Game>(record.event).unwrap();
            assert_eq!(record.meta.event_type, event.event_type());
            let (Game::Moved(n) | Game::Said(n)) = event;
            assert_eq!(record.meta.key, Key::new(n % 10));
            seen.push(n);
        }
        seen.sort_unstable();
        assert!(seen == (0..5000).filter(wants).collect::<Vec<_>>(), "feed {i}");
        assert!(feed.next_until(Duration::ZERO).is_err(), "feed {i}");
    }
    assert!(matches!(builder().types(["sung"]).start(), Err(LiveError::UnknownType { name }) if name == "sung"));
    assert!(matches!(builder().types::<&str>([]).start(), Err(LiveError::NoTypes)));
}

#[test]
fn a_shard_with_a_backlog_does_not_keep_the_others_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir, 2);
    let of_shard = |shard| (0..).find(|key| Key::new(*key).shard(2) == ShardId(shard)).unwrap();
    let keys = [of_shard(0), of_shard(1)];
    for (long, short) in [(keys[0], keys[1]), (keys[1], keys[0])] {
        let mut feed = engine.live().start().unwrap();
        publish(&engine, (0..3000).map(|n| (long, n)).chain([(short, 9999)]));
        let seen = numbers(&mut feed);
        let place = seen.iter().position(|n| *n == 9999).unwrap();
        assert!(place <= 256, "the other shard's event comes after {place} events");
        assert_eq!(seen.len(), 3001);
    }
}

#[test]
fn retention_frees_what_a_slow_feed_has_not_read_and_the_feed_says_how_much_it_missed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(Retention::bytes(2 * SEGMENT))).unwrap();
    let mut feed = engine.live().from(LiveFrom::Beginning).start().unwrap();
    let mut unread = engine.live().start().unwrap();
    publish(&engine, [(1, 0), (1, 1)]);
    assert_eq!(numbers(&mut feed), [0, 1]);
    let n = publish_until_freed(&engine, 2, 3);
    let earliest = read_shard(&engine, 0)[0].n;
    assert!(earliest > 2);
    assert_eq!(missed(&mut feed), earliest - 2, "events 2..{earliest} were freed");
    assert_eq!(numbers(&mut feed), (earliest..n).collect::<Vec<_>>(), "the feed continues with the earliest event");
    assert_eq!(missed(&mut unread), earliest, "a feed that was never read");
    // The next event is the first of a segment whose predecessor was freed: nothing is missed.
    let m = publish_until_freed(&engine, n, 2);
    let earliest = read_shard(&engine, 0)[0].n;
    assert_eq!(missed(&mut feed), earliest - n);
    assert_eq!(numbers(&mut feed), (earliest..m).collect::<Vec<_>>());
    let gone = EventId { shard: ShardId(0), offset: Offset(4096) };
    let error = engine.live().from(LiveFrom::At(gone)).start().unwrap_err();
    assert!(matches!(error, LiveError::Read(ReadError::BeyondRetention { .. })), "{error:?}");
}

#[test]
fn a_feed_in_the_middle_of_a_freed_segment_reads_it_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(Retention::bytes(2 * SEGMENT))).unwrap();
    let mut feed = engine.live().from(LiveFrom::Beginning).start().unwrap();
    publish(&engine, (0..1000).map(|n| (1, n)));
    assert_eq!(feed.next_until(Duration::ZERO).unwrap().unwrap().event.n.to_native(), 0);
    let n = publish_until_freed(&engine, 1000, 4);
    let (mut next, mut gaps) = (1, 0);
    while next < n {
        match feed.next_until(Duration::ZERO) {
            Ok(Some(record)) => {
                assert_eq!((record.meta.sequence.0, record.event.n.to_native()), (next, next));
                next += 1;
            }
            Err(LiveError::Lagged { missed, .. }) => {
                // At least the rest of the batch and of the segment that the feed holds.
                assert!(next > 256 && missed > 0, "{next} {missed}");
                (next, gaps) = (next + missed, gaps + 1);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((next, gaps), (n, 1), "returned and missed events add up");
}

/// The names of a shard's files that are segments of the log.
fn segment_files(dir: &tempfile::TempDir) -> Vec<u64> {
    let entries = std::fs::read_dir(dir.path().join("shard-0000")).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    entries.filter_map(|entry| name(entry).strip_suffix(".seg")?.parse().ok()).collect()
}

#[test]
fn a_feed_that_waits_or_is_never_read_keeps_no_file_from_being_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(Retention::bytes(2 * SEGMENT))).unwrap();
    let mut feed = engine.live().from(LiveFrom::Beginning).start().unwrap();
    publish(&engine, (0..1000).map(|n| (1, n)));
    assert_eq!(numbers(&mut feed).len(), 1000);
    let never_read = engine.live().from(LiveFrom::Beginning).start().unwrap();
    publish_until_freed(&engine, 1000, 4);
    until("the file of the feed's segment is used again", || segment_files(&dir).iter().all(|index| *index > 0));
    drop((feed, never_read));
}

#[test]
fn an_event_that_is_kept_stays_readable_after_its_segment_was_freed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(Retention::bytes(2 * SEGMENT))).unwrap();
    let mut feed = engine.live().start().unwrap();
    publish(&engine, [(1, 77)]);
    let kept = next_live(&mut feed).unwrap().unwrap();
    assert_eq!(numbers(&mut feed), [0; 0], "the feed holds nothing any more");
    publish_until_freed(&engine, 0, 4);
    let copy = std::thread::spawn(move || (kept.meta(), kept.event().n.to_native(), kept)).join().unwrap();
    assert_eq!((copy.0.key, copy.0.sequence.0, copy.1), (Key::new(1), 0, 77));
    assert!(segment_files(&dir).contains(&0), "the event holds the file");
    drop(copy);
    until("the file is used again", || !segment_files(&dir).contains(&0));
}

fn next_live(feed: &mut Live<Note>) -> Option<Result<corelane::log::LiveEvent<Note>, LiveError>> {
    feed.into_iter().next()
}

#[test]
fn a_feed_with_a_lag_limit_skips_to_the_latest_event_and_says_how_much_it_missed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir, 1);
    let mut feed = engine.live().lag_max(300).start().unwrap();
    let mut patient = engine.live().start().unwrap();
    publish(&engine, (0..300).map(|n| (1, n)));
    assert_eq!(numbers(&mut feed), (0..300).collect::<Vec<_>>(), "exactly at the limit");
    publish(&engine, (300..601).map(|n| (1, n)));
    assert_eq!(missed(&mut feed), 301);
    assert_eq!(numbers(&mut feed), [0; 0]);
    publish(&engine, [(1, 601)]);
    let next = next_live(&mut feed).unwrap().unwrap();
    assert_eq!((next.meta().sequence.0, next.event().n.to_native()), (601, 601));
    assert_eq!(numbers(&mut patient).len(), 602);
}

#[test]
fn a_durable_feed_without_syncs_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path())).unwrap();
    let refused = engine.live().durable().start().unwrap_err();
    assert!(matches!(refused, LiveError::Wait(WaitError::NeverDurable)), "{refused:?}");
}

#[test]
fn a_feed_reads_events_of_an_earlier_process_and_stops_at_damage() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir, 1);
    publish(&engine, (0..40).map(|n| (n % 3, n)));
    let damaged_at = read_shard(&engine, 0)[30].offset;
    drop(engine);
    let engine = open(&dir, 1);
    let mut feed = engine.live().from(LiveFrom::Beginning).start().unwrap();
    let mut latest = engine.live().start().unwrap();
    publish(&engine, (40..60).map(|n| (n % 3, n)));
    assert_eq!(numbers(&mut feed), (0..60).collect::<Vec<_>>());
    let record = latest.next_until(Duration::ZERO).unwrap().unwrap();
    assert_eq!((record.meta.sequence.0, record.event.n.to_native()), (40, 40));
    // The mapping shows the change at once.
    let path = crate::common::segment_path(dir.path(), 0);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", damaged_at + 50).unwrap();
    let mut feed = engine.live().from(LiveFrom::Beginning).start().unwrap();
    let mut seen = Vec::new();
    let error = loop {
        match feed.next_until(Duration::ZERO) {
            Ok(Some(record)) => seen.push(record.event.n.to_native()),
            Ok(None) => panic!("ended after {seen:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(seen, (0..30).collect::<Vec<_>>(), "everything before the damage");
    assert!(matches!(&error, LiveError::Read(ReadError::Corruption(c)) if c.offset.0 == damaged_at), "{error:?}");
    assert!(feed.next_until(Duration::ZERO).unwrap().is_none(), "the feed has ended");
}

#[test]
fn a_feed_outlives_its_engine_and_releases_the_store_when_it_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir, 2);
    let mut feed = engine.live().start().unwrap();
    let mut waiting = engine.live().start().unwrap();
    publish(&engine, (0..500).map(|n| (n, n)));
    drop(engine);
    assert!(matches!(EventLog::<Note>::open(small(dir.path()).shards(2)), Err(OpenError::Locked { .. })));
    let mut seen: Vec<_> = feed.into_iter().map(|event| event.unwrap().event().n.to_native()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..500).collect::<Vec<_>>(), "everything is returned before the end");
    assert!(feed.next_until(soon()).unwrap().is_none());
    assert_eq!(waiting.into_iter().count(), 500);
    let engine = open(&dir, 2);
    assert_eq!(engine.recovery().events(), 500, "feeds that have ended do not lock the store");
    drop((feed, waiting));
}

#[test]
fn the_deadline_ends_a_wait_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir, 2);
    let mut feed = engine.live().start().unwrap();
    for n in 0..50 {
        let timed_out = feed.next_until(Duration::from_millis(n % 2)).unwrap_err();
        assert!(matches!(timed_out, LiveError::Wait(WaitError::TimedOut)), "{timed_out:?}");
        publish(&engine, [(n, n)]);
        assert_eq!(feed.next_until(PATIENCE).unwrap().unwrap().event.n.to_native(), n);
    }
}

/// Feeds that begin while the shard appends know their exact place: sequences agree with the log's.
#[test]
fn feeds_that_begin_while_events_are_appended_miss_none_and_count_right() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).segment_bytes(SEGMENT)).unwrap();
    const EVENTS: u64 = 30_000;
    let mut firsts = Vec::new();
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            let mut producer = engine.producer();
            for n in 0..EVENTS {
                drop(producer.publish(Key::new(n % 7), Note::sized(n, (n % 40) as usize)).unwrap());
            }
        });
        while !publisher.is_finished() {
            let before = engine.shard_metrics()[0].sequence.0;
            let mut feed = engine.live().start().unwrap();
            if let Ok(Some(record)) = feed.next_until(Duration::from_millis(5)) {
                firsts.push((before, record.meta.sequence.0, record.meta.offset.0, record.event.n.to_native()));
            }
        }
    });
    engine.flush(soon()).unwrap();
    let all = read_shard(&engine, 0);
    assert_eq!(all.len() as u64, EVENTS);
    assert!(firsts.len() > 10, "{} feeds began in time", firsts.len());
    for (before, sequence, offset, n) in firsts {
        assert!(before <= sequence, "an event appended before is returned");
        let held = &all[sequence as usize];
        assert_eq!((held.offset, held.n), (offset, n), "sequence {sequence}");
    }
}

/// Slow feeds beside a producer and retention: for each feed, returned and missed events add up to a log without holes.
#[test]
fn returned_and_missed_events_add_up_however_slow_a_feed_is() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(Retention::bytes(2 * SEGMENT))).unwrap();
    const EVENTS: u64 = 20_000;
    let follow = |pause: u32, lag_max: u64| {
        let mut feed = engine.live().from(LiveFrom::Beginning).lag_max(lag_max).start().unwrap();
        let (mut next, mut seen, mut gaps) = (0, 0, 0);
        while next < EVENTS {
            match feed.next_until(PATIENCE) {
                Ok(Some(record)) => {
                    assert_eq!((record.meta.sequence.0, record.event.n.to_native()), (next, next));
                    (next, seen) = (next + 1, seen + 1);
                    (0..pause).for_each(|_| std::hint::spin_loop());
                }
                Err(LiveError::Lagged { missed, .. }) => (next, gaps) = (next + missed, gaps + 1),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(next, EVENTS, "no event is counted twice");
        (seen, gaps)
    };
    std::thread::scope(|scope| {
        let feeds: Vec<_> =
            [(0, u64::MAX), (2_000, u64::MAX), (500, 100)].map(|(p, l)| scope.spawn(move || follow(p, l))).into();
        let mut producer = engine.producer();
        for n in 0..EVENTS {
            drop(producer.publish(Key::new(n % 5), Note::sized(n, 300)).unwrap());
        }
        for feed in feeds {
            let (seen, gaps) = feed.join().unwrap();
            assert!(seen > 0, "{gaps} gaps");
        }
    });
}
