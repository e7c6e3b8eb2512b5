//! The keys of a decision's events. Decisions are generic over them, so that a command for one key pays nothing for the
//! others.

use crate::command::{NamedKeys, Reply};
use crate::event::{Key, KeyHash, Version};
use crate::log::other_keys::{OTHER_KEY_BYTES, OtherKeys};
use crate::state::keys::KeyTable;

/// The keys of a decision's events.
pub(super) trait Targets {
    /// Returns the key that owns the outcome.
    fn owner(&self) -> Key;

    /// Returns the key of event `at`. Called for every event, in order. `others` lists the events that are not for the
    /// first key, with the indices of their keys.
    fn of_event(&mut self, at: usize, others: &[(usize, usize)]) -> (Key, KeyHash);

    /// Returns the version of the first key. Called after the last event, which gave its key the version `last`.
    fn version<S: Default>(&self, last: Option<Version>, keys: &KeyTable<S>) -> Version;

    /// Returns the keys after the first, with their versions. Called after the last event.
    fn others(&self) -> Option<Box<OtherKeys>>;

    /// The length of the body of the outcome of a command that is carried out.
    fn body_bytes(&self) -> usize;

    /// Returns the reply to a command that was carried out.
    fn done<R>(self, version: Version, events: u32) -> Reply<R>;
}

/// The key of a command for one key.
pub(super) struct One {
    pub(super) key: Key,
    pub(super) hash: KeyHash,
}

impl Targets for One {
    #[inline(always)]
    fn owner(&self) -> Key {
        self.key
    }

    #[inline(always)]
    fn of_event(&mut self, _at: usize, _others: &[(usize, usize)]) -> (Key, KeyHash) {
        (self.key, self.hash)
    }

    #[inline(always)]
    fn version<S: Default>(&self, last: Option<Version>, keys: &KeyTable<S>) -> Version {
        let of_table = || keys.get_hashed(self.key, self.hash).map_or(Version(0), |known| known.version);
        last.unwrap_or_else(of_table)
    }

    #[inline(always)]
    fn others(&self) -> Option<Box<OtherKeys>> {
        None
    }

    #[inline(always)]
    fn body_bytes(&self) -> usize {
        0
    }

    #[inline(always)]
    fn done<R>(self, version: Version, events: u32) -> Reply<R> {
        Reply::Done { version, events, repeated: false }
    }
}

/// The keys of a command for several keys. Counts their versions.
pub(super) struct Each {
    pub(super) named: Box<NamedKeys>,
    /// The number of events so far that were not for the first key.
    others: usize,
}

impl Each {
    pub(super) fn new(named: Box<NamedKeys>) -> Self {
        Self { named, others: 0 }
    }
}

impl Targets for Each {
    fn owner(&self) -> Key {
        self.named.keys[0].key
    }

    #[inline]
    fn of_event(&mut self, at: usize, others: &[(usize, usize)]) -> (Key, KeyHash) {
        let other = others.get(self.others).filter(|(event, _)| *event == at);
        self.others += usize::from(other.is_some());
        let named = &mut self.named.keys[other.map_or(0, |(_, key)| *key)];
        named.version.0 += 1;
        (named.key, named.hash)
    }

    fn version<S: Default>(&self, _last: Option<Version>, _keys: &KeyTable<S>) -> Version {
        self.named.keys[0].version
    }

    fn others(&self) -> Option<Box<OtherKeys>> {
        self.named.others()
    }

    fn body_bytes(&self) -> usize {
        (self.named.keys.len() - 1) * OTHER_KEY_BYTES
    }

    fn done<R>(mut self, _version: Version, events: u32) -> Reply<R> {
        self.named.events = events;
        Reply::DoneEach(self.named)
    }
}
