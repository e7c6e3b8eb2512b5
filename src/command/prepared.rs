//! A command with its options, before a client sends it. Knows no client.

use super::expected::ExpectedVersion;
use super::lane::CommandSlot;
use super::named::{Expected, NamedKeys};
use crate::clock::Nanos;
use crate::error::KeysError;
use crate::event::{Key, KeyHash, Router};
use crate::state::states::KEYS_MAX;

/// A command with its options.
#[derive(Debug)]
pub(super) struct Prepared<C> {
    slot: CommandSlot<C>,
    /// The first fault of its keys. Such a command is not sent.
    refused: Option<Box<KeysError>>,
}

impl<C> Prepared<C> {
    /// Prepares a command for one key.
    #[inline]
    pub(super) fn one(key: Key, published: Nanos, command: C) -> Self {
        let expected = Expected::One(ExpectedVersion::Any);
        let slot = CommandSlot { key, hash: KeyHash::of(key), published, expected, idempotency: None, command };
        Self { slot, refused: None }
    }

    /// Prepares a command for several keys.
    pub(super) fn many(keys: &[Key], router: Router, published: Nanos, command: C) -> Self {
        let first = keys.first().copied().unwrap_or_default();
        let mut prepared = Self::one(first, published, command);
        match fault(keys, router) {
            Some(fault) => prepared.refuse(fault),
            None => prepared.slot.expected = Expected::Each(Box::new(NamedKeys::new(keys))),
        }
        prepared
    }

    fn refuse(&mut self, fault: KeysError) {
        self.refused.get_or_insert(Box::new(fault));
    }

    /// Returns the command's first key, which chooses the shard.
    pub(super) fn key(&self) -> Key {
        self.slot.key
    }

    /// Expects this version of every key.
    pub(super) fn expect(&mut self, expected: ExpectedVersion) {
        match &mut self.slot.expected {
            Expected::One(one) => *one = expected,
            Expected::Each(named) => named.keys.iter_mut().for_each(|named| named.expected = expected),
        }
    }

    /// Expects this version of one of the keys.
    pub(super) fn expect_of(&mut self, key: Key, expected: ExpectedVersion) {
        let first = self.slot.key;
        let found = match &mut self.slot.expected {
            Expected::One(one) => (key == first).then_some(one),
            Expected::Each(named) => {
                named.keys.iter_mut().find(|named| named.key == key).map(|named| &mut named.expected)
            }
        };
        match found {
            Some(found) => *found = expected,
            None => self.refuse(KeysError::NotNamed { key }),
        }
    }

    pub(super) fn once(&mut self, idempotency: u64) {
        self.slot.idempotency = Some(idempotency);
    }

    /// Returns the command for a lane, and the first fault of its keys. A command with a fault must not be sent.
    #[inline]
    pub(super) fn into_parts(self) -> (CommandSlot<C>, Option<Box<KeysError>>) {
        (self.slot, self.refused)
    }
}

/// Returns the first reason why no command may name these keys.
fn fault(keys: &[Key], router: Router) -> Option<KeysError> {
    let [first, others @ ..] = keys else { return Some(KeysError::None) };
    if keys.len() > KEYS_MAX {
        let last = keys[keys.len() - 1];
        return Some(KeysError::TooMany { keys: keys.len(), keys_max: KEYS_MAX, first: *first, last });
    }
    if let Some((_, key)) = keys.iter().enumerate().find(|(at, key)| keys[..*at].contains(key)) {
        return Some(KeysError::Twice { key: *key });
    }
    let shard = router.shard(*first);
    others
        .iter()
        .map(|other| (*other, router.shard(*other)))
        .find(|(_, other_shard)| *other_shard != shard)
        .map(|(other, other_shard)| KeysError::TwoShards { first: *first, shard, other, other_shard })
}
