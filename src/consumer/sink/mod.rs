//! Sinks that keep their position with their data: every event takes effect exactly once, whatever crashes.
//!
//! One writer: the sink's thread, or its task. The sink's own position is authoritative. The consumer's position file
//! follows it and tells retention what to keep.
//!
//! | part | its job |
//! |---|---|
//! | [`Batch`] | The events of one call of a sink. |
//! | `handle` | The application's handle of a running sink, and the state that it shares with the sink's runner. |
//! | `backend` | [`AsyncSink`], the form in which the runner calls every sink. |
//! | `runner` | Decides what the sink does next, and saves its positions. |
//! | `thread`, `task` | The shells that own the runner and wait: [`Sink`]s on a thread, [`AsyncSink`]s as a task. |

mod backend;
mod batch;
mod handle;
mod runner;
#[cfg(feature = "tokio")]
mod task;
mod thread;

#[cfg(feature = "tokio")]
pub use backend::AsyncSink;
pub use batch::Batch;
pub use handle::SinkConsumer;
pub use thread::Sink;
