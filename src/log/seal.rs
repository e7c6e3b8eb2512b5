//! Sealing: stores the CRC and the length of records that are otherwise complete. Computes the CRC-32C of several short
//! records at once.
//!
//! The processor's CRC instruction accepts 8 bytes per cycle but has a latency of three cycles, so sealing a single
//! record mostly waits. Sealing four records side by side does not. Long inputs go to the `crc32c` crate, which splits
//! them in the same way.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::storage::memory::padded;

/// The bytes at the beginning of a header that the CRC does not cover: the length word and the CRC itself.
pub(crate) const UNSUMMED_BYTES: usize = 8;

/// The number of records whose CRCs are computed side by side.
pub(crate) const SIDE_BY_SIDE: usize = 4;

/// The length in bytes from which splitting one input gains more than it costs.
#[cfg(target_arch = "x86_64")]
const LONG_BYTES: usize = 1024;

/// Seals, in order, the adjacent records of these exact lengths in `bytes`. Their CRCs start from `seed`. Requires SSE
/// 4.2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
pub(crate) fn each(seed: u32, bytes: &mut [u8], lens: &[u32]) {
    let len = lens.first().copied().unwrap_or_default();
    let differing = lens.iter().fold(0, |differing, other| differing | (other ^ len));
    if differing == 0 && lens.len().is_multiple_of(SIDE_BY_SIDE) {
        // Usually all events have one size, and the usual archive sizes of an enum get straight-line code.
        match len {
            64 => return of_size::<64>(seed, bytes),
            80 => return of_size::<80>(seed, bytes),
            96 => return of_size::<96>(seed, bytes),
            112 => return of_size::<112>(seed, bytes),
            128 => return of_size::<128>(seed, bytes),
            _ => {}
        }
    }
    let mut rest = bytes;
    let (fours, lens) = lens.as_chunks();
    for four in fours {
        rest = of_four(seed, rest, four);
    }
    for &len in lens {
        let record;
        (record, rest) = rest.split_at_mut(padded(len as usize));
        let sum = one(seed, &record[UNSUMMED_BYTES..len as usize]);
        commit(record, len, sum);
    }
}

/// Seals records of this one length. Their number is a multiple of four.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
#[inline(never)]
fn of_size<const BYTES: usize>(seed: u32, bytes: &mut [u8]) {
    for four in bytes.as_chunks_mut::<BYTES>().0.as_chunks_mut::<SIDE_BY_SIDE>().0 {
        let [mut sum_a, mut sum_b, mut sum_c, mut sum_d] = [u64::from(!seed); SIDE_BY_SIDE];
        // Written out, because a closure would not be compiled with the target feature.
        let [a, b, c, d] = four.each_ref().map(|record| record.as_chunks().0);
        for word in UNSUMMED_BYTES / 8..BYTES / 8 {
            sum_a = step(sum_a, &a[word]);
            sum_b = step(sum_b, &b[word]);
            sum_c = step(sum_c, &c[word]);
            sum_d = step(sum_d, &d[word]);
        }
        for (record, sum) in four.iter_mut().zip([sum_a, sum_b, sum_c, sum_d]) {
            commit(record, BYTES as u32, !(sum as u32));
        }
    }
}

/// Seals the first four records, of these lengths. Returns the bytes after them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
#[inline(never)]
fn of_four<'a>(seed: u32, bytes: &'a mut [u8], lens: &[u32; SIDE_BY_SIDE]) -> &'a mut [u8] {
    let [mut sum_a, mut sum_b, mut sum_c, mut sum_d] = [u64::from(!seed); SIDE_BY_SIDE];
    let mut rest = bytes;
    let mut records = lens.map(|len| {
        let record;
        (record, rest) = std::mem::take(&mut rest).split_at_mut(padded(len as usize));
        record
    });
    let mut summed = [&[][..]; SIDE_BY_SIDE];
    for ((summed, record), &len) in summed.iter_mut().zip(&records).zip(lens) {
        *summed = &record[UNSUMMED_BYTES..len as usize];
    }
    let [a, b, c, d] = summed;
    let words = a.as_chunks().0.iter().zip(b.as_chunks().0).zip(c.as_chunks().0.iter().zip(d.as_chunks().0));
    for ((a, b), (c, d)) in words {
        sum_a = step(sum_a, a);
        sum_b = step(sum_b, b);
        sum_c = step(sum_c, c);
        sum_d = step(sum_d, d);
    }
    let done = summed.map(<[u8]>::len).into_iter().min().unwrap_or_default() / 8 * 8;
    let mut sums = [sum_a, sum_b, sum_c, sum_d].map(|sum| !(sum as u32));
    for (sum, summed) in sums.iter_mut().zip(summed) {
        *sum = one(*sum, &summed[done..]);
    }
    for ((record, sum), &len) in records.iter_mut().zip(sums).zip(lens) {
        commit(record, len, sum);
    }
    rest
}

/// Returns the CRC of one input, starting from `seed`. Requires SSE 4.2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
pub(crate) fn one(seed: u32, input: &[u8]) -> u32 {
    if input.len() >= LONG_BYTES { crc32c::crc32c_append(seed, input) } else { finish(u64::from(!seed), input) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
#[inline]
fn step(sum: u64, word: &[u8; 8]) -> u64 {
    std::arch::x86_64::_mm_crc32_u64(sum, u64::from_le_bytes(*word))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
#[inline]
fn finish(mut sum: u64, input: &[u8]) -> u32 {
    let (words, bytes) = input.as_chunks::<8>();
    for word in words {
        sum = step(sum, word);
    }
    let mut sum = sum as u32;
    for byte in bytes {
        sum = std::arch::x86_64::_mm_crc32_u8(sum, *byte);
    }
    !sum
}

/// Stores the length and the CRC of an otherwise complete record in one store. This makes the record part of the log
/// for readers of the file. Readers in this process see it after `publish`.
#[inline]
pub(crate) fn commit(record: &mut [u8], len: u32, crc: u32) {
    let start: &mut [u8; UNSUMMED_BYTES] =
        record.first_chunk_mut().expect("a record is longer than its first two words");
    let word = start.as_mut_ptr().cast::<u64>();
    assert!(word.is_aligned(), "records begin at multiples of 16");
    // SAFETY: aligned, 8 bytes long, and exclusively borrowed.
    let word = unsafe { AtomicU64::from_ptr(word) };
    // Release: pairs with the first read of the length word in another process.
    word.store((u64::from(len) | u64::from(crc) << 32).to_le(), Ordering::Release);
}

/// Returns the CRC-32C of one input, starting from `seed`. (In this file because it calls unsafe code.)
#[inline]
pub(crate) fn crc32c(seed: u32, input: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor supports the target feature of the function.
        return unsafe { one(seed, input) };
    }
    crc32c::crc32c_append(seed, input)
}

/// Seals, in order, the adjacent records of these exact lengths in `bytes`. Their CRCs start from `salt`.
#[inline]
pub(crate) fn seal(salt: u32, bytes: &mut [u8], lens: &[u32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor supports the target feature of the function.
        return unsafe { each(salt, bytes, lens) };
    }
    let mut at = 0;
    for &len in lens {
        let record = &mut bytes[at..];
        let crc = crc32c(salt, &record[UNSUMMED_BYTES..len as usize]);
        commit(record, len, crc);
        at += padded(len as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::format::RECORD_HEADER_BYTES;
    use crate::log::seal::UNSUMMED_BYTES;
    use crate::log::seal::{crc32c, seal};
    use crate::storage::framed::u32_at;
    use crate::storage::memory::{ALIGN, padded};

    #[test]
    fn every_record_gets_its_length_and_the_same_crc_as_from_the_crate() {
        let noise: Vec<u8> = (0..1 << 16).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for body in (0..200).chain([1000, 1023, 1024, 1025, 4000]) {
            for seed in [0, 1, 0x0bad_cafe, u32::MAX] {
                let input = &noise[3..3 + body];
                assert_eq!(crc32c(seed, input), crc32c::crc32c_append(seed, input), "{body} bytes");
                // Each of the four records is the longest once; then come counts that are not multiples of four, and
                // equal lengths.
                for (longer, count) in (0..11).zip([8, 8, 8, 8, 8, 8, 2 * SIDE_BY_SIDE - 1, 5, 3, 8, 5]) {
                    let len = |i| RECORD_HEADER_BYTES + body + if i == longer { 11 + 8 * i } else { 0 };
                    let lens: Vec<u32> = (0..count).map(|i| len(i) as u32).collect();
                    let all: usize = lens.iter().map(|&len| padded(len as usize)).sum();
                    let mut bytes = rkyv::util::AlignedVec::<ALIGN>::new();
                    bytes.extend_from_slice(&noise[..all]);
                    seal(seed, &mut bytes, &lens);
                    let mut at = 0;
                    for (i, len) in lens.into_iter().enumerate() {
                        let end = at + len as usize;
                        let expected = crc32c::crc32c_append(seed, &noise[at + UNSUMMED_BYTES..end]);
                        assert_eq!(u32_at(&bytes, at), len, "{body} bytes, number {i}");
                        assert_eq!(u32_at(&bytes, at + 4), expected, "{body} bytes, number {i}");
                        let next = at + padded(len as usize);
                        assert_eq!(bytes[at + UNSUMMED_BYTES..next], noise[at + UNSUMMED_BYTES..next]);
                        at = next;
                    }
                }
            }
        }
    }
}
