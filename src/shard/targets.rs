//! The keys of a decision's events.

use crate::command::NamedKeys;
use crate::event::{Key, KeyHash, Version};
use crate::log::format::OtherKeys;
use crate::state::keys::KeyTable;

/// The keys of a decision's events, in the order of the events.
pub(super) trait Targets {
    /// Returns the key of the next event.
    fn next(&mut self) -> (Key, KeyHash);

    /// Returns the version of the command's first key. Called after the last event.
    fn version<S: Default>(&self, keys: &KeyTable<S>) -> Version;

    /// Returns the other keys with their versions. Called after the last event.
    fn others(&self) -> Option<Box<OtherKeys>>;
}

/// The key of a command for one key.
pub(super) struct One(pub(super) Key, pub(super) KeyHash);

impl Targets for One {
    #[inline(always)]
    fn next(&mut self) -> (Key, KeyHash) {
        (self.0, self.1)
    }

    #[inline(always)]
    fn version<S: Default>(&self, keys: &KeyTable<S>) -> Version {
        keys.get(self.0).map_or(Version(0), |known| known.version)
    }

    #[inline(always)]
    fn others(&self) -> Option<Box<OtherKeys>> {
        None
    }
}

/// The keys of a command for several keys. Counts their versions.
pub(super) struct Each<'a> {
    named: &'a mut NamedKeys,
    /// The events that are not for the first key: the event's index and the key's.
    others: std::iter::Peekable<std::slice::Iter<'a, (usize, usize)>>,
    /// The index of the next event.
    at: usize,
}

impl<'a> Each<'a> {
    pub(super) fn new(named: &'a mut NamedKeys, others: &'a [(usize, usize)]) -> Self {
        Self { named, others: others.iter().peekable(), at: 0 }
    }
}

impl Targets for Each<'_> {
    #[inline]
    fn next(&mut self) -> (Key, KeyHash) {
        let key = self.others.next_if(|(event, _)| *event == self.at).map_or(0, |(_, key)| *key);
        self.at += 1;
        let named = &mut self.named.keys[key];
        named.version.0 += 1;
        (named.key, named.hash)
    }

    fn version<S: Default>(&self, _keys: &KeyTable<S>) -> Version {
        self.named.keys[0].version
    }

    fn others(&self) -> Option<Box<OtherKeys>> {
        self.named.others()
    }
}
