//! Services that follow the log: durable consumers, and the event bus made of them.

use super::Engine;
use crate::consumer::{Consumer, ConsumerBuilder, ConsumerError, ConsumerReport, Handled, Start};
use crate::error::{Rejected, WaitError};
use crate::event::{EventId, Key, Offset};
use crate::ingress::producer::Producer;
use crate::state::aggregate::Aggregate;
use crate::sync::{Deadline, may_wait};

/// Why an event that was to be published and handled was not, or is not yet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishSyncError<E> {
    /// It was not accepted.
    #[error(transparent)]
    Rejected(Rejected<E>),
    /// It was accepted; whether it was appended and handled inline is not known, or not yet.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// It was appended and handled inline; this consumer did not say that it was done.
    #[error("consumer \"{consumer}\": {error}")]
    Consumer {
        /// Its name.
        consumer: String,
        /// What it said.
        error: ConsumerError,
    },
    /// It was appended and handled inline; this consumer was set past it meanwhile, so whether it was handled is not known.
    #[error("consumer \"{consumer}\" was set past the event")]
    Unknown {
        /// Its name.
        consumer: String,
    },
    /// It was appended and handled inline; this consumer could not handle it and has recorded it.
    #[error("consumer \"{consumer}\" has recorded the event as one it could not handle")]
    Recorded {
        /// Its name.
        consumer: String,
    },
}

impl<A: Aggregate> Engine<A> {
    /// A durable consumer of this name, to be set up and started. From its first start on, retention keeps what it has not done,
    /// whether it runs or not, until [`Engine::remove_consumer`].
    pub fn consumer(&self, name: &str) -> ConsumerBuilder<A::Event> {
        ConsumerBuilder::new(&self.services, name)
    }

    /// A subscriber of the event bus: a consumer that begins with what is published from now on, and sees events as soon as they are
    /// appended. Started again under its name, it goes on where it was.
    pub fn subscribe(&self, name: &str) -> ConsumerBuilder<A::Event> {
        self.consumer(name).start_at(Start::Latest).before_durable()
    }

    /// Publishes an event and returns when all inline handlers, and then these consumers, have handled it. The answer is about this
    /// event, whatever others publish to its key meanwhile. Earlier events of `producer` for the same shard are appended first.
    ///
    /// # Errors
    /// [`PublishSyncError`]: it was not accepted, or not every consumer had handled it by the deadline. On a shard's own thread, and inside a handler
    /// of one of `consumers`, the event comes back with [`Rejected::OnEngineThread`].
    pub fn publish_sync(
        &self,
        producer: &mut Producer<A::Event>,
        key: Key,
        event: A::Event,
        consumers: &[&Consumer<A::Event>],
        deadline: impl Into<Deadline>,
    ) -> Result<(), PublishSyncError<A::Event>> {
        let deadline = deadline.into().instant();
        if !may_wait() || !consumers.iter().all(|consumer| consumer.may_await()) {
            return Err(PublishSyncError::Rejected(Rejected::OnEngineThread(event)));
        }
        let shard = key.shard(self.config.shards);
        let from = Offset(self.shards[usize::from(shard.0)].door.log.appended.get());
        // Before the publish: a consumer may be past the event before it is asked.
        let watches: Vec<_> = consumers.iter().map(|consumer| consumer.watch(shard, from)).collect();
        let placed = producer.publish_placed(key, event, deadline).map_err(PublishSyncError::Rejected)?;
        let offset = placed?;
        // Asked between two turns: inline handlers are through with what is appended.
        self.head(key, deadline)?;
        for consumer in consumers {
            let name = || consumer.name().to_owned();
            // Retention frees nothing that a consumer has not done.
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

    /// What is known of every registered consumer.
    #[must_use]
    pub fn consumers(&self) -> Vec<ConsumerReport> {
        self.services.reports()
    }

    /// Unregisters a consumer that is gone for good, with its dead letters: retention keeps nothing for it any more.
    ///
    /// # Errors
    /// `NotRegistered`; `AlreadyRunning` until it is stopped; what the file system says.
    pub fn remove_consumer(&self, name: &str) -> Result<(), ConsumerError> {
        self.services.remove(name)
    }

    /// Waits until every running consumer has handled or recorded everything that there is to see. Whether all have, by the deadline,
    /// and no registered consumer has failed ([`ConsumerReport::failure`]): to be called before a shutdown, to leave no backlog. (A backlog is not
    /// lost: it is handled after the next start.) Pollers, and consumers that were stopped, are not waited for. `false` at once inside a handler
    /// of one of them, whose event is not handled yet.
    #[must_use]
    pub fn drain_consumers(&self, deadline: impl Into<Deadline>) -> bool {
        let deadline = deadline.into().instant();
        self.services.drain(deadline).is_ok()
    }
}
