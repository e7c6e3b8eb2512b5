//! Commands over several keys of one shard: what a decision sees and emits, the answers, idempotency, and bad input.

use crate::common::bank::{Account, Order, Refused, logged};
use crate::common::{block_on, os_cache, small, soon};
use corelane::command::{ExpectedVersion, KEYS_MAX};
use corelane::consumer::Start;
use corelane::error::{KeysError, RejectedReason};
use corelane::state::States;
use corelane::testing::FaultyStorage;
use corelane::view::ById;
use corelane::{
    Aggregate, Bounded, Client, CommandError, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Outcome,
    Placement, Rejected, Retention, Version,
};
use rkyv::{Archive, Deserialize, Serialize};

const A: Key = Key(1);
const B: Key = Key(2);
const C: Key = Key(3);

fn open(storage: &FaultyStorage) -> Engine<Account> {
    Engine::<Account>::builder(os_cache("/s").outcomes_kept(64).snapshot_every(3))
        .faulty_storage(storage)
        .open()
        .unwrap()
}

/// An engine whose accounts `A` and `B` have 100 cents each.
fn rich() -> (FaultyStorage, Engine<Account>) {
    let storage = FaultyStorage::new();
    let engine = open(&storage);
    let mut client = engine.client();
    for key in [A, B] {
        client.send(key, Order::Deposit(100)).wait().unwrap();
    }
    (storage, engine)
}

fn versions(outcome: &Outcome) -> Vec<(u64, u64)> {
    outcome.versions().map(|(key, version)| (key.0, version.0)).collect()
}

fn cents<const N: usize>(engine: &Engine<Account>, keys: [Key; N]) -> [u64; N] {
    keys.map(|key| engine.ask(key, |state, _| state.cents).wait().unwrap())
}

/// The number of events in the log.
fn events(engine: &Engine<Account>) -> usize {
    logged(engine, 0).len()
}

#[test]
fn a_decision_sees_every_state_and_its_events_are_one_group_with_a_version_step_each() {
    let (_storage, engine) = rich();
    let mut client = engine.client();
    let outcome = client.send_many(&[A, B, C], Order::Pay(30)).wait().unwrap();
    assert_eq!((outcome.key, outcome.version, outcome.events, outcome.repeated), (A, Version(3), 4, false));
    assert_eq!(versions(&outcome), [(1, 3), (2, 2), (3, 1)]);
    assert_eq!((outcome.version_of(B), outcome.version_of(Key(9))), (Some(Version(2)), None));
    assert_eq!(cents(&engine, [A, B, C]), [40, 130, 30]);
    let log: Vec<_> = logged(&engine, 0)[2..].iter().map(|event| (event.key, event.version)).collect();
    assert_eq!(log, [(1, 2), (2, 2), (1, 3), (3, 1)]);
    // A rejection looks at the states too, and appends nothing.
    match client.send_many(&[C, A], Order::Pay(31)).wait() {
        Err(CommandError::Rejected(Refused::NotEnough { missing })) => assert_eq!(missing, 1),
        other => panic!("{other:?}"),
    }
    assert_eq!(events(&engine), 6);
    // Keys without events, and no events.
    let nothing = client.send_many(&[Key(8), B], Order::Nothing).wait().unwrap();
    assert_eq!((versions(&nothing), nothing.events), (vec![(8, 0), (2, 2)], 0));
    // A command for one key may be sent in this way too.
    let alone = client.send_many(&[C], Order::Deposit(1)).wait().unwrap();
    assert_eq!((versions(&alone), alone.events), (vec![(3, 2)], 1));
    // A command for one key has one version.
    assert_eq!(versions(&client.send(B, Order::Deposit(1)).wait().unwrap()), [(2, 3)]);
}

#[test]
fn sixteen_keys_may_be_named_in_any_order_and_pipelined_commands_are_decided_in_order() {
    let (_storage, engine) = rich();
    let mut client = engine.client();
    let keys: Vec<Key> = (1..=KEYS_MAX as u64).rev().map(Key).collect();
    let deposited = client.send_many(&keys, Order::Deposits((100..132).collect())).wait().unwrap();
    assert_eq!(deposited.events, 32);
    let expected: Vec<_> = (1..=16).rev().map(|key| (key, if key < 3 { 3 } else { 2 })).collect();
    assert_eq!(versions(&deposited), expected);
    // The first key got events 0 and 16.
    assert_eq!(cents(&engine, [Key(16), Key(1)]), [100 + 116, 100 + 115 + 131]);
    // A pays B, and B pays the sum on to C: each decision sees the one before it.
    let before = cents(&engine, [A, B, C]);
    let tickets: Vec<_> = (0..20)
        .flat_map(|_| [[A, B], [B, C]])
        .map(|keys| client.send_many(&keys, Order::Pay(10)).ticket().unwrap())
        .collect();
    for ticket in tickets {
        assert_eq!(client.answer(ticket).wait().unwrap().events, 2);
    }
    assert_eq!(cents(&engine, [A, B, C]), [before[0] - 200, before[1], before[2] + 200]);
}

#[test]
fn tasks_await_answers_of_several_keys_and_tell_needs_no_answer() {
    let (_storage, engine) = rich();
    let mut client = engine.client();
    block_on(async {
        let outcome = client.send_many(&[A, B], Order::Pay(1)).await.unwrap();
        assert_eq!(versions(&outcome), [(1, 2), (2, 2)]);
        let refused = client.send_many(&[A, A], Order::Pay(1)).await;
        assert!(matches!(refused, Err(CommandError::NotSent(RejectedReason::Keys(KeysError::Twice { key: A })))));
    });
    client.send_many(&[A, B], Order::Pay(1)).tell().unwrap();
    let outcome = client.send_many(&[A, B], Order::Pay(1)).wait_until(soon().unwrap()).unwrap();
    assert_eq!(versions(&outcome), [(1, 4), (2, 4)]);
    // An answer that is polled too early, and claimed once.
    let ticket = client.send_many(&[A, B], Order::Pay(1)).ticket().unwrap();
    while client.try_answer(&ticket).is_none() {}
    assert!(matches!(client.answer(ticket).wait(), Err(CommandError::Claimed)));
}

#[test]
fn a_durable_answer_of_several_keys_keeps_all_versions_while_it_waits() {
    let storage = FaultyStorage::new();
    let engine = Engine::<Account>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
    let mut client = engine.client();
    for _ in 0..20 {
        let ticket = client.send_many(&[A, B], Order::Deposits(vec![5, 6])).durable().ticket().unwrap();
        let outcome = loop {
            if let Some(answer) = client.try_answer(&ticket) {
                break answer.unwrap();
            }
        };
        assert!(outcome.receipt().is_durable());
        assert_eq!(outcome.versions().count(), 2);
    }
    let outcome = client.send_many(&[A, B], Order::Nothing).durable().wait().unwrap();
    assert_eq!(versions(&outcome), [(1, 20), (2, 20)]);
}

#[test]
fn versions_are_expected_of_every_key_or_of_one() {
    let (_storage, engine) = rich();
    let mut client = engine.client();
    let exact = |version| ExpectedVersion::Exact(Version(version));
    let wrong = |answer: Result<Outcome, CommandError<Refused>>| match answer {
        Err(CommandError::WrongVersion { key, expected, found, .. }) => (key.0, expected, found.0),
        other => panic!("{other:?}"),
    };
    let answer = client.send_many(&[A, B], Order::Pay(1)).expect(ExpectedVersion::NoEvents).wait();
    assert_eq!(wrong(answer), (1, ExpectedVersion::NoEvents, 1));
    let answer = client.send_many(&[A, C], Order::Pay(1)).expect(ExpectedVersion::Exists).wait();
    assert_eq!(wrong(answer), (3, ExpectedVersion::Exists, 0));
    let answer = client.send_many(&[A, B], Order::Pay(1)).expect_of(A, exact(1)).expect_of(B, exact(2)).wait();
    assert_eq!(wrong(answer), (2, exact(2), 1));
    assert_eq!(events(&engine), 2, "nothing was appended");
    let done = client.send_many(&[A, B, C], Order::Pay(1)).expect(ExpectedVersion::Exists).expect_of(C, exact(0));
    assert_eq!(versions(&done.wait().unwrap()), [(1, 3), (2, 2), (3, 1)]);
    // The later expectation replaces the earlier one.
    let done = client.send_many(&[A, B], Order::Pay(1)).expect_of(B, exact(9)).expect(exact(3)).expect_of(B, exact(2));
    assert_eq!(versions(&done.wait().unwrap()), [(1, 4), (2, 3)]);
    let done = client.send(A, Order::Deposit(1)).expect_of(A, exact(4)).wait().unwrap();
    assert_eq!(done.version, Version(5));
    // A key that the command does not name.
    for refused in [
        client.send_many(&[A, B], Order::Pay(1)).expect_of(C, exact(1)).wait(),
        client.send(A, Order::Deposit(1)).expect_of(C, exact(1)).wait(),
    ] {
        let Err(CommandError::NotSent(RejectedReason::Keys(fault))) = refused else { panic!("{refused:?}") };
        assert_eq!(fault, KeysError::NotNamed { key: C });
    }
}

/// Sends a command to these keys in every way and returns the fault. Nothing is sent, and the command comes back.
fn fault(client: &mut Client<Account>, keys: &[Key]) -> KeysError {
    let order = || Order::Deposits(vec![1; 3]);
    let given_back = |rejected: Rejected<Order>| match rejected {
        Rejected::Keys(command, fault) => {
            assert_eq!(command, order());
            fault
        }
        other => panic!("{other:?}"),
    };
    let fault = given_back(client.send_many(keys, order()).ticket().unwrap_err());
    assert_eq!(given_back(client.send_many(keys, order()).try_ticket().unwrap_err()), fault);
    assert_eq!(given_back(client.send_many(keys, order()).ticket_until(soon().unwrap()).unwrap_err()), fault);
    assert_eq!(given_back(client.send_many(keys, order()).once(1).tell().unwrap_err()), fault);
    for answer in [
        client.send_many(keys, order()).wait(),
        client.send_many(keys, order()).durable().wait_until(soon().unwrap()),
        block_on(std::future::IntoFuture::into_future(client.send_many(keys, order()))),
    ] {
        let Err(CommandError::NotSent(RejectedReason::Keys(found))) = answer else { panic!("{answer:?}") };
        assert_eq!(found, fault);
    }
    assert_eq!(client.on_their_way(), 0);
    fault
}

#[test]
fn no_key_too_many_keys_a_key_twice_and_keys_of_two_shards_are_refused_by_name() {
    let storage = FaultyStorage::new();
    let config = os_cache("/s").shards(3);
    let engine = Engine::<Account>::builder(config).faulty_storage(&storage).open().unwrap();
    let mut client = engine.client();
    assert_eq!(fault(&mut client, &[]), KeysError::None);
    let of_shard = |shard: u16| (0..).map(Key).filter(move |key| key.shard(3).0 == shard);
    let same: Vec<Key> = of_shard(0).take(KEYS_MAX + 1).collect();
    let (first, last) = (same[0], same[KEYS_MAX]);
    assert_eq!(fault(&mut client, &same), KeysError::TooMany { keys: 17, keys_max: 16, first, last });
    assert_eq!(fault(&mut client, &[same[3], same[1], same[2], same[1]]), KeysError::Twice { key: same[1] });
    let stranger = of_shard(2).next().unwrap();
    let error = fault(&mut client, &[same[0], same[1], stranger]);
    let (shard, other_shard) = (engine.shard_of(same[0]), engine.shard_of(stranger));
    assert_eq!(error, KeysError::TwoShards { first: same[0], shard, other: stranger, other_shard });
    let text = error.to_string();
    assert!(text.contains(&same[0].to_string()) && text.contains(&stranger.to_string()), "{text}");
    assert_eq!(client.send_many(&same[..KEYS_MAX], Order::Deposits(vec![1; 16])).wait().unwrap().events, 16);
    assert_eq!((0..3).map(|shard| logged(&engine, shard).len()).sum::<usize>(), 16, "the refused ones left nothing");
}

#[test]
fn a_decision_that_panics_after_emitting_for_one_key_appends_nothing() {
    let (storage, engine) = rich();
    let mut client = engine.client();
    for once in [false, true] {
        let sending = client.send_many(&[A, B], Order::Panic);
        match if once { sending.once(1).wait() } else { sending.wait() } {
            Err(CommandError::Panicked(text)) => assert_eq!(text, "asked for"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((events(&engine), cents(&engine, [A, B])), (2, [100, 100]));
    // The emitted events do not appear with the next decision.
    let outcome = client.send_many(&[B, A], Order::Pay(1)).once(1).wait().unwrap();
    assert_eq!((versions(&outcome), outcome.events, outcome.repeated), (vec![(2, 2), (1, 2)], 2, false));
    assert_eq!(client.send(C, Order::Deposit(1)).wait().unwrap().events, 1);
    assert_eq!(cents(&engine, [A, B, C]), [101, 99, 1]);
    drop((client, engine));
    assert_eq!(cents(&open(&storage), [A, B, C]), [101, 99, 1]);
}

#[test]
fn an_event_for_a_key_outside_the_command_fails_it_and_appends_nothing() {
    let (_storage, engine) = rich();
    let mut client = engine.client();
    for answer in [
        client.send_many(&[A, B], Order::Foreign(3)).wait(),
        client.send_many(&[A, B], Order::Foreign(3)).once(1).wait(),
        client.send(A, Order::Foreign(3)).wait(),
        client.send(A, Order::Foreign(2)).once(2).wait(),
    ] {
        let Err(CommandError::ForeignKey { key, .. }) = answer else { panic!("{answer:?}") };
        assert!([B, C].contains(&key));
    }
    assert_eq!(events(&engine), 2);
    // A key of an earlier command is as foreign; the command's own key is not.
    assert_eq!(client.send_many(&[A, B], Order::Pay(1)).wait().unwrap().events, 2);
    assert!(matches!(client.send(A, Order::Foreign(2)).wait(), Err(CommandError::ForeignKey { key: B, .. })));
    assert_eq!(client.send(A, Order::Foreign(1)).once(1).wait().unwrap().events, 2);
    assert_eq!(client.send_many(&[B, A], Order::Foreign(1)).once(1).wait().unwrap().events, 3);
    assert_eq!(engine.shard_metrics()[0].rejected, 5);
}

#[test]
fn the_first_key_owns_the_outcome_and_a_repeat_gets_all_versions_also_after_a_restart() {
    let (storage, engine) = rich();
    let mut client = engine.client();
    let first = client.send_many(&[A, B, C], Order::Pay(10)).once("pay").wait().unwrap();
    let all = vec![(1, 3), (2, 2), (3, 1)];
    assert_eq!((versions(&first), first.repeated), (all.clone(), false));
    let refused = client.send_many(&[C, B], Order::Pay(1000)).once("too much").wait();
    assert!(matches!(refused, Err(CommandError::Rejected(Refused::NotEnough { missing: 990 }))), "{refused:?}");
    client.send_many(&[B, A], Order::Pay(1)).once("other").wait().unwrap();
    let single = client.send(C, Order::Deposit(1)).once("single").wait().unwrap();
    let nothing = client.send_many(&[Key(8), Key(9)], Order::Nothing).once("nothing").wait().unwrap();
    assert_eq!(versions(&nothing), [(8, 0), (9, 0)]);
    let count = events(&engine);
    let repeats = |engine: &Engine<Account>, how: &str| {
        let mut client = engine.client();
        let check = |outcome: Outcome, expected: &[(u64, u64)], count: u32| {
            assert_eq!(
                (versions(&outcome), outcome.events, outcome.repeated),
                (expected.to_vec(), count, true),
                "{how}"
            );
        };
        // With the same keys, with others, and for one key: the first key alone counts.
        check(client.send_many(&[A, B, C], Order::Pay(10)).once("pay").wait().unwrap(), &all, 4);
        check(client.send_many(&[A, Key(77)], Order::Deposit(5)).once("pay").wait().unwrap(), &all, 4);
        check(client.send(A, Order::Deposit(5)).once("pay").wait().unwrap(), &all, 4);
        check(client.send_many(&[B, A], Order::Pay(1)).once("other").wait().unwrap(), &[(2, 3), (1, 4)], 2);
        check(client.send_many(&[C, A], Order::Pay(1)).once("single").wait().unwrap(), &[(3, single.version.0)], 1);
        check(client.send_many(&[Key(8), A], Order::Pay(1)).once("nothing").wait().unwrap(), &[(8, 0), (9, 0)], 0);
        let refused = client.send_many(&[C, A], Order::Pay(0)).once("too much").wait();
        assert!(matches!(refused, Err(CommandError::Rejected(Refused::NotEnough { missing: 990 }))), "{refused:?}");
        assert_eq!(events(engine), count, "{how}");
    };
    repeats(&engine, "at once");
    engine.shutdown(soon()).unwrap();
    drop((client, engine));
    for how in ["from the log", "from the log again", "from a checkpoint", "from a checkpoint again"] {
        let engine = open(&storage);
        repeats(&engine, how);
        assert_eq!(engine.snapshot_stats().unreadable, 0, "{how}");
        if how == "from the log again" {
            engine.checkpoint(soon()).unwrap();
        }
        engine.shutdown(soon()).unwrap();
    }
    // With another first key the command is carried out.
    let engine = open(&storage);
    let again = engine.client().send_many(&[B, A, C], Order::Pay(10)).once("pay").wait().unwrap();
    assert_eq!((again.repeated, again.events), (false, 4));
}

#[test]
fn history_snapshots_and_views_of_each_key_agree_with_the_commands() {
    let storage = FaultyStorage::new();
    let view = ById::new(64, |account: &Account| account.clone());
    let config = || os_cache("/s").snapshot_every(3);
    let mut engine = Engine::<Account>::builder(config()).view(&view).faulty_storage(&storage).open().unwrap();
    let keys = [A, B, C, Key(4)];
    let mut past: Vec<Vec<Account>> = vec![vec![Account::default()]; 4];
    for n in 0..120_u64 {
        let (from, to) = ((n % 4) as usize, ((n + 1 + n % 3) % 4) as usize);
        let order = if n < 8 { Order::Deposits(vec![50, 60, 70]) } else { Order::Pay(n % 9) };
        let outcome = engine.client().send_many(&[keys[from], keys[to]], order).wait().unwrap();
        for at in [from, to] {
            let log = logged(&engine, 0);
            let mut state = past[at].last().unwrap().clone();
            let new = log.iter().filter(|event| event.key == keys[at].0).skip(past[at].len() - 1);
            for event in new {
                state.apply(&event.money, event.version);
                past[at].push(state.clone());
            }
            assert_eq!(outcome.version_of(keys[at]), Some(Version(past[at].len() as u64 - 1)));
            engine.ask(keys[at], |_, _| ()).wait().unwrap();
            assert_eq!(view.get(keys[at]).unwrap().as_ref(), Some(&state));
        }
        if n % 40 == 39 {
            if n == 79 {
                engine.checkpoint(soon()).unwrap();
            }
            engine.shutdown(soon()).unwrap();
            drop(engine);
            engine = Engine::<Account>::builder(config()).view(&view).faulty_storage(&storage).open().unwrap();
            assert!(engine.compare().unwrap().differing.is_empty());
        }
    }
    for (key, past) in keys.into_iter().zip(&past) {
        for (version, state) in (0..).map(Version).zip(past) {
            let found = engine.state_at(key, version).unwrap();
            assert_eq!((&found.state, found.version), (state, version), "key {key}");
            assert!(found.applied <= 3, "a snapshot is near");
        }
        let mut stream = engine.stream(key, Version(1)).unwrap();
        let mut count = 0;
        while let Some(record) = stream.next().unwrap() {
            count += 1;
            assert_eq!((record.meta.key, record.meta.version.0), (key, count));
        }
        assert_eq!(count as usize, past.len() - 1);
        assert_eq!(engine.rebuild(key).unwrap(), (past[count as usize].clone(), Version(count)));
        assert_eq!(view.get(key).unwrap().as_ref(), past.last());
    }
}

#[test]
fn retention_frees_groups_of_several_keys_and_no_state_or_outcome_with_them() {
    let storage = FaultyStorage::new();
    let config = || {
        let retention = Retention::bytes(3 * crate::common::SEGMENT);
        os_cache("/s").snapshot_every(5).outcomes_kept(16).retention(retention)
    };
    let open = || Engine::<Account>::builder(config()).faulty_storage(&storage).open().unwrap();
    let mut engine = open();
    let mut last = Vec::new();
    for n in 0..600_u64 {
        let keys = [Key(n % 7), Key(7 + n % 5), Key(12 + n % 3)];
        let sizes = vec![300, 10, 500, (n % 700) as usize];
        let outcome = engine.client().send_many(&keys, Order::NotesOf(sizes)).once(n).wait().unwrap();
        last.push((keys[0], n, versions(&outcome)));
        if n % 150 == 149 {
            engine.shutdown(soon()).unwrap();
            drop(engine);
            engine = open();
        }
    }
    crate::common::until("retention frees segments", || {
        engine.reader(corelane::ShardId(0)).offset().0 > crate::common::SEGMENT
    });
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = open();
    assert!(engine.compare().unwrap().differing.is_empty());
    let mut client = engine.client();
    for (key, id, versions_then) in last.iter().skip(600 - 7 * 16) {
        let again = client.send_many(&[*key, Key(99)], Order::Nothing).once(*id).wait().unwrap();
        assert_eq!((versions(&again), again.repeated), (versions_then.clone(), true), "command {id}");
    }
    for key in (0..15).map(Key) {
        let (state, version) = engine.state(key).wait().unwrap().unwrap();
        assert_eq!(engine.state_at(key, version).unwrap().state, state);
    }
}

#[test]
fn a_command_for_several_keys_waits_whole_for_a_segment_and_too_large_ones_are_refused() {
    let storage = FaultyStorage::new();
    let engine = open(&storage);
    let mut client = engine.client();
    let before = client.send_many(&[A, B, C], Order::NotesOf(vec![14_000; 3])).wait().unwrap();
    assert_eq!(versions(&before), [(1, 1), (2, 1), (3, 1)]);
    let mut expected = 1;
    for round in 0..20 {
        // Each command takes more than half a segment, and the keeper cannot prepare segments.
        storage.hold(true);
        let order = || Order::NotesOf(vec![14_000; 3]);
        let tickets: Vec<_> =
            (0..3).map(|n| client.send_many(&[A, B, C], order()).once(3 * round + n).ticket().unwrap()).collect();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let log = logged(&engine, 0);
        let held = |key: Key| log.iter().filter(|event| event.key == key.0).count();
        assert!(held(A) == held(B) && held(B) == held(C), "round {round}: all of a command or nothing");
        storage.hold(false);
        for ticket in tickets {
            expected += 1;
            let outcome = client.answer(ticket).wait_until(soon().unwrap()).unwrap();
            assert_eq!(versions(&outcome), [(1, expected), (2, expected), (3, expected)], "round {round}");
        }
    }
    let segments: Vec<u64> = logged(&engine, 0).iter().map(|event| event.offset / crate::common::SEGMENT).collect();
    assert!(segments.chunks(3).all(|group| group[0] == group[2]), "a group is in one segment");
    let count = events(&engine);
    let refused = client.send_many(&[A, B], Order::NotesOf(vec![14_000; 5])).wait();
    assert!(matches!(refused, Err(CommandError::TooLarge { .. })), "{refused:?}");
    let refused = client.send_many(&[A, B], Order::NotesOf(vec![1, 40_000])).once(1_000_000).wait();
    assert!(matches!(refused, Err(CommandError::TooLarge { .. })), "{refused:?}");
    assert_eq!(events(&engine), count);
}

/// Counts notes; has no `decide_many`.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
struct Notes(u64);

#[derive(Archive, Serialize, Deserialize, Bounded, Clone)]
struct Noted;

impl Event for Noted {
    const TYPES: &'static [EventType] = &[EventType::new(1, "noted", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

impl Aggregate for Notes {
    type Event = Noted;
    type Command = ();
    type Rejection = ();

    fn evolve(&mut self, _event: &ArchivedNoted, _meta: &Meta) {
        self.0 += 1;
    }

    fn decide(&self, (): (), emit: &mut Emit<Noted>) -> Result<(), ()> {
        emit.event(Noted);
        Ok(())
    }
}

#[test]
fn an_aggregate_without_decide_many_refuses_commands_for_several_keys() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Notes>::open(small(dir.path())).unwrap();
    let mut client = engine.client();
    for once in [false, true] {
        let sending = client.send_many(&[A, B], ());
        let refused = if once { sending.once(1).wait() } else { sending.wait() };
        assert!(matches!(refused, Err(CommandError::NotSupported)), "{refused:?}");
    }
    assert_eq!(client.send(A, ()).once(1).wait().unwrap().version, Version(1));
    assert!(matches!(client.send_many(&[B], ()).wait(), Err(CommandError::NotSupported)));
}

/// An event that may be of a type that is not declared.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone)]
struct Typed(u16);

impl Event for Typed {
    const TYPES: &'static [EventType] = &[EventType::new(1, "typed", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(self.0)
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
struct Counted(u64);

impl Aggregate for Counted {
    type Event = Typed;
    type Command = Vec<(Key, u16)>;
    type Rejection = ();

    fn evolve(&mut self, _event: &ArchivedTyped, _meta: &Meta) {
        self.0 += 1;
    }

    fn decide(&self, _: Vec<(Key, u16)>, _: &mut Emit<Typed>) -> Result<(), ()> {
        Ok(())
    }

    fn decide_many(states: &States<'_, Self>, events: Vec<(Key, u16)>, emit: &mut Emit<Typed>) -> Result<(), ()> {
        assert_eq!(states.len(), states.iter().len());
        for (key, event_type) in events {
            if event_type == 9 {
                emit.event_for(Key(u64::MAX), Typed(1));
                panic!("after a mistake");
            }
            // A key that the command does not name panics.
            let _count = states[key].0;
            assert!(states.get(Key(u64::MAX)).is_none() && states.version(Key(u64::MAX)).is_none());
            emit.event_for(key, Typed(event_type));
        }
        Ok(())
    }
}

#[test]
fn an_undeclared_event_type_of_one_key_and_a_state_that_is_not_named_refuse_the_whole_command() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Counted>::open(small(dir.path())).unwrap();
    let mut client = engine.client();
    let refused = client.send_many(&[A, B], vec![(A, 1), (B, 2)]).wait();
    assert!(matches!(refused, Err(CommandError::UndeclaredType { event_type: EventTypeId(2), .. })), "{refused:?}");
    match client.send_many(&[A, B], vec![(A, 1), (C, 1)]).wait() {
        Err(CommandError::Panicked(text)) => assert!(text.contains("does not name key 3"), "{text}"),
        other => panic!("{other:?}"),
    }
    // A mistake before a panic is not that of the next decision.
    let panicked = client.send_many(&[A, B], vec![(A, 9)]).wait();
    assert!(matches!(panicked, Err(CommandError::Panicked(_))), "{panicked:?}");
    assert_eq!(client.send(A, Vec::new()).wait().unwrap().events, 0);
    assert_eq!(engine.state(A).wait().unwrap().map(|(_, version)| version), None);
    let outcome = client.send_many(&[A, B], vec![(B, 1), (A, 1), (B, 1)]).wait().unwrap();
    assert_eq!(outcome.versions().collect::<Vec<_>>(), [(A, Version(1)), (B, Version(2))]);
}

#[test]
fn a_placement_lets_one_command_change_the_keys_of_one_zone_on_any_number_of_shards() {
    let storage = FaultyStorage::new();
    let placement = || Placement::new("zone", 1, |key| key.0 >> 32);
    let open = || {
        let config = os_cache("/s").shards(4).placement(placement()).outcomes_kept(64);
        Engine::<Account>::builder(config).faulty_storage(&storage).open().unwrap()
    };
    let key = |zone: u64, player: u64| Key(zone << 32 | player);
    let engine = open();
    let mut client = engine.client();
    let mut shards = std::collections::BTreeSet::new();
    for zone in 0..20 {
        let keys: Vec<Key> = (0..5).map(|player| key(zone, player)).collect();
        client.send_many(&keys, Order::Deposits(vec![40; 5])).once(1).wait().unwrap();
        client.send_many(&keys, Order::Pay(zone)).wait_until(soon().unwrap()).ok();
        shards.insert(engine.shard_of(keys[0]));
    }
    assert_eq!(shards.len(), 4);
    let other = (1..).find(|zone| engine.shard_of(key(*zone, 0)) != engine.shard_of(key(0, 0))).unwrap();
    let refused = client.send_many(&[key(0, 0), key(other, 0)], Order::Pay(1)).wait();
    assert!(matches!(refused, Err(CommandError::NotSent(RejectedReason::Keys(KeysError::TwoShards { .. })))));
    engine.shutdown(soon()).unwrap();
    drop((client, engine));
    let engine = open();
    let mut client = engine.client();
    for zone in 0..20 {
        let total: u64 =
            (0..5).map(|player| engine.ask(key(zone, player), |state, _| state.cents).wait().unwrap()).sum();
        assert_eq!(total, 200, "zone {zone}");
        let again = client.send_many(&[key(zone, 0)], Order::Nothing).once(1).wait().unwrap();
        assert!(again.repeated && again.versions().count() == 5);
    }
}

#[test]
fn a_consumer_may_stop_between_two_events_of_a_group_and_continues_there() {
    let storage = FaultyStorage::new();
    let mut seen = Vec::new();
    for round in 0..6 {
        let engine = open(&storage);
        if round == 0 {
            let mut client = engine.client();
            client.send_many(&[A, B], Order::Deposits(vec![10, 20, 30, 40])).once(1).wait().unwrap();
            client.send_many(&[B, C], Order::Pay(5)).wait().unwrap();
        }
        let mut poller = engine.consumer("one-by-one").before_durable().start_at(Start::Beginning).poller().unwrap();
        let Some(delivery) = poller.next().unwrap() else { break };
        seen.push(poller.event(&delivery).map(|(_, meta)| (meta.key, meta.version.0)).unwrap());
        poller.succeeded(delivery).unwrap();
        poller.save().unwrap();
        drop(poller);
        engine.shutdown(soon()).unwrap();
    }
    assert_eq!(seen, [(A, 1), (B, 1), (A, 2), (B, 2), (B, 3), (C, 1)]);
    // A reader may begin in the middle of a group too.
    let engine = open(&storage);
    let second = logged(&engine, 0)[1].offset;
    let mut reader = engine.reader_at(corelane::ShardId(0), corelane::Offset(second)).unwrap();
    assert_eq!(reader.next().unwrap().map(|record| record.meta.key), Some(B));
}
