//! Saved states: time travel and opening start from them instead of the log's beginning.
//!
//! Writers: the shard copies states into chunks (one state every `snapshot_every` events of its key, and all states for
//! a checkpoint); the snapshotter's thread writes chunks to files and keeps the index. Saved states are a cache of the
//! log, with one exception: before retention frees a part of the log, a checkpoint must hold the states which that part
//! led to.

pub(crate) mod format;
pub(crate) mod store;
pub(crate) mod taker;
