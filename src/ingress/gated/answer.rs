//! What a gated producer answers. Data only.

use std::fmt;

use crate::error::{GateError, Rejected, RejectedReason};
use crate::event::Key;
#[expect(unused_imports, reason = "named by the documentation")]
use crate::ingress::gated::GatedProducer;
use crate::ingress::sequence_gate::answer::OfferRefused;
use crate::lane::receipt::Receipt;

/// What became of an event that was offered and not refused.
#[derive(Debug)]
#[must_use]
pub enum Accepted<E> {
    /// It was the one expected, and is published; so are those that waited behind it, as far as there was room.
    Published(Receipt),
    /// It was the one expected, and stands in front: published before anything else as soon as it can be.
    Waiting,
    /// It is early. It is published when those before it are, or are given up.
    Buffered,
    /// It has been published, or waits already. It was counted and dropped.
    Duplicate,
    /// It belongs to a gap that has been closed, and comes for the first time. A second time it is a duplicate.
    Late(LateEvent<E>),
    /// It lies below what the gate remembers of its partition: before where the partition started, before where it stood when the gate
    /// was opened, or in times of gaps that were forgotten. Normally it has been published.
    TooOld(LateEvent<E>),
}

/// An event that came when its turn was over. Who wants it in the log all the same, out of order, says so:
/// [`GatedProducer::publish_late`].
#[non_exhaustive]
pub struct LateEvent<E> {
    /// Its partition.
    pub partition: u64,
    /// Its number there.
    pub sequence: u64,
    /// Its key.
    pub key: Key,
    /// The event.
    pub event: E,
}

// Not derived, here and below: an event need not be Debug for its answer to be.
impl<E> fmt::Debug for LateEvent<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("LateEvent");
        shown.field("partition", &self.partition).field("sequence", &self.sequence).field("key", &self.key);
        shown.finish_non_exhaustive()
    }
}

/// Why an event was refused. It comes back, and the gate keeps nothing of it.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum GateRefused<E> {
    /// The gate has no room for an early one, or its sequence cannot be.
    #[error(transparent)]
    Gate(OfferRefused<E>),
    /// What stands in front cannot be published now; or the event is too large and never could be.
    #[error(transparent)]
    Publish(Rejected<E>),
    /// The gate has stopped; offering again is of no use.
    #[error("{}", crate::error::with_sources(.1))]
    Stopped(E, GateError),
}

impl<E> GateRefused<E> {
    /// `event`, because of `why`.
    pub(super) fn because(why: GateError, event: E) -> Self {
        match why {
            GateError::Publish(reason) => Self::Publish(reason.of(event)),
            why => Self::Stopped(event, why),
        }
    }

    /// Takes the event back.
    pub fn into_event(self) -> E {
        match self {
            Self::Gate(refused) => refused.into_item(),
            Self::Publish(rejected) => rejected.into_event(),
            Self::Stopped(event, _) => event,
        }
    }

    /// Whether it is worth offering again later: there was no room.
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
