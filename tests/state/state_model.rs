//! States against an in-memory model: after any series of events, commands, checkpoints, flushes, restarts, power cuts
//! and retention, four states agree at every version and time of every key: the live one, the model's, that of a full
//! replay, and that of a snapshot and the events after it.
//! `CORELANE_MODEL_CASES` sets the cases.

use std::collections::VecDeque;
use std::time::Instant;

use crate::common::bank::{Account, ArchivedMoney, Money, Order, Refused};
use crate::common::{SEGMENT, env_number, small, soon};
use corelane::error::HistoryError;
use corelane::state::AsOf;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Client, CommandError, Config, Durability, Engine, Key, OpenError, Producer, Retention, Time, Version};
use proptest::prelude::*;

const SHARDS: u16 = 2;
const KEYS: u64 = 5;

#[derive(Debug, Clone)]
enum Step {
    Publish { key: u64, count: usize, bytes: usize },
    Batch { keys: Vec<u64>, bytes: usize },
    Command { key: u64, order: Order, once: Option<u64> },
    Checkpoint,
    Flush,
    Restart,
    PowerCut(Option<u64>),
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        (1..100_u64).prop_map(Order::Deposit),
        (1..150_u64).prop_map(Order::Withdraw),
        (1..150_u64, 1..150_u64).prop_map(|(out, back)| Order::Exchange { out, back }),
        (1..4_usize, 0..9000_usize).prop_map(|(count, bytes)| Order::Notes { count, bytes }),
        Just(Order::Nothing),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..KEYS, 1..8_usize, 0..9000_usize).prop_map(|(key, count, bytes)| Step::Publish { key, count, bytes }),
        3 => (prop::collection::vec(0..KEYS, 1..40), 0..3000_usize).prop_map(|(keys, bytes)| Step::Batch { keys, bytes }),
        6 => (0..KEYS, order(), prop::option::of(1..6_u64)).prop_map(|(key, order, once)| Step::Command { key, order, once }),
        2 => Just(Step::Checkpoint),
        1 => Just(Step::Flush),
        2 => Just(Step::Restart),
        2 => prop::option::of(1..u64::MAX).prop_map(Step::PowerCut),
    ]
}

/// The outcome of a command.
#[derive(Debug, Clone, PartialEq)]
enum Outcome {
    Done { version: u64, events: u32 },
    Rejected(Refused),
}

/// The expected contents of one key.
#[derive(Default)]
struct Known {
    events: Vec<Money>,
    /// The state after each version, including 0.
    states: Vec<Account>,
    /// Versions after which the log may not end, because the command has more events.
    inside: Vec<bool>,
    durable: usize,
    outcomes: VecDeque<(u64, Outcome)>,
}

impl Known {
    fn add(&mut self, event: Money, is_continued: bool) {
        let mut state = self.states.last().unwrap().clone();
        let n = match &event {
            Money::Deposited { cents } => {
                state.cents += cents;
                cents * 2
            }
            Money::Withdrawn { cents } => {
                state.cents -= cents;
                cents * 2 + 1
            }
            Money::Noted { text } => {
                state.notes += 1;
                text.len() as u64
            }
        };
        let version = self.states.len() as u64;
        state.hash = (state.hash ^ n ^ version << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
        self.states.push(state);
        self.events.push(event);
        self.inside.push(is_continued);
    }

    fn version(&self) -> usize {
        self.events.len()
    }

    fn now(&self) -> &Account {
        self.states.last().unwrap()
    }

    /// Adds the events of `order` and returns its outcome.
    fn command(&mut self, order: &Order) -> Outcome {
        let cents = self.now().cents;
        let events = match *order {
            Order::Withdraw(out) | Order::Exchange { out, .. } if out > cents => {
                return Outcome::Rejected(Refused::NotEnough { missing: out - cents });
            }
            Order::Deposit(cents) => vec![Money::Deposited { cents }],
            Order::Withdraw(cents) => vec![Money::Withdrawn { cents }],
            Order::Exchange { out, back } => vec![Money::Withdrawn { cents: out }, Money::Deposited { cents: back }],
            Order::Notes { count, bytes } => vec![Money::Noted { text: "n".repeat(bytes) }; count],
            Order::Deposits(_) | Order::NotesOf(_) | Order::Pay(_) | Order::Foreign(_) => {
                unreachable!("this model gives no such commands")
            }
            Order::Nothing | Order::Panic => vec![],
        };
        let count = events.len();
        for (i, event) in events.into_iter().enumerate() {
            self.add(event, i + 1 < count);
        }
        Outcome::Done { version: self.version() as u64, events: count as u32 }
    }
}

#[derive(Debug, Clone, Copy)]
struct Setting {
    durability: Durability,
    /// Segments that retention keeps.
    keeps: Option<u64>,
    every: u64,
    outcomes_kept: usize,
    cuts_power: bool,
}

struct World {
    setting: Setting,
    storage: FaultyStorage,
    /// `None` only while the store is reopened.
    engine: Option<Engine<Account>>,
    producer: Producer<Money>,
    client: Client<Account>,
    keys: Vec<Known>,
    /// Makes idempotency keys differ before and after a power cut, which may lose outcomes.
    epoch: u64,
    cut: bool,
    grown: usize,
}

impl World {
    fn new(setting: Setting) -> Self {
        let storage = FaultyStorage::new();
        let engine = Self::open(&storage, &setting).unwrap();
        let (producer, client) = (engine.producer(), engine.client());
        let keys = (0..KEYS).map(|_| Known { states: vec![Account::default()], ..Known::default() }).collect();
        Self { setting, storage, engine: Some(engine), producer, client, keys, epoch: 0, cut: false, grown: 0 }
    }

    fn config(setting: &Setting) -> Config {
        let retention = setting.keeps.map_or_else(Retention::default, |segments| Retention::bytes(segments * SEGMENT));
        small("/s")
            .shards(SHARDS)
            .durability(setting.durability)
            .retention(retention)
            .snapshot_every(setting.every)
            .outcomes_kept(setting.outcomes_kept)
    }

    fn open(storage: &FaultyStorage, setting: &Setting) -> Result<Engine<Account>, OpenError> {
        Engine::<Account>::builder(Self::config(setting)).faulty_storage(storage).open()
    }

    fn reopen(&mut self) {
        self.engine = None;
        let engine = Self::open(&self.storage, &self.setting).unwrap();
        (self.producer, self.client) = (engine.producer(), engine.client());
        self.engine = Some(engine);
    }

    fn engine(&self) -> &Engine<Account> {
        self.engine.as_ref().unwrap()
    }

    fn settle(&self) {
        self.producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
    }

    fn all_durable(&mut self) {
        self.keys.iter_mut().for_each(|known| known.durable = known.version());
    }

    /// Makes an event. Sizes grow with the run, so that estimates from old sizes are wrong.
    fn note(&mut self, key: u64, bytes: usize) -> Money {
        self.grown += 7;
        let event = match bytes % 5 {
            0 => Money::Deposited { cents: bytes as u64 },
            _ => Money::Noted { text: "x".repeat((bytes + self.grown).min(9000)) },
        };
        self.keys[key as usize].add(event.clone(), false);
        event
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Publish { key, count, bytes } => {
                for _ in 0..*count {
                    let event = self.note(*key, *bytes);
                    self.producer.publish(Key(*key), event).unwrap();
                }
            }
            Step::Batch { keys, bytes } => {
                let mut batch: Vec<_> = keys.iter().map(|&key| (Key(key), self.note(key, *bytes))).collect();
                self.producer.publish_batch(&mut batch).unwrap();
            }
            Step::Command { key, order, once } => self.command(*key, order, *once),
            Step::Checkpoint => self.engine().checkpoint(soon()).unwrap(),
            Step::Flush => {
                self.engine().flush(soon()).unwrap();
                self.all_durable();
            }
            Step::Restart => {
                self.engine().shutdown(soon()).unwrap();
                self.all_durable();
                self.reopen();
                assert!(self.engine().recovery().shards.iter().all(|shard| shard.torn_tail.is_none()));
                self.repeat_all();
            }
            Step::PowerCut(_) if !self.setting.cuts_power => {}
            Step::PowerCut(seed) => {
                self.settle();
                self.storage = self.storage.after_crash(seed.map_or(Unsynced::Lost, Unsynced::Random));
                self.reopen();
                self.cut();
            }
        }
    }

    fn command(&mut self, key: u64, order: &Order, once: Option<u64>) {
        self.settle();
        let known = &mut self.keys[key as usize];
        let once = once.map(|id| id + 100 * self.epoch);
        let first = once.and_then(|id| known.outcomes.iter().rev().find(|(other, _)| *other == id)).cloned();
        let (expected, repeated) = match first {
            Some((_, outcome)) => (outcome, true),
            None => (known.command(order), false),
        };
        if let (Some(id), false) = (once, repeated) {
            known.outcomes.push_back((id, expected.clone()));
            if known.outcomes.len() > self.setting.outcomes_kept {
                known.outcomes.pop_front();
            }
        }
        let sending = self.client.send(Key(key), order.clone());
        let answer = match once {
            Some(id) => sending.once(id).wait(),
            None => sending.wait(),
        };
        match (answer, &expected) {
            (Ok(outcome), Outcome::Done { version, events }) => {
                assert_eq!((outcome.version.get(), outcome.events, outcome.repeated), (*version, *events, repeated));
            }
            (Err(CommandError::Rejected(rejection)), Outcome::Rejected(refused)) => assert_eq!(rejection, *refused),
            (answer, expected) => panic!("{answer:?} instead of {expected:?}"),
        }
    }

    /// Repeats every remembered command: the repeat does nothing and gets the first answer.
    fn repeat_all(&mut self) {
        let first = 100 * self.epoch;
        let remembered: Vec<(u64, u64)> = (0..)
            .zip(&self.keys)
            .flat_map(|(key, known)| known.outcomes.iter().map(move |(id, _)| (key, *id - first)))
            .collect();
        for (key, id) in remembered {
            self.command(key, &Order::Deposit(1), Some(id));
        }
    }

    /// After a power cut each key may have any version from its durable one on, but none inside a command.
    fn cut(&mut self) {
        self.cut = true;
        self.epoch += 1;
        let engine = self.engine.as_ref().unwrap();
        for (key, known) in (0..).zip(&mut self.keys) {
            let version = engine.state(Key(key)).wait().unwrap().map_or(0, |(_, version)| version.get() as usize);
            assert!(version >= known.durable, "key {key}: {version} of {} durable events", known.durable);
            assert!(version <= known.version(), "key {key}: invented events");
            assert!(version == 0 || !known.inside[version - 1], "key {key}: {version} is inside a command");
            known.events.truncate(version);
            known.states.truncate(version + 1);
            known.inside.truncate(version);
            known.outcomes.clear();
        }
        self.all_durable();
    }

    /// Checks that everything readable of a key agrees with the model.
    fn check_key(&self, key: u64) {
        let (engine, known) = (self.engine(), &self.keys[key as usize]);
        let newest = known.version() as u64;
        let live = engine.state(Key(key)).wait().unwrap();
        assert_eq!(live.as_ref().map(|(_, version)| version.get()), (newest > 0).then_some(newest));
        assert_eq!(&live.map_or(Account::default(), |(state, _)| state), known.now(), "key {key}, live");
        let (rebuilt, version) = engine.rebuild(Key(key)).unwrap();
        assert_eq!((&rebuilt, version.get()), (known.now(), newest), "key {key}, rebuilt");
        for version in (0..=newest).rev() {
            self.check_version(key, version);
        }
        let beyond = engine.state_at(Key(key), Version(newest + 1));
        assert!(matches!(beyond, Err(HistoryError::NotYet { newest: n, .. }) if n.get() == newest), "{beyond:?}");
        self.check_stream(key, 1);
        self.check_stream(key, newest / 2 + 1);
        self.check_times(key);
    }

    fn check_version(&self, key: u64, version: u64) {
        match self.engine().state_at(Key(key), Version(version)) {
            Ok(past) => {
                assert_eq!(past.version.get(), version);
                assert_eq!(past.state, self.keys[key as usize].states[version as usize], "key {key} at {version}");
            }
            Err(HistoryError::BeyondRetention { earliest, .. }) if self.setting.keeps.is_some() => {
                assert!(earliest.get() > version, "key {key} at {version}: the earliest is {earliest}");
                // This version may be freed by now, which the call then reports.
                self.check_version(key, earliest.get());
            }
            Err(error) => panic!("key {key} at {version}: {error}"),
        }
    }

    fn check_stream(&self, key: u64, from: u64) {
        let events = &self.keys[key as usize].events;
        let mut stream = match self.engine().stream(Key(key), Version(from)) {
            Err(HistoryError::BeyondRetention { earliest, .. }) if self.setting.keeps.is_some() => {
                assert!(earliest.get() > from && earliest.get() <= events.len() as u64 + 1);
                return self.check_stream(key, earliest.get());
            }
            stream => stream.unwrap(),
        };
        let mut version = from;
        loop {
            let record = match stream.next() {
                Err(corelane::ReadError::BeyondRetention { .. }) if self.setting.keeps.is_some() => return,
                record => record.unwrap(),
            };
            let Some(record) = record else { break };
            assert_eq!((record.meta.key, record.meta.version.get()), (Key(key), version));
            let same = match (record.event, &events[version as usize - 1]) {
                (ArchivedMoney::Deposited { cents }, Money::Deposited { cents: expected })
                | (ArchivedMoney::Withdrawn { cents }, Money::Withdrawn { cents: expected }) => cents == expected,
                (ArchivedMoney::Noted { text }, Money::Noted { text: expected }) => text == expected,
                _ => false,
            };
            assert!(same, "event {version} of key {key}");
            version += 1;
        }
        assert_eq!(version, events.len() as u64 + 1);
    }

    /// Checks at each event's time the state with all events up to then.
    fn check_times(&self, key: u64) {
        let known = &self.keys[key as usize];
        let mut times = Vec::new();
        let mut from = 1;
        let mut stream = match self.engine().stream(Key(key), Version(1)) {
            Err(HistoryError::BeyondRetention { earliest, .. }) if self.setting.keeps.is_some() => {
                from = earliest.get();
                match self.engine().stream(Key(key), earliest) {
                    Ok(stream) => stream,
                    Err(HistoryError::BeyondRetention { .. }) => return,
                    Err(error) => panic!("{error}"),
                }
            }
            stream => stream.unwrap(),
        };
        while let Ok(Some(record)) = stream.next() {
            times.push(record.meta.time.get());
        }
        for &time in &times {
            let until = times.iter().position(|&other| other > time).unwrap_or(times.len());
            let version = from + until as u64 - 1;
            match self.engine().state_at(Key(key), Time(time)) {
                Ok(past) => {
                    assert_eq!(past.version.get(), version, "key {key} at time {time}");
                    assert_eq!(past.state, known.states[version as usize]);
                }
                Err(HistoryError::BeyondRetention { earliest, .. }) if self.setting.keeps.is_some() => {
                    assert!(earliest.get() > version);
                }
                Err(error) => panic!("{error}"),
            }
        }
        let now = self.engine().state_at(Key(key), AsOf::Time(Time(u64::MAX))).unwrap();
        assert_eq!(&now.state, known.now());
    }

    fn check(&self) {
        self.settle();
        (0..KEYS).for_each(|key| self.check_key(key));
        let deadline = soon().unwrap();
        let compared = loop {
            match self.engine().compare() {
                Ok(compared) => break compared,
                // A segment was freed while it was read.
                Err(HistoryError::BeyondRetention { .. } | HistoryError::Read(_)) if self.setting.keeps.is_some() => {
                    assert!(Instant::now() < deadline);
                }
                Err(error) => panic!("{error}"),
            }
        };
        assert!(compared.differing.is_empty(), "{compared:?}");
        let stats = self.engine().snapshot_stats();
        assert_eq!(stats.checkpoints_failed, 0);
        assert!(self.engine().failures().is_empty());
        if !self.cut {
            assert_eq!(stats.unreadable, 0);
        }
    }

    /// Checks that, with all snapshots written, every state takes fewer than `snapshot_every` events after its
    /// snapshot.
    fn check_distance(&self) {
        if self.cut || self.setting.every == 0 || self.engine().snapshot_stats().skipped > 0 {
            return;
        }
        let deadline = soon().unwrap();
        for (key, known) in (0..).zip(&self.keys) {
            for version in 0..=known.version() as u64 {
                loop {
                    match self.engine().state_at(Key(key), Version(version)) {
                        Ok(past) if past.applied < self.setting.every => break,
                        Ok(past) => assert!(Instant::now() < deadline, "{} events for {version}", past.applied),
                        Err(HistoryError::BeyondRetention { .. }) => break,
                        Err(error) => panic!("{error}"),
                    }
                    std::thread::yield_now();
                }
            }
        }
    }
}

fn run(steps: &[Step], setting: Setting) {
    let mut run = World::new(setting);
    for step in steps {
        run.step(step);
        run.check();
    }
    run.check_distance();
    run.step(&Step::Restart);
    run.check();
    run.check_distance();
}

fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: env_number("CORELANE_MODEL_CASES", 24) as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..24)
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn states_agree_with_the_model_after_every_step(steps in steps(), group in any::<bool>(), every in 0..20_u64) {
        let durability = if group { Durability::GroupCommit } else { Durability::OsCache };
        run(&steps, Setting { durability, keeps: None, every, outcomes_kept: 64, cuts_power: true });
    }

    #[test]
    fn states_with_retention_agree_with_the_model_after_every_step(
        steps in steps(), every in 0..20_u64, keeps in 2..5_u64,
    ) {
        let durability = Durability::GroupCommit;
        run(&steps, Setting { durability, keeps: Some(keeps), every, outcomes_kept: 64, cuts_power: true });
    }

    #[test]
    fn outcomes_are_remembered_across_checkpoints_and_restarts_as_long_as_promised(
        steps in steps(), every in 1..20_u64, keeps in prop::option::of(2..5_u64), outcomes_kept in 1..4_usize,
        group in any::<bool>(),
    ) {
        let durability = if group { Durability::GroupCommit } else { Durability::OsCache };
        run(&steps, Setting { durability, keeps, every, outcomes_kept, cuts_power: false });
    }
}
