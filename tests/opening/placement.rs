//! Placements: kept in the manifest, refused at opening if they differ, and used by everything that routes a key.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::common::bank::{Account, Money, Order, logged};
use crate::common::{os_cache, soon, tree};
use corelane::log::LiveFrom;
use corelane::log::scan::Store;
use corelane::testing::FaultyStorage;
use corelane::view::ById;
use corelane::{Config, Engine, EventLog, Key, OpenError, Placement, ShardId, Version};

const SHARDS: u16 = 4;

fn by_zone(key: Key) -> u64 {
    key.0 >> 32
}

fn zone() -> Placement {
    Placement::new("zone", 7, by_zone)
}

fn key(zone: u64, player: u64) -> Key {
    Key(zone << 32 | player)
}

fn placed() -> Config {
    os_cache("/s").shards(SHARDS).placement(zone())
}

fn open(storage: &FaultyStorage, config: Config) -> Result<Engine<Account>, OpenError> {
    Engine::<Account>::builder(config).faulty_storage(storage).open()
}

/// Publishes one event for every player of every zone, in each of the ways, and returns the keys.
fn publish(engine: &Engine<Account>) -> Vec<Key> {
    let keys: Vec<Key> = (0..40).flat_map(|zone| (0..3).map(move |player| key(zone, player))).collect();
    let deposited = |key: Key| Money::Deposited { cents: key.0 & 0xff };
    let mut producer = engine.producer();
    let shared = engine.shared_producer();
    let mut client = engine.client();
    for key in &keys {
        producer.publish(*key, deposited(*key)).unwrap();
        shared.publish(*key, deposited(*key)).with_receipt().wait().unwrap().appended().wait().unwrap();
        client.send(*key, Order::Deposit(1)).wait().unwrap();
        crate::common::block_on(engine.shared_client().send(*key, Order::Deposit(1)).into_future()).unwrap();
    }
    let mut batch: Vec<_> = keys.iter().map(|key| (*key, deposited(*key))).collect();
    producer.publish_batch(&mut batch).unwrap();
    engine.flush(soon()).unwrap();
    keys
}

#[test]
fn every_way_to_the_log_and_back_uses_the_placement() {
    let storage = FaultyStorage::new();
    let view = ById::new(64, |account: &Account| account.cents);
    let mut engine = Engine::<Account>::builder(placed()).view(&view).faulty_storage(&storage).open().unwrap();
    let keys = publish(&engine);
    let (mut seen, mut shards) = (0, std::collections::BTreeSet::new());
    for shard in 0..SHARDS {
        for event in logged(&engine, shard) {
            assert_eq!(Key(by_zone(Key(event.key))).shard(SHARDS), ShardId(shard), "key {}", event.key);
            seen += 1;
            shards.insert(shard);
        }
    }
    assert_eq!((seen, shards.len()), (keys.len() * 5, 4));
    for key in &keys {
        let mut feed = engine.live().key(*key).from(LiveFrom::Beginning).start().unwrap();
        for _ in 0..5 {
            let found = feed.next_until(soon()).unwrap().expect("the engine is open");
            assert_eq!(found.meta.key, *key);
        }
    }
    for _ in 0..2 {
        for key in &keys {
            let cents = 3 * (key.0 & 0xff) + 2;
            assert_eq!(
                engine.state(*key).wait().unwrap().map(|(state, version)| (state.cents, version)),
                Some((cents, Version(5)))
            );
            assert_eq!(view.get(*key).unwrap(), Some(cents));
            assert_eq!(engine.shard_of(*key), Key(by_zone(*key)).shard(SHARDS));
            assert_eq!(engine.rebuild(*key).unwrap().1, Version(5));
        }
        engine.shutdown(soon()).unwrap();
        drop(engine);
        engine = Engine::<Account>::builder(placed()).view(&view).faulty_storage(&storage).open().unwrap();
    }
}

#[test]
fn consumers_find_an_event_by_its_key_and_publish_sync_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = os_cache(dir.path()).shards(SHARDS).placement(zone());
    let engine = EventLog::<crate::common::Note>::open(config).unwrap();
    let consumer = engine.subscribe("all").start(|_, _| Ok(())).unwrap();
    let mut producer = engine.producer();
    for zone in 0..20 {
        let (key, note) = (key(zone, zone), crate::common::Note::new(zone));
        engine.publish_sync(&mut producer, key, note, &[&consumer], soon().unwrap()).unwrap();
        assert!(!consumer.gap_filled(key).unwrap());
    }
    assert_eq!(consumer.report().handled, 20);
}

#[test]
fn another_placement_is_refused_and_named_and_the_store_stays_unchanged() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, placed()).unwrap();
    publish(&engine);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let files = storage.files();
    let refused = |config: Config| match open(&storage, config) {
        Err(OpenError::Placement { stored, asked, .. }) => {
            let says = OpenError::Placement { stored: stored.clone(), asked: asked.clone() }.to_string();
            (stored.map(|id| (id.name, id.version)), asked.map(|id| (id.name, id.version)), says)
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened"),
    };
    let plain = || os_cache("/s").shards(SHARDS);
    let (stored, asked, says) = refused(plain());
    assert_eq!((stored, asked), (Some(("zone".into(), 7)), None));
    assert!(says.contains("the placement \"zone\", version 7") && says.contains("the key's own hash"), "{says}");
    let (_, asked, _) = refused(plain().placement(Placement::new("zone", 8, by_zone)));
    assert_eq!(asked, Some(("zone".into(), 8)));
    let (_, asked, _) = refused(plain().placement(Placement::new("room", 7, by_zone)));
    assert_eq!(asked, Some(("room".into(), 7)));
    assert_eq!(storage.files(), files);
    assert!(open(&storage, placed()).is_ok());
    // A store without a placement.
    let storage = FaultyStorage::new();
    drop(open(&storage, plain()).unwrap());
    let files = storage.files();
    match open(&storage, placed()) {
        Err(OpenError::Placement { stored: None, asked: Some(id), .. }) => assert_eq!(&id, zone().id()),
        other => panic!("{:?}", other.err()),
    }
    assert_eq!(storage.files(), files);
}

#[test]
fn a_function_that_changed_under_its_name_is_refused_with_a_key_that_it_moves() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, placed()).unwrap();
    publish(&engine);
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let files = storage.files();
    let changed = os_cache("/s").shards(SHARDS).placement(Placement::new("zone", 7, |key| key.0 >> 31));
    match open(&storage, changed) {
        Err(OpenError::KeyMoved { key, stored, asked, placement, .. }) => {
            assert_eq!(stored, Key(by_zone(key)).shard(SHARDS));
            assert_eq!((asked, &placement), (Key(key.0 >> 31).shard(SHARDS), zone().id()));
        }
        other => panic!("{:?}", other.err()),
    }
    let panics = os_cache("/s").shards(SHARDS).placement(Placement::new("zone", 7, |_| panic!("no zone")));
    match open(&storage, panics) {
        Err(OpenError::Panicked(panic)) => assert_eq!(panic.message, "no zone"),
        other => panic!("{:?}", other.err()),
    }
    assert_eq!(storage.files(), files);
}

#[test]
fn a_placement_that_panics_reaches_the_caller_before_anything_is_sent() {
    let storage = FaultyStorage::new();
    let picky = Placement::new("picky", 1, |key| if key.0 == 13 { panic!("unlucky") } else { key.0 });
    let engine = open(&storage, os_cache("/s").shards(2).placement(picky)).unwrap();
    let (mut producer, shared, mut client) = (engine.producer(), engine.shared_producer(), engine.client());
    let deposited = || Money::Deposited { cents: 1 };
    let panics = |what: &mut dyn FnMut()| {
        let panic = catch_unwind(AssertUnwindSafe(what)).expect_err("the placement panics");
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"unlucky"));
    };
    panics(&mut || drop(producer.publish(Key(13), deposited())));
    panics(&mut || drop(shared.publish(Key(13), deposited())));
    panics(&mut || drop(client.send(Key(13), Order::Deposit(1)).wait()));
    panics(&mut || drop(client.send_many(&[Key(1), Key(13)], Order::Deposit(1)).wait()));
    panics(&mut || drop(engine.state(Key(13)).wait()));
    // A batch loses none of its events.
    let mut batch: Vec<_> = (10..16).map(|key| (Key(key), deposited())).collect();
    panics(&mut || drop(producer.publish_batch(&mut batch)));
    assert_eq!(batch.len(), 6);
    batch.retain(|(key, _)| key.0 != 13);
    producer.publish_batch(&mut batch).unwrap();
    client.send(Key(1), Order::Deposit(1)).wait().unwrap();
    engine.flush(soon()).unwrap();
    assert_eq!((0..2).map(|shard| logged(&engine, shard).len()).sum::<usize>(), 6);
    assert!(engine.failures().is_empty());
}

#[test]
fn a_store_is_read_from_outside_although_its_placement_is_not_known_there() {
    let dir = tempfile::tempdir().unwrap();
    let config = os_cache(dir.path()).shards(SHARDS).placement(zone());
    let engine = Engine::<Account>::open(config).unwrap();
    let keys = publish(&engine);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let before = tree(dir.path());
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.placement(), Some(zone().id()));
    assert_eq!(store.shards_of(keys[0]).len(), usize::from(SHARDS), "any shard may hold it");
    let mut found = 0;
    for shard in store.shard_ids() {
        let mut records = store.records(shard);
        while let Some(record) = records.next().unwrap() {
            assert_eq!(Key(by_zone(record.meta.key)).shard(SHARDS), shard);
            found += 1;
        }
    }
    assert_eq!(found, keys.len() * 5);
    assert_eq!(tree(dir.path()), before);
    let plain = tempfile::tempdir().unwrap();
    drop(Engine::<Account>::open(os_cache(plain.path()).shards(SHARDS)).unwrap());
    let store = Store::open(plain.path()).unwrap();
    assert_eq!((store.placement(), store.shards_of(Key(7))), (None, vec![Key(7).shard(SHARDS)]));
}
