//! Commands are decided against the current state, append all of their events or none, are answered in order, and run
//! once per idempotency key.

use std::time::{Duration, Instant};

use crate::common::bank::{Account, Order, Refused};
use crate::common::{small, soon};
use corelane::command::ExpectedVersion;
use corelane::error::RejectedReason;
use corelane::{
    Aggregate, Bounded, CommandError, Durability, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Rejected,
    Version, WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

fn open(dir: &std::path::Path) -> Engine<Account> {
    Engine::<Account>::open(small(dir).durability(Durability::OsCache)).unwrap()
}

#[test]
fn a_command_is_decided_against_the_state_and_its_outcome_is_returned() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    let key = Key(7);
    let outcome = client.send(key, Order::Deposit(100)).wait().unwrap();
    assert_eq!((outcome.version, outcome.events, outcome.repeated), (Version(1), 1, false));
    match client.send(key, Order::Withdraw(150)).wait() {
        Err(CommandError::Rejected(Refused::NotEnough { missing })) => assert_eq!(missing, 50),
        other => panic!("{other:?}"),
    }
    let outcome = client.send(key, Order::Withdraw(40)).wait().unwrap();
    assert_eq!(outcome.version, Version(2), "a rejection appends nothing");
    let (state, version) = engine.state(key).wait().unwrap().unwrap();
    assert_eq!((state.cents, version), (60, Version(2)));
    assert!(engine.state(Key(8)).wait().unwrap().is_none());
    let metrics = engine.shard_metrics();
    assert_eq!((metrics[0].commands, metrics[0].rejected), (3, 1));
    engine.shutdown(soon()).unwrap();
    assert!(matches!(engine.state(key).wait(), Err(WaitError::Closed)));
    assert!(matches!(client.send(key, Order::Deposit(1)).wait(), Err(CommandError::NotSent(RejectedReason::Closed))));
}

#[test]
fn a_command_with_a_wrong_expected_version_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    let key = Key(1);
    let wrong = client.send(key, Order::Deposit(1)).expect(ExpectedVersion::Exists).wait();
    assert!(matches!(
        wrong,
        Err(CommandError::WrongVersion { key: Key(1), expected: ExpectedVersion::Exists, found: Version(0) })
    ));
    client.send(key, Order::Deposit(1)).expect(ExpectedVersion::NoEvents).wait().unwrap();
    let wrong = client.send(key, Order::Deposit(1)).expect(ExpectedVersion::NoEvents).wait();
    assert!(matches!(wrong, Err(CommandError::WrongVersion { found: Version(1), .. })));
    client.send(key, Order::Deposit(1)).expect(ExpectedVersion::Exact(Version(1))).wait().unwrap();
    assert_eq!(engine.state(key).wait().unwrap().unwrap().0.cents, 2);
}

#[test]
fn pipelined_commands_are_each_answered_once() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path()).shards(2)).unwrap();
    let mut client = engine.client();
    let tickets: Vec<_> = (0..60).map(|i| client.send(Key(i % 5), Order::Deposit(i)).ticket().unwrap()).collect();
    // Claims the answers in reverse order, each once.
    for (i, ticket) in tickets.into_iter().enumerate().rev() {
        let outcome = client.answer(ticket.clone()).wait().unwrap();
        assert_eq!((outcome.key, outcome.version), (Key(i as u64 % 5), Version(i as u64 / 5 + 1)));
        assert!(matches!(client.answer(ticket).wait(), Err(CommandError::Claimed)));
    }
    assert_eq!(client.on_their_way(), 0);
}

#[test]
fn unclaimed_answers_fill_the_lane_and_further_commands_are_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    let mut tickets = Vec::new();
    let refused = loop {
        match client.send(Key(1), Order::Deposit(1)).ticket_until(Instant::now() + Duration::from_secs(5)) {
            Ok(ticket) => tickets.push(ticket),
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, Rejected::Full(Order::Deposit(1))), "{refused:?}");
    assert_eq!(tickets.len(), 64, "the capacity of the lane");
    client.forget(tickets.remove(0));
    tickets.push(client.send(Key(1), Order::Deposit(1)).ticket().unwrap());
    for ticket in tickets {
        client.answer(ticket).wait().unwrap();
    }
    for _ in 0..1000 {
        client.send(Key(1), Order::Deposit(1)).tell().unwrap();
    }
    assert_eq!(client.send(Key(1), Order::Deposit(1)).wait().unwrap().version, Version(1066));
}

#[test]
fn a_panic_in_a_decision_is_returned_to_the_sender() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    match client.send(Key(1), Order::Panic).wait() {
        Err(CommandError::Panicked(text)) => assert_eq!(text, "asked for"),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.send(Key(1), Order::Deposit(1)).wait().unwrap().version, Version(1));
}

#[test]
fn a_command_that_does_not_fit_is_refused_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    client.send(Key(1), Order::Deposit(5)).wait().unwrap();
    // With 64 KiB segments an event may take 16 KiB and a command 60 KiB.
    let refused = client.send(Key(1), Order::Notes { count: 2, bytes: 20_000 }).wait();
    assert!(matches!(refused, Err(CommandError::TooLarge { .. })), "{refused:?}");
    let refused = client.send(Key(1), Order::Notes { count: 5, bytes: 15_000 }).wait();
    assert!(matches!(refused, Err(CommandError::TooLarge { .. })), "{refused:?}");
    let outcome = client.send(Key(1), Order::Notes { count: 3, bytes: 15_000 }).wait().unwrap();
    assert_eq!((outcome.version, outcome.events), (Version(4), 3));
    let (state, _) = engine.state(Key(1)).wait().unwrap().unwrap();
    assert_eq!((state.cents, state.notes), (5, 3), "no event of a refused command");
}

#[test]
fn a_command_larger_than_the_rest_of_a_segment_goes_whole_into_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    for i in 0..40 {
        let bytes = 1000 + 331 * (i % 17);
        let outcome = client.send(Key(i as u64 % 3), Order::Notes { count: 7, bytes }).wait().unwrap();
        assert_eq!(outcome.events, 7);
    }
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = open(dir.path());
    assert!(engine.recovery().shards[0].torn_tail.is_none());
    assert_eq!(engine.recovery().events(), 280);
    let notes: u64 = (0..3).map(|key| engine.state(Key(key)).wait().unwrap().unwrap().0.notes).sum();
    assert_eq!(notes, 280);
}

#[test]
fn a_repeat_under_an_idempotency_key_gets_the_first_outcome_even_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Key(1), Key(2));
    for restart in 0..3 {
        let engine = Engine::<Account>::open(small(dir.path()).outcomes_kept(4)).unwrap();
        let mut client = engine.client();
        let paid = client.send(a, Order::Deposit(10)).once("payment-1").durable().wait().unwrap();
        assert_eq!((paid.version, paid.events, paid.repeated), (Version(1), 1, restart > 0));
        // A remembered rejection is repeated although the command would now succeed.
        let refused = client.send(a, Order::Withdraw(15)).once("payment-2").wait();
        assert!(matches!(refused, Err(CommandError::Rejected(Refused::NotEnough { missing: 5 }))), "{refused:?}");
        if restart == 0 {
            client.send(a, Order::Deposit(10)).wait().unwrap();
        }
        // Another key has idempotency keys of its own.
        let other = client.send(b, Order::Deposit(3)).once("payment-1").wait().unwrap();
        assert_eq!((other.version, other.repeated), (Version(1), restart > 0));
        // A command without events has an outcome as well.
        let nothing = client.send(b, Order::Nothing).once(77).wait().unwrap();
        assert_eq!((nothing.version, nothing.events, nothing.repeated), (Version(1), 0, restart > 0));
        assert_eq!(engine.state(a).wait().unwrap().unwrap().0.cents, 20);
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn only_the_newest_outcomes_of_a_key_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path()).outcomes_kept(4)).unwrap();
    let mut client = engine.client();
    for id in 1..=5_u64 {
        assert!(!client.send(Key(1), Order::Deposit(1)).once(id).wait().unwrap().repeated);
    }
    assert!(client.send(Key(1), Order::Deposit(1)).once(2).wait().unwrap().repeated);
    assert!(!client.send(Key(1), Order::Deposit(1)).once(1).wait().unwrap().repeated, "the oldest is forgotten");
}

#[test]
fn tasks_await_answers() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path())).unwrap();
    let mut client = engine.client();
    crate::common::block_on(async {
        for i in 1..=200 {
            let outcome = client.send(Key(1), Order::Deposit(1)).await.unwrap();
            assert_eq!(outcome.version, Version(i));
        }
        let durable = client.send(Key(1), Order::Deposit(1)).durable().await.unwrap();
        assert!(durable.receipt().is_durable());
        assert_eq!(engine.ask(Key(1), |state, _| state.cents).await.unwrap(), 201);
        // A future dropped before its answer frees its slot.
        for _ in 0..200 {
            let mut sending = Box::pin(std::future::IntoFuture::into_future(client.send(Key(1), Order::Deposit(1))));
            crate::common::poll_once(&mut sending);
        }
        client.send(Key(1), Order::Deposit(1)).await.unwrap();
    });
}

#[test]
fn accepted_commands_are_carried_out_when_the_engine_is_shut_down() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    let tickets: Vec<_> = (0..50).map(|_| client.send(Key(1), Order::Deposit(1)).ticket().unwrap()).collect();
    engine.shutdown(soon()).unwrap();
    let last = tickets.into_iter().map(|ticket| client.answer(ticket).wait().unwrap()).last().unwrap();
    assert_eq!(last.version, Version(50));
}

#[test]
fn a_durable_answer_comes_even_if_nothing_is_appended() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path()).durability(Durability::GroupCommit)).unwrap();
    let mut client = engine.client();
    client.send(Key(1), Order::Deposit(10)).once(1).durable().wait().unwrap();
    for _ in 0..3 {
        // Lets every idle thread fall asleep.
        std::thread::sleep(Duration::from_millis(30));
        let repeated = client.send(Key(1), Order::Deposit(10)).once(1).durable().wait_until(soon().unwrap()).unwrap();
        assert!(repeated.repeated && repeated.receipt().is_durable());
        std::thread::sleep(Duration::from_millis(30));
        let nothing = client.send(Key(1), Order::Nothing).durable().wait_until(soon().unwrap()).unwrap();
        assert_eq!((nothing.events, nothing.receipt().is_durable()), (0, true));
    }
}

/// An event without drop glue whose archive is longer than its value.
#[derive(Archive, Serialize, Bounded)]
struct Named {
    #[rkyv(with = rkyv::with::InlineAsBox)]
    name: &'static str,
}

impl Event for Named {
    const TYPES: &'static [EventType] = &[EventType::new(1, "named", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
struct Names {
    bytes: usize,
}

impl Aggregate for Names {
    type Event = Named;
    type Command = &'static [&'static str];
    type Rejection = ();

    fn evolve(&mut self, event: &ArchivedNamed, _meta: &Meta) {
        self.bytes += event.name.len();
    }

    fn decide(&self, names: &'static [&'static str], emit: &mut Emit<Named>) -> Result<(), ()> {
        names.iter().for_each(|name| emit.event(Named { name }));
        Ok(())
    }
}

#[test]
fn an_event_whose_archive_is_longer_than_its_value_is_measured_before_its_command_is_appended() {
    const LONG: &str = "longer than sixty-four bytes, which is what this store allows an event to be";
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Names>::open(small(dir.path()).event_bytes_max(64)).unwrap();
    let mut client = engine.client();
    assert_eq!(client.send(Key(1), &["short"]).wait().unwrap().version, Version(1));
    let refused = client.send(Key(1), &["first", LONG]).wait();
    assert!(matches!(refused, Err(CommandError::TooLarge { bytes_max: 64, .. })), "{refused:?}");
    // The commands also cross the end of a segment.
    for i in 0..500 {
        let outcome = client.send(Key(1), &["forty bytes of text, more or less, of it"; 9]).wait().unwrap();
        assert_eq!(outcome.version, Version(10 + 9 * i));
    }
    assert_eq!(engine.ask(Key(1), |names, _| names.bytes).wait().unwrap(), 5 + 500 * 9 * 40);
}

#[test]
fn polling_returns_failures_and_a_ticket_belongs_to_its_client() {
    let storage = corelane::testing::FaultyStorage::new();
    let engine = Engine::<Account>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
    let (mut client, mut other) = (engine.client(), engine.client());
    let ticket = client.send(Key(1), Order::Deposit(1)).ticket().unwrap();
    assert!(matches!(other.try_answer(&ticket), Some(Err(CommandError::Claimed))));
    other.forget(ticket.clone());
    assert!(matches!(other.answer(ticket.clone()).wait(), Err(CommandError::Claimed)));
    client.answer(ticket.clone()).wait().unwrap();
    assert!(matches!(client.try_answer(&ticket), Some(Err(CommandError::Claimed))));
    // A durable answer comes when the event is durable, or with the failure.
    let ticket = client.send(Key(1), Order::Deposit(1)).durable().ticket().unwrap();
    let deadline = soon().unwrap();
    let answer = loop {
        if let Some(answer) = client.try_answer(&ticket) {
            break answer;
        }
        assert!(Instant::now() < deadline, "the answer never comes");
    };
    assert!(answer.unwrap().receipt().is_durable());
    engine.flush(soon()).unwrap();
    storage.fail_sync(1);
    let ticket = client.send(Key(1), Order::Deposit(1)).durable().ticket().unwrap();
    let answer = loop {
        if let Some(answer) = client.try_answer(&ticket) {
            break answer;
        }
        assert!(Instant::now() < deadline, "the failed sync is never reported");
    };
    assert!(matches!(answer, Err(CommandError::NotDurable(WaitError::ShardFailed(_)))), "{answer:?}");

    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    let ticket = client.send(Key(1), Order::Deposit(1)).durable().ticket().unwrap();
    let answer = loop {
        if let Some(answer) = client.try_answer(&ticket) {
            break answer;
        }
    };
    assert!(matches!(answer, Err(CommandError::NotDurable(WaitError::NeverDurable))), "{answer:?}");
}

/// An aggregate that rejects every command with a rejection whose archive is empty.
#[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, corelane::Bounded, Clone, Default)]
struct Wall(u64);

#[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, corelane::Bounded, Clone, Debug, PartialEq)]
struct No;

impl corelane::Aggregate for Wall {
    type Event = crate::common::Note;
    type Command = ();
    type Rejection = No;

    fn evolve(&mut self, _event: &<crate::common::Note as rkyv::Archive>::Archived, _meta: &corelane::Meta) {}

    fn decide(&self, _command: (), _emit: &mut corelane::Emit<crate::common::Note>) -> Result<(), No> {
        Err(No)
    }
}

#[test]
fn an_empty_rejection_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    for saved in [false, false, true, true] {
        let engine = Engine::<Wall>::open(small(dir.path())).unwrap();
        let refused = engine.client().send(Key(1), ()).once(9).wait();
        assert!(matches!(refused, Err(CommandError::Rejected(No))), "{refused:?}");
        if saved {
            engine.checkpoint(soon()).unwrap();
        }
        engine.shutdown(soon()).unwrap();
    }
}
