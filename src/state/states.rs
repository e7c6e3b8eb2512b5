//! The states of the keys of one decision.

use std::fmt;
use std::ops::Index;

use crate::event::{Key, Version};

/// The largest number of keys that one command may name.
pub const KEYS_MAX: usize = 16;

/// The state of one key of a decision.
pub(crate) struct StateOf<'a, A> {
    pub(crate) key: Key,
    pub(crate) version: Version,
    pub(crate) state: &'a A,
}

impl<A> Clone for StateOf<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for StateOf<'_, A> {}

/// The current states of the keys that a command names, in the order in which it names them.
///
/// [`Aggregate::decide_many`](crate::Aggregate::decide_many) gets them. A key without events has the default state and
/// version 0. `states[key]` is the state of a key that the command names; any other key panics, and the command fails
/// with [`CommandError::Panicked`](crate::CommandError::Panicked).
pub struct States<'a, A> {
    all: &'a [StateOf<'a, A>],
}

impl<'a, A> States<'a, A> {
    pub(crate) fn new(all: &'a [StateOf<'a, A>]) -> Self {
        Self { all }
    }

    fn find(&self, key: Key) -> Option<&StateOf<'a, A>> {
        self.all.iter().find(|one| one.key == key)
    }

    /// Returns the state of `key`, or `None` if the command does not name it.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&'a A> {
        self.find(key).map(|one| one.state)
    }

    /// Returns the version of `key`: that of its newest event, or 0 if it has none. `None` if the command does not name
    /// the key.
    #[must_use]
    pub fn version(&self, key: Key) -> Option<Version> {
        self.find(key).map(|one| one.version)
    }

    /// Returns the keys, in the order in which the command names them.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = Key> + 'a {
        self.all.iter().map(|one| one.key)
    }

    /// Returns every key with its state, in the order in which the command names them.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Key, &'a A)> + 'a {
        self.all.iter().map(|one| (one.key, one.state))
    }

    /// Returns the number of keys, 1 to [`KEYS_MAX`].
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a command names at least one key")]
    pub fn len(&self) -> usize {
        self.all.len()
    }
}

impl<A> Index<Key> for States<'_, A> {
    type Output = A;

    fn index(&self, key: Key) -> &A {
        self.get(key).unwrap_or_else(|| panic!("the command does not name key {key}"))
    }
}

impl<A> fmt::Debug for States<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all.iter().map(|one| (one.key, one.version))).finish()
    }
}
