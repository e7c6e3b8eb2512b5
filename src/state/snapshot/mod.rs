//! Saved states: so that time travel and opening need not begin at the beginning of the log.
//!
//! Writers: the shard puts states into chunks (every so many events of a key, and all of them for a checkpoint); the
//! snapshotter's thread writes chunks to files and keeps the index. What is saved is a cache of the log, except for one
//! thing: before retention frees a part of the log, a checkpoint has the states that it had made.

pub(crate) mod format;
pub(crate) mod store;
pub(crate) mod taker;
