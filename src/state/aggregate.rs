//! Aggregates: the state of a key, the one function that changes it, and its rules. The application writes them.
//!
//! One writer: [`Aggregate::evolve`]. It runs on the shard that owns the key. Recovery, rebuilding, snapshots, time
//! travel and views get their states from the same function, run over the log.

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;

use rkyv::api::low::LowDeserializer;
use rkyv::rancor::Error as RkyvError;
use rkyv::{Archive, Deserialize, Serialize};

use crate::bounded::Bounded;
use crate::event::{Correlation, Encode, Event, Key, Meta, Time, Version};
use crate::state::states::States;

/// A type that can be archived to disk and restored. Implemented for every suitable rkyv type; do not implement it by
/// hand.
pub trait Stored: Encode + Clone + Send + 'static {
    /// Restores a value from its archive, which begins at a multiple of 16, after validating every byte.
    ///
    /// # Errors
    /// The error of the validator or of the deserializer.
    fn decode(bytes: &[u8]) -> Result<Self, RkyvError>;
}

impl<T> Stored for T
where
    T: Encode + Clone + Send + 'static,
    T::Archived: Deserialize<T, LowDeserializer<RkyvError>>,
{
    fn decode(bytes: &[u8]) -> Result<Self, RkyvError> {
        rkyv::api::low::deserialize::<T, RkyvError>(T::access(bytes)?)
    }
}

/// The state of one key, and its rules. `Default` gives the state of a key without events.
///
/// ```
/// use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Bounded)]
/// enum Money { Deposited { cents: u64 }, Withdrawn { cents: u64 } }
///
/// impl Event for Money {
///     const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1), EventType::new(2, "withdrawn", 1)];
///     fn event_type(&self) -> EventTypeId {
///         match self { Money::Deposited { .. } => EventTypeId(1), Money::Withdrawn { .. } => EventTypeId(2) }
///     }
/// }
///
/// #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// struct Account { cents: u64 }
///
/// #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, PartialEq)]
/// enum Refused { NotEnough { missing: u64 } }
///
/// enum Order { Deposit(u64), Withdraw(u64) }
///
/// impl Aggregate for Account {
///     type Event = Money;
///     type Command = Order;
///     type Rejection = Refused;
///
///     fn evolve(&mut self, event: &ArchivedMoney, _meta: &Meta) {
///         match event {
///             ArchivedMoney::Deposited { cents } => self.cents += cents.to_native(),
///             ArchivedMoney::Withdrawn { cents } => self.cents -= cents.to_native(),
///         }
///     }
///
///     fn decide(&self, order: Order, emit: &mut Emit<Money>) -> Result<(), Refused> {
///         match order {
///             Order::Deposit(cents) => emit.event(Money::Deposited { cents }),
///             Order::Withdraw(cents) if cents > self.cents => {
///                 return Err(Refused::NotEnough { missing: cents - self.cents });
///             }
///             Order::Withdraw(cents) => emit.event(Money::Withdrawn { cents }),
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait Aggregate: Default + Stored {
    /// Something that happened to a key. Events are the only data that is kept for ever.
    type Event: Event;
    /// A request to change a key's state.
    type Command: Send + 'static;
    /// The reason why a command is not carried out.
    type Rejection: Stored + fmt::Debug;

    /// Version of the archived layout of `Self`. Increment it when the layout changes, or when `evolve` derives other
    /// states from old events: snapshots of other versions are then ignored, and the states are folded again from the
    /// log. Saved states of another size or alignment are ignored in any case. (Swapping two fields of the same type
    /// changes neither size nor alignment.)
    const STATE_VERSION: u16 = 1;

    /// Applies one event to the state. It must be deterministic and must depend on nothing but its arguments: it runs
    /// when the event is appended and again whenever the state is rebuilt. `meta.version` is the event's number in its
    /// key; `meta.sequence` is always [`crate::Sequence::UNKNOWN`] here, because a key's history is read without its
    /// neighbours.
    ///
    /// A panic stops the shard, and the event does not become part of the log. When the event is read again, a panic is
    /// an error: `OpenError::Panicked`, which leaves the store unchanged, or `HistoryError::Panicked`. Calls that would
    /// wait for the engine are refused here, as in [`crate::Handler`].
    fn evolve(&mut self, event: &<Self::Event as Archive>::Archived, meta: &Meta);

    /// Decides on a command: emits the events that carry it out, or rejects it. Runs on the shard that owns the key,
    /// against its current state, so no other event can come between the decision and its events. It may read other
    /// inputs (a clock, a view), because a decision is never repeated. Calls that would wait for the engine are
    /// refused, as in [`crate::Handler`].
    ///
    /// # Errors
    /// The reason for rejecting the command. None of its events is appended then.
    fn decide(&self, command: Self::Command, emit: &mut Emit<Self::Event>) -> Result<(), Self::Rejection>;

    /// Decides on a command for several keys of one shard ([`Client::send_many`](crate::Client::send_many)): as
    /// [`Aggregate::decide`], but it sees the states of all keys that the command names, and emits for any of them with
    /// [`Emit::event_for`]. The events are appended together, all or none, in the order in which they were emitted; each
    /// takes its key one version further.
    ///
    /// By default no command may name several keys: it fails with
    /// [`CommandError::NotSupported`](crate::CommandError::NotSupported).
    ///
    /// # Errors
    /// The reason for rejecting the command. None of its events is appended then.
    fn decide_many(
        states: &States<'_, Self>,
        command: Self::Command,
        emit: &mut Emit<Self::Event>,
    ) -> Result<(), Self::Rejection> {
        let _unused = (states, command);
        emit.fault = Some(Fault::NotSupported);
        Ok(())
    }

    /// Converts a state that was archived under another [`Aggregate::STATE_VERSION`]. `None` means that the saved state
    /// cannot be used and the state is folded again from the log.
    #[must_use]
    fn upgrade(state_version: u16, archived: &[u8]) -> Option<Self> {
        let _unused = (state_version, archived);
        None
    }

    /// Converts a rejection whose archive has another size or alignment than the program's. The engine keeps the
    /// rejections of commands that carry an idempotency key. `None` means that the rejection cannot be read: opening
    /// the store is then refused ([`crate::OpenError::RejectionLayout`]).
    #[must_use]
    fn upgrade_rejection(archived: &[u8]) -> Option<Self::Rejection> {
        let _unused = archived;
        None
    }
}

/// The aggregate of an engine without states. Its engine, [`crate::EventLog`], carries events, keeps versions and
/// chains, and folds nothing.
#[derive(Archive, Serialize, Deserialize, Bounded)]
pub struct Stateless<E>(PhantomData<fn() -> E>);

impl<E> Default for Stateless<E> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E> Clone for Stateless<E> {
    fn clone(&self) -> Self {
        Self(PhantomData)
    }
}

impl<E> fmt::Debug for Stateless<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stateless")
    }
}

impl<E: Event> Aggregate for Stateless<E> {
    type Event = E;
    type Command = Infallible;
    type Rejection = ();

    #[inline(always)]
    fn evolve(&mut self, _event: &E::Archived, _meta: &Meta) {}

    fn decide(&self, command: Infallible, _emit: &mut Emit<E>) -> Result<(), ()> {
        match command {}
    }
}

/// A mistake in the code of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It emitted an event for a key that the command does not name.
    ForeignKey(Key),
    /// The aggregate has no `decide_many`.
    NotSupported,
}

/// Collects the events of a decision, and gives the decision the facts that are not in the state.
#[derive(Debug)]
pub struct Emit<E> {
    pub(crate) events: Vec<E>,
    /// All keys of a command for several keys.
    pub(crate) keys: Vec<Key>,
    /// The events that are not for the first key: the event's index and the key's, in the order of the events.
    pub(crate) others: Vec<(usize, usize)>,
    pub(crate) fault: Option<Fault>,
    pub(crate) key: Key,
    pub(crate) version: Version,
    pub(crate) now: Time,
    pub(crate) correlation: Correlation,
}

impl<E> Emit<E> {
    pub(crate) fn new() -> Self {
        Self {
            events: Vec::new(),
            keys: Vec::new(),
            others: Vec::new(),
            fault: None,
            key: Key(0),
            version: Version(0),
            now: Time(0),
            correlation: Correlation(0),
        }
    }

    /// Clears the events and sets the facts of the next decision.
    pub(crate) fn begin(&mut self, key: Key, version: Version, now: Time) {
        self.events.clear();
        (self.key, self.version, self.now, self.correlation) = (key, version, now, Correlation(0));
    }

    /// As [`Emit::begin`], for a decision on several keys; `key` is the first. [`Emit::end_many`] must follow.
    pub(crate) fn begin_many(&mut self, keys: impl Iterator<Item = Key>, key: Key, version: Version, now: Time) {
        self.begin(key, version, now);
        self.others.clear();
        self.keys.extend(keys);
    }

    /// Forgets the keys, so that the next decision can emit for none of them. The events stay.
    pub(crate) fn end_many(&mut self) {
        self.keys.clear();
    }

    /// Adds an event. All events of one command are appended together, in this order, after the decision. The event of a
    /// command for several keys is for the first of them.
    #[inline]
    pub fn event(&mut self, event: E) {
        self.events.push(event);
    }

    /// Adds an event for one of the command's keys. For any other key, the command fails with
    /// [`CommandError::ForeignKey`](crate::CommandError::ForeignKey), and nothing is appended.
    pub fn event_for(&mut self, key: Key, event: E) {
        if key == self.key {
            self.events.push(event);
        } else if let Some(at) = self.keys.iter().position(|one| *one == key) {
            self.others.push((self.events.len(), at));
            self.events.push(event);
        } else {
            self.fault.get_or_insert(Fault::ForeignKey(key));
        }
    }

    /// The key that the command is for, or the first of its keys.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// The version of [`Emit::key`]: that of its newest event, or 0 if it has none.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The current time by the engine's clock. The events get this time unless they carry their own.
    #[must_use]
    pub fn now(&self) -> Time {
        self.now
    }

    /// Sets the correlation of all events of this command. Events that carry their own correlation keep it.
    pub fn correlate(&mut self, correlation: Correlation) {
        self.correlation = correlation;
    }
}
