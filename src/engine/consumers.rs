//! Services that follow the log: durable consumers, and the event bus made of them.

use super::Engine;
use crate::consumer::{Consumer, ConsumerBuilder, ConsumerError, ConsumerReport, Handled, Start};
use crate::error::fault::{Fault, says_whose_fault};
use crate::error::{Rejected, WaitError};
use crate::event::{EventId, Key, Offset};
use crate::ingress::producer::Producer;
use crate::state::aggregate::Aggregate;
use crate::sync::{Deadline, may_wait};

/// The reason why [`Engine::publish_sync`] cannot confirm that the event was published and handled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishSyncError<E> {
    /// The event was not accepted.
    #[error(transparent)]
    Rejected(Rejected<E>),
    /// The event was accepted; it is not known whether it was appended and handled inline.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// The event was appended and handled inline; this consumer did not confirm that it handled the event.
    #[error("consumer \"{consumer}\": {}", crate::error::with_sources(error))]
    Consumer {
        /// The consumer's name.
        consumer: String,
        /// The consumer's error.
        error: ConsumerError,
    },
    /// The event was appended and handled inline; this consumer was moved past it meanwhile, so it is not known whether
    /// the consumer handled it.
    #[error("consumer \"{consumer}\" was moved past the event")]
    Unknown {
        /// The consumer's name.
        consumer: String,
    },
    /// The event was appended and handled inline; this consumer could not handle it and has recorded it.
    #[error("consumer \"{consumer}\" has recorded the event as one it could not handle")]
    Recorded {
        /// The consumer's name.
        consumer: String,
    },
}

says_whose_fault!(PublishSyncError<E>);

impl<E> PublishSyncError<E> {
    fn fault(&self) -> Fault {
        match self {
            Self::Rejected(rejected) => rejected.reason().fault(),
            // Accepted: published again, the event would be there twice.
            Self::Wait(_) | Self::Consumer { .. } | Self::Unknown { .. } | Self::Recorded { .. } => Fault::Neither,
        }
    }
}

impl<A: Aggregate> Engine<A> {
    /// Returns a builder for the durable consumer `name`. From the consumer's first start, retention keeps the
    /// consumer's unfinished events, whether it runs or not, until [`Engine::remove_consumer`].
    pub fn consumer(&self, name: &str) -> ConsumerBuilder<A::Event> {
        ConsumerBuilder::new(&self.services, name)
    }

    /// Returns a builder for a subscriber of the event bus: a consumer whose first start begins with the next event,
    /// and that sees events as soon as they are appended. Started again under the same name, it continues where it
    /// stopped.
    pub fn subscribe(&self, name: &str) -> ConsumerBuilder<A::Event> {
        self.consumer(name).start_at(Start::Latest).before_durable()
    }

    /// Publishes an event and waits until all inline handlers, and then `consumers`, have handled it. The result is
    /// about this event alone, whatever else is published to its key meanwhile. Earlier events of `producer` for the
    /// same shard are appended first.
    ///
    /// # Errors
    /// [`PublishSyncError`]: the event was not accepted, or a consumer had not handled it by the deadline. On a shard's
    /// own thread, and inside a handler of one of `consumers`, the event comes back with [`Rejected::OnEngineThread`].
    pub fn publish_sync(
        &self,
        producer: &mut Producer<A::Event>,
        key: Key,
        event: A::Event,
        consumers: &[&Consumer<A::Event>],
        deadline: impl Into<Deadline>,
    ) -> Result<(), PublishSyncError<A::Event>> {
        let until = deadline.into();
        let deadline = until.instant();
        if !may_wait() || !consumers.iter().all(|consumer| consumer.may_await()) {
            return Err(PublishSyncError::Rejected(Rejected::OnEngineThread(event)));
        }
        let shard = self.shard_of(key);
        let from = Offset(self.shards[usize::from(shard.0)].door.log.appended.get());
        // Watch before publishing: a consumer may pass the event before it is asked about it.
        let watches: Vec<_> = consumers.iter().map(|consumer| consumer.watch(shard, from)).collect();
        let placed = producer.publish_placed(key, event, deadline).map_err(PublishSyncError::Rejected)?;
        let offset = placed?;
        // The shard answers between two turns, when inline handlers have seen everything appended.
        self.head(key, until)?;
        for consumer in consumers {
            let name = || consumer.name().to_owned();
            // Retention keeps a consumer's unfinished events, so if the event is freed, the consumer was moved past it.
            let Some(offset) = offset else { return Err(PublishSyncError::Unknown { consumer: name() }) };
            match consumer.wait_handled(key, EventId { shard, offset }, deadline) {
                Ok(Handled::Yes) => {}
                Ok(Handled::Unknown) => return Err(PublishSyncError::Unknown { consumer: name() }),
                Ok(Handled::Recorded) => return Err(PublishSyncError::Recorded { consumer: name() }),
                Err(error) => return Err(PublishSyncError::Consumer { consumer: name(), error }),
            }
        }
        drop(watches);
        Ok(())
    }

    /// Returns the report of every registered consumer.
    #[must_use]
    pub fn consumers(&self) -> Vec<ConsumerReport> {
        self.services.reports()
    }

    /// Removes a consumer for good, with its dead letters: retention keeps nothing for it any more.
    ///
    /// # Errors
    /// `NotRegistered`; `AlreadyRunning` until the consumer is stopped; the error of the file system.
    pub fn remove_consumer(&self, name: &str) -> Result<(), ConsumerError> {
        self.services.remove(name)
    }

    /// Waits until every running consumer has handled or recorded everything in the log. Call it before a shutdown to
    /// leave no backlog. (A backlog is not lost: it is handled after the next start.) Pollers and stopped consumers are
    /// not waited for.
    ///
    /// # Errors
    /// `Ended` if a registered consumer has failed ([`ConsumerReport::failure`]) or ends meanwhile; `Wait(TimedOut)` at
    /// `deadline`; `Wait(OnEngineThread)` at once on a shard's own thread and inside a handler of one of the consumers,
    /// whose event is not handled yet.
    pub fn drain_consumers(&self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        self.services.drain(deadline.into().instant())
    }
}
