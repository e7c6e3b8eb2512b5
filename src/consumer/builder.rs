//! The entry point for applications: sets up a consumer and starts it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::dead_letter::answer::DeadLetterPolicy;
#[cfg(feature = "tokio")]
use super::delivered::Delivered;
use super::driver::Driver;
use super::effects::Call;
use super::error::ConsumerError;
use super::handle::Consumer;
use super::health::HealthPolicy;
use super::poller::Poller;
use super::retry::Retry;
use super::running;
#[cfg(feature = "tokio")]
use super::runtime::OwnRuntime;
use super::services::Services;
use super::settings::{Exhausted, Filter, Judgement, Settings, Start};
#[cfg(feature = "tokio")]
use super::task;
use crate::config::in_range;
use crate::config::whole_ms;
use crate::consumer::key_queues::answer::QueuePolicy;
use crate::error::HandlerError;
use crate::event::{Event, Meta};
use crate::log::reader::Sight;

/// Sets up a consumer. Every setting has a default. The name identifies the consumer in the store.
#[must_use = "it does nothing until it is started"]
pub struct ConsumerBuilder<E: Event> {
    services: Arc<Services>,
    settings: Settings,
    types: Option<Vec<String>>,
    retry: Retry,
    event: std::marker::PhantomData<fn() -> E>,
}

impl<E: Event> fmt::Debug for ConsumerBuilder<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsumerBuilder").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl<E: Event> ConsumerBuilder<E> {
    pub(crate) fn new(services: &Arc<Services>, name: &str) -> Self {
        let settings = Settings {
            name: name.into(),
            filter: Filter::all(),
            start: Start::Beginning,
            sight: if services.syncs { Sight::Durable } else { Sight::Appended },
            concurrency: 1,
            queues: QueuePolicy::default(),
            retry: super::retry::RetryPolicy::default(),
            health: HealthPolicy::default(),
            letters: DeadLetterPolicy::default(),
            exhausted: Exhausted::default(),
            judge: None,
            save_every: Duration::from_secs(1),
            // Consumers that fail together must not be retried together.
            jitter_seed: xxhash_rust::xxh3::xxh3_64(name.as_bytes()),
        };
        let retry = Retry::exponential(2.0);
        Self { services: Arc::clone(services), settings, types: None, retry, event: std::marker::PhantomData }
    }

    /// Delivers only events of these types, given by their names in [`Event::TYPES`]; at least one. Default: all types.
    pub fn types<T: AsRef<str>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.types = Some(names.into_iter().map(|name| name.as_ref().to_owned()).collect());
        self
    }

    /// Sets where a new consumer starts. A registered consumer continues from its saved position. Default: at the
    /// beginning.
    pub fn start_at(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// Delivers events as soon as they are appended, not only when they are durable. After a power cut the consumer may
    /// have handled events that the log lost. In durability mode `OsCache`, events are always delivered like this.
    /// Default: durable events only.
    pub fn before_durable(mut self) -> Self {
        self.settings.sight = Sight::Appended;
        self
    }

    /// Sets the number of keys handled at the same time, each key in order, 1..=65,536. Above 1, this number of threads
    /// calls the handler; an asynchronous handler needs no thread. Default: 1, on the consumer's own thread.
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.settings.concurrency = concurrency;
        self
    }

    /// Limits the unfinished events and the keys kept in memory. Default: [`QueuePolicy::default`], with the
    /// concurrency of [`ConsumerBuilder::concurrency`].
    pub fn queues(mut self, policy: QueuePolicy) -> Self {
        self.settings.queues = policy;
        self
    }

    /// Sets when a failed attempt is repeated. Default: exponential, 5 attempts.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Sets what happens to an event whose attempts are used up. Default: its key is parked.
    pub fn when_exhausted(mut self, exhausted: Exhausted) -> Self {
        self.settings.exhausted = exhausted;
        self
    }

    /// Sets a function that decides about each error that a handler returns, given the attempt's number. It may, for
    /// example, decide that no retry can help. Panics follow the retry policy.
    pub fn judge(mut self, judge: impl Fn(&HandlerError, u32) -> Judgement + Send + Sync + 'static) -> Self {
        self.settings.judge = Some(Arc::new(judge));
        self
    }

    /// Sets when the service counts as unhealthy, and how it is probed then.
    pub fn health(mut self, policy: HealthPolicy) -> Self {
        self.settings.health = policy;
        self
    }

    /// Sets how many dead letters are kept, and what happens to further ones.
    pub fn dead_letters(mut self, policy: DeadLetterPolicy) -> Self {
        self.settings.letters = policy;
        self
    }

    /// Sets how often the position is saved, 1 ms..=1 h. A crash repeats the events handled since the last save.
    /// Default: 1 s.
    pub fn save_every(mut self, every: Duration) -> Self {
        self.settings.save_every = every;
        self
    }

    /// Sets the seed of the retries' jitter, for reproducible runs. Default: a hash of the name.
    pub fn jitter_seed(mut self, seed: u64) -> Self {
        self.settings.jitter_seed = seed;
        self
    }

    /// Starts the consumer: calls `handler` for every event, each key's in order, at least once. A handler may fail,
    /// panic or block without affecting other consumers. It may wait for the engine, but not for its own consumer: such
    /// calls return `OnEngineThread`.
    ///
    /// # Errors
    /// [`ConsumerError`]: a setting out of range, an invalid name, a consumer that is already running, or files that
    /// cannot be read.
    pub fn start<F>(self, handler: F) -> Result<Consumer<E>, ConsumerError>
    where
        F: Fn(&E::Archived, &Meta) -> Result<(), HandlerError> + Send + Sync + 'static,
    {
        self.start_with(move |event: &E::Archived, meta: &Meta, _: &Call<'_>| handler(event, meta))
    }

    /// Does the same as [`ConsumerBuilder::start`], for handlers with side effects: [`Call`] identifies each effect and
    /// tells whether it has already run.
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`].
    pub fn start_with<F>(self, handler: F) -> Result<Consumer<E>, ConsumerError>
    where
        F: Fn(&E::Archived, &Meta, &Call<'_>) -> Result<(), HandlerError> + Send + Sync + 'static,
    {
        let services = Arc::clone(&self.services);
        let driver = self.driver()?;
        let name = driver.settings().name.to_string();
        let control = running::start(driver, Arc::clone(&services), handler);
        let control = control.map_err(|error| services.note_refused(&name, error))?;
        Ok(Consumer::new(control, &name))
    }

    /// Starts the consumer with an asynchronous handler, on the tokio runtime of the current thread. Feature `tokio`.
    ///
    /// Up to [`ConsumerBuilder::concurrency`] futures of the handler run at the same time, each as a task, each key's
    /// events in order. Order, retries, dead letters, health and saved positions are those of
    /// [`ConsumerBuilder::start`]. The consumer has no thread of its own: between events it is a task that sleeps. Its
    /// file operations run on the runtime's threads for blocking work (`spawn_blocking`); this function itself blocks
    /// while it opens the consumer's files.
    ///
    /// A handler's future that panics is a failed attempt. A handler must not block its thread. It may publish, send
    /// commands and await their answers. It may call its own consumer, but not wait for itself: `drain`, `wait_handled`,
    /// `seek` and `stop`, and their `_async` forms, return `OnEngineThread` there. Such a wait in another task that the
    /// handler awaits cannot be detected: use deadlines.
    ///
    /// A future that never completes holds up its key and one of the `concurrency` places. Give calls to other systems a
    /// timeout. [`Consumer::stop_async`] cancels at its deadline what is still running.
    ///
    /// When the runtime is shut down, the consumer ends with [`ConsumerError::RuntimeEnded`]. Futures that were dropped
    /// count as not handled: their events are handled after the next start.
    ///
    /// ```
    /// # use corelane::envelope::Envelope;
    /// # use corelane::{Config, Deadline, EventLog};
    /// # use std::time::Duration;
    /// # async fn send(_mail: &str) -> Result<(), std::io::Error> { Ok(()) }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let engine = EventLog::<Envelope>::open(Config::new(dir.path()))?;
    /// let mails = engine.consumer("mails").concurrency(64).start_async(|event| async move {
    ///     send(event.event().payload()).await?;
    ///     Ok(())
    /// })?;
    ///
    /// let event = Envelope::new("player.levelled_up", 42, r#"{"level":7}"#)?;
    /// engine.producer().publish(event.key(), event)?;
    /// # engine.flush(Deadline::NEVER)?;
    /// mails.drain_async(Duration::from_secs(10)).await?;
    /// assert_eq!(mails.report().handled, 1);
    /// mails.stop_async(Duration::from_secs(10)).await?;
    /// # engine.shutdown(Deadline::NEVER)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`]; `NoRuntime` outside a tokio runtime, or if it has no timers;
    /// `RuntimeEnded` if the runtime is being shut down.
    #[cfg(feature = "tokio")]
    pub fn start_async<F, Fut>(self, handler: F) -> Result<Consumer<E>, ConsumerError>
    where
        F: Fn(Delivered<E>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
    {
        let runtime = OwnRuntime::current()?;
        let services = Arc::clone(&self.services);
        let driver = self.driver()?;
        let name = driver.settings().name.to_string();
        let control = task::start(runtime, driver, services, handler)?;
        Ok(Consumer::new(control, &name))
    }

    /// Returns a consumer without threads, driven by the application's own thread or task.
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`].
    pub fn poller(self) -> Result<Poller<E>, ConsumerError> {
        let services = Arc::clone(&self.services);
        self.driver().map(|driver| Poller::new(services, driver))
    }

    /// Returns the checked settings.
    pub(super) fn settle(mut self) -> Result<(Arc<Services>, Settings), ConsumerError> {
        self.settings.retry = self.retry.validate()?;
        in_range("consumer_save_every_ms", whole_ms(self.settings.save_every), 1, 3_600_000)?;
        in_range("consumer_concurrency", self.settings.concurrency as u64, 1, 65_536)?;
        if let Some(types) = &self.types {
            self.settings.filter = Filter::named::<E>(types)?;
        }
        Ok((self.services, self.settings))
    }

    fn driver(self) -> Result<Driver<E>, ConsumerError> {
        let (services, settings) = self.settle()?;
        let name = Arc::clone(&settings.name);
        let (shards, letters) = services.drive::<E>(&name, settings.start)?;
        let storage = Arc::clone(&services.storage);
        let driver = Driver::open(settings, storage, services.dir(&name), shards, letters, services.router());
        driver.map_err(|error| services.note_refused(&name, error))
    }
}
