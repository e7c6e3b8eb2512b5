//! The log against an in-memory model: after any series of publishes, flushes, restarts, power cuts and retention, a
//! reader returns what the model holds: keys, versions, order, sequences and back-links. `CORELANE_MODEL_CASES` sets
//! the cases (24).

use std::collections::HashMap;

use crate::common::{Held, Note, env_number, open_on, read_shard, small, soon};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Config, Durability, EventLog, Key, Retention};
use proptest::prelude::*;

const SHARDS: u16 = 2;

#[derive(Debug, Clone)]
enum Step {
    Publish { key: u64, count: usize, bytes: usize },
    Batch { keys: Vec<u64>, bytes: usize },
    Flush,
    Restart,
    PowerCut(Option<u64>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6_u64, 1..8_usize, 0..9000_usize).prop_map(|(key, count, bytes)| Step::Publish { key, count, bytes }),
        4 => (prop::collection::vec(0..6_u64, 1..40), 0..3000_usize).prop_map(|(keys, bytes)| Step::Batch { keys, bytes }),
        2 => Just(Step::Flush),
        1 => Just(Step::Restart),
        2 => prop::option::of(1..u64::MAX).prop_map(Step::PowerCut),
    ]
}

/// The events that each shard's log must hold.
#[derive(Default)]
struct Model {
    events: [Vec<(u64, u64, usize)>; SHARDS as usize],
    durable: [usize; SHARDS as usize],
    next: u64,
}

impl Model {
    fn add(&mut self, key: u64, bytes: usize) -> Note {
        let n = self.next;
        self.next += 1;
        self.events[usize::from(Key(key).shard(SHARDS).0)].push((key, n, bytes));
        Note::sized(n, bytes)
    }

    fn all_durable(&mut self) {
        self.durable = [self.events[0].len(), self.events[1].len()];
    }

    /// Retention may have freed every durable event. Then only the sequence of the next event shows where the log
    /// continues.
    fn probe_empty_shards(&mut self, engine: &EventLog<Note>, producer: &mut corelane::Producer<Note>) {
        for shard in 0..SHARDS {
            let i = usize::from(shard);
            let before = self.events[i].len();
            if before == 0 || !read_shard(engine, shard).is_empty() {
                continue;
            }
            let key = (0..6).find(|key| Key(*key).shard(SHARDS).0 == shard).unwrap();
            producer.publish(Key(key), self.add(key, 0)).unwrap();
            engine.flush(soon()).unwrap();
            let sequence = read_shard(engine, shard)[0].sequence as usize;
            assert!((self.durable[i]..=before).contains(&sequence), "shard {shard} continues at {sequence}");
            let event = self.events[i].pop().unwrap();
            self.events[i].truncate(sequence);
            self.events[i].push(event);
        }
    }

    /// After a power cut the log may end anywhere after the last durable event.
    fn cut(&mut self, engine: &EventLog<Note>) {
        for shard in 0..SHARDS {
            let i = usize::from(shard);
            let found = read_shard(engine, shard).last().map_or(0, |last| last.sequence as usize + 1);
            assert!(found >= self.durable[i], "shard {shard}: {found} of {} durable events", self.durable[i]);
            assert!(found <= self.events[i].len(), "shard {shard}: invented events");
            self.events[i].truncate(found);
        }
        self.all_durable();
    }

    fn check(&self, engine: &EventLog<Note>, freed: bool) {
        for shard in 0..SHARDS {
            let expected = &self.events[usize::from(shard)];
            let found = read_shard(engine, shard);
            let first = found.first().map_or(expected.len(), |held| held.sequence as usize);
            assert!(freed || first == 0 || found.is_empty() && expected.is_empty(), "shard {shard} begins at {first}");
            assert_eq!(found.len(), expected.len() - first, "shard {shard}");
            let mut heads: HashMap<u64, &Held> = HashMap::new();
            for (held, (key, n, bytes)) in found.iter().zip(&expected[first..]) {
                assert_eq!((held.key, held.n, held.bytes), (*key, *n, *bytes));
                let before = heads.insert(held.key, held);
                match before {
                    Some(before) => {
                        assert_eq!(held.version, before.version + 1, "versions of key {key}");
                        assert_eq!(held.previous, Some(before.offset), "back-link of key {key}");
                    }
                    None => assert!(
                        freed || held.version == 1 && held.previous.is_none(),
                        "the first of key {key}: {held:?}"
                    ),
                }
            }
        }
    }
}

fn run(steps: &[Step], durability: Durability, retention: Retention) {
    let config = || -> Config { small("/s").shards(SHARDS).durability(durability).retention(retention) };
    let freed = retention.bytes_max.is_some();
    let mut storage = FaultyStorage::new();
    let mut model = Model::default();
    let mut engine = open_on(&storage, config()).unwrap();
    let mut producer = engine.producer();
    for step in steps {
        match step {
            Step::Publish { key, count, bytes } => {
                for _ in 0..*count {
                    producer.publish(Key(*key), model.add(*key, *bytes)).unwrap();
                }
            }
            Step::Batch { keys, bytes } => {
                let mut batch: Vec<_> = keys.iter().map(|key| (Key(*key), model.add(*key, *bytes))).collect();
                producer.publish_batch(&mut batch).unwrap();
            }
            Step::Flush => {
                engine.flush(soon()).unwrap();
                model.all_durable();
                model.check(&engine, freed);
            }
            Step::Restart => {
                engine.shutdown(soon()).unwrap();
                model.all_durable();
                drop(engine);
                engine = open_on(&storage, config()).unwrap();
                assert!(engine.recovery().shards.iter().all(|shard| shard.torn_tail.is_none()));
                producer = engine.producer();
            }
            Step::PowerCut(seed) => {
                producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
                storage = storage.after_crash(seed.map_or(Unsynced::Lost, Unsynced::Random));
                engine = open_on(&storage, config()).unwrap();
                producer = engine.producer();
                if freed {
                    model.probe_empty_shards(&engine, &mut producer);
                }
                model.cut(&engine);
            }
        }
    }
    engine.flush(soon()).unwrap();
    model.check(&engine, freed);
}

fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: env_number("CORELANE_MODEL_CASES", 24) as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn the_log_agrees_with_the_model(steps in prop::collection::vec(step(), 1..24), group in any::<bool>()) {
        let durability = if group { Durability::GroupCommit } else { Durability::OsCache };
        run(&steps, durability, Retention::default());
    }

    #[test]
    fn the_log_with_retention_agrees_with_the_end_of_the_model(steps in prop::collection::vec(step(), 1..24)) {
        run(&steps, Durability::GroupCommit, Retention::bytes(3 * crate::common::SEGMENT));
    }
}
