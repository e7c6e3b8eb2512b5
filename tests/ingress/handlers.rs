//! Inline handlers that fail follow their error policy and never hang. Invalid archives with a valid checksum are typed
//! errors.

use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::common::{Note, env_number, numbers, open_on, os_cache, small, soon};
use corelane::error::FailureCause;
use corelane::handler::BatchEnd;
use corelane::testing::FaultyStorage;
use corelane::{
    Bounded, Event, EventLog, EventType, EventTypeId, Handler, HandlerError, Key, Meta, OnError, ReadError, Rejected,
    ShardId, WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Records the events that it handles; returns an error at 5 and panics at 7, if those faults are enabled.
struct Fussy(Arc<Mutex<Vec<u64>>>, u64);

impl Handler<Note> for Fussy {
    fn on_event(&mut self, event: &<Note as Archive>::Archived, _meta: &Meta) -> Result<(), HandlerError> {
        let n = event.n.to_native();
        if n == 5 && self.1 & 1 != 0 {
            return Err("five".into());
        }
        assert!(n != 7 || self.1 & 2 == 0, "seven");
        self.0.lock().unwrap().push(n);
        Ok(())
    }

    fn on_batch_end(&mut self, _batch: &BatchEnd) -> Result<(), HandlerError> {
        if self.1 & 4 != 0 { Err("batch".into()) } else { Ok(()) }
    }
}

fn engine(storage: &FaultyStorage, on_error: OnError, faults: u64) -> (EventLog<Note>, Arc<Mutex<Vec<u64>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let theirs = Arc::clone(&seen);
    let builder = EventLog::<Note>::builder(small("/s")).faulty_storage(storage);
    let engine = builder.handler("fussy", on_error, move |_| Fussy(Arc::clone(&theirs), faults)).open().unwrap();
    (engine, seen)
}

#[test]
fn an_error_or_panic_under_halt_stops_the_shard_with_the_cause() {
    for (faults, at, said) in [(1, 5, "five"), (2, 7, "seven"), (4, 0, "batch")] {
        let storage = FaultyStorage::new();
        let (engine, seen) = engine(&storage, OnError::Halt, faults);
        let mut producer = engine.producer();
        let rejected = (0..).find_map(|n| producer.publish(Key(1), Note::new(n)).err()).unwrap();
        let Rejected::ShardFailed(_, failure) = rejected else { panic!("{rejected:?}") };
        let FailureCause::Handler { handler, error, .. } = &failure.cause else { panic!("{failure}") };
        assert_eq!(handler, "fussy");
        assert!(error.contains(said), "{error}");
        if at > 0 {
            assert_eq!(
                *seen.lock().unwrap(),
                (0..at).collect::<Vec<_>>(),
                "the handler sees no event after the failed one"
            );
        }
        match engine.flush(soon()) {
            Err(WaitError::ShardFailed(_)) => (),
            // Every accepted event may have been durable before the failure.
            outcome => assert!(outcome.is_ok() && numbers(&engine).len() as u64 == producer.published(), "{outcome:?}"),
        }
        assert!(matches!(engine.shutdown(soon()), Err(WaitError::ShardFailed(_))));
        drop(engine);
        // The event is in the log; only its handler failed.
        let engine = open_on(&storage, small("/s")).unwrap();
        let found = numbers(&engine);
        assert!(found.len() as u64 > at);
        assert_eq!(found, (0..found.len() as u64).collect::<Vec<_>>());
    }
}

#[test]
fn an_error_or_panic_under_quarantine_is_recorded_and_the_shard_continues() {
    let storage = FaultyStorage::new();
    let (engine, seen) = engine(&storage, OnError::Quarantine, 3);
    let mut producer = engine.producer();
    for n in 0..20 {
        producer.publish(Key(1), Note::new(n)).unwrap();
    }
    engine.flush(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    assert_eq!(*seen.lock().unwrap(), (0..20).filter(|n| *n != 5 && *n != 7).collect::<Vec<u64>>());
    assert_eq!(engine.shard_metrics()[0].quarantined, 2);
    let notes = storage.files()[Path::new("/s/quarantine/handlers.jsonl")].clone();
    let notes = String::from_utf8(notes).unwrap();
    let lines: Vec<serde_json::Value> = notes.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    let all = crate::common::read_shard(&engine, 0);
    assert_eq!(lines[0]["offset"], all[5].offset);
    assert_eq!(lines[1]["offset"], all[7].offset);
    assert!(lines[0]["error"].as_str().unwrap().contains("five"));
    assert!(lines[1]["error"].as_str().unwrap().contains("seven"));
}

/// An event whose code panics on the shard's thread.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
struct Trap(u64);
impl Event for Trap {
    const TYPES: &'static [EventType] = &[EventType::new(1, "trap", 1)];
    fn event_type(&self) -> EventTypeId {
        // `publish` calls this function too, on the producer's thread.
        let on_shard = std::thread::current().name().is_some_and(|name| name.starts_with("corelane-shard"));
        assert!(self.0 != 3 || !on_shard, "a trap");
        EventTypeId(1)
    }
}

#[test]
fn an_event_that_panics_on_the_shards_thread_fails_that_shard_alone() {
    let storage = FaultyStorage::new();
    let engine = EventLog::<Trap>::builder(small("/s").shards(2)).faulty_storage(&storage).open().unwrap();
    let key_of = |shard: u16| (0..).map(Key).find(|key| key.shard(2).0 == shard).unwrap();
    let mut producer = engine.producer();
    let before = producer.publish(key_of(0), Trap(1)).unwrap();
    before.durable().wait().unwrap();
    let receipt = producer.publish(key_of(0), Trap(3)).unwrap();
    let Err(WaitError::ShardFailed(failure)) = receipt.appended().wait() else { panic!("appended") };
    assert!(matches!(&failure.cause, FailureCause::Panic(text) if text.contains("a trap")), "{failure}");
    producer.publish(key_of(1), Trap(1)).unwrap().durable().wait_until(soon().unwrap()).unwrap();
    assert!(before.is_durable());
    drop((producer, engine));
}

/// An event type with many kinds of invalid archives.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
enum Rich {
    Text(String),
    List(Vec<String>),
    Flag(bool, char),
}
impl Event for Rich {
    const TYPES: &'static [EventType] = &[EventType::new(1, "rich", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

/// Changes the body of the first record of the first segment and makes its checksum valid again.
fn forge(disk: &FaultyStorage, change: impl FnOnce(&mut [u8])) -> FaultyStorage {
    let mut files = disk.files();
    let bytes = files.get_mut(Path::new("/s/shard-0000/000000000000.seg")).unwrap();
    let salt = u32::from_le_bytes(bytes[72..76].try_into().unwrap());
    let record = &mut bytes[4096..];
    let len = u32::from_le_bytes(record[..4].try_into().unwrap()) as usize;
    change(&mut record[48..len]);
    let crc = crc32c::crc32c_append(salt, &record[8..len]);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
    FaultyStorage::with_files(files)
}

/// `CORELANE_INVALID_ARCHIVES` sets the number of random archives. About half of them are refused.
#[test]
fn invalid_archives_with_a_valid_checksum_are_typed_errors() {
    let storage = FaultyStorage::new();
    let open = |disk: &FaultyStorage| EventLog::<Rich>::builder(os_cache("/s")).faulty_storage(disk).open();
    let engine = open(&storage).unwrap();
    let mut producer = engine.producer();
    producer
        .publish(Key(1), Rich::List(vec!["a string that lies outside".into(), "and another of them".into()]))
        .unwrap();
    producer.publish(Key(1), Rich::Text("a text that lies outside".into())).unwrap();
    producer.publish(Key(1), Rich::Flag(true, 'x')).unwrap();
    engine.shutdown(soon()).unwrap();
    drop((producer, engine));
    let (mut refused, mut harmless) = (0, 0);
    let mut x = 1_u64;
    for round in 0..env_number("CORELANE_INVALID_ARCHIVES", 400) {
        let disk = forge(&storage, |body| match round {
            0 => body.fill(0xff),
            1 => body.fill(0x80),
            2 => body.fill(0),
            _ => {
                for _ in 0..=round % 3 {
                    x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let at = (x >> 33) as usize % body.len();
                    body[at] = (x >> 20) as u8;
                }
            }
        });
        let engine = open(&disk).unwrap();
        let mut reader = engine.reader(ShardId(0));
        match reader.next() {
            Ok(Some(record)) => {
                // The archive passed validation, so every part of it must be readable.
                std::hint::black_box(format!("{:?}", corelane::event::deserialize::<Rich>(record.event).unwrap()));
                harmless += 1;
            }
            Err(ReadError::Corruption(damage)) => {
                assert_eq!(damage.offset.0, 4096);
                refused += 1;
            }
            other => panic!("round {round}: {other:?}"),
        }
    }
    assert!(refused > 50, "{refused} refused, {harmless} harmless");
}
