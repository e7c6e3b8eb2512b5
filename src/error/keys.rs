//! Errors in the keys of a command for several keys.

use crate::event::{Key, ShardId};

/// The reason why a command cannot be sent to its keys. Nothing was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// The command names no key.
    #[error("a command must name at least one key")]
    None,
    /// The command names too many keys.
    #[error("a command may name at most {keys_max} keys, but this one names {keys}, from {first} to {last}")]
    TooMany {
        /// The number of keys named.
        keys: usize,
        /// The largest number allowed.
        keys_max: usize,
        /// The first of them.
        first: Key,
        /// The last of them.
        last: Key,
    },
    /// The command names a key twice.
    #[error("the command names key {key} twice")]
    Twice {
        /// The key.
        key: Key,
    },
    /// Two keys are in different shards, and a decision runs on one shard. Use one shard, or a
    /// [`Placement`](crate::Placement) that gives both keys the same value.
    #[error("key {first} is in shard {shard}, but key {other} in shard {other_shard}: one command cannot change both")]
    TwoShards {
        /// The first key of the command.
        first: Key,
        /// Its shard.
        shard: ShardId,
        /// The first key in another shard.
        other: Key,
        /// That shard.
        other_shard: ShardId,
    },
    /// A version is expected of a key that the command does not name.
    #[error("the command expects a version of key {key}, which it does not name")]
    NotNamed {
        /// The key.
        key: Key,
    },
}
