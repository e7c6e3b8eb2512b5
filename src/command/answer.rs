//! The answer to a command, which a thread or a task can wait for.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use super::client::Client;
use super::lane::Ticket;
use super::outcome::{CommandError, Outcome};
use crate::state::aggregate::Aggregate;
use crate::sync::{Deadline, Registration};

/// The answer to a command: a blocking wait, or a future for any runtime.
#[must_use = "nothing waits until `.wait()` or `.await`"]
pub struct Answer<'c, A: Aggregate> {
    client: &'c mut Client<A>,
    /// `None` once the answer is claimed.
    ticket: Option<Ticket>,
    /// The task's place among the waiters.
    registration: Registration,
}

impl<A: Aggregate> std::fmt::Debug for Answer<'_, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl<'c, A: Aggregate> Answer<'c, A> {
    fn new(client: &'c mut Client<A>, ticket: Ticket) -> Self {
        Self { client, ticket: Some(ticket), registration: Registration::default() }
    }

    /// Blocks the thread until the answer comes.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out.
    pub fn wait(self) -> Result<Outcome, CommandError<A::Rejection>> {
        self.block(None)
    }

    /// Blocks the thread until the answer comes or `deadline` passes. After the deadline, the answer is discarded when
    /// it arrives.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out, or `Unanswered(TimedOut)` after the deadline.
    pub fn wait_until(self, deadline: impl Into<Deadline>) -> Result<Outcome, CommandError<A::Rejection>> {
        let deadline = deadline.into().instant();
        self.block(deadline)
    }

    fn block(mut self, deadline: Option<Instant>) -> Result<Outcome, CommandError<A::Rejection>> {
        let ticket = self.ticket.take().filter(|ticket| self.client.is_mine(ticket));
        let Some(ticket) = ticket else { return Err(CommandError::Claimed) };
        self.ticket = Some(ticket.clone());
        let wait = self.client.wait;
        let lane = &mut self.client.lanes[ticket.lane];
        lane.await_answer(ticket.number, wait, deadline).map_err(CommandError::Unanswered)?;
        lane.receive();
        // The command is answered, so dropping `self` must not forget it, even if the wait for durability fails.
        self.ticket = None;
        let outcome = lane.claim(&ticket).unwrap_or_else(|| Err(CommandError::Claimed))?;
        if ticket.durable {
            let durable = outcome.receipt.durable();
            let waited = match deadline {
                Some(deadline) => durable.wait_until(deadline),
                None => durable.wait(),
            };
            waited.map_err(CommandError::NotDurable)?;
        }
        Ok(outcome)
    }
}

impl<A: Aggregate> Future for Answer<'_, A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let ticket = self.ticket.clone().filter(|ticket| self.client.is_mine(ticket));
        let Some(ticket) = ticket else { return Poll::Ready(Err(CommandError::Claimed)) };
        let this = &mut *self;
        let outcome = this.client.poll_answer(&ticket, &mut this.registration, context);
        if outcome.is_ready() {
            self.ticket = None;
        }
        outcome
    }
}

impl<A: Aggregate> Drop for Answer<'_, A> {
    /// Discards the answer if it is not claimed.
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.client.forget(ticket);
        }
    }
}

impl<A: Aggregate> Client<A> {
    /// Returns the answer to a command sent earlier, for `.wait()`, `.wait_until()` or `.await`.
    pub fn answer(&mut self, ticket: Ticket) -> Answer<'_, A> {
        Answer::new(self, ticket)
    }

    /// Returns the answer if it has arrived. Each answer is given once: later calls return [`CommandError::Claimed`].
    pub fn try_answer(&mut self, ticket: &Ticket) -> Option<Result<Outcome, CommandError<A::Rejection>>> {
        if !self.is_mine(ticket) {
            return Some(Err(CommandError::Claimed));
        }
        let lane = &mut self.lanes[ticket.lane];
        // Read before the replies: a reply that comes after these reads is found by the next call.
        let failure = lane.door.log.failure().cloned();
        let is_answered = lane.shared.appended_count() >= ticket.number;
        lane.receive();
        let Some(claimed) = lane.claim(ticket) else {
            return match failure {
                _ if is_answered => Some(Err(CommandError::Claimed)),
                Some(failure) => Some(Err(CommandError::Unanswered(failure.into()))),
                None => None,
            };
        };
        match claimed {
            Ok(outcome) if ticket.durable => match outcome.receipt.durable().outcome() {
                Some(Ok(())) => Some(Ok(outcome)),
                Some(Err(error)) => Some(Err(CommandError::NotDurable(error))),
                None => {
                    lane.put_back(ticket, Ok(outcome));
                    None
                }
            },
            claimed => Some(claimed),
        }
    }

    /// Polls the answer to `ticket`. While the answer is pending, the task is woken when it must poll again.
    pub(super) fn poll_answer(
        &mut self,
        ticket: &Ticket,
        registration: &mut Registration,
        context: &mut Context<'_>,
    ) -> Poll<Result<Outcome, CommandError<A::Rejection>>> {
        let lane = &mut self.lanes[ticket.lane];
        if lane.shared.appended_count() < ticket.number {
            lane.shared.register_appended(registration, ticket.number, context.waker());
            // Check once more: the reply may have come between the check and the registration.
            if lane.shared.appended_count() < ticket.number {
                return match lane.door.log.failure() {
                    Some(failure) => Poll::Ready(Err(CommandError::Unanswered(failure.clone().into()))),
                    None => Poll::Pending,
                };
            }
        }
        lane.receive();
        let outcome = match lane.claim(ticket) {
            None => return Poll::Ready(Err(CommandError::Claimed)),
            Some(Ok(outcome)) => outcome,
            Some(Err(error)) => return Poll::Ready(Err(error)),
        };
        if !ticket.durable {
            return Poll::Ready(Ok(outcome));
        }
        match outcome.receipt.durable().poll_with(registration, context) {
            Poll::Ready(Ok(())) => Poll::Ready(Ok(outcome)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(CommandError::NotDurable(error))),
            Poll::Pending => {
                lane.put_back(ticket, Ok(outcome));
                Poll::Pending
            }
        }
    }
}
