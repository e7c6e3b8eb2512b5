//! A seeded hash for tables whose keys outsiders choose. The seed consists of two secret words per process; without
//! these words an attacker cannot choose keys that collide.
//!
//! One writer: the thread that creates the first such table. The words are set before any table exists, and never
//! change.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

static PLANTED: Once = Once::new();
static MASK: AtomicU64 = AtomicU64::new(0);
static FACTOR: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);

/// Sets the seed. Every table that uses [`keyed`] calls this before it is created.
pub(crate) fn plant() {
    PLANTED.call_once(|| {
        let random = |number: u64| RandomState::new().hash_one(number);
        MASK.store(random(0), Ordering::Relaxed);
        FACTOR.store(
            (1..).map(random).map(|word| word | 1).find(|word| is_mixing(*word)).unwrap_or(1),
            Ordering::Relaxed,
        );
    });
}

/// Returns `true` if each quarter of `factor` has about as many ones as zeros, so that consecutive keys spread.
fn is_mixing(factor: u64) -> bool {
    (0..4).all(|quarter| (5..=11).contains(&(factor >> (16 * quarter) & 0xffff).count_ones()))
}

/// Returns a hash of `number` that differs between processes. All 64 bits are usable.
#[inline(always)]
pub(crate) fn keyed(number: u64) -> u64 {
    // Relaxed: a table is created after the seed is set, and reaches other threads through a lock or a release store.
    folded(number, MASK.load(Ordering::Relaxed), FACTOR.load(Ordering::Relaxed))
}

#[inline(always)]
fn folded(number: u64, mask: u64, factor: u64) -> u64 {
    // A second round with a fixed factor: after the first, numbers at equal steps would still have hashes at equal
    // steps.
    fold(fold(number ^ mask, factor), 0x9e37_79b9_7f4a_7c15)
}

/// XORs both halves of the 128-bit product.
#[inline(always)]
fn fold(number: u64, factor: u64) -> u64 {
    let product = u128::from(number) * u128::from(factor);
    product as u64 ^ (product >> 64) as u64
}

/// [`keyed`] as a hasher for hash maps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keyed(());

impl Default for Keyed {
    fn default() -> Self {
        plant();
        Self(())
    }
}

impl BuildHasher for Keyed {
    type Hasher = KeyedHasher;

    fn build_hasher(&self) -> KeyedHasher {
        KeyedHasher(0)
    }
}

/// Hashes one number, or several in sequence.
#[derive(Debug)]
pub(crate) struct KeyedHasher(u64);

impl Hasher for KeyedHasher {
    fn write_u64(&mut self, number: u64) {
        self.0 = keyed(self.0.rotate_left(23) ^ number);
    }

    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut whole = [0; 8];
            whole[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(whole));
        }
        self.write_u64(bytes.len() as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts collisions in the low bits of the hash, and in the high bits of its low half: the two parts that tables
    /// use.
    fn collisions(numbers: impl Fn(u64) -> u64, mask: u64, factor: u64) -> [usize; 2] {
        const PLACES: usize = 1 << 16;
        let mut met = [vec![false; PLACES], vec![false; PLACES]];
        let mut count = [0; 2];
        for number in (0..PLACES as u64).map(numbers) {
            let hash = folded(number, mask, factor);
            for (way, place) in [hash as usize % PLACES, hash as u32 as usize >> 16].into_iter().enumerate() {
                count[way] += usize::from(std::mem::replace(&mut met[way][place], true));
            }
        }
        count
    }

    #[test]
    fn consecutive_and_evenly_spaced_numbers_spread_with_every_seed() {
        let mut x = 42_u64;
        let mut random = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        for _ in 0..25 {
            let mask = random();
            let factor = (0..).map(|_| random() | 1).find(|word| is_mixing(*word)).expect("a mixing factor exists");
            for step in [1, 7, 8, 100, 1 << 12, 1 << 16, 1_000_000, 1 << 32, 1 << 44, 1 << 48] {
                // Random numbers collide in 37 % of the cases.
                let count = collisions(|i| i * step, mask, factor);
                assert!(
                    count.iter().all(|count| *count < (1 << 16) * 4 / 10),
                    "{factor:x}, steps of {step}: {count:?}"
                );
            }
        }
    }
}
