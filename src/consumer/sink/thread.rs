//! Sinks on a thread of their own.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::backend::AsyncSink;
use super::batch::Batch;
use super::handle::SinkConsumer;
use super::runner::SinkRunner;
use crate::consumer::builder::ConsumerBuilder;
use crate::consumer::error::ConsumerError;
use crate::consumer::running::spawn;
use crate::consumer::services::Running;
use crate::error::HandlerError;
use crate::event::{Event, ShardId};
use crate::log::position::Position;
use crate::sync::{thread, thread_waker};

/// Takes in events together with the position after them: for example a database with transactions. A [`Position`] is
/// 40 bytes or a text of 80 characters. The sink keeps one position per shard and returns it unchanged. The position
/// identifies the log: a position of another store, or of another history of this store (after restoring a copy of the
/// store or of the database), ends the sink with a typed failure.
///
/// ```
/// # use corelane::consumer::{Batch, Sink};
/// # use corelane::log::Position;
/// # use corelane::{Event, HandlerError, ShardId};
/// # use std::collections::HashMap;
/// # #[derive(Default)] struct Transaction { rows: u64, positions: HashMap<u16, Vec<u8>> }
/// # struct Database { committed: Transaction }
/// # impl Database { fn commit(&mut self, transaction: Transaction) { self.committed = transaction } }
/// impl<E: Event> Sink<E> for Database {
///     fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
///         let saved = self.committed.positions.get(&shard.0);
///         Ok(saved.map(|bytes| Position::from_bytes(bytes)).transpose()?)
///     }
///
///     fn apply(&mut self, batch: &mut Batch<'_, E>) -> Result<(), HandlerError> {
///         let mut transaction = Transaction::default();
///         while let Some(_record) = batch.next()? {
///             transaction.rows += 1;
///         }
///         transaction.positions.insert(batch.shard().0, batch.end().to_bytes().to_vec());
///         self.commit(transaction);
///         Ok(())
///     }
/// }
/// ```
pub trait Sink<E: Event>: Send + 'static {
    /// Returns the position that was kept with the data, or `None` if there is none for this shard yet: delivery then
    /// begins where the sink was registered. If events were delivered before, `None` ends the sink with
    /// [`ConsumerError::PositionGone`]. Called when the sink starts, and after every failed batch.
    ///
    /// # Errors
    /// Any error of reading the position. The retry policy decides when it is called again.
    fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError>;

    /// Takes in a batch of events: stores the batch's effects on the data, and [`Batch::end`], in one transaction, all
    /// or nothing.
    ///
    /// # Errors
    /// The batch was not taken in, and is delivered again. If it was taken in after all, `position` must return its
    /// end.
    fn apply(&mut self, batch: &mut Batch<'_, E>) -> Result<(), HandlerError>;
}

impl<E: Event> ConsumerBuilder<E> {
    /// Starts a sink: delivers batches of up to `batch_max` events of one shard (1..=1,000,000), in order, each taken
    /// in once. Settings about keys do not apply. A batch that fails is retried as the retry policy says. When its
    /// attempts are used up the sink halts, to keep the order.
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`].
    pub fn start_sink(self, batch_max: usize, sink: impl Sink<E>) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink(batch_max, sink, false)
    }

    /// Starts a sink whose data is gone, as [`ConsumerBuilder::start_sink`] does. For a shard without a position,
    /// delivery begins again where the sink was registered, although events were delivered before. Use it for one
    /// start, then [`ConsumerBuilder::start_sink`] again.
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`], and `BeginningGone` if retention has freed events that were
    /// delivered before: remove the consumer and register it again, to begin with the earliest event held.
    pub fn start_sink_over(self, batch_max: usize, sink: impl Sink<E>) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink(batch_max, sink, true)
    }

    fn run_sink(self, batch_max: usize, sink: impl Sink<E>, over: bool) -> Result<SinkConsumer, ConsumerError> {
        let (runner, services) = SinkRunner::open(self, batch_max, Blocking(sink), over, None)?;
        let (shared, name) = (Arc::clone(&runner.shared), runner.name().to_owned());
        services.note_running(&name, Arc::clone(&shared) as Arc<dyn Running>);
        // The handle waits for the life's end, not for the thread.
        let spawned = spawn(&services, name.clone(), move || run_to_the_end(runner));
        drop(spawned.map_err(|error| {
            let error = services.note_refused(&name, error);
            // A caller may have found the sink meanwhile, and may be waiting for it.
            shared.end(None);
            error
        })?);
        Ok(SinkConsumer::new(shared, name))
    }
}

/// A sink whose functions block, as the runner calls it.
struct Blocking<S>(S);

impl<E: Event, S: Sink<E>> AsyncSink<E> for Blocking<S> {
    async fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
        self.0.position(shard)
    }

    async fn apply(&mut self, batch: &mut Batch<'_, E>) -> Result<(), HandlerError> {
        self.0.apply(batch)
    }
}

/// Completes a future that never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("a blocking sink completes at once"),
    }
}

fn run_to_the_end<E: Event, S: Sink<E>>(mut runner: SinkRunner<E, Blocking<S>>) {
    let shared = Arc::clone(&runner.shared);
    let name = runner.name().to_owned();
    let failure = shared.life.run(&name, || run(&mut runner));
    runner.end(failure);
}

fn run<E: Event, S: Sink<E>>(runner: &mut SinkRunner<E, Blocking<S>>) -> Result<(), ConsumerError> {
    let waker = thread_waker();
    while !runner.shared.life.is_stopping() {
        let taken = now(runner.round())?;
        runner.file_work()?;
        runner.report();
        if taken == 0
            && let Some(due) = runner.rest(|reader, at| reader.register_thread(at, &waker))
        {
            match due {
                Some(due) => thread::park_timeout(due),
                None => thread::park(),
            }
        }
    }
    runner.save();
    runner.report();
    Ok(())
}
