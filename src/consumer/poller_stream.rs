//! A poller's deliveries as a stream.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;

use super::error::ConsumerError;
use super::poller::{Delivery, Poller};
use crate::event::Event;

/// The deliveries, for tasks on any runtime: [`Poller::next`] as a stream. Each delivery returns to the poller as
/// usual, so keep the poller: with the traits of other crates, `(&mut poller).take(100)`.
///
/// An error does not end the stream: the next poll tries the same again. The stream is pending while as many deliveries
/// are in flight as the concurrency allows; poll it again after returning one. It ends when the engine has closed, or
/// the shards have failed, and every delivery has returned and no event is left to retry.
///
/// Cancel safety: a delivery is taken only by the poll that returns it.
impl<E: Event> Stream for Poller<E> {
    type Item = Result<Delivery, ConsumerError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let poller = self.get_mut();
        for is_registered in [false, true] {
            if let Some(delivery) = poller.next().transpose() {
                return Poll::Ready(Some(delivery));
            }
            if poller.has_ended() {
                return Poll::Ready(None);
            }
            if !is_registered {
                poller.listen(context.waker());
            }
        }
        Poll::Pending
    }
}
