//! The test kit for aggregates without an engine: it decides and folds as a shard does, and its failures are readable.

use crate::common::bank::{Account, Money, Order, Refused};
use crate::common::{os_cache, soon};
use corelane::event::{Correlation, Upcaster};
use corelane::testing::{given, given_many};
use corelane::{
    Aggregate, Bounded, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Offset, Stored, Time, Version,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Returns the message of a failing test.
fn complaint<T>(failing: impl FnOnce() -> T) -> String {
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(failing)).err().expect("the test fails");
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => (*panic.downcast::<&str>().unwrap()).to_owned(),
    }
}

#[test]
fn rules_are_tested_without_an_engine() {
    given::<Account>([Money::Deposited { cents: 100 }, Money::Withdrawn { cents: 60 }])
        .when(Order::Withdraw(41))
        .then_rejected(Refused::NotEnough { missing: 1 })
        .then_state(|account| assert_eq!(account.cents, 40))
        .when(Order::Exchange { out: 40, back: 7 })
        .then([Money::Withdrawn { cents: 40 }, Money::Deposited { cents: 7 }])
        .then_state(|account| assert_eq!(account.cents, 7))
        .when(Order::Nothing)
        .then_nothing()
        .and([Money::Deposited { cents: 3 }])
        .then_state(|account| assert_eq!(account.cents, 10))
        .when(Order::Withdraw(10))
        .then([Money::Withdrawn { cents: 10 }]);
}

#[test]
fn failures_show_the_expected_and_the_actual_result() {
    let deposited = || given::<Account>([Money::Deposited { cents: 100 }]);
    let says = complaint(|| deposited().when(Order::Withdraw(70)).then([Money::Withdrawn { cents: 71 }]));
    assert_eq!(
        says,
        "expected: carried out, 1 event\n! 1 Withdrawn { cents: 71 }\nactual: carried out, 1 event\n! 1 Withdrawn { cents: 70 }\n"
    );
    let says = complaint(|| {
        let exchange = Order::Exchange { out: 1, back: 2 };
        deposited().when(exchange).then([Money::Withdrawn { cents: 1 }])
    });
    assert_eq!(
        says,
        "expected: carried out, 1 event\n  1 Withdrawn { cents: 1 }\n\
         actual: carried out, 2 events\n  1 Withdrawn { cents: 1 }\n! 2 Deposited { cents: 2 }\n"
    );
    let says = complaint(|| deposited().when(Order::Withdraw(101)).then_nothing());
    assert_eq!(says, "expected: carried out, 0 events\nactual: rejected\n  NotEnough { missing: 1 }\n");
    let says = complaint(|| deposited().when(Order::Withdraw(101)).then_rejected(Refused::NotEnough { missing: 2 }));
    assert_eq!(says, "expected: rejected\n  NotEnough { missing: 2 }\nactual: rejected\n  NotEnough { missing: 1 }\n");
    let says = complaint(|| deposited().when(Order::Withdraw(1)).then_rejected(Refused::NotEnough { missing: 2 }));
    assert_eq!(
        says,
        "expected: rejected\n  NotEnough { missing: 2 }\nactual: carried out, 1 event\n  1 Withdrawn { cents: 1 }\n"
    );
}

/// An aggregate that records everything passed to `evolve`.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Witness {
    seen: Vec<Seen>,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Seen {
    key: u64,
    version: u64,
    time: u64,
    schema_version: u16,
    correlation: u64,
    offset: u64,
    sequence: u64,
    previous: Option<u64>,
    text_bytes: u64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
struct SaidV1 {
    times: u32,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
struct Said {
    text: String,
    at: Option<u64>,
    cause: u64,
    event_type: u16,
}

impl Said {
    fn plain(text: &str) -> Self {
        Self { text: text.to_owned(), at: None, cause: 0, event_type: 1 }
    }
}

impl Event for Said {
    const TYPES: &'static [EventType] = &[EventType::new(1, "said", 3)];
    const UPCASTERS: &'static [Upcaster<Self>] =
        &[Upcaster::new(1, 1, |archive| Ok(Said::plain(&"ha".repeat(SaidV1::decode(archive)?.times as usize))))];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(self.event_type)
    }

    fn time(&self) -> Option<Time> {
        self.at.map(Time)
    }

    fn correlation(&self) -> Correlation {
        Correlation(self.cause)
    }
}

impl Aggregate for Witness {
    type Event = Said;
    type Command = (u64, Vec<Said>);
    type Rejection = (u64, u64, u64);

    fn evolve(&mut self, event: &ArchivedSaid, meta: &Meta) {
        self.seen.push(Seen {
            key: meta.key.0,
            version: meta.version.0,
            time: meta.time.0,
            schema_version: meta.schema_version,
            correlation: meta.correlation.0,
            offset: meta.offset.0,
            sequence: meta.sequence.0,
            previous: meta.previous.map(Offset::get),
            text_bytes: event.text.len() as u64,
        });
    }

    fn decide(&self, (cause, events): (u64, Vec<Said>), emit: &mut Emit<Said>) -> Result<(), (u64, u64, u64)> {
        if events.is_empty() {
            return Err((emit.key().0, emit.version().0, emit.now().0));
        }
        emit.correlate(Correlation(cause));
        events.into_iter().for_each(|event| emit.event(event));
        Ok(())
    }
}

#[test]
fn the_kit_folds_events_as_an_engine_does() {
    let commands = || {
        vec![
            (0, vec![Said { at: Some(5), ..Said::plain("first") }]),
            (
                7,
                vec![
                    Said { at: Some(6), ..Said::plain("") },
                    Said { at: Some(7), cause: 9, ..Said::plain(&"x".repeat(9000)) },
                ],
            ),
            (8, vec![Said { at: Some(8), ..Said::plain("eight bytes or more") }]),
        ]
    };
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Witness>::open(os_cache(dir.path())).unwrap();
    let mut client = engine.client();
    commands().into_iter().for_each(|command| drop(client.send(Key(42), command).wait().unwrap()));
    let (live, version) = engine.state(Key(42)).wait().unwrap().unwrap();
    engine.shutdown(soon()).unwrap();
    assert_eq!(version, Version(4));

    let mut kit = given::<Witness>([]).key(Key(42));
    for command in commands() {
        kit = kit.when(command).and([]);
    }
    // The log of an engine has marks between its events.
    let without_offsets = |witness: &Witness| {
        let mut seen = witness.seen.clone();
        let places: Vec<_> = std::iter::once(None).chain(seen.iter().map(|seen| Some(seen.offset))).collect();
        seen.iter_mut().zip(places).for_each(|(seen, place)| {
            assert_eq!(seen.previous, place, "each event is linked to the previous one");
            (seen.offset, seen.previous) = (0, None);
        });
        seen
    };
    drop(kit.then_state(|witness| {
        assert_eq!(without_offsets(witness), without_offsets(&live));
        assert_eq!(witness.seen[0].offset, live.seen[0].offset);
    }));
}

#[test]
fn a_decision_gets_the_key_version_and_time() {
    let now = Time(123);
    let (key, version) = (Key(9), 2);
    given::<Witness>([])
        .key(key)
        .and([Said::plain("a"), Said::plain("b")])
        .at(now)
        .when((0, Vec::new()))
        .then_rejected((key.0, version, now.0))
        .when((0, vec![Said::plain("c")]))
        .then_state(|witness| assert_eq!(witness.seen[2].time, now.0));
}

#[test]
fn events_of_older_layouts_go_through_their_upcasters() {
    drop(given::<Witness>([]).and_old(1, 1, &SaidV1 { times: 5000 }).and([Said::plain("a")]).then_state(|witness| {
        let seen: Vec<_> =
            witness.seen.iter().map(|seen| (seen.version, seen.schema_version, seen.text_bytes)).collect();
        assert_eq!(seen, [(1, 1, 10_000), (2, 3, 1)]);
    }));
    let says = complaint(|| given::<Witness>([]).and_old(1, 2, &SaidV1 { times: 5000 }));
    assert_eq!(says, "there is no upcaster for schema version 2 of event type 1");
    let says = complaint(|| given::<Witness>([]).and_old(1, 1, &0_u8));
    assert!(says.starts_with("the upcaster for schema version 1 of event type 1 returned: "), "{says}");
}

#[test]
fn the_kit_refuses_events_that_an_engine_refuses() {
    let undeclared = || Said { event_type: 4, ..Said::plain("") };
    let says = complaint(|| given::<Witness>([undeclared()]));
    assert_eq!(says, "the event is of type 4, which its TYPES do not declare");
    let says = complaint(|| given::<Witness>([]).when((0, vec![undeclared()])));
    assert_eq!(says, "the event is of type 4, which its TYPES do not declare");
    let says = complaint(|| given::<Witness>([Said::plain(&"x".repeat(17 << 20))]));
    assert_eq!(says, "the event is larger than 16777216 bytes");
}

#[test]
fn decisions_on_several_keys_are_tested_without_an_engine() {
    let (a, b, c) = (Key(1), Key(2), Key(3));
    let deposited = |cents| Money::Deposited { cents };
    let withdrawn = |cents| Money::Withdrawn { cents };
    let kit = given_many::<Account>([(a, vec![deposited(100)]), (b, vec![]), (c, vec![deposited(5), withdrawn(1)])])
        .at(Time(77))
        .when(Order::Pay(30))
        .then([(a, withdrawn(30)), (b, deposited(30)), (a, withdrawn(30)), (c, deposited(30))])
        .then_state(a, |account| assert_eq!(account.cents, 40))
        .when(Order::Pay(21))
        .then_rejected(Refused::NotEnough { missing: 2 })
        .when(Order::Deposits(vec![1, 2, 3, 4]))
        .then([(a, deposited(1)), (b, deposited(2)), (c, deposited(3)), (a, deposited(4))]);
    assert_eq!(kit.outcome().unwrap().len(), 4);
    // The states are those of an engine, versions and all.
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(os_cache(dir.path())).unwrap();
    let mut client = engine.client();
    client.send(a, Order::Deposit(100)).wait().unwrap();
    client.send(c, Order::Deposit(5)).wait().unwrap();
    client.send(c, Order::Withdraw(1)).wait().unwrap();
    client.send_many(&[a, b, c], Order::Pay(30)).wait().unwrap();
    client.send_many(&[a, b, c], Order::Deposits(vec![1, 2, 3, 4])).wait().unwrap();
    drop([a, b, c].into_iter().fold(kit, |kit, key| {
        let state = engine.state(key).wait().unwrap().unwrap().0;
        kit.then_state(key, |account| assert_eq!(*account, state))
    }));
}

#[test]
fn the_kit_refuses_keys_that_an_engine_refuses() {
    let says = complaint(|| given_many::<Account>([]));
    assert_eq!(says, "a command names 1 to 16 keys, not 0");
    let says = complaint(|| given_many::<Account>((0..17).map(|key| (Key(key), vec![]))));
    assert_eq!(says, "a command names 1 to 16 keys, not 17");
    let says = complaint(|| given_many::<Account>([(Key(1), vec![]), (Key(2), vec![]), (Key(1), vec![])]));
    assert_eq!(says, "the command names key 1 twice");
    let foreign = "the decision emitted an event for key 9, which the command does not name";
    let says = complaint(|| given_many::<Account>([(Key(1), vec![])]).when(Order::Foreign(9)));
    assert_eq!(says, foreign);
    assert_eq!(complaint(|| given::<Account>([]).when(Order::Foreign(9))), foreign);
    let says = complaint(|| given_many::<Witness>([(Key(1), vec![])]).when((0, Vec::new())));
    assert_eq!(says, "the aggregate has no `decide_many`");
    let failed = || given_many::<Account>([(Key(1), vec![])]).when(Order::Deposits(vec![1])).then([]);
    assert!(complaint(failed).contains("! 1 (Key(1), Deposited { cents: 1 })"), "{}", complaint(failed));
}
