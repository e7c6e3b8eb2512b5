//! Placements: how keys are assigned to shards, by their own hash or by a function of the application.

use std::fmt;

use super::key::Key;
use super::position::ShardId;

/// The longest name of a placement, in bytes.
pub(crate) const PLACEMENT_NAME_BYTES_MAX: usize = 64;

/// A function that decides which keys share a shard: keys with the same value are in the same shard.
///
/// By default a key's own hash chooses its shard. With a placement, the value that the function gives the key takes the
/// key's place: the same hash of that value chooses the shard. So the keys of one zone, room or guild can be changed by
/// one command ([`Client::send_many`](crate::Client::send_many)), however many shards the store has.
///
/// The function must be pure: it gives a key the same value for ever. [`Config::placement`](crate::Config::placement)
/// declares it. Name and version are fixed when the store is created; a store with another placement does not open
/// ([`OpenError::Placement`](crate::OpenError::Placement)), and neither does one in which the function puts a key into
/// another shard than before ([`OpenError::KeyMoved`](crate::OpenError::KeyMoved)). With one shard, a placement has no
/// effect.
///
/// If the function panics, the panic reaches the caller of `publish` or `send` before anything is sent.
///
/// ```
/// use corelane::{Config, Key, Placement};
///
/// // The upper half of a player's id is the zone.
/// let config = Config::new("data").shards(4).placement(Placement::new("zone", 1, |key| key.get() >> 32));
/// let router = config.validate()?;
/// assert_eq!(router.shard_of(Key::new(7 << 32 | 1)), router.shard_of(Key::new(7 << 32 | 2)));
/// # Ok::<(), corelane::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Placement {
    id: PlacementId,
    place: fn(Key) -> u64,
}

impl Placement {
    /// Describes the placement `place`. The name has 1 to 64 bytes. Increment the version when `place` gives any key
    /// another value than before; existing stores then refuse to open.
    #[must_use]
    pub fn new(name: impl Into<String>, version: u16, place: fn(Key) -> u64) -> Self {
        Self { id: PlacementId { name: name.into(), version }, place }
    }

    /// Returns the name and version.
    #[must_use]
    pub fn id(&self) -> &PlacementId {
        &self.id
    }
}

/// The identity of a placement, as the store's manifest holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlacementId {
    /// The name.
    pub name: String,
    /// The version of the function.
    pub version: u16,
}

impl PlacementId {
    pub(crate) fn new(name: String, version: u16) -> Self {
        Self { name, version }
    }

    /// Describes a placement in a sentence; `None` is the default.
    pub(crate) fn describe(id: Option<&Self>) -> String {
        id.map_or_else(|| "the key's own hash".to_owned(), Self::to_string)
    }
}

impl fmt::Display for PlacementId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the placement \"{}\", version {}", self.name, self.version)
    }
}

/// The function from keys to the shards of a store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Router {
    shards: u16,
    place: Option<fn(Key) -> u64>,
}

impl Router {
    pub(crate) fn new(shards: u16, placement: Option<&Placement>) -> Self {
        Self { shards, place: placement.map(|placement| placement.place) }
    }

    /// Returns the shard of `key`.
    ///
    /// # Panics
    /// If the application's placement panics.
    #[inline]
    pub(crate) fn shard(self, key: Key) -> ShardId {
        match self.place {
            None => key.shard(self.shards),
            Some(place) => Key(place(key)).shard(self.shards),
        }
    }

    /// Returns the number of shards.
    pub(crate) fn shards(self) -> u16 {
        self.shards
    }

    /// Returns the index of the shard of `key`.
    #[inline]
    pub(crate) fn index(self, key: Key) -> usize {
        usize::from(self.shard(key).0)
    }

    /// Calls the placement for every key, so that a panic comes before anything is changed.
    pub(crate) fn try_all(self, keys: impl Iterator<Item = Key>) {
        if let Some(place) = self.place {
            keys.for_each(|key| {
                place(key);
            });
        }
    }
}

impl PartialEq for Router {
    fn eq(&self, other: &Self) -> bool {
        let same = match (self.place, other.place) {
            (None, None) => true,
            (Some(one), Some(other)) => std::ptr::fn_addr_eq(one, other),
            _ => false,
        };
        self.shards == other.shards && same
    }
}

impl Eq for Router {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_routes_by_its_value_with_the_frozen_hash() {
        let plain = Router::new(12, None);
        let zone = Placement::new("zone", 1, |key| key.0 >> 32);
        let placed = Router::new(12, Some(&zone));
        for key in (0..2000).map(|i| Key(i * 0x1234_5678_9abc)) {
            assert_eq!(plain.shard(key), key.shard(12));
            assert_eq!(placed.shard(key), Key(key.0 >> 32).shard(12));
        }
        assert_eq!(placed, Router::new(12, Some(&zone)));
        assert_ne!(placed, plain);
        assert_ne!(plain, Router::new(11, None));
    }
}
