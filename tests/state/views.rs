//! Views in an engine: filled when a store opens, up to date for every appended receipt, and never behind the position
//! that they show.

use std::collections::BTreeMap;

use crate::common::bank::{Account, Money, Order};
use crate::common::{SEGMENT, small, soon};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::view::{Area, ById, Leaderboard, Presence, ServerStatus};
use corelane::{Config, Engine, Key, Retention, ShardId};

const SHARDS: u16 = 2;
const KEYS: u64 = 40;

#[derive(Clone)]
struct Views {
    by_id: ById<Account, Account>,
    best: Leaderboard<Account>,
    status: ServerStatus<Account>,
    area: Area<Account>,
}

fn place(account: &Account) -> (f64, f64) {
    ((account.cents % 100) as f64, (account.notes % 100) as f64)
}

impl Views {
    fn new() -> Self {
        Self {
            by_id: ById::new(64, Account::clone),
            best: Leaderboard::new(10, |account: &Account| account.cents as i64),
            status: ServerStatus::new(|account: &Account| match account.cents % 2 {
                0 => Presence::Online,
                _ => Presence::Offline,
            })
            .with_top(3, |account: &Account| account.cents as i64),
            area: Area::new((0.0, 0.0, 100.0, 100.0), 10.0, |account: &Account| Some(place(account))),
        }
    }

    fn open(&self, storage: &FaultyStorage, config: Config) -> Engine<Account> {
        let builder = Engine::<Account>::builder(config).faulty_storage(storage);
        builder.view(&self.by_id).view(&self.best).view(&self.status).view(&self.area).open().unwrap()
    }

    /// Checks that every view shows exactly these states.
    fn check(&self, states: &BTreeMap<u64, Account>, events: u64) {
        for key in 0..KEYS {
            assert_eq!(self.by_id.get(Key(key)).unwrap().as_ref(), states.get(&key), "key {key}");
        }
        let mut best: Vec<i64> = states.values().map(|account| account.cents as i64).collect();
        best.sort_unstable_by_key(|cents| std::cmp::Reverse(*cents));
        best.truncate(10);
        let top: Vec<i64> = self.status.top(99).iter().map(|ranked| ranked.score).collect();
        assert_eq!(top, best[..best.len().min(3)], "the best of the status view");
        let ranked = self.best.top(10);
        assert_eq!(ranked.iter().map(|ranked| ranked.score).collect::<Vec<_>>(), best);
        assert!(ranked.iter().all(|ranked| states[&ranked.key.get()].cents as i64 == ranked.score));
        let status = self.status.get();
        let online = states.values().filter(|account| account.cents % 2 == 0).count() as u64;
        assert_eq!((status.online, status.total, status.events), (online, states.len() as u64, events));
        let (x, y, radius) = (30.0, 40.0, 35.0);
        let mut found: Vec<u64> = self.area.within(x, y, radius).iter().map(|found| found.key.get()).collect();
        found.sort_unstable();
        let is_near = |account: &Account| {
            let (dx, dy) = (place(account).0 - x, place(account).1 - y);
            dx * dx + dy * dy <= radius * radius
        };
        let near: Vec<u64> = states.iter().filter(|(_, account)| is_near(account)).map(|(key, _)| *key).collect();
        assert_eq!(found, near);
    }

    /// The number of events of each shard that each view contains.
    fn positions(&self) -> [Vec<(ShardId, u64)>; 4] {
        [self.by_id.positions(), self.best.positions(), self.status.positions(), self.area.positions()]
            .map(|positions| positions.into_iter().map(|(shard, at)| (shard, at.sequence.get())).collect())
    }
}

fn states(engine: &Engine<Account>) -> BTreeMap<u64, Account> {
    (0..KEYS).filter_map(|key| Some((key, engine.state(Key(key)).wait().unwrap()?.0))).collect()
}

/// Publishes events and sends commands. Returns the number of events.
fn play(engine: &Engine<Account>, rounds: u64) -> u64 {
    let (mut producer, mut client, mut events) = (engine.producer(), engine.client(), 0);
    for round in 0..rounds {
        let key = Key(round * 7 % KEYS);
        producer.publish(key, Money::Deposited { cents: round * 13 % 101 }).unwrap();
        producer.publish(Key(round % 3), Money::Noted { text: "x".repeat(round as usize % 900) }).unwrap();
        events += 2;
        if let Ok(outcome) = client.send(key, Order::Exchange { out: round % 50, back: round % 31 }).wait() {
            events += u64::from(outcome.events);
        }
    }
    producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
    events
}

#[test]
fn views_agree_with_the_states_live_and_after_every_opening() {
    let mut storage = FaultyStorage::new();
    let config = || {
        let retention = Retention::bytes(3 * SEGMENT);
        small("/s").shards(SHARDS).snapshot_every(5).retention(retention)
    };
    let mut events = 0;
    // The first engine has no views: they are added to a store that already has events.
    let engine = Engine::<Account>::builder(config()).faulty_storage(&storage).open().unwrap();
    events += play(&engine, 500);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let views = Views::new();
    for round in 0..4 {
        let engine = views.open(&storage, config());
        views.check(&states(&engine), events);
        let opened = views.positions();
        assert!(opened.iter().all(|positions| positions.len() == usize::from(SHARDS)));
        assert_eq!(opened[0].iter().map(|(_, sequence)| sequence).sum::<u64>(), events);
        events += play(&engine, 300);
        views.check(&states(&engine), events);
        if round == 2 {
            engine.checkpoint(soon()).unwrap();
        }
        if round % 2 == 0 {
            engine.shutdown(soon()).unwrap();
            // The views keep their contents after the engine is dropped.
            drop(engine);
            assert_eq!(views.positions()[2].iter().map(|(_, sequence)| sequence).sum::<u64>(), events);
        } else {
            // The next engine opens the store after a power cut, which keeps every flushed event.
            engine.flush(soon()).unwrap();
            storage = storage.after_crash(Unsynced::Lost);
        }
    }
}

#[test]
fn an_event_whose_receipt_is_appended_is_in_every_view() {
    let storage = FaultyStorage::new();
    let views = Views::new();
    let engine = views.open(&storage, small("/s").shards(SHARDS));
    let mut producer = engine.producer();
    let mut sequences = [0_u64; SHARDS as usize];
    for n in 1..2000_u64 {
        let key = Key(n % KEYS);
        let shard = key.shard(SHARDS);
        producer.publish(key, Money::Deposited { cents: 2 * n }).unwrap().appended().wait().unwrap();
        sequences[usize::from(shard.get())] += 1;
        let positions = views.positions();
        for (view, at) in positions.iter().enumerate() {
            let at = at.iter().find(|(other, _)| *other == shard).unwrap().1;
            assert_eq!(at, sequences[usize::from(shard.get())], "view {view}");
        }
        let account = views.by_id.get(key).unwrap().unwrap();
        let best = views.best.top(1)[0];
        assert!(best.score >= account.cents as i64);
        assert_eq!(views.status.get().events, n);
        let (x, y) = place(&account);
        assert!(views.area.within(x, y, 0.5).iter().any(|found| found.key == key));
        // The shard itself returns the same state.
        assert_eq!(engine.state(key).wait().unwrap().unwrap().0, account);
    }
}

#[test]
fn a_view_contains_at_least_the_events_up_to_its_position() {
    let storage = FaultyStorage::new();
    let views = Views::new();
    let engine = views.open(&storage, small("/s").shards(SHARDS).ring_capacity(1024));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut before = vec![0; usize::from(SHARDS)];
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    let positions = views.by_id.positions();
                    // Each event deposits one cent, so the cents of a shard's keys count its events.
                    let mut cents = vec![0; usize::from(SHARDS)];
                    for key in (0..KEYS).map(Key) {
                        let account = views.by_id.get(key).unwrap();
                        cents[usize::from(key.shard(SHARDS).get())] += account.map_or(0, |account| account.cents);
                    }
                    for (shard, at) in positions {
                        let shard = usize::from(shard.get());
                        assert!(cents[shard] >= at.sequence.get(), "shard {shard}: {cents:?} before {at:?}");
                        assert!(at.sequence.get() >= before[shard], "positions only grow");
                        before[shard] = at.sequence.get();
                    }
                }
            });
        }
        let mut producer = engine.producer();
        for n in 0..60_000 {
            producer.publish(Key(n % KEYS), Money::Deposited { cents: 1 }).unwrap();
        }
        engine.flush(soon()).unwrap();
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    views.check(&states(&engine), 60_000);
}
