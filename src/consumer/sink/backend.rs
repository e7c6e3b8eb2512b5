//! The form in which the runner calls every sink.

use std::future::Future;

use super::batch::Batch;
use crate::error::HandlerError;
use crate::event::{Event, ShardId};
use crate::log::position::Position;

/// Takes in events together with the position after them, as [`super::Sink`] does, for database clients whose calls are
/// awaited. Feature `tokio`; started by [`crate::consumer::ConsumerBuilder::start_sink_async`].
///
/// ```
/// # use corelane::consumer::{AsyncSink, Batch};
/// # use corelane::log::Position;
/// # use corelane::{Event, HandlerError, ShardId};
/// # use std::collections::HashMap;
/// # #[derive(Default)] struct Transaction { rows: u64, positions: HashMap<u16, Vec<u8>> }
/// # struct Database { committed: Transaction }
/// # impl Database { async fn commit(&mut self, transaction: Transaction) { self.committed = transaction } }
/// impl<E: Event> AsyncSink<E> for Database {
///     async fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
///         let saved = self.committed.positions.get(&shard.0);
///         Ok(saved.map(|bytes| Position::from_bytes(bytes)).transpose()?)
///     }
///
///     async fn apply(&mut self, batch: &mut Batch<'_, E>) -> Result<(), HandlerError> {
///         let mut transaction = Transaction::default();
///         while let Some(_record) = batch.next()? {
///             transaction.rows += 1;
///         }
///         transaction.positions.insert(batch.shard().0, batch.end().to_bytes().to_vec());
///         self.commit(transaction).await;
///         Ok(())
///     }
/// }
/// ```
///
/// Cancel safety that the sink must provide: the future of either function may be dropped at any `.await`, when the
/// runtime is shut down or a call of `stop` reaches its deadline. As after an error, the transaction must then have
/// taken effect as a whole or not at all.
#[cfg_attr(not(feature = "tokio"), expect(unreachable_pub, reason = "public with the feature"))]
pub trait AsyncSink<E: Event>: Send + 'static {
    /// Returns the position that was kept with the data; see [`super::Sink::position`].
    ///
    /// # Errors
    /// Any error of reading the position. The retry policy decides when it is called again.
    fn position(&mut self, shard: ShardId) -> impl Future<Output = Result<Option<Position>, HandlerError>> + Send;

    /// Takes in a batch of events: stores the batch's effects on the data, and [`Batch::end`], in one transaction, all
    /// or nothing; see [`super::Sink::apply`]. A [`crate::log::Record`] that is kept across an `.await` needs an archived
    /// type that is `Sync`.
    ///
    /// # Errors
    /// The batch was not taken in, and is delivered again. If it was taken in after all, `position` must return its
    /// end.
    fn apply(&mut self, batch: &mut Batch<'_, E>) -> impl Future<Output = Result<(), HandlerError>> + Send;
}
