//! Live feeds: the entry point.

use std::sync::Arc;

use super::Engine;
use crate::config::Durability;
use crate::log::LiveBuilder;
use crate::state::aggregate::Aggregate;

impl<A: Aggregate> Engine<A> {
    /// Returns a builder for a live feed: the events of all shards or of one key as they are appended, for readers that
    /// come and go. The store keeps nothing for a feed, and a feed holds nothing back. A service that must see every
    /// event is a [`Engine::consumer`] instead.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use corelane::envelope::Envelope;
    /// use corelane::{Config, Deadline, EventLog, Key};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let engine = EventLog::<Envelope>::open(Config::new(dir.path()).shards(2))?;
    /// let mut feed = engine.live().key(Key::new(42)).start()?;
    /// let mut producer = engine.producer();
    /// for user in [7, 42] {
    ///     let event = Envelope::new("player.levelled_up", user, r#"{"level":7}"#)?;
    ///     producer.publish(event.key(), event)?;
    /// }
    /// let record = feed.next_until(Duration::from_secs(10))?.expect("the engine is open");
    /// assert_eq!((record.meta.key, record.event.payload()), (Key::new(42), r#"{"level":7}"#));
    /// // In a task: `feed.next_async().await`, or the feed as a `Stream`.
    /// engine.shutdown(Deadline::NEVER)?;
    /// assert!(feed.next_until(Deadline::NEVER)?.is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn live(&self) -> LiveBuilder<A::Event> {
        let logs = self.shards.iter().map(|shard| Arc::clone(&shard.door.log)).collect();
        let syncs = self.config.durability != Durability::OsCache;
        LiveBuilder::new(logs, self.config.router(), Arc::clone(&self.lock), syncs)
    }
}
