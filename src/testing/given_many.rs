//! Tests of decisions on several keys without an engine: given these events of each key, when this command, then those
//! events.

use std::fmt::Debug;

use super::given::{Given, given, list, refuse_fault};
use crate::event::{Correlation, Key, Time};
use crate::state::aggregate::{Aggregate, Emit};
use crate::state::states::{KEYS_MAX, StateOf, States};

/// Starts a test of a command for several keys, each of which has exactly these events. The command names them in this
/// order.
///
/// ```
/// use corelane::Key;
/// use corelane::testing::given_many;
/// # use corelane::state::States;
/// # use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Debug, PartialEq)]
/// # enum Money { Deposited { cents: u64 }, Withdrawn { cents: u64 } }
/// # impl Event for Money {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1), EventType::new(2, "withdrawn", 1)];
/// #     fn event_type(&self) -> EventTypeId {
/// #         EventTypeId(match self { Money::Deposited { .. } => 1, Money::Withdrawn { .. } => 2 })
/// #     }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Account { cents: u64 }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, PartialEq)]
/// # struct NotEnough;
/// # struct Transfer { from: Key, to: Key, cents: u64 }
/// # impl Aggregate for Account {
/// #     type Event = Money;
/// #     type Command = Transfer;
/// #     type Rejection = NotEnough;
/// #     fn evolve(&mut self, event: &ArchivedMoney, _meta: &Meta) {
/// #         match event {
/// #             ArchivedMoney::Deposited { cents } => self.cents += cents.to_native(),
/// #             ArchivedMoney::Withdrawn { cents } => self.cents -= cents.to_native(),
/// #         }
/// #     }
/// #     fn decide(&self, _: Transfer, _: &mut Emit<Money>) -> Result<(), NotEnough> { Err(NotEnough) }
/// #     fn decide_many(states: &States<'_, Self>, transfer: Transfer, emit: &mut Emit<Money>) -> Result<(), NotEnough> {
/// #         let Transfer { from, to, cents } = transfer;
/// #         if states[from].cents < cents { return Err(NotEnough); }
/// #         emit.event_for(from, Money::Withdrawn { cents });
/// #         emit.event_for(to, Money::Deposited { cents });
/// #         Ok(())
/// #     }
/// # }
/// let (alice, bob) = (Key(1), Key(2));
/// given_many::<Account>([(alice, vec![Money::Deposited { cents: 50 }]), (bob, vec![])])
///     .when(Transfer { from: alice, to: bob, cents: 30 })
///     .then([(alice, Money::Withdrawn { cents: 30 }), (bob, Money::Deposited { cents: 30 })])
///     .then_state(bob, |account| assert_eq!(account.cents, 30))
///     .when(Transfer { from: alice, to: bob, cents: 21 })
///     .then_rejected(NotEnough);
/// ```
///
/// # Panics
/// If the engine would refuse the keys (none, more than [`KEYS_MAX`], or one twice), or an event ([`given`]).
#[must_use]
pub fn given_many<A: Aggregate>(keys: impl IntoIterator<Item = (Key, Vec<A::Event>)>) -> GivenMany<A> {
    let keys: Vec<Given<A>> = keys.into_iter().map(|(key, events)| given([]).key(key).and(events)).collect();
    assert!((1..=KEYS_MAX).contains(&keys.len()), "a command names 1 to {KEYS_MAX} keys, not {}", keys.len());
    for (at, one) in keys.iter().enumerate() {
        assert!(keys[..at].iter().all(|other| other.key != one.key), "the command names key {} twice", one.key);
    }
    GivenMany { keys, emit: Emit::new() }
}

/// Several keys with their events, ready for a command. Made by [`given_many`].
pub struct GivenMany<A: Aggregate> {
    keys: Vec<Given<A>>,
    emit: Emit<A::Event>,
}

impl<A: Aggregate> Debug for GivenMany<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.keys).finish()
    }
}

impl<A: Aggregate> GivenMany<A> {
    /// Sets the time for decisions, and for events that carry no time of their own. Default: 14 November 2023.
    #[must_use]
    pub fn at(mut self, now: Time) -> Self {
        self.keys = self.keys.into_iter().map(|one| one.at(now)).collect();
        self
    }

    /// Decides on a command and applies its events.
    ///
    /// # Panics
    /// As [`given_many`], for the events that the decision emits; if it emits for another key; if the aggregate has no
    /// `decide_many`.
    #[must_use]
    pub fn when(mut self, command: A::Command) -> WhenMany<A> {
        let Self { keys, emit } = &mut self;
        emit.begin_many(keys.iter().map(|one| one.key), keys[0].key, keys[0].version, keys[0].now);
        let states: Vec<_> =
            keys.iter().map(|one| StateOf { key: one.key, version: one.version, state: &one.state }).collect();
        let decision = A::decide_many(&States::new(&states), command, emit);
        refuse_fault(emit);
        let events = std::mem::take(&mut emit.events);
        let others = std::mem::take(&mut emit.others);
        let key_of = |event: usize| others.iter().find(|(at, _)| *at == event).map_or(0, |(_, key)| *key);
        let correlation: Correlation = emit.correlation;
        let outcome = decision.map(|()| {
            let apply = |(at, event): (usize, A::Event)| {
                let one = &mut keys[key_of(at)];
                one.append(&event, correlation);
                (one.key, event)
            };
            events.into_iter().enumerate().map(apply).collect()
        });
        WhenMany { given: self, outcome }
    }

    /// Passes the state of one of the keys to `look`.
    ///
    /// # Panics
    /// If it is not one of the keys.
    #[track_caller]
    pub fn then_state(self, key: Key, look: impl FnOnce(&A)) -> Self {
        let one = self.keys.iter().find(|one| one.key == key);
        look(&one.unwrap_or_else(|| panic!("key {key} is not one of the keys")).state);
        self
    }
}

/// A command for several keys that was decided on, and carried out or rejected. Made by [`GivenMany::when`].
pub struct WhenMany<A: Aggregate> {
    given: GivenMany<A>,
    outcome: Result<Vec<(Key, A::Event)>, A::Rejection>,
}

impl<A: Aggregate> Debug for WhenMany<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WhenMany").field("given", &self.given).finish_non_exhaustive()
    }
}

impl<A: Aggregate> WhenMany<A> {
    /// Asserts that the command was carried out with exactly these events, in this order.
    ///
    /// # Panics
    /// If it was not.
    #[track_caller]
    pub fn then(self, expected: impl IntoIterator<Item = (Key, A::Event)>) -> Self
    where
        A::Event: PartialEq + Debug,
    {
        let expected: Vec<_> = expected.into_iter().collect();
        match &self.outcome {
            Ok(events) if *events == expected => self,
            Ok(events) => panic!("{}{}", list("expected", &expected, events), list("actual", events, &expected)),
            Err(rejection) => panic!("{}actual: rejected\n  {rejection:?}\n", list("expected", &expected, &expected)),
        }
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

    /// Passes the state of one of the keys after the command to `look`.
    ///
    /// # Panics
    /// If it is not one of the keys.
    #[track_caller]
    pub fn then_state(self, key: Key, look: impl FnOnce(&A)) -> Self {
        Self { given: self.given.then_state(key, look), outcome: self.outcome }
    }

    /// Returns the events of the command and their keys, for other assertions.
    ///
    /// # Errors
    /// The rejection.
    pub fn outcome(&self) -> Result<&[(Key, A::Event)], &A::Rejection> {
        self.outcome.as_deref()
    }

    /// Decides on the next command.
    ///
    /// # Panics
    /// The same as for [`GivenMany::when`].
    #[must_use]
    pub fn when(self, command: A::Command) -> WhenMany<A> {
        self.given.when(command)
    }
}
