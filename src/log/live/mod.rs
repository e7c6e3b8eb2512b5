//! Live feeds: the events of the log as they come, for readers that come and go.
//!
//! One owner per feed. A feed reads the log in place with a [`super::Reader`] per shard. No other part knows it: the
//! store keeps nothing for it and retention does not wait for it. Only while it waits do the logs have its waker.

// | file | contents |
// |---|---|
// | `builder` | `LiveBuilder`: what a feed wants, and where it begins |
// | `feed` | `Live`: the shards in turn; waiting as a thread or as a task |
// | `shard` | one shard's part of a feed: filter, lag, end |
// | `batch` | events of one segment, found by a shard's turn |
// | `event` | `LiveEvent` and `LiveBatch`: events that own their place in the log |

mod batch;
mod builder;
mod event;
mod feed;
mod shard;

pub use builder::{LiveBuilder, LiveFrom};
pub use event::{LiveBatch, LiveEvent};
pub use feed::{Live, LiveBatches, LiveIter};
