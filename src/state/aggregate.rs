//! What a user of the engine writes: the state of a key, the one place that changes it, and its rules.
//!
//! One writer: [`Aggregate::evolve`]. It runs on the shard that owns the key, and everything else that needs a state
//! (recovery, rebuilding, snapshots, time travel, views) is that same function run over the log.

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;

use rkyv::api::low::LowDeserializer;
use rkyv::rancor::Error as RkyvError;
use rkyv::{Archive, Deserialize, Serialize};

use crate::bounded::Bounded;
use crate::event::{Correlation, Encode, Event, Key, Meta, Time, Version};

/// A type that is archived to disk and turned back into itself. Implemented for every fitting rkyv type; nobody
/// implements it by hand.
pub trait Stored: Encode + Clone + Send + 'static {
    /// Turns an archive, which begins at a multiple of 16, back into a value after checking every byte of it.
    ///
    /// # Errors
    /// What the validator or the rebuilding found wrong.
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

/// The state of one key, and its rules. `Default` is the state of a key without events.
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
    /// What happened to a key: the only thing that is kept for ever.
    type Event: Event;
    /// What somebody wants to happen.
    type Command: Send + 'static;
    /// Why a command is not carried out.
    type Rejection: Stored + fmt::Debug;

    /// Version of the archived layout of `Self`. Count it up when the layout, or what `evolve` makes of old events, changes:
    /// snapshots of other versions are then passed over, and what they saved is folded again from the log. Saved states of
    /// another size or alignment are passed over in any case; two fields of one type that change places show in neither.
    const STATE_VERSION: u16 = 1;

    /// Changes the state by one event. It must be deterministic and must not depend on anything but its arguments: it runs
    /// when the event is appended and again whenever the state is rebuilt. `meta.version` is the event's number in its key;
    /// `meta.sequence` is always [`crate::Sequence::UNKNOWN`] here, since a key's history is read without its neighbours.
    ///
    /// A panic stops the shard; the event is then not part of the log. Where the event is read again, it is an error:
    /// `OpenError::Panicked` of an opening, which leaves the store as it was, and `HistoryError::Panicked`. Calls that would wait for
    /// the engine are refused here, as in [`crate::Handler`].
    fn evolve(&mut self, event: &<Self::Event as Archive>::Archived, meta: &Meta);

    /// Decides on a command: gives out the events that carry it out, or says why not. Runs on the shard that owns the
    /// key, against its current state, so nothing can come in between. What it reads besides (clock, views) is its own
    /// business: it is never run again. Calls that would wait for the engine are refused, as in
    /// [`crate::Handler`].
    ///
    /// # Errors
    /// The reason for refusing the command. No event of it is appended then.
    fn decide(&self, command: Self::Command, emit: &mut Emit<Self::Event>) -> Result<(), Self::Rejection>;

    /// Turns a state that was archived under another [`Aggregate::STATE_VERSION`] into one of today. `None`: it cannot be
    /// used, and is folded again from the log.
    #[must_use]
    fn upgrade(state_version: u16, archived: &[u8]) -> Option<Self> {
        let _unused = (state_version, archived);
        None
    }

    /// Turns a rejection whose archive has another size or alignment than today's into one of today. Rejections are kept where
    /// a command carried an idempotency key. `None`: it cannot be read, and a store that holds one is refused
    /// ([`crate::OpenError::RejectionLayout`]).
    #[must_use]
    fn upgrade_rejection(archived: &[u8]) -> Option<Self::Rejection> {
        let _unused = archived;
        None
    }
}

/// The state of keys that have none: an engine of this carries events and keeps versions and chains, and folds nothing.
///
/// [`crate::EventLog`] is an engine of this.
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

/// Where a decision puts its events, and what it may know besides the state.
#[derive(Debug)]
pub struct Emit<E> {
    pub(crate) events: Vec<E>,
    pub(crate) key: Key,
    pub(crate) version: Version,
    pub(crate) now: Time,
    pub(crate) correlation: Correlation,
}

impl<E> Emit<E> {
    pub(crate) fn new() -> Self {
        Self { events: Vec::new(), key: Key(0), version: Version(0), now: Time(0), correlation: Correlation(0) }
    }

    /// Begins a decision.
    pub(crate) fn begin(&mut self, key: Key, version: Version, now: Time) {
        self.events.clear();
        (self.key, self.version, self.now, self.correlation) = (key, version, now, Correlation(0));
    }

    /// Adds an event. All events of one command are appended together, in this order, after the decision has been made.
    #[inline]
    pub fn event(&mut self, event: E) {
        self.events.push(event);
    }

    /// Whose command it is.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// The key's version: that of its newest event, 0 where it has none.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Now, by the engine's clock: the time that the events will carry, unless they carry their own.
    #[must_use]
    pub fn now(&self) -> Time {
        self.now
    }

    /// Ties all events of this command to others of one cause (events that carry a correlation of their own keep it).
    pub fn correlate(&mut self, correlation: Correlation) {
        self.correlation = correlation;
    }
}
