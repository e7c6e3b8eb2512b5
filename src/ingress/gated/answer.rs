//! The answers of a gated producer. Data only.

use std::fmt;

use crate::error::{GateError, Rejected, RejectedReason};
use crate::event::Key;
use crate::ingress::sequence_gate::answer::OfferRefused;
use crate::lane::receipt::Receipt;

/// The gate's answer to an event that it did not refuse.
#[derive(Debug)]
#[must_use]
pub enum Accepted<E> {
    /// The event was expected next and is published. The events buffered behind it are published too, until the lane is
    /// full.
    Published(Receipt),
    /// The event was expected next but could not be published yet. It will be published before any other event.
    Waiting,
    /// The event is early. It will be published once the sequences before it have come or their gap is closed.
    Buffered,
    /// The event was published before, or is buffered. The gate counted and dropped it.
    Duplicate,
    /// The event belongs to a closed gap and is offered for the first time. If it is offered again, it is a duplicate.
    Late(LateEvent<E>),
    /// The sequence is below everything that the gate remembers of its partition: below the partition's start, below
    /// the sequence that it expected when the gate was opened, or among forgotten gaps. Normally the event was
    /// published before.
    TooOld(LateEvent<E>),
}

/// An event that came after its turn. [`GatedProducer::publish_late`](crate::ingress::GatedProducer::publish_late)
/// publishes it out of order.
#[non_exhaustive]
pub struct LateEvent<E> {
    /// Its partition.
    pub partition: u64,
    /// Its sequence number in the partition.
    pub sequence: u64,
    /// Its key.
    pub key: Key,
    /// The event.
    pub event: E,
}

// Not derived, here and below, because the event need not implement `Debug`.
impl<E> fmt::Debug for LateEvent<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("LateEvent");
        shown.field("partition", &self.partition).field("sequence", &self.sequence).field("key", &self.key);
        shown.finish_non_exhaustive()
    }
}

/// The reason why an event was refused, with the event. The gate does not keep the event.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum GateRefused<E> {
    /// The gate has no room for the early event, or its sequence is too far ahead.
    #[error(transparent)]
    Gate(OfferRefused<E>),
    /// An earlier event cannot be published now, or this event can never be published, because it is too large or of an
    /// undeclared type.
    #[error(transparent)]
    Publish(Rejected<E>),
    /// The gate has stopped. Offering again does not help.
    #[error("{}", crate::error::with_sources(.1))]
    Stopped(E, GateError),
}

impl<E> GateRefused<E> {
    /// Returns the refusal of `event` because of `why`.
    pub(super) fn because(why: GateError, event: E) -> Self {
        match why {
            GateError::Publish(reason) => Self::Publish(reason.of(event)),
            why => Self::Stopped(event, why),
        }
    }

    /// Returns the event.
    pub fn into_event(self) -> E {
        match self {
            Self::Gate(refused) => refused.into_item(),
            Self::Publish(rejected) => rejected.into_event(),
            Self::Stopped(event, _) => event,
        }
    }

    /// Returns `true` if there was no room; a later offer may then succeed.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Gate(refused) => matches!(refused, OfferRefused::Full(_) | OfferRefused::PartitionFull(_)),
            Self::Publish(rejected) => {
                matches!(rejected.reason(), RejectedReason::Full | RejectedReason::StorageFull)
            }
            Self::Stopped(..) => false,
        }
    }
}

impl<E> fmt::Debug for GateRefused<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gate(refused) => write!(f, "Gate({refused:?})"),
            Self::Publish(rejected) => write!(f, "Publish({:?})", rejected.reason()),
            Self::Stopped(_, why) => write!(f, "Stopped({why:?})"),
        }
    }
}
