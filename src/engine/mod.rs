//! The composition root: opens a store, starts the threads and stops them.

// | file | contents |
// |---|---|
// | `mod` | `Engine`: producers, clients, readers, flush, metrics, shutdown |
// | `builder` | `Builder`: inline handlers and views of an engine that is not open yet |
// | `start` | the steps of an opening, in order |
// | `open` | the manifest, the recovery of all shards, and the repairs |
// | `store_lock` | the locks on a store's folders |
// | `gate_holds` | the parts of the log that sequence gates still need |
// | `build` | a shard and everything around it |
// | `handle` | the engine's end of a running shard |
// | `closing` | shutdown, and the drop of an engine |
// | `runner` | the loop of a shard's thread |
// | `threads` | starting and joining threads |
// | `query` | `Query`: a question that a thread waits for or a task awaits |
// | `queries`, `history`, `flush`, `live`, `consumers`, `gated` | the rest of `Engine`'s methods, by topic |

mod background;
mod build;
mod builder;
mod closing;
mod consumers;
mod flush;
mod gate_holds;
mod gated;
mod handle;
mod history;
mod live;
mod open;
mod queries;
mod query;
pub(crate) mod runner;
mod start;
mod store_lock;
mod threads;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::command::{Client, ClientEnd, ClientLane, SharedClient};
use crate::config::ValidConfig;
use crate::consumer::services::Services;
use crate::error::{ReadError, ShardFailure, WaitError};
use crate::event::{Key, Offset, ShardId};
use crate::ingress::gated::OpenGates;
use crate::ingress::producer::Producer;
use crate::ingress::shared::SharedProducer;
use crate::lane::counts::LaneShared;
use crate::lane::requests::KeeperRequests;
use crate::lane::shared::SharedLane;
use crate::log::position::Position;
use crate::log::reader::Reader;
use crate::metrics::{Metrics, ShardMetrics, Totals};
use crate::recovery::report::RecoveryReport;
use crate::shard::LaneEnd;
use crate::state::aggregate::{Aggregate, Stateless};
use crate::storage::{Lock, Storage};
use crate::sync::{Deadline, Mutex, lock, may_wait, nap};
pub use builder::Builder;
use closing::Closing;
pub use consumers::PublishSyncError;
use handle::Handle;
pub use history::Comparison;
pub use query::Query;

/// An engine that carries events and keeps no states.
///
/// ```
/// use corelane::envelope::Envelope;
/// use corelane::{Config, Deadline, EventLog, Key, Sequence, ShardId};
///
/// # let dir = tempfile::tempdir()?;
/// let engine = EventLog::<Envelope>::open(Config::new(dir.path()))?;
/// let mut producer = engine.producer();
/// let envelope = Envelope::from_json(
///     r#"{"event_type":"player.move","timestamp":1280526901009,"user_id":42,"payload":{"x":133.96}}"#,
/// )?;
/// producer.publish(envelope.key(), envelope)?;
/// engine.flush(Deadline::NEVER)?;
///
/// let mut reader = engine.reader(ShardId(0));
/// let record = reader.next()?.expect("the event is durable");
/// assert_eq!((record.meta.key, record.meta.sequence), (Key(42), Sequence(0)));
/// engine.shutdown(Deadline::NEVER)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type EventLog<E> = Engine<Stateless<E>>;

/// An open store and its running threads: one per shard, one syncer per shard, and the background threads.
///
/// # Drop
///
/// Dropping the engine shuts it down, and **blocks** until everything accepted is appended and synced and every thread
/// has ended. It waits as long as the shards make progress, and gives up after ten seconds on events that a full disk
/// keeps from being appended, on consumers that do not end, on a shard whose turn does not end, and on a waker that does
/// not return. A drop that takes longer than 100 ms logs what it waits for and how long (`tracing`, level warn), and logs
/// an error when it gives up.
/// To choose the time, and to learn the result, call [`Engine::shutdown`] first; in a task, call it on a thread for
/// blocking work. A drop on one of the engine's own threads (in an inline handler or a consumer's handler) does not
/// wait; the engine then closes in the background.
///
/// ```
/// use corelane::{
///     Aggregate, Bounded, Config, Deadline, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Version,
/// };
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Bounded)]
/// struct Scored { points: u32 }
///
/// impl Event for Scored {
///     const TYPES: &'static [EventType] = &[EventType::new(1, "scored", 1)];
///     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// }
///
/// #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default, Debug, PartialEq)]
/// struct Player { points: u64 }
///
/// impl Aggregate for Player {
///     type Event = Scored;
///     type Command = u32;
///     type Rejection = ();
///     fn evolve(&mut self, event: &ArchivedScored, _meta: &Meta) {
///         self.points += u64::from(event.points.to_native());
///     }
///     fn decide(&self, points: u32, emit: &mut Emit<Scored>) -> Result<(), ()> {
///         emit.event(Scored { points });
///         Ok(())
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// let engine = Engine::<Player>::open(Config::new(dir.path()).shards(2))?;
/// let mut producer = engine.producer();
/// for points in [3, 4] {
///     producer.publish(Key(7), Scored { points })?;
/// }
/// engine.flush(Deadline::NEVER)?;
/// assert_eq!(engine.state(Key(7)).wait()?, Some((Player { points: 7 }, Version(2))));
/// engine.shutdown(Deadline::NEVER)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Engine<A: Aggregate> {
    config: ValidConfig,
    clock: Clock,
    recovery: RecoveryReport,
    shards: Vec<Handle<A>>,
    shared_lanes: Arc<[Arc<SharedLane<A::Event>>]>,
    keeper: Arc<KeeperRequests>,
    totals: Mutex<Totals>,
    closing: Arc<Closing>,
    services: Arc<Services>,
    /// Shared with readers: while a reader lives, no other engine may write its segments.
    lock: Arc<dyn Lock>,
    storage: Arc<dyn Storage>,
    gates: OpenGates,
}

impl<A: Aggregate> std::fmt::Debug for Engine<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("dir", &self.config.dir)
            .field("shards", &self.shards.len())
            .finish_non_exhaustive()
    }
}

impl<A: Aggregate> Engine<A> {
    /// Returns the report of recovery, from the time when the store was opened.
    #[must_use]
    pub fn recovery(&self) -> &RecoveryReport {
        &self.recovery
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &ValidConfig {
        &self.config
    }

    /// Returns an entry point for one thread: a lane to every shard. There may be any number, created at any time;
    /// dropping a producer ends its lanes.
    #[must_use]
    pub fn producer(&self) -> Producer<A::Event> {
        let lanes = self.shards.iter().map(|shard| {
            let (tx, ring) = rtrb::RingBuffer::new(self.config.ring_capacity);
            let shared = Arc::new(LaneShared::new(Arc::clone(&shard.door.log), self.config.durability));
            shard.door.lanes.register(&shared);
            if let Err(end) = shard.arriving.push(LaneEnd { ring, shared: Arc::clone(&shared), appended: 0 }) {
                // The shard has ended: the lane accepts nothing.
                end.shared.close_gate.close();
            }
            shard.door.signal.notify();
            (tx, shared, Arc::clone(&shard.door))
        });
        let (clock, router) = (self.clock.clone(), self.config.router());
        Producer::new(lanes.collect(), clock, self.config.wait, self.config.event_bytes_max, router)
    }

    /// Returns an entry point that any number of threads may clone and share.
    #[must_use]
    pub fn shared_producer(&self) -> SharedProducer<A::Event> {
        SharedProducer::new(
            Arc::clone(&self.shared_lanes),
            self.clock.clone(),
            self.config.wait,
            self.config.event_bytes_max,
            self.config.router(),
        )
    }

    /// Returns a client through which one thread sends commands: a lane to every shard, and one back. There may be any
    /// number, created at any time.
    #[must_use]
    pub fn client(&self) -> Client<A> {
        Client::new(self.client_lanes(), self.clock.clone(), self.config.wait, self.config.router())
    }

    /// Returns a client that any number of threads and tasks may clone and share: a lane to every shard, and one back.
    /// There may be any number, created at any time.
    #[must_use]
    pub fn shared_client(&self) -> SharedClient<A> {
        SharedClient::new(self.client_lanes(), self.clock.clone(), self.config.router())
    }

    fn client_lanes(&self) -> Vec<ClientLane<A>> {
        let lanes = self.shards.iter().map(|shard| {
            let (orders_tx, orders) = rtrb::RingBuffer::new(self.config.ring_capacity);
            let (answers, answers_rx) = rtrb::RingBuffer::new(self.config.ring_capacity);
            let shared = Arc::new(LaneShared::of_commands(Arc::clone(&shard.door.log), self.config.durability));
            shard.door.lanes.register(&shared);
            let end = ClientEnd::new(orders, answers, Arc::clone(&shared));
            if let Err(end) = shard.arriving_clients.push(end) {
                // The shard has ended: the lane accepts nothing.
                end.shared.close_gate.close();
            }
            shard.door.signal.notify();
            ClientLane::new(orders_tx, answers_rx, shared, Arc::clone(&shard.door))
        });
        lanes.collect()
    }

    /// Returns a reader of a shard's log that starts at the earliest event held.
    ///
    /// # Panics
    /// If the store has no such shard.
    #[must_use]
    pub fn reader(&self, shard: ShardId) -> Reader<A::Event> {
        Reader::earliest(Arc::clone(&self.shards[usize::from(shard.0)].door.log), Arc::clone(&self.lock))
    }

    /// Returns a reader of a shard's log that starts at the record that begins at `offset`.
    ///
    /// # Errors
    /// `BeyondRetention`, `NotARecord`, or an error of reading the log.
    ///
    /// # Panics
    /// If the store has no such shard.
    pub fn reader_at(&self, shard: ShardId, offset: Offset) -> Result<Reader<A::Event>, ReadError> {
        Reader::at(Arc::clone(&self.shards[usize::from(shard.0)].door.log), offset, Arc::clone(&self.lock))
    }

    /// Returns a reader of a shard's log that continues from a saved position.
    ///
    /// # Errors
    /// `Position` if the position is from another log, or from another history of this one; `BeyondRetention`, or an
    /// error of reading the log.
    pub fn reader_from(&self, position: &Position) -> Result<Reader<A::Event>, ReadError> {
        let (shard, shards) = (position.shard(), self.shards.len());
        // A position in a shard that this store does not have is from another store, which any shard's log reports.
        let log = &self.shards[usize::from(shard.0).min(shards - 1)].door.log;
        position.reader(log, &self.lock)
    }

    /// Returns all counters as they are now, and the histograms as far as their threads have handed them over by
    /// `deadline`.
    ///
    /// Every shard's thread and syncer records its own histograms and hands them over between two turns, a syncer after
    /// the sync in progress. This call asks all of them at once and waits for the slowest, so it usually takes as long
    /// as one sync. With `Duration::ZERO` it does not wait: the histograms are then those of the previous call.
    /// [`Metrics::is_complete`] says whether all threads answered. Without latency histograms
    /// ([`Config::latency`](crate::Config::latency)), and on an engine's own thread, it never waits.
    ///
    /// ```
    /// # use corelane::envelope::Envelope;
    /// # use corelane::{Config, EventLog};
    /// # use std::time::Duration;
    /// # let dir = tempfile::tempdir()?;
    /// # let engine = EventLog::<Envelope>::open(Config::new(dir.path()))?;
    /// let text = engine.metrics(Duration::from_millis(20)).prometheus();
    /// # assert!(text.contains("corelane_appended_total"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn metrics(&self, deadline: impl Into<Deadline>) -> Metrics {
        let deadline = deadline.into().instant();
        let exchanges = || self.shards.iter().flat_map(|shard| &shard.exchanges);
        if self.config.latency {
            let mut totals = lock(&self.totals);
            exchanges().for_each(|exchange| totals.fetch_and_ask(exchange));
            self.shards.iter().for_each(|shard| {
                shard.door.signal.notify();
                shard.syncer.signal.notify();
            });
        }
        let is_complete = loop {
            if !exchanges().any(|exchange| exchange.is_wanted()) {
                break true;
            }
            if !may_wait() || deadline.is_some_and(|at| Instant::now() >= at) {
                break false;
            }
            nap(Duration::from_micros(50));
        };
        let mut totals = lock(&self.totals);
        exchanges().for_each(|exchange| totals.fetch(exchange));
        Metrics::new(self.shard_metrics(), is_complete, totals.histograms())
    }

    /// Returns the counters alone. Never waits and wakes no thread.
    #[must_use]
    pub fn shard_metrics(&self) -> Vec<ShardMetrics> {
        self.shards.iter().enumerate().map(|(i, shard)| shard.metrics(ShardId(i as u16))).collect()
    }

    /// Returns the failures of the shards that have failed.
    #[must_use]
    pub fn failures(&self) -> Vec<ShardFailure> {
        self.closing.failures().collect()
    }

    /// Refuses further events, appends what was accepted, syncs, and joins every thread. A second call is harmless and
    /// returns the same result.
    ///
    /// # Errors
    /// The first shard's failure; `TimedOut` if the deadline passes first (the threads then keep running, and a later
    /// call or the drop waits again); `OnEngineThread` on a thread of this engine or its consumers, and nothing is
    /// closed.
    pub fn shutdown(&self, deadline: impl Into<Deadline>) -> Result<(), WaitError> {
        let deadline = deadline.into().instant();
        if self.closing.is_own_thread() {
            return Err(WaitError::OnEngineThread);
        }
        self.closing.close(deadline)
    }

    /// Returns the shard that owns `key`.
    #[must_use]
    pub fn shard_of(&self, key: Key) -> ShardId {
        self.config.shard_of(key)
    }

    /// The shard that owns `key`.
    fn of(&self, key: Key) -> &Handle<A> {
        &self.shards[usize::from(self.shard_of(key).0)]
    }
}

impl<A: Aggregate> Drop for Engine<A> {
    fn drop(&mut self) {
        self.closing.close_dropped();
    }
}
