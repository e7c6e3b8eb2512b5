//! A consumer without threads, driven by the application's own thread or by its tasks.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::alarm::Alarm;
use super::dead_letter::answer::DeadLetter;
use super::dead_letter::selector::LetterSelector;
use super::driver::job::{Failed, Job};
use super::driver::{Driver, ShardFollower};
use super::error::ConsumerError;
use super::report::ConsumerReport;
use super::services::Services;
use super::settings::Start;
use crate::error::{HandlerError, WaitError};
use crate::event::{Event, EventId, Key, Meta, Offset};
use crate::log::access::Access;
use crate::log::finder::Finder;
use crate::sync::{Deadline, Mutex, Registration, lock, may_wait, thread_waker};

/// The interval at which the report for `Engine::consumers` is renewed while there is work.
const SHOW_EVERY: Duration = Duration::from_millis(100);
/// The pause of a task before work that was due and could not be done.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(1);

/// A consumer without threads. Its owner takes deliveries and reports the outcome of each; until then no other event of
/// that key is delivered. Retries, dead letters and saved positions work as with threads, but inside these calls, so
/// call them often.
///
/// Dropping it saves as [`Poller::save`] does, and blocks for that. Deliveries in flight at that time are delivered
/// again. The attempts of an event are counted while the poller lives; the next poller counts from 1.
///
/// ```
/// # use corelane::envelope::Envelope;
/// # use corelane::{Config, Deadline, EventLog};
/// # fn send(_mail: &str) -> Result<(), std::io::Error> { Ok(()) }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// let engine = EventLog::<Envelope>::open(Config::new(dir.path()))?;
/// let mut mails = engine.consumer("mails").poller()?;
///
/// let event = Envelope::new("player.levelled_up", 42, r#"{"level":7}"#)?;
/// engine.producer().publish(event.key(), event)?;
/// engine.flush(Deadline::NEVER)?;
/// while let Some(delivery) = mails.next()? {
///     match mails.event(&delivery).map(|(event, _meta)| send(event.payload())) {
///         Some(Ok(())) => mails.succeeded(delivery)?,
///         Some(Err(error)) => mails.failed(delivery, error)?,
///         None => mails.undecodable(delivery)?,
///     }
/// }
/// assert_eq!(mails.report().handled, 1);
/// mails.save()?;
/// # drop(mails);
/// # engine.shutdown(Deadline::NEVER)?;
/// # Ok(())
/// # }
/// ```
pub struct Poller<E: Event> {
    services: Arc<Services>,
    driver: Driver<E>,
    finders: Vec<Finder>,
    access: Access,
    clock: Box<dyn Fn() -> Duration + Send>,
    alarm: Option<Alarm>,
    /// Its owner's places among the waiters of each log.
    registrations: Vec<Registration>,
    /// The report for `Engine::consumers`, and the time at which it is renewed although there is work.
    shown: Arc<Mutex<ConsumerReport>>,
    show_at: Duration,
}

impl<E: Event> std::fmt::Debug for Poller<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller").field("driver", &self.driver).finish_non_exhaustive()
    }
}

/// An event in flight. It returns through [`Poller::succeeded`], [`Poller::failed`] or [`Poller::undecodable`].
#[derive(Debug)]
#[must_use = "its key waits until the outcome is reported"]
pub struct Delivery(Job);

impl Delivery {
    /// Returns the number of this attempt; the first is 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.0.attempt()
    }
}

impl<E: Event> Poller<E> {
    pub(super) fn new(services: Arc<Services>, driver: Driver<E>) -> Self {
        let finders = driver.followers().iter().map(|follower| follower.finder()).collect();
        let began = Instant::now();
        let clock = Box::new(move || began.elapsed());
        let shown = Arc::new(Mutex::new(ConsumerReport::of(&driver, Duration::ZERO)));
        services.note_report(&driver.settings().name, &shown);
        let (access, show_at) = (Access::new::<E>(), Duration::ZERO);
        Self { services, driver, finders, access, clock, alarm: None, registrations: Vec::new(), shown, show_at }
    }

    /// Replaces the clock by a function that returns the time since a fixed moment. This time must never fall. For
    /// tests of retries.
    #[cfg(any(test, feature = "test-util"))]
    #[must_use]
    pub fn clock(mut self, clock: impl Fn() -> Duration + Send + 'static) -> Self {
        self.clock = Box::new(clock);
        self
    }

    /// Returns the next event that may be handled now. `None` if there is none; see [`Poller::wait`] and
    /// [`Poller::ready`].
    ///
    /// Never waits for an event, but may block for file operations: due saves (every `save_every`), dead letters, and
    /// segments that are not in memory.
    ///
    /// # Errors
    /// Errors of reading the log or of writing the consumer's files. The position stays: the next call tries the same
    /// again, and never returns a later event.
    #[expect(clippy::should_implement_trait, reason = "None is not the end")]
    pub fn next(&mut self) -> Result<Option<Delivery>, ConsumerError> {
        loop {
            let now = (self.clock)();
            if let Some(job) = self.driver.next_job(now)? {
                if now >= self.show_at {
                    self.show(now);
                }
                return Ok(Some(Delivery(job)));
            }
            if self.driver.step(now, true)? == 0 {
                let job = self.driver.next_job(now)?;
                self.show(now);
                return Ok(job.map(Delivery));
            }
        }
    }

    /// Renews the report for `Engine::consumers`.
    fn show(&mut self, now: Duration) {
        *lock(&self.shown) = ConsumerReport::of(&self.driver, now);
        self.show_at = now + SHOW_EVERY;
    }

    /// Returns up to `max` deliveries, limited by the number that may be in flight.
    ///
    /// # Errors
    /// The same as for [`Poller::next`]. Deliveries taken before the error are returned, and the next call returns the
    /// error.
    pub fn next_batch(&mut self, max: usize) -> Result<Vec<Delivery>, ConsumerError> {
        let mut batch = Vec::new();
        while batch.len() < max {
            match self.next() {
                Ok(Some(delivery)) => batch.push(delivery),
                Ok(None) => break,
                Err(error) if batch.is_empty() => return Err(error),
                // Dropped deliveries would stay in flight for ever.
                Err(_) => break,
            }
        }
        Ok(batch)
    }

    /// Returns the delivered event in place; its `meta.sequence` is unknown. `None` if it cannot be decoded: report
    /// that with [`Poller::undecodable`], which returns the error if the log is damaged.
    pub fn event<'a>(&'a mut self, delivery: &'a Delivery) -> Option<(&'a E::Archived, Meta)> {
        // If the log cannot be read, `undecodable` meets the same error and returns it.
        delivery.0.event::<E>(&mut self.finders[delivery.0.shard], &mut self.access).ok().flatten()
    }

    /// Reports that the event was handled.
    ///
    /// # Errors
    /// Errors of writing the consumer's files.
    ///
    /// # Panics
    /// If another poller made the delivery.
    pub fn succeeded(&mut self, delivery: Delivery) -> Result<(), ConsumerError> {
        self.take_back(delivery, Ok(()))
    }

    /// Reports that the handler failed. The consumer's policies decide what follows.
    ///
    /// # Errors
    /// The same as for [`Poller::succeeded`].
    ///
    /// # Panics
    /// If another poller made the delivery.
    pub fn failed(&mut self, delivery: Delivery, error: impl Into<HandlerError>) -> Result<(), ConsumerError> {
        self.take_back(delivery, Err(Failed::Handler(error.into())))
    }

    /// Reports that the event cannot be decoded. Its key is parked with it.
    ///
    /// # Errors
    /// The same as for [`Poller::succeeded`].
    ///
    /// # Panics
    /// If another poller made the delivery.
    pub fn undecodable(&mut self, delivery: Delivery) -> Result<(), ConsumerError> {
        self.take_back(delivery, Err(Failed::Undecodable))
    }

    /// Takes a delivery back. The outcome of a dead letter is durable when this returns, unless writing fails.
    fn take_back(&mut self, delivery: Delivery, outcome: Result<(), Failed>) -> Result<(), ConsumerError> {
        let now = (self.clock)();
        self.driver.done(delivery.0, outcome, now)?;
        self.driver.write_outcomes(now);
        Ok(())
    }

    /// Blocks until [`Poller::next`] may have an event, or until the deadline. Returns `Ok` in both cases.
    ///
    /// # Errors
    /// `Wait` with `OnEngineThread` on a shard's own thread, which must not wait.
    pub fn wait(&mut self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        if !may_wait() {
            return Err(WaitError::OnEngineThread.into());
        }
        let waker = thread_waker();
        self.register(|follower, at| follower.register_thread(at, &waker));
        if self.has_event() {
            return Ok(());
        }
        let due = self.driver.next_due().map(|due| Instant::now() + due.saturating_sub((self.clock)()));
        match [due, deadline].into_iter().flatten().min() {
            Some(at) => crate::sync::thread::park_timeout(at.saturating_duration_since(Instant::now())),
            None => crate::sync::thread::park(),
        }
        Ok(())
    }

    /// Completes when [`Poller::next`] may have an event. For tasks, on any runtime. A thread of the poller, started
    /// with the first call, wakes the task when a retry or a probe is due.
    ///
    /// Never blocks. Cancel safety: a dropped future changes nothing.
    pub fn ready(&mut self) -> impl Future<Output = ()> + '_ {
        HasEvent { poller: self, is_first: true }
    }

    /// Returns the next event as soon as there is one. For tasks, on any runtime. Blocks for file operations as
    /// [`Poller::next`] does. A task that must not block at all uses `ConsumerBuilder::start_async` (feature `tokio`).
    ///
    /// Cancel safety: a dropped future has taken no event.
    ///
    /// # Errors
    /// The same as for [`Poller::next`].
    pub async fn next_async(&mut self) -> Result<Delivery, ConsumerError> {
        loop {
            if let Some(delivery) = self.next()? {
                return Ok(delivery);
            }
            self.ready().await;
        }
    }

    /// Registers the caller with each log.
    fn register(&mut self, register: impl Fn(&ShardFollower<E>, &mut Registration)) {
        let followers = self.driver.followers();
        self.registrations.resize_with(followers.len(), Registration::default);
        followers.iter().zip(&mut self.registrations).for_each(|(follower, at)| register(follower, at));
    }

    /// Returns `true` if there may be an event.
    fn has_event(&self) -> bool {
        self.driver.has_unread() || self.driver.next_due().is_some_and(|due| due <= (self.clock)())
    }

    /// Registers a task, which is woken when [`Poller::next`] may have an event.
    pub(super) fn listen(&mut self, waker: &Waker) {
        self.register(|follower, at| follower.register(at, waker));
        if let Some(due) = self.driver.next_due() {
            // Work that is due and cannot be done yet is tried again a little later.
            let left = due.saturating_sub((self.clock)()).max(TRY_AGAIN_AFTER);
            self.alarm.get_or_insert_with(Alarm::new).set(Instant::now() + left, waker);
        }
    }

    /// Returns `true` if there will be no more events: nothing more is appended, and everything is done.
    pub(super) fn has_ended(&self) -> bool {
        self.driver.followers().iter().all(|follower| follower.log().has_ended()) && self.driver.is_caught_up()
    }

    /// Saves the position and the records of parked and skipped events. Durable when it returns. Waits for the log to
    /// become durable up to these events, at most 10 s. Blocks: a task calls it on a thread for blocking work, for
    /// example `spawn_blocking(move || (poller.save(), poller))`.
    ///
    /// # Errors
    /// Errors of the file system; `Records` if there is no room for more dead letters; `Wait` if the log does not
    /// become durable. The next call saves the rest. Without a further call, the unsaved events are delivered again.
    pub fn save(&mut self) -> Result<(), ConsumerError> {
        self.driver.save()
    }

    /// Sets the consumer to another position; see [`super::Consumer::seek`]. Records parked and skipped events first.
    ///
    /// # Errors
    /// `Busy` while deliveries are in flight; `Read` if the log no longer holds the position; as [`Poller::save`], if a
    /// parked or skipped event without a record would be left behind.
    pub fn seek(&mut self, start: Start) -> Result<(), ConsumerError> {
        if self.driver.running() > 0 {
            return Err(ConsumerError::Busy { name: self.driver.settings().name.to_string() });
        }
        self.driver.seek(start)
    }

    /// Ends a halt.
    pub fn resume(&mut self) {
        self.driver.resume();
    }

    /// Returns a report of the consumer.
    #[must_use]
    pub fn report(&self) -> ConsumerReport {
        ConsumerReport::of(&self.driver, (self.clock)())
    }

    /// Returns dead letters; see [`super::Consumer::dead_letters`].
    ///
    /// # Errors
    /// Errors of the dead letters' files.
    pub fn dead_letters(&self, after: Option<(Key, Offset)>, max: usize) -> Result<Vec<DeadLetter>, ConsumerError> {
        Ok(self.driver.letters().list(after, max)?)
    }

    /// Starts delivering dead letters again; see [`super::Consumer::reprocess`].
    pub fn reprocess(&mut self, which: LetterSelector) -> usize {
        self.driver.reprocess(which)
    }

    /// Discards dead letters; see [`super::Consumer::discard`].
    ///
    /// # Errors
    /// Errors of the dead letters' files.
    pub fn discard(&mut self, which: LetterSelector) -> Result<u64, ConsumerError> {
        self.driver.discard(which)
    }

    /// Lets a key's first event run if it waits for a gap; see [`super::Consumer::gap_filled`]. Returns `true` if an
    /// event waited.
    pub fn gap_filled(&mut self, key: Key) -> bool {
        self.driver.gap_filled(key)
    }

    /// Returns the delivered event's id.
    #[must_use]
    pub fn id(&self, delivery: &Delivery) -> EventId {
        let (shard, offset) = delivery.0.identity();
        EventId { shard: crate::event::ShardId(shard as u16), offset }
    }
}

impl<E: Event> Drop for Poller<E> {
    fn drop(&mut self) {
        if let Err(error) = self.driver.save() {
            tracing::error!(
                error = crate::error::with_sources(&error),
                "a position could not be saved; events since the last save are handled again"
            );
        }
        self.services.note_end(&self.driver.settings().name, None);
    }
}

/// Completes when [`Poller::next`] may have an event. One wake-up completes it.
struct HasEvent<'a, E: Event> {
    poller: &'a mut Poller<E>,
    is_first: bool,
}

impl<E: Event> Future for HasEvent<'_, E> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Self { poller, is_first } = self.get_mut();
        if !std::mem::take(is_first) {
            return Poll::Ready(());
        }
        poller.register(|follower, at| follower.register(at, context.waker()));
        if poller.has_event() {
            return Poll::Ready(());
        }
        if let Some(due) = poller.driver.next_due() {
            let at = Instant::now() + due.saturating_sub((poller.clock)());
            poller.alarm.get_or_insert_with(Alarm::new).set(at, context.waker());
        }
        Poll::Pending
    }
}
