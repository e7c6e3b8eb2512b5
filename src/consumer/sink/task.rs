//! Asynchronous sinks: the shell around a runner that is a task of the application's runtime. It owns no thread.
//!
//! Between two rounds the runner is in a seat, from where a thread that waits for the sink may end it. File operations
//! run on the runtime's blocking threads.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use tokio::task::{spawn_blocking, yield_now};

use super::backend::AsyncSink;
use super::handle::{SinkConsumer, SinkShared};
use super::runner::SinkRunner;
use crate::consumer::builder::ConsumerBuilder;
use crate::consumer::error::ConsumerError;
use crate::consumer::life::Host;
use crate::consumer::runtime::{OwnRuntime, check_started, sleep_until_woken};
use crate::consumer::services::Running;
use crate::event::Event;
use crate::sync::{Mutex, lock, lock_until};

impl<E: Event> ConsumerBuilder<E> {
    /// Starts an asynchronous sink on the tokio runtime of the current thread. Feature `tokio`. Delivers batches, retries
    /// them and halts as [`ConsumerBuilder::start_sink`] does, from a task: the sink has no thread of its own. Batches
    /// of older parts of the log are smaller, and they are read from the disk by the runtime's threads for blocking
    /// work. This function itself blocks while it opens the consumer's files.
    ///
    /// When the runtime is shut down, the sink ends with [`ConsumerError::RuntimeEnded`], and the next start asks it for
    /// its position.
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`] and [`ConsumerBuilder::start_async`].
    pub fn start_sink_async(self, batch_max: usize, sink: impl AsyncSink<E>) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink_async(batch_max, sink, false)
    }

    /// Starts an asynchronous sink whose data is gone; see [`ConsumerBuilder::start_sink_over`].
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start_sink_async`] and [`ConsumerBuilder::start_sink_over`].
    pub fn start_sink_over_async(
        self,
        batch_max: usize,
        sink: impl AsyncSink<E>,
    ) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink_async(batch_max, sink, true)
    }

    fn run_sink_async(
        self,
        batch_max: usize,
        sink: impl AsyncSink<E>,
        over: bool,
    ) -> Result<SinkConsumer, ConsumerError> {
        let runtime = OwnRuntime::current()?;
        let handle = runtime.handle().clone();
        let seat = Arc::new(Seat { place: Mutex::new(Place::Ended), runtime });
        let host = Some(Arc::clone(&seat) as Arc<dyn Host>);
        let (runner, services) = SinkRunner::open(self, batch_max, sink, over, host)?;
        let (shared, name) = (Arc::clone(&runner.shared), runner.name().to_owned());
        *lock(&seat.place) = Place::Seated(Box::new(Seated { runner, ending: None }));
        services.note_running(&name, Arc::clone(&shared) as Arc<dyn Running>);
        drop(handle.spawn(drive(Leaving(seat), Arc::clone(&shared))));
        check_started(&shared.report())?;
        Ok(SinkConsumer::new(shared, name))
    }
}

/// A runner between two rounds, and the reason why it ends by itself.
struct Seated<E: Event, S: AsyncSink<E>> {
    runner: SinkRunner<E, S>,
    ending: Option<ConsumerError>,
}

impl<E: Event, S: AsyncSink<E>> Seated<E, S> {
    fn is_over(&self) -> bool {
        self.ending.is_some() || self.runner.shared.life.is_stopping()
    }

    /// Saves the position and ends the sink.
    fn end(mut self) {
        let shared = Arc::clone(&self.runner.shared);
        let name = self.runner.name().to_owned();
        let (runner, ending) = (&mut self.runner, self.ending);
        let failure = shared.life.outcome(&name, || {
            runner.save();
            runner.report();
            ending.map_or(Ok(()), Err)
        });
        self.runner.end(failure);
    }
}

/// The place of the runner.
enum Place<E: Event, S: AsyncSink<E>> {
    Seated(Box<Seated<E, S>>),
    /// The task has it: a round is running.
    Away,
    Ended,
}

struct Seat<E: Event, S: AsyncSink<E>> {
    place: Mutex<Place<E, S>>,
    runtime: OwnRuntime,
}

impl<E: Event, S: AsyncSink<E>> std::fmt::Debug for Seat<E, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seat").finish_non_exhaustive()
    }
}

impl<E: Event, S: AsyncSink<E>> Seat<E, S> {
    /// Ends the sink if it is to end and its runner is in the seat. Returns `true` if it has ended. Gives up at the
    /// deadline.
    fn end_if_over(&self, deadline: Option<Instant>) -> bool {
        let Some(mut place) = lock_until(&self.place, deadline) else { return false };
        if !matches!(&*place, Place::Seated(seated) if seated.is_over()) {
            return matches!(*place, Place::Ended);
        }
        if let Place::Seated(seated) = std::mem::replace(&mut *place, Place::Ended) {
            drop(place);
            seated.end();
        }
        true
    }

    /// Does what may wait for the disk. Returns `true` if the sink has ended.
    fn file_work(&self) -> bool {
        if let Place::Seated(seated) = &mut *lock(&self.place)
            && !seated.is_over()
        {
            seated.ending = seated.runner.file_work().err();
            seated.runner.report();
        }
        self.end_if_over(None)
    }

    /// Takes a round. Returns the work done.
    async fn round(&self) -> usize {
        let place = std::mem::replace(&mut *lock(&self.place), Place::Away);
        let mut away = Away { seat: self, place: Some(place) };
        let Some(Place::Seated(seated)) = &mut away.place else { return 0 };
        let taken = seated.runner.round().await;
        seated.runner.report();
        taken.unwrap_or_else(|error| {
            seated.ending = Some(error);
            1
        })
    }
}

/// A runner on a round. It returns to its seat even if the round is dropped.
struct Away<'a, E: Event, S: AsyncSink<E>> {
    seat: &'a Seat<E, S>,
    place: Option<Place<E, S>>,
}

impl<E: Event, S: AsyncSink<E>> Drop for Away<'_, E, S> {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            *lock(&self.seat.place) = place;
        }
    }
}

impl<E: Event, S: AsyncSink<E>> Host for Seat<E, S> {
    fn is_here(&self) -> bool {
        self.runtime.is_here()
    }

    fn is_busy(&self) -> bool {
        matches!(*lock(&self.place), Place::Away)
    }

    fn help(&self, deadline: Option<Instant>) {
        self.end_if_over(deadline);
    }
}

/// Ends the sink if the runtime drops its task, polled or not.
struct Leaving<E: Event, S: AsyncSink<E>>(Arc<Seat<E, S>>);

impl<E: Event, S: AsyncSink<E>> Drop for Leaving<E, S> {
    fn drop(&mut self) {
        if let Place::Seated(seated) = &mut *lock(&self.0.place)
            && !seated.is_over()
        {
            seated.ending = Some(ConsumerError::RuntimeEnded);
        }
        self.0.end_if_over(None);
    }
}

/// The sink's task.
async fn drive<E: Event, S: AsyncSink<E>>(leaving: Leaving<E, S>, shared: Arc<SinkShared>) {
    let seat = &leaving.0;
    let waker = poll_fn(|context| Poll::Ready(context.waker().clone())).await;
    // Set before the first round: a later request finds this waker. The waker of a task does not change.
    shared.life.woken_by(&waker);
    loop {
        seat.runtime.note_polled();
        let taken = seat.round().await;
        let must_block = match &*lock(&seat.place) {
            Place::Seated(seated) => seated.is_over() || seated.runner.has_file_work(),
            Place::Away | Place::Ended => true,
        };
        if must_block {
            let seat = Arc::clone(seat);
            match spawn_blocking(move || seat.file_work()).await {
                Ok(false) => {}
                // An error: the runtime is being shut down.
                Ok(true) | Err(_) => return,
            }
        }
        if taken > 0 || must_block {
            yield_now().await;
            continue;
        }
        let rest = match &mut *lock(&seat.place) {
            Place::Seated(seated) if !seated.is_over() => seated.runner.rest(|reader, at| reader.register(at, &waker)),
            _ => None,
        };
        match rest {
            Some(due) => sleep_until_woken(due).await,
            None => yield_now().await,
        }
    }
}
