//! What services that hang off the log are made of: order, retry, health, and the place of every key.
//!
//! Each part is plain data with one owner: no thread, no clock, no I/O, no shard. Time is an argument, always
//! the time passed since one fixed moment on a monotonic clock; randomness is seeded.
//!
//! | part | question it answers |
//! |---|---|
//! | [`SequenceGate`] | Input came out of order: what is its order, and what is missing? |
//! | [`KeyQueues`] | What may run now so that every key keeps its order, and how far is all of it done? |
//! | [`RetryPolicy`] | An attempt failed: when is the next, if any? |
//! | [`Health`] | Does this service work, and may it be called now? |

mod alarm;
mod builder;
mod dead_letter;
mod driver;
mod effects;
mod error;
mod handle;
mod health;
mod key_queues;
mod life;
pub mod outside;
mod poller;
pub(crate) mod position_file;
mod report;
mod requests;
mod retry;
mod running;
pub(crate) mod services;
mod settings;
mod sink;
mod watches;

pub use builder::ConsumerBuilder;
pub use dead_letter::answer::{
    DeadLetter, DeadLetterPolicy, LetterKind, LetterStatistics, LettersError, WhenFull, WriteRefused,
};
pub use driver::{HaltCause, Handled, Letters};
pub use effects::{Call, EffectKey};
pub use error::{ConsumerError, ConsumerFailure};
pub use handle::Consumer;
pub use poller::{Delivery, Poller};
pub use report::{ConsumerReport, prometheus};
pub use requests::Request;
pub use settings::{Exhausted, Judgement, Start};
pub use sink::{Batch, Sink, SinkConsumer};

pub use health::report::HealthReport;
pub use health::{Admission, CallPermit, Health, HealthChange, HealthPolicy, HealthStatus, UnhealthyCause};
pub use key_queues::KeyQueues;
pub use key_queues::answer::{
    InFlight, KeyState, NotParked, QueuePolicy, QueueRefused, QueueStatistics, RecordKind, ToRecord, Verdict,
};
pub use retry::{AfterFailure, JitterRng, Retry, RetryPolicy};
