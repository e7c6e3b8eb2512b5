//! Keys, and the shard that each belongs to.

use std::fmt;

use super::position::ShardId;
use crate::sync::keyed;

/// The key of an event: usually the id of a user. Events of one key keep their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Key(pub u64);

impl Key {
    /// Wraps a numeric user id.
    #[must_use]
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    /// Returns the key of a text user id: its xxh3 hash (64 bits).
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }

    /// Returns the raw id.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the routing hash: splitmix64's finaliser, fixed for ever. Anyone can compute this hash, so tables use
    /// another one.
    #[must_use]
    pub const fn hash(self) -> u64 {
        let mut z = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns the shard of this key among `shards`, in a store without a [`Placement`](super::Placement): the high half
    /// of hash × `shards`. Fixed for ever. [`Engine::shard_of`](crate::Engine::shard_of) knows the store's placement.
    #[must_use]
    pub const fn shard(self, shards: u16) -> ShardId {
        ShardId(((self.hash() as u128 * shards as u128) >> 64) as u16)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The hash of a key in a shard's key table, different in each process. The publisher computes it once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyHash(pub(crate) u32);

impl KeyHash {
    #[inline]
    pub(crate) fn of(key: Key) -> Self {
        Self(keyed(key.0) as u32)
    }
}

/// Returns the key with this routing hash. An attacker can do the same and so choose colliding keys.
#[cfg(test)]
pub(crate) fn key_routed_by(hash: u64) -> Key {
    let inverse = |factor: u64| (0..6).fold(factor, |x, _| x.wrapping_mul(2_u64.wrapping_sub(factor.wrapping_mul(x))));
    let mut z = hash ^ (hash >> 31) ^ (hash >> 62);
    z = z.wrapping_mul(inverse(0x94d0_49bb_1331_11eb));
    z = z ^ (z >> 27) ^ (z >> 54);
    z = z.wrapping_mul(inverse(0xbf58_476d_1ce4_e5b9));
    z = z ^ (z >> 30) ^ (z >> 60);
    let key = Key(z.wrapping_sub(0x9e37_79b9_7f4a_7c15));
    assert_eq!(key.hash(), hash);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routing_is_frozen() {
        let golden = [(0u64, 0xe220a8397b1dcdaf_u64), (1, 0x910a2dec89025cc1), (42, 0xbdd732262feb6e95)];
        for (key, hash) in golden {
            assert_eq!(Key(key).hash(), hash, "splitmix64({key})");
        }
        let shards: Vec<u16> = (0..12).map(|key| Key(key).shard(4).0).collect();
        assert_eq!(shards, [3, 2, 2, 0, 1, 1, 2, 1, 2, 2, 0, 1], "keys 0..12 over 4 shards");
        assert_eq!(Key::of("alice"), Key::of("alice"));
        assert_eq!(Key(u64::MAX).shard(1), ShardId(0));
    }
}
