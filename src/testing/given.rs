//! Tests of an aggregate without an engine: given these events, when this command, then those events.
//!
//! Events are treated as on a shard: archived, and folded in place with a `Meta` whose version grows; events of older
//! layouts pass their upcasters. Only the log is missing.

use std::fmt::{Debug, Write as _};

use rkyv::util::AlignedVec;

use crate::event::{
    Correlation, Encode, Event, EventTypeId, Key, Meta, Offset, Schemas, Scratch, Sequence, ShardId, Time, Version,
    upcaster,
};
use crate::log::format::{HEADER_BYTES, RECORD_HEADER_BYTES, RecordHeader};
use crate::state::aggregate::{Aggregate, Emit, Fault};
use crate::storage::memory::{ALIGN, padded};

/// The first size of an archive's buffer.
const ARCHIVE_BYTES_MIN: usize = 4 << 10;
/// The largest event that any configuration allows.
const ARCHIVE_BYTES_MAX: usize = 16 << 20;

/// Starts a test of a key that has exactly these events.
///
/// ```
/// use corelane::testing::given;
/// # use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Debug, PartialEq)]
/// # enum Money { Deposited { cents: u64 }, Withdrawn { cents: u64 } }
/// # impl Event for Money {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1), EventType::new(2, "withdrawn", 1)];
/// #     fn event_type(&self) -> EventTypeId {
/// #         match self { Money::Deposited { .. } => EventTypeId(1), Money::Withdrawn { .. } => EventTypeId(2) }
/// #     }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Account { cents: u64 }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, PartialEq)]
/// # enum Refused { NotEnough { missing: u64 } }
/// # enum Order { Withdraw(u64) }
/// # impl Aggregate for Account {
/// #     type Event = Money;
/// #     type Command = Order;
/// #     type Rejection = Refused;
/// #     fn evolve(&mut self, event: &ArchivedMoney, _meta: &Meta) {
/// #         match event {
/// #             ArchivedMoney::Deposited { cents } => self.cents += cents.to_native(),
/// #             ArchivedMoney::Withdrawn { cents } => self.cents -= cents.to_native(),
/// #         }
/// #     }
/// #     fn decide(&self, Order::Withdraw(cents): Order, emit: &mut Emit<Money>) -> Result<(), Refused> {
/// #         if cents > self.cents { return Err(Refused::NotEnough { missing: cents - self.cents }); }
/// #         emit.event(Money::Withdrawn { cents });
/// #         Ok(())
/// #     }
/// # }
///
/// given::<Account>([Money::Deposited { cents: 100 }])
///     .when(Order::Withdraw(70))
///     .then([Money::Withdrawn { cents: 70 }])
///     .then_state(|account| assert_eq!(account.cents, 30))
///     .when(Order::Withdraw(70))
///     .then_rejected(Refused::NotEnough { missing: 40 });
/// ```
///
/// # Panics
/// If the engine would refuse an event: its type is not declared, it is too large, or its archive is not valid.
#[must_use]
pub fn given<A: Aggregate>(events: impl IntoIterator<Item = A::Event>) -> Given<A> {
    let given = Given {
        state: A::default(),
        key: Key(1),
        now: Time::unix_ms(1_700_000_000_000),
        version: Version(0),
        head: Offset(0),
        next: Offset(HEADER_BYTES as u64),
        schemas: Schemas::of::<A::Event>(),
        archive: AlignedVec::new(),
        scratch: Scratch::new(4 << 20),
        emit: Emit::new(),
    };
    given.and(events)
}

/// A key with its events, ready for a command. Made by [`given`].
pub struct Given<A: Aggregate> {
    pub(super) state: A,
    pub(super) key: Key,
    pub(super) now: Time,
    pub(super) version: Version,
    /// The offset of the newest event; 0 if there is none.
    head: Offset,
    next: Offset,
    schemas: Schemas,
    archive: AlignedVec<ALIGN>,
    scratch: Scratch,
    emit: Emit<A::Event>,
}

impl<A: Aggregate> Debug for Given<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Given").field("key", &self.key).field("version", &self.version).finish_non_exhaustive()
    }
}

impl<A: Aggregate> Given<A> {
    /// Sets the key of the events that follow. Default: 1.
    #[must_use]
    pub fn key(mut self, key: Key) -> Self {
        self.key = key;
        self
    }

    /// Sets the time for decisions, and for the events that follow and carry no time of their own. Default: 14 November
    /// 2023.
    #[must_use]
    pub fn at(mut self, now: Time) -> Self {
        self.now = now;
        self
    }

    /// Adds events.
    ///
    /// # Panics
    /// The same as for [`given`].
    #[must_use]
    pub fn and(mut self, events: impl IntoIterator<Item = A::Event>) -> Self {
        for event in events {
            self.append(&event, Correlation(0));
        }
        self
    }

    /// Adds an event in the layout of an older schema version of its type. It is read through its upcaster.
    ///
    /// # Panics
    /// The same as for [`given`]; if there is no such upcaster, or if it returns an error.
    #[must_use]
    pub fn and_old<O: Encode>(mut self, event_type: u16, schema_version: u16, old: &O) -> Self {
        let event_type = EventTypeId(event_type);
        let Some(upcaster) = upcaster::<A::Event>(event_type, schema_version) else {
            panic!("there is no upcaster for schema version {schema_version} of event type {event_type}");
        };
        let len = self.encode(old);
        let event = (upcaster.upcast)(&self.archive[..len]).unwrap_or_else(|error| {
            panic!("the upcaster for schema version {schema_version} of event type {event_type} returned: {error}")
        });
        self.fold(&event, event_type, schema_version, Correlation(0));
        self
    }

    /// Decides on a command and applies its events.
    ///
    /// # Panics
    /// The same as for [`given`], for the events that the decision emits; if it emits for another key.
    #[must_use]
    pub fn when(mut self, command: A::Command) -> When<A> {
        self.emit.begin(self.key, self.version, self.now);
        let decision = self.state.decide(command, &mut self.emit);
        refuse_fault(&self.emit);
        let events = std::mem::take(&mut self.emit.events);
        let outcome = decision.map(|()| {
            for event in &events {
                self.append(event, self.emit.correlation);
            }
            events
        });
        When { given: self, outcome }
    }

    /// Passes the state after the events to `look`.
    pub fn then_state(self, look: impl FnOnce(&A)) -> Self {
        look(&self.state);
        self
    }

    pub(super) fn append(&mut self, event: &A::Event, correlation: Correlation) {
        let event_type = event.event_type();
        let Some(schema_version) = self.schemas.current(event_type) else {
            panic!("the event is of type {event_type}, which its TYPES do not declare");
        };
        self.fold(event, event_type, schema_version, correlation);
    }

    fn fold(&mut self, event: &A::Event, event_type: EventTypeId, schema_version: u16, correlation: Correlation) {
        let len = self.encode(event);
        let own = event.correlation();
        let header = RecordHeader {
            time: event.time().unwrap_or(self.now),
            key: self.key,
            previous: self.head,
            event_type,
            correlation: if own == Correlation(0) { correlation } else { own },
            version: Version(self.version.0 + 1),
            schema_version,
            more: false,
        };
        let meta: Meta = header.meta(ShardId(0), self.next, Sequence::UNKNOWN);
        let archived = <A::Event as Encode>::access(&self.archive[..len]);
        let archived =
            archived.unwrap_or_else(|error| panic!("event {}'s archive is not valid: {error}", meta.version));
        self.state.evolve(archived, &meta);
        self.version = meta.version;
        self.head = self.next;
        self.next.0 += padded(RECORD_HEADER_BYTES + len) as u64;
    }

    /// Archives a value and returns the archive's length.
    fn encode<T: Encode>(&mut self, value: &T) -> usize {
        let mut bytes = self.archive.len().max(ARCHIVE_BYTES_MIN);
        loop {
            self.archive.resize(bytes, 0);
            match value.encode(&mut self.archive, &mut self.scratch) {
                Some(len) => return len,
                None if bytes >= ARCHIVE_BYTES_MAX => panic!("the event is larger than {ARCHIVE_BYTES_MAX} bytes"),
                None => bytes *= 2,
            }
        }
    }
}

/// A command that was decided on, and carried out or rejected. Made by [`Given::when`].
pub struct When<A: Aggregate> {
    given: Given<A>,
    outcome: Result<Vec<A::Event>, A::Rejection>,
}

impl<A: Aggregate> Debug for When<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("When").field("given", &self.given).finish_non_exhaustive()
    }
}

impl<A: Aggregate> When<A> {
    /// Asserts that the command was carried out with exactly these events, in this order.
    ///
    /// # Panics
    /// If it was not.
    #[track_caller]
    pub fn then(self, expected: impl IntoIterator<Item = A::Event>) -> Self
    where
        A::Event: PartialEq + Debug,
    {
        let expected: Vec<A::Event> = expected.into_iter().collect();
        match &self.outcome {
            Ok(events) if *events == expected => self,
            Ok(events) => panic!("{}{}", list("expected", &expected, events), list("actual", events, &expected)),
            Err(rejection) => panic!("{}actual: rejected\n  {rejection:?}\n", list("expected", &expected, &expected)),
        }
    }

    /// Asserts that the command was carried out with no event.
    ///
    /// # Panics
    /// If it was not.
    #[track_caller]
    pub fn then_nothing(self) -> Self
    where
        A::Event: PartialEq + Debug,
    {
        self.then([])
    }

    /// Asserts that the command was rejected for this reason.
    ///
    /// # Panics
    /// If it was not.
    #[track_caller]
    pub fn then_rejected(self, expected: A::Rejection) -> Self
    where
        A::Event: PartialEq + Debug,
        A::Rejection: PartialEq,
    {
        match &self.outcome {
            Err(rejection) if *rejection == expected => self,
            Err(rejection) => panic!("expected: rejected\n  {expected:?}\nactual: rejected\n  {rejection:?}\n"),
            Ok(events) => panic!("expected: rejected\n  {expected:?}\n{}", list("actual", events, events)),
        }
    }

    /// Passes the state after the command to `look`.
    pub fn then_state(self, look: impl FnOnce(&A)) -> Self {
        look(&self.given.state);
        self
    }

    /// Returns the events of the command, for other assertions.
    ///
    /// # Errors
    /// The rejection.
    pub fn outcome(&self) -> Result<&[A::Event], &A::Rejection> {
        self.outcome.as_deref()
    }

    /// Adds events.
    ///
    /// # Panics
    /// The same as for [`given`].
    #[must_use]
    pub fn and(self, events: impl IntoIterator<Item = A::Event>) -> Given<A> {
        self.given.and(events)
    }

    /// Sets the time, as [`Given::at`].
    #[must_use]
    pub fn at(self, now: Time) -> Given<A> {
        self.given.at(now)
    }

    /// Decides on the next command.
    ///
    /// # Panics
    /// The same as for [`Given::when`].
    #[must_use]
    pub fn when(self, command: A::Command) -> When<A> {
        self.given.when(command)
    }
}

/// Panics if the engine would refuse the decision for a mistake in its code.
pub(super) fn refuse_fault<E>(emit: &Emit<E>) {
    match emit.fault {
        None => {}
        Some(Fault::ForeignKey(key)) => {
            panic!("the decision emitted an event for key {key}, which the command does not name")
        }
        Some(Fault::NotSupported) => panic!("the aggregate has no `decide_many`"),
    }
}

/// Lists events one per line, and marks those that differ from `others` in the same place.
pub(super) fn list<E: PartialEq + Debug>(title: &str, events: &[E], others: &[E]) -> String {
    let plural = if events.len() == 1 { "" } else { "s" };
    let mut text = format!("{title}: carried out, {} event{plural}\n", events.len());
    for (i, event) in events.iter().enumerate() {
        let mark = if others.get(i) == Some(event) { ' ' } else { '!' };
        writeln!(text, "{mark} {} {event:?}", i + 1).expect("writing to a string cannot fail");
    }
    text
}
