//! Commands of several threads against a sequential model, with restarts and power cuts: one order of a key's commands
//! explains every answer and every event in the log. `CORELANE_MODEL_CASES` sets the cases (24).

use std::collections::{HashMap, VecDeque};

use crate::common::bank::{Account, Logged, Money, Order, Refused, folded, logged};
use crate::common::{env_number, small, soon};
use corelane::command::{ExpectedVersion, Ticket};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Client, CommandError, Durability, Engine, Key, Outcome, Version};
use proptest::prelude::*;

const SHARDS: u16 = 2;
const KEYS: u64 = 4;
const THREADS: usize = 3;
/// Bytes of records that a segment holds.
const ROOM: usize = crate::common::SEGMENT as usize - crate::common::PAGE;

/// A step of a thread.
#[derive(Debug, Clone)]
enum Step {
    Command(Sent),
    /// Publishes a deposit whose amount encodes the thread, so that the log shows the sender.
    Publish {
        key: u64,
        triple: u64,
    },
}

#[derive(Debug, Clone)]
struct Sent {
    key: u64,
    order: Order,
    expected: ExpectedVersion,
    once: Option<u64>,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    Pipelined,
    OneAtATime,
    Durable,
}

/// How a run of the engine ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Restart,
    /// With or without a flush before; `unsynced` decides which unsynced bytes survive.
    PowerCut {
        flushed: bool,
        unsynced: Option<u64>,
    },
}

type Answer = Result<Outcome, CommandError<Refused>>;

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        4 => (0..30_u64).prop_map(|cents| Order::Deposit(3 * cents)),
        4 => (0..60_u64).prop_map(Order::Withdraw),
        3 => (0..60_u64, 0..20_u64).prop_map(|(out, back)| Order::Exchange { out, back: 3 * back }),
        2 => (0..12_usize, 0..9000_usize).prop_map(|(count, bytes)| Order::Notes { count, bytes }),
        1 => Just(Order::Nothing),
    ]
}

fn expected() -> impl Strategy<Value = ExpectedVersion> {
    prop_oneof![
        6 => Just(ExpectedVersion::Any),
        1 => Just(ExpectedVersion::NoEvents),
        1 => Just(ExpectedVersion::Exists),
        2 => (0..40_u64).prop_map(|version| ExpectedVersion::Exact(Version(version))),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let how = prop_oneof![4 => Just(How::Pipelined), 2 => Just(How::OneAtATime), 1 => Just(How::Durable)];
    let once = prop::option::weighted(0.4, 1..7_u64);
    prop_oneof![
        5 => (0..KEYS, order(), expected(), once, how).prop_map(|(key, order, expected, once, how)| {
            Step::Command(Sent { key, order, expected, once, how })
        }),
        1 => (0..KEYS, 0..20_u64).prop_map(|(key, triple)| Step::Publish { key, triple }),
    ]
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        Just(End::Restart),
        (any::<bool>(), prop::option::of(1..u64::MAX))
            .prop_map(|(flushed, unsynced)| End::PowerCut { flushed, unsynced }),
    ]
}

type Scripts = Vec<Vec<Step>>;

fn scripts() -> impl Strategy<Value = Scripts> {
    prop::collection::vec(prop::collection::vec(step(), 0..40), THREADS)
}

/// Runs the script. Returns every answer, in sending order.
fn perform(engine: &Engine<Account>, thread: usize, script: &[Step], durable: bool) -> Vec<(Sent, Answer)> {
    fn claim(client: &mut Client<Account>, open: &mut VecDeque<(Ticket, usize)>, answers: &mut [Option<Answer>]) {
        let (ticket, at) = open.pop_front().unwrap();
        answers[at] = Some(client.answer(ticket).wait_until(soon().unwrap()));
    }
    let (mut client, mut producer) = (engine.client(), engine.producer());
    let (mut sent, mut answers, mut open) = (Vec::new(), Vec::new(), VecDeque::new());
    for step in script {
        match step {
            Step::Publish { key, triple } => {
                producer.publish(Key(*key), Money::Deposited { cents: published(*triple, thread) }).unwrap();
            }
            Step::Command(command) => {
                let mut sending = client.send(Key(command.key), command.order.clone()).expect(command.expected);
                if let Some(id) = command.once {
                    sending = sending.once(id);
                }
                sent.push(command.clone());
                match command.how {
                    How::Pipelined => {
                        open.push_back((sending.ticket().unwrap(), answers.len()));
                        answers.push(None);
                    }
                    How::Durable if durable => answers.push(Some(sending.durable().wait_until(soon().unwrap()))),
                    How::OneAtATime | How::Durable => answers.push(Some(sending.wait_until(soon().unwrap()))),
                }
                if open.len() > 30 {
                    claim(&mut client, &mut open, &mut answers);
                }
            }
        }
    }
    while !open.is_empty() {
        claim(&mut client, &mut open, &mut answers);
    }
    producer.receipts().iter().for_each(|receipt| receipt.appended().wait_until(soon().unwrap()).unwrap());
    sent.into_iter().zip(answers.into_iter().map(Option::unwrap)).collect()
}

/// The amount that a producer deposits. Commands deposit multiples of three below 100.
fn published(triple: u64, thread: usize) -> u64 {
    1000 + triple * 3 + thread as u64
}

/// The known outcome of a command with an idempotency key.
#[derive(Debug, Clone, PartialEq)]
enum Known {
    Done { version: u64, events: u64 },
    Rejected(Refused),
}

/// The expected contents of the store.
#[derive(Default)]
struct Model {
    /// Answers can be durable.
    durable: bool,
    /// The last contents of each shard's log.
    log: [Vec<Logged>; SHARDS as usize],
    /// The outcome by key and idempotency key. `false`: a power cut may have lost it.
    known: HashMap<(u64, u64), (Known, bool)>,
}

/// The states of one key, by version.
struct Past {
    states: Vec<Account>,
    events: Vec<Money>,
}

impl Past {
    fn of(key: u64, log: &[Logged]) -> Self {
        let mut past = Self { states: vec![Account::default()], events: Vec::new() };
        for event in log.iter().filter(|event| event.key == key) {
            let mut state = past.states.last().unwrap().clone();
            state.apply(&event.money, event.version);
            past.states.push(state);
            past.events.push(event.money.clone());
        }
        past
    }

    fn last(&self) -> u64 {
        self.events.len() as u64
    }
}

fn holds(expected: ExpectedVersion, version: u64) -> bool {
    match expected {
        ExpectedVersion::Any => true,
        ExpectedVersion::NoEvents => version == 0,
        ExpectedVersion::Exists => version != 0,
        ExpectedVersion::Exact(exact) => version == exact.0,
        other => panic!("the model does not know {other:?}"),
    }
}

impl Model {
    /// Checks the threads' answers against the log.
    fn check(&mut self, engine: &Engine<Account>, scripts: &Scripts, histories: &[Vec<(Sent, Answer)>]) {
        for shard in 0..SHARDS {
            let (log, before) = (logged(engine, shard), &mut self.log[usize::from(shard)]);
            assert!(log.starts_with(before), "the earlier log is unchanged");
            for key in (0..KEYS).filter(|key| Key(*key).shard(SHARDS).0 == shard) {
                let first = before.iter().filter(|event| event.key == key).count() as u64;
                let past = Past::of(key, &log);
                let of_key: Vec<Vec<_>> = histories
                    .iter()
                    .map(|history| history.iter().filter(|(sent, _)| sent.key == key).collect())
                    .collect();
                check_versions(key, first, &past, scripts, &of_key);
                check_answers(key, first, &past, &mut self.known, &of_key);
            }
            check_states(engine, shard, &log);
            *before = log;
        }
    }

    /// Checks the log after a power cut: every durable event exists, and of the rest a prefix that ends between two
    /// commands.
    fn cut(&mut self, engine: &Engine<Account>, flushed: bool, histories: &[Vec<(Sent, Answer)>]) {
        for shard in 0..SHARDS {
            let (log, before) = (logged(engine, shard), &mut self.log[usize::from(shard)]);
            assert!(before.starts_with(&log), "shard {shard}: a prefix of the earlier log");
            assert!(!flushed || log.len() == before.len(), "shard {shard}: {} of {}", log.len(), before.len());
            let survived = |key: u64| log.iter().filter(|event| event.key == key).count() as u64;
            for (sent, answer) in histories.iter().flatten() {
                let Ok(Outcome { version, events, repeated, .. }) = answer else { continue };
                if Key(sent.key).shard(SHARDS).0 != shard {
                    continue;
                }
                let (first, last) = (version.0 - u64::from(*events), version.0);
                let survived = survived(sent.key);
                assert!(survived <= first || survived >= last, "a part of a command: {sent:?}, {survived}");
                let durable = self.durable && sent.how == How::Durable;
                assert!(!durable || *repeated || survived >= last, "a durable command is gone: {sent:?}, {survived}");
            }
            self.known.retain(|(key, _), (known, certain)| {
                if Key(*key).shard(SHARDS).0 != shard || flushed {
                    return true;
                }
                match known {
                    Known::Done { version, events } => {
                        *certain &= *events > 0;
                        *version <= survived(*key)
                    }
                    Known::Rejected(_) => {
                        *certain = false;
                        true
                    }
                }
            });
            check_states(engine, shard, &log);
            *before = log;
        }
    }
}

fn check_states(engine: &Engine<Account>, shard: u16, log: &[Logged]) {
    let states = folded(log);
    for key in (0..KEYS).filter(|key| Key(*key).shard(SHARDS).0 == shard) {
        let state = engine.state(Key(key)).wait().unwrap().map(|(state, version)| (state, version.0));
        assert_eq!(state.as_ref(), states.get(&key), "the state of key {key}");
    }
}

/// Checks that every version above `first` belongs to a command that was carried out, with its own events, or to a
/// published event, in each thread's order.
fn check_versions(key: u64, first: u64, past: &Past, scripts: &Scripts, of_key: &[Vec<&(Sent, Answer)>]) {
    let mut claimed = vec![false; past.events.len()];
    for (sent, answer) in of_key.iter().flatten() {
        let Ok(Outcome { version, events, repeated: false, .. }) = answer else { continue };
        let before = version.0.checked_sub(u64::from(*events)).expect("no more events than versions");
        assert!(before >= first && version.0 <= past.last(), "a version outside of this run: {sent:?}: {answer:?}");
        assert!(holds(sent.expected, before), "{sent:?}: {answer:?}");
        let range = before as usize..version.0 as usize;
        let would = past.states[range.start].would(&sent.order);
        if *events > 0 {
            assert_eq!(would.as_deref(), Ok(&past.events[range.clone()]), "{sent:?}: {answer:?}");
        } else {
            assert_eq!(would, Ok(Vec::new()), "{sent:?}: {answer:?}");
        }
        for claimed in &mut claimed[range] {
            assert!(!std::mem::replace(claimed, true), "two commands of key {key} with one version: {sent:?}");
        }
    }
    let rest: Vec<u64> = (first as usize..past.events.len())
        .filter(|at| !claimed[*at])
        .map(|at| match past.events[at] {
            Money::Deposited { cents } if cents >= 1000 => cents,
            ref other => panic!("key {key}, version {}: invented {other:?}", at + 1),
        })
        .collect();
    for (thread, script) in scripts.iter().enumerate() {
        let theirs: Vec<u64> = rest.iter().copied().filter(|cents| (cents - 1000) % 3 == thread as u64).collect();
        let wanted: Vec<u64> = script
            .iter()
            .filter_map(|step| match step {
                Step::Publish { key: at, triple } if *at == key => Some(published(*triple, thread)),
                _ => None,
            })
            .collect();
        assert_eq!(theirs, wanted, "key {key}: the events of thread {thread}, in its order");
    }
}

/// Checks that one order explains the answers: each thread's answers fit, in sending order, between the key's versions,
/// and all answers of one idempotency key are equal.
fn check_answers(
    key: u64,
    first: u64,
    past: &Past,
    known: &mut HashMap<(u64, u64), (Known, bool)>,
    of_key: &[Vec<&(Sent, Answer)>],
) {
    let before: HashMap<u64, (Known, bool)> =
        known.iter().filter(|((of, _), _)| *of == key).map(|((_, id), known)| (*id, known.clone())).collect();
    // By idempotency key: the new outcome, all answers, and `true` if a rejection is explained.
    let mut decided: HashMap<u64, Known> = HashMap::new();
    let mut answered: HashMap<u64, Vec<Known>> = HashMap::new();
    let mut explained: HashMap<u64, bool> = HashMap::new();
    for history in of_key {
        let mut at = first;
        let mut settled: Vec<u64> = Vec::new();
        for (sent, answer) in history {
            // Once answered, an idempotency key gets the same answer again.
            let repeats = sent
                .once
                .is_some_and(|id| settled.contains(&id) || before.get(&id).is_some_and(|(_, certain)| *certain));
            let is_rejection = |at: u64, refused: &Refused| {
                holds(sent.expected, at) && past.states[at as usize].would(&sent.order).as_ref() == Err(refused)
            };
            match answer {
                Ok(Outcome { version, events, repeated, .. }) => {
                    let done = Known::Done { version: version.0, events: u64::from(*events) };
                    assert!(*repeated || !repeats, "carried out again: {sent:?}: {answer:?}");
                    if *repeated {
                        at = at.max(version.0);
                    } else {
                        let before = version.0 - u64::from(*events);
                        assert!(
                            before >= at,
                            "overtook an earlier command of its client, at {at}: {sent:?}: {answer:?}"
                        );
                        at = version.0;
                        if let Some(id) = sent.once {
                            let again = decided.insert(id, done.clone());
                            assert_eq!(again, None, "carried out twice under one idempotency key: {sent:?}");
                        }
                    }
                    if let Some(id) = sent.once {
                        answered.entry(id).or_default().push(done);
                        settled.push(id);
                    }
                }
                Err(CommandError::Rejected(refused)) => {
                    let place = (at..=past.last()).find(|at| is_rejection(*at, refused));
                    match sent.once {
                        None => {
                            at = place.unwrap_or_else(|| panic!("no reason to reject from {at}: {sent:?}: {answer:?}"))
                        }
                        Some(id) => {
                            *explained.entry(id).or_default() |= place.is_some() && !repeats;
                            answered.entry(id).or_default().push(Known::Rejected(refused.clone()));
                            settled.push(id);
                        }
                    }
                }
                Err(CommandError::WrongVersion { expected, found, .. }) => {
                    assert!(!repeats, "a repeat was decided again: {sent:?}: {answer:?}");
                    assert_eq!(*expected, sent.expected);
                    assert!(!holds(sent.expected, found.0), "{sent:?}: {answer:?}");
                    assert!((at..=past.last()).contains(&found.0), "{sent:?}: {answer:?}, was at {at}");
                    at = found.0;
                }
                Err(CommandError::TooLarge { .. }) => {
                    assert!(!repeats, "a repeat was decided again: {sent:?}: {answer:?}");
                    let Order::Notes { count, bytes } = sent.order else { panic!("{sent:?}: {answer:?}") };
                    assert!(count * (bytes + 96) + 48 > ROOM, "the command would fit: {sent:?}: {answer:?}");
                }
                Err(other) => panic!("{sent:?}: {other:?}"),
            }
        }
    }
    for (id, answers) in answered {
        let one = &answers[0];
        assert!(answers.iter().all(|answer| answer == one), "key {key}, idempotency key {id}: {answers:?}");
        match before.get(&id) {
            Some((before, true)) => assert_eq!(one, before, "key {key}, idempotency key {id}: the first outcome"),
            Some((before, false)) if one == before => {}
            _ => match one {
                Known::Done { .. } => assert_eq!(decided.get(&id), Some(one), "key {key}: repeated, but never done"),
                Known::Rejected(_) => assert!(explained[&id], "key {key}, idempotency key {id}: no reason for {one:?}"),
            },
        }
        known.insert((key, id), (one.clone(), true));
    }
}

fn run(runs: &[(Scripts, End)], durability: Durability) {
    let mut storage = FaultyStorage::new();
    let open = |storage: &FaultyStorage| {
        let config = small("/s").shards(SHARDS).durability(durability).outcomes_kept(1024);
        Engine::<Account>::builder(config).faulty_storage(storage).open().unwrap()
    };
    let mut engine = open(&storage);
    let durable = durability != Durability::OsCache;
    let mut model = Model { durable, ..Model::default() };
    for (scripts, end) in runs {
        let histories: Vec<_> = std::thread::scope(|scope| {
            let engine = &engine;
            let threads: Vec<_> = scripts
                .iter()
                .enumerate()
                .map(|(i, script)| scope.spawn(move || perform(engine, i, script, durable)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        model.check(&engine, scripts, &histories);
        match *end {
            End::Restart => {
                engine.shutdown(soon()).unwrap();
                drop(engine);
                engine = open(&storage);
                assert!(engine.recovery().shards.iter().all(|shard| shard.torn_tail.is_none()));
                let held = model.log.clone();
                model.cut(&engine, true, &histories);
                assert_eq!(model.log, held, "a restart loses nothing");
            }
            End::PowerCut { flushed, unsynced } => {
                if flushed {
                    engine.flush(soon()).unwrap();
                }
                storage = storage.after_crash(unsynced.map_or(Unsynced::Lost, Unsynced::Random));
                engine = open(&storage);
                model.cut(&engine, flushed, &histories);
            }
        }
    }
}

fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: env_number("CORELANE_MODEL_CASES", 24) as u32,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn one_order_of_a_keys_commands_explains_every_answer_and_every_event(
        runs in prop::collection::vec((scripts(), end()), 1..5),
        group in any::<bool>(),
    ) {
        run(&runs, if group { Durability::GroupCommit } else { Durability::OsCache });
    }
}
