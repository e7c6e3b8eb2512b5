//! Side effects of a handler. Each has a key that identifies repeats, and no side effect runs again after a seek.

use std::fmt;
use std::future::Future;

use crate::event::EventId;

/// One call of a handler.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    consumer: &'a str,
    id: EventId,
    attempt: u32,
    is_rebuild: bool,
}

impl<'a> Call<'a> {
    pub(crate) fn new(consumer: &'a str, id: EventId, attempt: u32, is_rebuild: bool) -> Self {
        Self { consumer, id, attempt, is_rebuild }
    }

    /// Returns the number of this attempt; the first is 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Returns `true` if the event was handled before the consumer was set back: its side effects have already run.
    #[must_use]
    pub fn is_rebuild(&self) -> bool {
        self.is_rebuild
    }

    /// Returns a key that is the same for every attempt at this event by this consumer, even after a crash, and that no
    /// other event or consumer has.
    #[must_use]
    pub fn effect_key(&self) -> EffectKey<'a> {
        EffectKey { consumer: self.consumer, id: self.id }
    }

    /// Runs a side effect (a mail, a payment, a message to another system), unless this is a rebuild. `effect` passes
    /// the key on to the receiver, which uses it to drop repeats: an effect that ran before a crash, and whose success
    /// was not saved, runs again with the same key. Returns `None`, without calling `effect`, if this is a rebuild.
    ///
    /// ```
    /// # use corelane::consumer::Call;
    /// fn on_purchase(call: &Call<'_>) -> Result<(), std::io::Error> {
    ///     call.effect(|key| send_receipt(&key.to_string()))?;
    ///     Ok(())
    /// }
    /// # fn send_receipt(_idempotency_key: &str) -> Result<(), std::io::Error> { Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The error of `effect`.
    pub fn effect<T, F>(&self, effect: impl FnOnce(EffectKey<'a>) -> Result<T, F>) -> Result<Option<T>, F> {
        if self.is_rebuild { Ok(None) } else { effect(self.effect_key()).map(Some) }
    }

    /// Does the same as [`Call::effect`] for an asynchronous side effect.
    ///
    /// ```
    /// # use corelane::consumer::Call;
    /// async fn on_purchase(call: Call<'_>) -> Result<(), std::io::Error> {
    ///     call.effect_async(async |key| send_receipt(&key.to_string()).await).await?;
    ///     Ok(())
    /// }
    /// # async fn send_receipt(_idempotency_key: &str) -> Result<(), std::io::Error> { Ok(()) }
    /// ```
    ///
    /// Cancel safety: that of the future that `effect` returns. If this future is dropped before it completes, the
    /// effect may have run; the next attempt has the same key.
    ///
    /// # Errors
    /// The error of `effect`.
    pub async fn effect_async<T, F, Fut>(&self, effect: impl FnOnce(EffectKey<'a>) -> Fut) -> Result<Option<T>, F>
    where
        Fut: Future<Output = Result<T, F>>,
    {
        if self.is_rebuild { Ok(None) } else { effect(self.effect_key()).await.map(Some) }
    }
}

/// Identifies one event's side effect by one consumer. Its text is `consumer/shard/offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct EffectKey<'a> {
    /// The consumer's name.
    pub consumer: &'a str,
    /// The event.
    pub id: EventId,
}

impl fmt::Display for EffectKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.consumer, self.id.shard, self.id.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Offset, ShardId};

    #[test]
    fn an_effect_has_a_stable_key_and_a_rebuild_does_not_run_it() {
        let id = EventId { shard: ShardId(3), offset: Offset(4096) };
        let live = Call::new("mail", id, 2, false);
        let ran = live.effect(|key| Ok::<_, ()>(key.to_string()));
        assert_eq!(ran, Ok(Some("mail/3/4096".to_owned())));
        assert_eq!(live.effect(|_| Err::<(), _>("refused")), Err("refused"));
        let rebuild = Call::new("mail", id, 1, true);
        assert_eq!(rebuild.effect(|_| -> Result<(), ()> { panic!("it has run before") }), Ok(None));
    }
}
