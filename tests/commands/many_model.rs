//! Commands for several keys against a sequential model, with checkpoints, restarts and power cuts: every answer is the
//! one that the model gives, and the log is always that of some number of whole commands. `CORELANE_MODEL_CASES` sets
//! the cases (24).

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use crate::common::bank::{Account, Money, Order, Refused, logged};
use crate::common::{env_number, small, soon};
use corelane::command::{ExpectedVersion, Ticket};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Client, CommandError, Durability, Engine, Key, Outcome, Version};
use proptest::prelude::*;

const KEYS: u64 = 5;

#[derive(Debug, Clone)]
enum Step {
    Command(Sent),
    /// A producer deposits an amount.
    Publish(u64, u64),
    Checkpoint,
    Flush,
}

#[derive(Debug, Clone)]
struct Sent {
    keys: Vec<u64>,
    order: Order,
    /// The version expected of the key at this index.
    expected: Vec<(usize, ExpectedVersion)>,
    once: Option<u64>,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    Pipelined,
    OneAtATime,
    Durable,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Restart,
    PowerCut(Option<u64>),
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq)]
enum Told {
    Done { versions: Vec<(u64, u64)>, events: u32, repeated: bool },
    Rejected(Refused),
    WrongVersion { key: u64, found: u64 },
    Panicked,
    ForeignKey(u64),
}

fn told(answer: Result<Outcome, CommandError<Refused>>) -> Told {
    match answer {
        Ok(outcome) => Told::Done {
            versions: outcome.versions().map(|(key, version)| (key.0, version.0)).collect(),
            events: outcome.events,
            repeated: outcome.repeated,
        },
        Err(CommandError::Rejected(refused)) => Told::Rejected(refused),
        Err(CommandError::WrongVersion { key, found, .. }) => Told::WrongVersion { key: key.0, found: found.0 },
        Err(CommandError::Panicked(_)) => Told::Panicked,
        Err(CommandError::ForeignKey { key, .. }) => Told::ForeignKey(key.0),
        Err(other) => panic!("{other:?}"),
    }
}

/// The expected contents of the store.
#[derive(Debug, Clone, Default)]
struct Model {
    states: BTreeMap<u64, (Account, u64)>,
    /// Key, version and event.
    log: Vec<(u64, u64, Money)>,
    /// By first key and idempotency key.
    outcomes: HashMap<(u64, u64), Told>,
}

impl Model {
    fn state(&self, key: u64) -> (Account, u64) {
        self.states.get(&key).cloned().unwrap_or_default()
    }

    fn append(&mut self, key: u64, event: Money) {
        let (state, version) = self.states.entry(key).or_default();
        *version += 1;
        state.apply(&event, *version);
        self.log.push((key, *version, event));
    }

    fn carry_out(&mut self, sent: &Sent) -> Told {
        let owner = sent.once.map(|id| (sent.keys[0], id));
        if let Some(outcome) = owner.and_then(|owner| self.outcomes.get(&owner)) {
            return outcome.clone();
        }
        for (at, key) in sent.keys.iter().enumerate() {
            // The last expectation of a key counts.
            let expected = sent.expected.iter().rev().find(|(of, _)| *of % sent.keys.len() == at);
            let found = self.state(*key).1;
            let holds = match expected.map_or(ExpectedVersion::Any, |(_, expected)| *expected) {
                ExpectedVersion::Any => true,
                ExpectedVersion::NoEvents => found == 0,
                ExpectedVersion::Exists => found > 0,
                ExpectedVersion::Exact(version) => found == version.0,
                other => panic!("the model does not know {other:?}"),
            };
            if !holds {
                return Told::WrongVersion { key: *key, found };
            }
        }
        let states: Vec<Account> = sent.keys.iter().map(|key| self.state(*key).0).collect();
        let (told, kept) = match &sent.order {
            Order::Panic => return Told::Panicked,
            Order::Foreign(key) => return Told::ForeignKey(*key),
            order => match Account::would_many(&states, order) {
                Err(refused) => (Told::Rejected(refused.clone()), Told::Rejected(refused)),
                Ok(events) => {
                    let count = events.len() as u32;
                    events.into_iter().for_each(|(at, event)| self.append(sent.keys[at], event));
                    let versions: Vec<_> = sent.keys.iter().map(|key| (*key, self.state(*key).1)).collect();
                    let done = |repeated| Told::Done { versions: versions.clone(), events: count, repeated };
                    (done(false), done(true))
                }
            },
        };
        if let Some(owner) = owner {
            self.outcomes.insert(owner, kept);
        }
        told
    }

    /// Compares the engine with the model.
    fn check(&self, engine: &Engine<Account>, how: &str) {
        assert_eq!(contents(engine), self.log, "{how}");
        for key in 0..KEYS {
            let found = engine.state(Key(key)).wait().unwrap().map(|(state, version)| (state, version.0));
            assert_eq!(found.as_ref(), self.states.get(&key), "{how}: the state of key {key}");
            let (state, version) = self.state(key);
            assert_eq!(engine.state_at(Key(key), Version(version)).unwrap().state, state, "{how}: key {key}");
        }
        assert!(engine.compare().unwrap().differing.is_empty(), "{how}");
    }
}

fn contents(engine: &Engine<Account>) -> Vec<(u64, u64, Money)> {
    logged(engine, 0).into_iter().map(|event| (event.key, event.version, event.money)).collect()
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        4 => prop::collection::vec(0..60_u64, 0..6).prop_map(Order::Deposits),
        6 => (0..40_u64).prop_map(Order::Pay),
        2 => (0..60_u64, 0..20_u64).prop_map(|(out, back)| Order::Exchange { out, back }),
        2 => prop::collection::vec(0..9000_usize, 0..6).prop_map(Order::NotesOf),
        1 => Just(Order::Nothing),
        1 => Just(Order::Panic),
        1 => Just(Order::Foreign(KEYS + 7)),
    ]
}

fn sent() -> impl Strategy<Value = Sent> {
    let keys = (Just((0..KEYS).collect::<Vec<_>>()).prop_shuffle(), 1..=KEYS as usize);
    let keys = keys.prop_map(|(mut keys, count)| {
        keys.truncate(count);
        keys
    });
    let expected = prop_oneof![
        1 => Just(ExpectedVersion::NoEvents),
        2 => Just(ExpectedVersion::Exists),
        2 => (0..20_u64).prop_map(|version| ExpectedVersion::Exact(Version(version))),
    ];
    let expected = prop_oneof![
        3 => Just(Vec::new()),
        1 => prop::collection::vec((0..KEYS as usize, expected), 1..3),
    ];
    let how = prop_oneof![4 => Just(How::Pipelined), 2 => Just(How::OneAtATime), 1 => Just(How::Durable)];
    let once = prop::option::weighted(0.4, 1..7_u64);
    (keys, order(), expected, once, how).prop_map(|(keys, order, expected, once, how)| Sent {
        keys,
        order,
        expected,
        once,
        how,
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => sent().prop_map(Step::Command),
        3 => (0..KEYS, 0..200_u64).prop_map(|(key, cents)| Step::Publish(key, cents)),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Flush),
    ]
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![1 => Just(End::Restart), 2 => prop::option::of(1..u64::MAX).prop_map(End::PowerCut)]
}

/// A run of the engine, with the model after every step.
struct Run {
    durable: bool,
    /// The model before the run and after every step.
    models: Vec<Model>,
    /// The index of the newest model that a power cut keeps.
    certain: usize,
    /// Owners whose outcome a power cut may have taken.
    unknown: HashSet<(u64, u64)>,
}

impl Run {
    fn perform(&mut self, engine: &Engine<Account>, steps: &[Step]) {
        let (mut client, mut producer) = (engine.client(), engine.producer());
        let mut open: VecDeque<(Ticket, Told, Sent)> = VecDeque::new();
        for step in steps {
            let mut model = self.models.last().unwrap().clone();
            match step {
                Step::Command(sent) => {
                    let mut sent = sent.clone();
                    sent.once = sent.once.filter(|id| !self.unknown.contains(&(sent.keys[0], *id)));
                    let expected = model.carry_out(&sent);
                    self.send(&mut client, sent, expected, &mut open);
                }
                Step::Publish(key, cents) => {
                    claim(&mut client, &mut open);
                    let deposited = Money::Deposited { cents: *cents };
                    producer.publish(Key(*key), deposited.clone()).unwrap().appended().wait().unwrap();
                    model.append(*key, deposited);
                }
                Step::Checkpoint => engine.checkpoint(soon()).unwrap(),
                Step::Flush => {
                    engine.flush(soon()).unwrap();
                    self.certain = self.models.len() - 1;
                }
            }
            self.models.push(model);
        }
        claim(&mut client, &mut open);
    }

    fn send(
        &mut self,
        client: &mut Client<Account>,
        sent: Sent,
        expected: Told,
        open: &mut VecDeque<(Ticket, Told, Sent)>,
    ) {
        let keys: Vec<Key> = sent.keys.iter().copied().map(Key).collect();
        let mut sending = client.send_many(&keys, sent.order.clone());
        for (at, version) in &sent.expected {
            sending = sending.expect_of(keys[at % keys.len()], *version);
        }
        if let Some(id) = sent.once {
            sending = sending.once(id);
        }
        let answer = match sent.how {
            How::Pipelined => {
                open.push_back((sending.ticket().unwrap(), expected, sent));
                if open.len() > 30 {
                    claim(client, open);
                }
                return;
            }
            How::Durable if self.durable => sending.durable().wait_until(soon().unwrap()),
            How::Durable | How::OneAtATime => sending.wait_until(soon().unwrap()),
        };
        assert_eq!(told(answer), expected, "{sent:?}");
        // Everything before a durable answer is durable too. (A rejection is answered at once.)
        if self.durable && sent.how == How::Durable && matches!(expected, Told::Done { .. }) {
            self.certain = self.models.len();
        }
    }

    /// Goes back to the model whose log the store has after a power cut.
    fn cut(&mut self, engine: &Engine<Account>) {
        let log = contents(engine);
        let fits: Vec<&Model> = self.models[self.certain..].iter().filter(|model| model.log == log).collect();
        let (Some(first), Some(last)) = (fits.first(), fits.last()) else {
            panic!("no number of whole commands gives this log: {log:?}");
        };
        // Outcomes without events may be lost or not.
        let new = last.outcomes.keys().filter(|owner| !first.outcomes.contains_key(owner));
        self.unknown.extend(new.copied());
        let model = Model::clone(first);
        self.begin(model);
    }

    fn begin(&mut self, model: Model) {
        (self.models, self.certain) = (vec![model], 0);
    }
}

/// Claims all answers and compares them.
fn claim(client: &mut Client<Account>, open: &mut VecDeque<(Ticket, Told, Sent)>) {
    for (ticket, expected, sent) in open.drain(..) {
        assert_eq!(told(client.answer(ticket).wait_until(soon().unwrap())), expected, "{sent:?}");
    }
}

fn run(runs: &[(Vec<Step>, End)], durability: Durability) {
    let mut storage = FaultyStorage::new();
    let open = |storage: &FaultyStorage| {
        let config = small("/s").durability(durability).outcomes_kept(1024).snapshot_every(3);
        Engine::<Account>::builder(config).faulty_storage(storage).open().unwrap()
    };
    let mut engine = open(&storage);
    let durable = durability != Durability::OsCache;
    let mut model = Run { durable, models: vec![Model::default()], certain: 0, unknown: HashSet::new() };
    for (steps, end) in runs {
        model.perform(&engine, steps);
        model.models.last().unwrap().check(&engine, "before the end");
        match *end {
            End::Restart => {
                engine.shutdown(soon()).unwrap();
                drop(engine);
                engine = open(&storage);
                let last = model.models.last().unwrap().clone();
                model.begin(last);
            }
            End::PowerCut(unsynced) => {
                storage = storage.after_crash(unsynced.map_or(Unsynced::Lost, Unsynced::Random));
                engine = open(&storage);
                model.cut(&engine);
            }
        }
        model.models[0].check(&engine, "after the opening");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: env_number("CORELANE_MODEL_CASES", 24) as u32,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]

    #[test]
    fn commands_for_several_keys_agree_with_the_model_across_restarts_and_power_cuts(
        runs in prop::collection::vec((prop::collection::vec(step(), 0..60), end()), 1..5),
        group in any::<bool>(),
    ) {
        run(&runs, if group { Durability::GroupCommit } else { Durability::OsCache });
    }
}
