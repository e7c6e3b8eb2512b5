//! Consumers: services that follow the log, each event of a key in order and at least once.
//!
//! | part | its job |
//! |---|---|
//! | [`ConsumerBuilder`] | Sets up a consumer and starts it: with its own threads ([`Consumer`]), without ([`Poller`]), or as a [`Sink`]. |
//! | `driver` | Decides what one consumer does next. No thread, no waiting; the time is an argument. |
//! | `key_queues` | Keeps each key's events in order, and knows the position below which all events are done. |
//! | `retry`, `health` | Decide when a failed attempt is repeated, and whether the service may be called now. |
//! | `dead_letter` | The files of events that were parked or skipped. |
//! | `running`, `sink`, [`Poller`] | The shells that own threads, call handlers and wait. |
//! | `task`, `attempt` | The shell of asynchronous handlers: tasks of the application's runtime (feature `tokio`). |

mod alarm;
mod assigned_shard;
#[cfg(feature = "tokio")]
mod attempt;
mod builder;
mod dead_letter;
#[cfg(feature = "tokio")]
mod delivered;
mod driver;
mod effects;
#[cfg(feature = "tokio")]
mod ending;
mod error;
mod handle;
#[cfg(feature = "tokio")]
mod handle_async;
mod health;
mod key_queues;
mod life;
mod outcome;
pub mod outside;
mod poller;
mod poller_stream;
pub(crate) mod position_file;
mod report;
mod requests;
mod retry;
mod running;
#[cfg(feature = "tokio")]
mod runtime;
pub(crate) mod services;
mod settings;
mod sink;
#[cfg(feature = "tokio")]
mod task;
mod watches;

pub use builder::ConsumerBuilder;
pub use dead_letter::answer::{
    DeadLetter, DeadLetterPolicy, LetterKind, LetterStatistics, LettersError, WhenFull, WriteRefused,
};
pub use dead_letter::selector::LetterSelector;
#[cfg(feature = "tokio")]
pub use delivered::Delivered;
pub use effects::{Call, EffectKey};
pub use error::{ConsumerError, ConsumerFailure};
pub use handle::Consumer;
pub use health::HealthPolicy;
pub use health::report::{HealthReport, HealthStatus, UnhealthyCause};
pub use key_queues::answer::QueuePolicy;
pub use outcome::{HaltCause, Handled};
pub use poller::{Delivery, Poller};
pub use report::{ConsumerReport, prometheus};
pub use requests::Request;
pub use retry::{Retry, RetryPolicy};
pub use settings::{Exhausted, Judgement, Start};
#[cfg(feature = "tokio")]
pub use sink::AsyncSink;
pub use sink::{Batch, Sink, SinkConsumer};

#[cfg(feature = "bench-support")]
pub(crate) use key_queues::{KeyQueues, answer::InFlight, answer::Verdict};
#[cfg(test)]
pub(crate) use retry::JitterRng;
