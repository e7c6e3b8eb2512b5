//! A query: a question to a shard, sent and answered once, that a thread waits for or a task awaits.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use crate::command::Question;
use crate::error::{WaitError, panic_text};
use crate::lane::door::ShardDoor;
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::sync::{Arrivals, Deadline, Promise, may_wait, promise_of_shard};

/// An answer, or the message of the question's panic.
type Answered<T> = Result<T, String>;

/// A query to the shard that owns a key. Nothing is sent before the query is awaited or waited for.
///
/// | | waits |
/// |---|---|
/// | `.await` | as a task, on any runtime |
/// | [`wait()`](Query::wait) | blocking, without limit |
/// | [`wait_until(deadline)`](Query::wait_until) | blocking, until the deadline |
///
/// The query borrows nothing, so it can be moved to another task or thread, and it may outlive the engine. The shard
/// answers between two batches: within microseconds, unless application code (an inline handler, `evolve`, `decide`, a
/// view, another query) keeps its thread.
///
/// Cancel safety: a query that was sent and is dropped may still run on the shard, and its answer is discarded. A query
/// changes nothing, so it can be made again.
///
/// ```
/// # use corelane::envelope::Envelope;
/// # use corelane::{Config, EventLog, Key};
/// # use std::time::Duration;
/// # let dir = tempfile::tempdir()?;
/// # let engine = EventLog::<Envelope>::open(Config::new(dir.path()))?;
/// let version = engine.ask(Key(7), |_state, version| version.get()).wait_until(Duration::from_secs(1))?;
/// assert_eq!(version, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a query does nothing until it is awaited or waited for"]
pub struct Query<A: Aggregate, T> {
    /// `None` once sent.
    unsent: Option<Question<A>>,
    questions: Arc<Arrivals<Question<A>>>,
    door: Arc<ShardDoor>,
    answer: Promise<Answered<T>>,
}

impl<A: Aggregate, T> std::fmt::Debug for Query<A, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Query").field("is_sent", &self.unsent.is_none()).finish_non_exhaustive()
    }
}

impl<A: Aggregate, T: Send + 'static> Query<A, T> {
    /// Returns a query that runs `look` on the shard's key table between two batches.
    pub(super) fn new(
        questions: &Arc<Arrivals<Question<A>>>,
        door: &Arc<ShardDoor>,
        look: impl FnOnce(&KeyTable<A>) -> T + Send + 'static,
    ) -> Self {
        let (answer, keeping) = promise_of_shard(&door.log.notifier);
        let question = Box::new(move |keys: &KeyTable<A>| {
            let answer = catch_unwind(AssertUnwindSafe(|| look(keys)));
            keeping.keep(answer.map_err(|panic| panic_text(&*panic)));
        });
        Self { unsent: Some(question), questions: Arc::clone(questions), door: Arc::clone(door), answer }
    }

    /// Waits for the answer without a limit.
    ///
    /// # Errors
    /// `ShardFailed`; `Closed` after the engine was shut down; `QuestionPanicked` with the message if the query
    /// panicked; `OnEngineThread` on a shard's own thread (inline handlers, `decide`, views, another query), which would
    /// wait for itself: the query is then not sent.
    pub fn wait(self) -> Result<T, WaitError> {
        self.wait_until(Deadline::NEVER)
    }

    /// Waits for the answer until `deadline`.
    ///
    /// # Errors
    /// The same as for [`Query::wait`]; `TimedOut`.
    pub fn wait_until(mut self, deadline: impl Into<Deadline>) -> Result<T, WaitError> {
        if !may_wait() {
            return Err(WaitError::OnEngineThread);
        }
        self.send();
        let answer = self.answer.wait(deadline.into().instant())?;
        self.answered(answer)
    }

    fn send(&mut self) {
        if let Some(question) = self.unsent.take() {
            // A shard that has ended drops the question, which breaks the promise.
            drop(self.questions.push(question));
            self.door.signal.notify();
        }
    }

    fn answered(&self, answer: Option<Answered<T>>) -> Result<T, WaitError> {
        match answer {
            Some(answer) => answer.map_err(WaitError::QuestionPanicked),
            // The shard ended without answering.
            None => Err(self.door.log.failure().map_or(WaitError::Closed, |failure| failure.clone().into())),
        }
    }
}

impl<A: Aggregate, T: Send + 'static> Future for Query<A, T> {
    type Output = Result<T, WaitError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.send();
        let answer = ready!(Pin::new(&mut self.answer).poll(context));
        Poll::Ready(self.answered(answer))
    }
}
