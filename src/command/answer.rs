//! The answer to a command: waited for by a thread or a task.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use super::{Client, ClientLane, CommandError, Outcome, Ticket, Verdict, Waiting};
use crate::state::aggregate::Aggregate;
use crate::sync::Deadline;

/// An answer that is waited for.
#[must_use = "nothing waits until `.wait()` or `.await`"]
pub struct Answer<'c, A: Aggregate> {
    client: &'c mut Client<A>,
    /// `None` once answered.
    ticket: Option<Ticket>,
}

impl<A: Aggregate> std::fmt::Debug for Answer<'_, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl<'c, A: Aggregate> Answer<'c, A> {
    pub(super) fn new(client: &'c mut Client<A>, ticket: Ticket) -> Self {
        Self { client, ticket: Some(ticket) }
    }

    /// Blocks the thread until there is an answer.
    ///
    /// # Errors
    /// Why the command was not carried out.
    pub fn wait(self) -> Result<Outcome, CommandError<A::Rejection>> {
        self.block(None)
    }

    /// Blocks the thread until there is an answer, or `deadline`. The answer is given up then.
    ///
    /// # Errors
    /// Why the command was not carried out; `Unanswered` with `TimedOut`.
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
        // Answered; what is still waited for does not give the answer up.
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
        let outcome = self.client.poll_answer(&ticket, context);
        if outcome.is_ready() {
            self.ticket = None;
        }
        outcome
    }
}

impl<A: Aggregate> Drop for Answer<'_, A> {
    /// Dropped before it came: nobody asks any more.
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.client.forget(ticket);
        }
    }
}

impl<A: Aggregate> Client<A> {
    /// The answer to `ticket`, or the task is woken when there is more to see.
    pub(super) fn poll_answer(
        &mut self,
        ticket: &Ticket,
        context: &mut Context<'_>,
    ) -> Poll<Result<Outcome, CommandError<A::Rejection>>> {
        let lane = &mut self.lanes[ticket.lane];
        if lane.shared.appended_count() < ticket.number {
            lane.shared.register_appended(ticket.number, context.waker());
            // Once more: it may have come between the look and the registration.
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
        match Pin::new(&mut outcome.receipt.durable()).poll(context) {
            Poll::Ready(Ok(())) => Poll::Ready(Ok(outcome)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(CommandError::NotDurable(error))),
            Poll::Pending => {
                lane.put_back(ticket, Ok(outcome));
                Poll::Pending
            }
        }
    }
}

impl<A: Aggregate> ClientLane<A> {
    /// Puts an answer back that is not to be given yet.
    pub(super) fn put_back(&mut self, ticket: &Ticket, claimed: Result<Outcome, CommandError<A::Rejection>>) {
        let Ok(outcome) = claimed else { return };
        let Outcome { version, events, repeated, .. } = outcome;
        let verdict = Verdict::Done { version, events, repeated };
        // What was carried out needs no expectation any more.
        let expected = super::ExpectedVersion::Any;
        match self.waiting(ticket.number) {
            Some(waiting) => *waiting = Waiting::Answered(expected, verdict),
            // Claimed answers at the front are settled at once.
            None => self.keep(ticket.number, expected, verdict),
        }
    }
}
