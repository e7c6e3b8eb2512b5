//! An event from `publish` to `durable`, and read back after a restart.

use std::time::{Duration, Instant};

use corelane::{Bounded, Config, Durability, Event, EventLog, EventType, EventTypeId, Key, ShardId, WaitError};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
enum Ping {
    Numbered { n: u64 },
    Named { name: String },
}

impl Event for Ping {
    const TYPES: &'static [EventType] = &[EventType::new(1, "numbered", 1), EventType::new(2, "named", 1)];
    fn event_type(&self) -> EventTypeId {
        match self {
            Ping::Numbered { .. } => EventTypeId(1),
            Ping::Named { .. } => EventTypeId(2),
        }
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(120))
}

fn read_all(engine: &EventLog<Ping>, shards: u16) -> Vec<(u64, u64, Ping)> {
    let mut all = Vec::new();
    for shard in 0..shards {
        let mut reader = engine.reader(ShardId(shard));
        let mut sequence = 0;
        while let Some(record) = reader.next().expect("the log reads") {
            assert_eq!(record.meta.sequence.0, sequence);
            sequence += 1;
            let event = corelane::event::deserialize::<Ping>(record.event).expect("deserializes");
            all.push((record.meta.key.0, record.meta.version.0, event));
        }
    }
    all
}

#[test]
fn published_events_become_durable_and_survive_a_restart() {
    for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_millis(5)), Durability::OsCache] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let config = || Config::new(dir.path()).shards(2).segment_bytes(64 << 10).durability(durability);
        {
            let engine = EventLog::<Ping>::open(config()).expect("opens");
            let mut producer = engine.producer();
            let mut last = None;
            for n in 0..5_000_u64 {
                let event =
                    if n.is_multiple_of(3) { Ping::Named { name: format!("name {n}") } } else { Ping::Numbered { n } };
                last = Some(producer.publish(Key::new(n % 100), event).expect("accepted"));
            }
            let last = last.expect("published");
            last.appended().wait_until(soon().expect("soon")).expect("appended");
            match durability {
                Durability::OsCache => assert!(matches!(last.durable().wait(), Err(WaitError::NeverDurable))),
                _ => last.durable().wait_until(soon().expect("soon")).expect("durable"),
            }
            engine.flush(soon()).expect("flushes");
            assert!(last.is_durable());
            let metrics = engine.metrics(soon());
            assert_eq!(metrics.shards.iter().map(|s| s.appended).sum::<u64>(), 5_000);
            assert_eq!(metrics.shards.iter().map(|s| s.published).sum::<u64>(), 5_000);
            assert_eq!(read_all(&engine, 2).len(), 5_000);
            engine.shutdown(soon()).expect("shuts down");
            engine.shutdown(soon()).expect("twice");
        }
        let engine = EventLog::<Ping>::open(config()).expect("opens again");
        assert_eq!(engine.recovery().events(), 5_000);
        let all = read_all(&engine, 2);
        for key in 0..100 {
            let of_key: Vec<_> = all.iter().filter(|(k, _, _)| *k == key).collect();
            assert_eq!(of_key.len(), 50);
            for (i, (_, version, event)) in of_key.iter().enumerate() {
                let n = key + 100 * i as u64;
                assert_eq!(*version, i as u64 + 1);
                let expected =
                    if n.is_multiple_of(3) { Ping::Named { name: format!("name {n}") } } else { Ping::Numbered { n } };
                assert_eq!(*event, expected, "publish order of key {key}");
            }
        }
        let mut producer = engine.producer();
        producer.publish(Key::new(1), Ping::Numbered { n: 1 }).expect("accepted after the restart");
        engine.flush(soon()).expect("flushes");
        assert_eq!(
            read_all(&engine, 2).iter().filter(|(k, _, _)| *k == 1).map(|(_, version, _)| *version).max(),
            Some(51)
        );
    }
}
