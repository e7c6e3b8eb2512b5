//! A consumer driven from outside: by an application's own thread, or by its tasks.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::alarm::Alarm;
use super::dead_letter::answer::DeadLetter;
use super::driver::execute::{Failed, Job};
use super::driver::{Driver, Letters};
use super::error::ConsumerError;
use super::report::ConsumerReport;
use super::services::Services;
use super::settings::Start;
use crate::error::HandlerError;
use crate::event::{Event, EventId, Key, Meta, Offset};
use crate::log::access::Access;
use crate::log::finder::Finder;
use crate::sync::{Deadline, Mutex, lock, may_wait, thread_waker};

/// How often its report is renewed while it has work.
const SHOW_EVERY: Duration = Duration::from_millis(100);

/// A consumer without threads. Its owner takes deliveries and says how each ended; meanwhile no other event of that key
/// is given out. Retries, dead letters and checkpoints are as with threads, and happen inside these calls: call often.
///
/// Dropping it saves as [`Poller::save`] does; deliveries that are out then are delivered again. The attempts
/// of an event that is tried again are counted while the poller lives, and from 1 by the next one.
pub struct Poller<E: Event> {
    services: Arc<Services>,
    driver: Driver<E>,
    finders: Vec<Finder>,
    access: Access,
    clock: Box<dyn Fn() -> Duration + Send>,
    alarm: Option<Alarm>,
    /// What `Engine::consumers` shows of it, and when that is to be renewed although there is work.
    shown: Arc<Mutex<ConsumerReport>>,
    show_at: Duration,
}

impl<E: Event> std::fmt::Debug for Poller<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller").field("driver", &self.driver).finish_non_exhaustive()
    }
}

/// An event that is out to be handled; it goes back with [`Poller::succeeded`] or [`Poller::failed`].
#[derive(Debug)]
#[must_use = "its key waits until the outcome is told"]
pub struct Delivery(Job);

impl Delivery {
    /// 1 the first time.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.0.attempt()
    }
}

impl<E: Event> Poller<E> {
    pub(super) fn new(services: Arc<Services>, driver: Driver<E>) -> Self {
        let finders = driver.desks().iter().map(|desk| desk.finder()).collect();
        let began = Instant::now();
        let clock = Box::new(move || began.elapsed());
        let shown = Arc::new(Mutex::new(ConsumerReport::of(&driver, Duration::ZERO)));
        services.shows(&driver.settings().name, &shown);
        let (access, show_at) = (Access::new::<E>(), Duration::ZERO);
        Self { services, driver, finders, access, clock, alarm: None, shown, show_at }
    }

    /// Another clock: the time since any fixed moment, monotonic. For tests of what retries do.
    #[cfg(any(test, feature = "test-util"))]
    #[must_use]
    pub fn clock(mut self, clock: impl Fn() -> Duration + Send + 'static) -> Self {
        self.clock = Box::new(clock);
        self
    }

    /// The next event that may be handled now. `None`: none may; see [`Poller::wait`] and [`Poller::ready`].
    ///
    /// # Errors
    /// The error of reading the log or of writing the consumer's files. The position stays: the next call tries the same again, and
    /// never returns a later event.
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

    /// Lets `Engine::consumers` see how it is.
    fn show(&mut self, now: Duration) {
        *lock(&self.shown) = ConsumerReport::of(&self.driver, now);
        self.show_at = now + SHOW_EVERY;
    }

    /// As many deliveries as may be out at once, at most `max`.
    ///
    /// # Errors
    /// As [`Poller::next`]. Deliveries taken before the error are returned, and the next call returns the error.
    pub fn next_batch(&mut self, max: usize) -> Result<Vec<Delivery>, ConsumerError> {
        let mut batch = Vec::new();
        while batch.len() < max {
            match self.next() {
                Ok(Some(delivery)) => batch.push(delivery),
                Ok(None) => break,
                Err(error) if batch.is_empty() => return Err(error),
                // Dropped deliveries would be out for ever.
                Err(_) => break,
            }
        }
        Ok(batch)
    }

    /// What is delivered, in place; its `meta.sequence` is not known. `None` where it cannot be decoded: say so with
    /// [`Poller::undecodable`], which says so where in truth the log is damaged.
    pub fn event<'a>(&'a mut self, delivery: &'a Delivery) -> Option<(&'a E::Archived, Meta)> {
        // Where the log does not hold it any more, recording it as undecodable needs it too, and fails with the reason.
        delivery.0.event::<E>(&mut self.finders[delivery.0.of().0], &mut self.access).ok().flatten()
    }

    /// It was handled.
    ///
    /// # Errors
    /// What writing the consumer's files said.
    ///
    /// # Panics
    /// When the delivery is another poller's.
    pub fn succeeded(&mut self, delivery: Delivery) -> Result<(), ConsumerError> {
        self.tell(delivery, Ok(()))
    }

    /// It failed: the consumer's policies say what becomes of it.
    ///
    /// # Errors
    /// As [`Poller::succeeded`].
    ///
    /// # Panics
    /// When the delivery is another poller's.
    pub fn failed(&mut self, delivery: Delivery, error: impl Into<HandlerError>) -> Result<(), ConsumerError> {
        self.tell(delivery, Err(Failed::Handler(error.into())))
    }

    /// It cannot be decoded: its key is parked with it.
    ///
    /// # Errors
    /// As [`Poller::succeeded`].
    ///
    /// # Panics
    /// When the delivery is another poller's.
    pub fn undecodable(&mut self, delivery: Delivery) -> Result<(), ConsumerError> {
        self.tell(delivery, Err(Failed::Undecodable))
    }

    /// What became of a dead letter is durable when this returns, if it can be.
    fn tell(&mut self, delivery: Delivery, outcome: Result<(), Failed>) -> Result<(), ConsumerError> {
        let now = (self.clock)();
        self.driver.done(delivery.0, outcome, now)?;
        self.driver.record_tried(now);
        Ok(())
    }

    /// Blocks until there may be something for [`Poller::next`], or the deadline. On a shard's own thread, which must not wait, it
    /// returns at once.
    pub fn wait(&mut self, deadline: impl Into<Deadline>) {
        let deadline = deadline.into().instant();
        let waker = thread_waker();
        if !may_wait() || self.may_go_on(&waker) {
            return;
        }
        let due = self.driver.next_due().map(|due| Instant::now() + due.saturating_sub((self.clock)()));
        match [due, deadline].into_iter().flatten().min() {
            Some(at) => crate::sync::thread::park_timeout(at.saturating_duration_since(Instant::now())),
            None => crate::sync::thread::park(),
        }
    }

    /// Ready when there may be something for [`Poller::next`]: for tasks, on any runtime. What is due by time (retries, probes) is
    /// woken by a thread of the poller's own, started with the first call.
    pub fn ready(&mut self) -> impl Future<Output = ()> + '_ {
        Ready { poller: self, is_first: true }
    }

    /// The next event, when there is one: for tasks.
    ///
    /// # Errors
    /// As [`Poller::next`].
    pub async fn next_async(&mut self) -> Result<Delivery, ConsumerError> {
        loop {
            if let Some(delivery) = self.next()? {
                return Ok(delivery);
            }
            self.ready().await;
        }
    }

    /// Registers `waker` with the logs. Whether there is something already.
    fn may_go_on(&self, waker: &Waker) -> bool {
        self.driver.desks().iter().for_each(|desk| desk.register(waker));
        self.driver.has_unread() || self.driver.next_due().is_some_and(|due| due <= (self.clock)())
    }

    /// Saves its position and the records of parked and skipped events. Durable when it returns; waits for the log to become durable
    /// up to such events.
    ///
    /// # Errors
    /// What the file system says; `Records` where there is no room for more dead letters; `Wait` where the log does not become durable.
    /// Whatever could not be saved is saved by the next call, or the event comes again.
    pub fn save(&mut self) -> Result<(), ConsumerError> {
        self.driver.save()
    }

    /// Sets it elsewhere; see [`super::Consumer::seek`]. Parked and skipped events are recorded first.
    ///
    /// # Errors
    /// `Busy` while deliveries are out; `Read` where the place is gone; as [`Poller::save`], where an event that was told to be parked or skipped
    /// would be left behind without a record.
    pub fn seek(&mut self, start: Start) -> Result<(), ConsumerError> {
        if self.driver.running() > 0 {
            return Err(ConsumerError::Busy { name: self.driver.settings().name.to_string() });
        }
        self.driver.seek(start)
    }

    /// Goes on after a halt.
    pub fn resume(&mut self) {
        self.driver.resume();
    }

    /// What is known of it now.
    #[must_use]
    pub fn report(&self) -> ConsumerReport {
        ConsumerReport::of(&self.driver, (self.clock)())
    }

    /// Its dead letters; see [`super::Consumer::dead_letters`].
    ///
    /// # Errors
    /// What the files say.
    pub fn dead_letters(&self, after: Option<(Key, Offset)>, max: usize) -> Result<Vec<DeadLetter>, ConsumerError> {
        Ok(self.driver.letters().list(after, max)?)
    }

    /// Lets dead letters be delivered again; see [`super::Consumer::reprocess`].
    pub fn reprocess(&mut self, which: Letters) -> usize {
        self.driver.reprocess(which)
    }

    /// Takes dead letters away; see [`super::Consumer::discard`].
    ///
    /// # Errors
    /// What the files say.
    pub fn discard(&mut self, which: Letters) -> Result<u64, ConsumerError> {
        self.driver.discard(which)
    }

    /// What was missing before a key's first event is there. Whether one waited.
    pub fn gap_filled(&mut self, key: Key) -> bool {
        self.driver.gap_filled(key)
    }

    /// The id of what is delivered.
    #[must_use]
    pub fn id(&self, delivery: &Delivery) -> EventId {
        let (desk, offset) = delivery.0.of();
        EventId { shard: crate::event::ShardId(desk as u16), offset }
    }
}

impl<E: Event> Drop for Poller<E> {
    fn drop(&mut self) {
        if let Err(error) = self.driver.save() {
            let error = &error as &(dyn std::error::Error + 'static);
            tracing::error!(
                error,
                "a consumer's position could not be saved; what was done since the last one is done again"
            );
        }
        self.services.left(&self.driver.settings().name, None);
    }
}

/// Waits for something to do. Woken once; what there is then, [`Poller::next`] says.
struct Ready<'a, E: Event> {
    poller: &'a mut Poller<E>,
    is_first: bool,
}

impl<E: Event> Future for Ready<'_, E> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Self { poller, is_first } = self.get_mut();
        if !std::mem::take(is_first) || poller.may_go_on(context.waker()) {
            return Poll::Ready(());
        }
        if let Some(due) = poller.driver.next_due() {
            let at = Instant::now() + due.saturating_sub((poller.clock)());
            poller.alarm.get_or_insert_with(Alarm::new).set(at, context.waker());
        }
        Poll::Pending
    }
}
