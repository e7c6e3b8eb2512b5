//! The keys that a command names.
//!
//! The keys of a command for several keys are in one allocation. The client makes it, the shard writes the versions
//! into it, and the answer brings it back to the client.

use super::expected::ExpectedVersion;
use crate::event::{Key, KeyHash, Version};
use crate::log::format::OTHER_KEYS_MAX;
use crate::log::other_keys::OtherKeys;
use crate::state::states::KEYS_MAX;

// An outcome in the log holds every key of its command.
const _: () = assert!(KEYS_MAX == 1 + OTHER_KEYS_MAX);

/// The versions that a command expects, and its keys if it may change several.
#[derive(Debug)]
pub(crate) enum Expected {
    /// The command is for one key, which must have this version.
    One(ExpectedVersion),
    /// The command is for several keys.
    Each(Box<NamedKeys>),
}

// A command for one key pays nothing for the others.
const _: () = assert!(size_of::<Expected>() == size_of::<ExpectedVersion>());

/// A key of a command for several keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NamedKey {
    pub(crate) key: Key,
    pub(crate) hash: KeyHash,
    pub(crate) expected: ExpectedVersion,
    /// The key's version, from the decision on: first that before the command, then that after it.
    pub(crate) version: Version,
}

/// The keys of a command for several keys, at least one, and its outcome.
#[derive(Debug, Clone)]
pub(crate) struct NamedKeys {
    pub(crate) keys: Vec<NamedKey>,
    /// The number of events of the command.
    pub(crate) events: u32,
    /// `true` if an earlier command with the same idempotency key had this outcome.
    pub(crate) repeated: bool,
}

impl NamedKeys {
    pub(super) fn new(keys: &[Key]) -> Self {
        let named =
            |&key| NamedKey { key, hash: KeyHash::of(key), expected: ExpectedVersion::Any, version: Version(0) };
        Self { keys: keys.iter().map(named).collect(), events: 0, repeated: false }
    }

    /// Returns the outcome of an earlier command, which left its first key at `first` and had `events` events.
    pub(crate) fn remembered(first: (Key, Version), others: &OtherKeys, events: u32) -> Self {
        let all = std::iter::once(first).chain(others.iter());
        let named = |(key, version)| NamedKey { key, hash: KeyHash::of(key), expected: ExpectedVersion::Any, version };
        Self { keys: all.map(named).collect(), events, repeated: true }
    }

    /// Returns the keys after the first, with their versions.
    pub(crate) fn others(&self) -> Option<Box<OtherKeys>> {
        OtherKeys::new(self.keys.iter().skip(1).map(|named| (named.key, named.version)))
    }
}
