//! Side effects of a handler: each with a key by which its receiver can tell a repeat, and none again when a consumer is set back.

use std::fmt;

use crate::event::EventId;

/// What a handler learns of one call of it.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    consumer: &'a str,
    id: EventId,
    attempt: u32,
    had: bool,
}

impl<'a> Call<'a> {
    pub(crate) fn new(consumer: &'a str, id: EventId, attempt: u32, had: bool) -> Self {
        Self { consumer, id, attempt, had }
    }

    /// 1 the first time.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Whether the event was handled before the consumer was set back: what it does outside it has done already.
    #[must_use]
    pub fn is_rebuild(&self) -> bool {
        self.had
    }

    /// The same for every attempt at this event by this consumer, also after a crash, and no other's.
    #[must_use]
    pub fn effect_key(&self) -> EffectKey<'a> {
        EffectKey { consumer: self.consumer, id: self.id }
    }

    /// Has a side effect, unless this is a rebuild: mail, a payment, a message to another system. `effect` hands the key on to the
    /// receiver, who by it drops repeats: an effect that was had and whose success was not saved before a crash is had again with
    /// the same key. `None`: this is a rebuild, and it was not called.
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
    /// What `effect` says.
    pub fn effect<T, F>(&self, effect: impl FnOnce(EffectKey<'a>) -> Result<T, F>) -> Result<Option<T>, F> {
        if self.had { Ok(None) } else { effect(self.effect_key()).map(Some) }
    }
}

/// Names one event's side effect by one consumer. As a text: `consumer/shard/offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    fn an_effect_is_named_for_ever_and_not_had_again_by_a_rebuild() {
        let id = EventId { shard: ShardId(3), offset: Offset(4096) };
        let live = Call::new("mail", id, 2, false);
        let had = live.effect(|key| Ok::<_, ()>(key.to_string()));
        assert_eq!(had, Ok(Some("mail/3/4096".to_owned())));
        assert_eq!(live.effect(|_| Err::<(), _>("refused")), Err("refused"));
        let rebuild = Call::new("mail", id, 1, true);
        assert_eq!(rebuild.effect(|_| -> Result<(), ()> { panic!("had before") }), Ok(None));
    }
}
