//! The hash of tables whose keys outsiders choose: without the process's two secret words nobody can choose keys that collide.
//!
//! One writer: the thread that makes the first such table. The words are set before a table exists, and never change.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

static PLANTED: Once = Once::new();
static MASK: AtomicU64 = AtomicU64::new(0);
static FACTOR: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);

/// Sets the words. Every table that uses [`keyed`] calls this before it is made.
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

/// Whether a factor has about as many ones as zeros in each quarter, so that keys in a row are spread.
fn is_mixing(factor: u64) -> bool {
    (0..4).all(|quarter| (5..=11).contains(&(factor >> (16 * quarter) & 0xffff).count_ones()))
}

/// A hash of `number`, of which all bits may be used. Another one in every process.
#[inline(always)]
pub(crate) fn keyed(number: u64) -> u64 {
    // Relaxed: a table is made after the words were set, and reaches other threads by a lock or a release store.
    folded(number, MASK.load(Ordering::Relaxed), FACTOR.load(Ordering::Relaxed))
}

#[inline(always)]
fn folded(number: u64, mask: u64, factor: u64) -> u64 {
    // Once more, with a factor that is none of a table's secrets: numbers in steps would lie in steps after the first.
    fold(fold(number ^ mask, factor), 0x9e37_79b9_7f4a_7c15)
}

/// Both halves of the product, one upon the other.
#[inline(always)]
fn fold(number: u64, factor: u64) -> u64 {
    let product = u128::from(number) * u128::from(factor);
    product as u64 ^ (product >> 64) as u64
}

/// [`keyed`] for hash maps.
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

/// One number's, or several one after the other.
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

    /// How many numbers meet one before them, by low bits and by the high bits of the low half: what tables use.
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
    fn numbers_in_a_row_and_in_steps_are_spread_with_every_seed() {
        let mut x = 42_u64;
        let mut random = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        for _ in 0..25 {
            let mask = random();
            let factor = (0..).map(|_| random() | 1).find(|word| is_mixing(*word)).expect("one of them");
            for step in [1, 7, 8, 100, 1 << 12, 1 << 16, 1_000_000, 1 << 32, 1 << 44, 1 << 48] {
                // Random ones meet in 0.37 of the cases.
                let count = collisions(|i| i * step, mask, factor);
                assert!(
                    count.iter().all(|count| *count < (1 << 16) * 4 / 10),
                    "{factor:x}, steps of {step}: {count:?}"
                );
            }
        }
    }
}
