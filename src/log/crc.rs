//! CRC-32C as records need it: short inputs, one after the other, and at the writing end several at once.
//!
//! The processor's instruction takes 8 bytes each cycle but answers after three, so one record alone waits most
//! of the time. Four side by side do not. Long inputs go to the crate, which splits them likewise.

#[cfg(target_arch = "x86_64")]
use crate::log::format::Staged;

/// Records whose sums are computed side by side.
pub(crate) const LANES: usize = 4;

/// From this length on, splitting one input pays more than what it costs.
#[cfg(target_arch = "x86_64")]
const LONG_BYTES: usize = 1024;

/// Sums of records, each begun with `seed`. For a processor that has the instruction.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
pub(crate) fn each<const N: usize>(seed: u32, records: &[Option<Staged<'_>>; N]) -> [u32; N] {
    let mut sums = [0; N];
    for (four, sums) in records.chunks_exact(LANES).zip(sums.chunks_exact_mut(LANES)) {
        if let [Some(a), Some(b), Some(c), Some(d)] = four {
            sums.copy_from_slice(&of_four(seed, [a, b, c, d]));
            continue;
        }
        for (record, sum) in four.iter().zip(sums) {
            let Some(record) = record else { break };
            let (head, body) = record.summed();
            *sum = one(one(seed, head), body);
        }
    }
    sums
}

/// Sums of four records.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
#[inline]
fn of_four(seed: u32, [a, b, c, d]: [&Staged<'_>; LANES]) -> [u32; LANES] {
    // Written out: a closure would not be compiled for the instruction.
    let [mut sum_a, mut sum_b, mut sum_c, mut sum_d] = [u64::from(!seed); LANES];
    let ((a_head, a), (b_head, b)) = (a.summed(), b.summed());
    let ((c_head, c), (d_head, d)) = (c.summed(), d.summed());
    let (a_head, b_head) = (a_head.as_chunks().0, b_head.as_chunks().0);
    let (c_head, d_head) = (c_head.as_chunks().0, d_head.as_chunks().0);
    for word in 0..a_head.len() {
        sum_a = step(sum_a, &a_head[word]);
        sum_b = step(sum_b, &b_head[word]);
        sum_c = step(sum_c, &c_head[word]);
        sum_d = step(sum_d, &d_head[word]);
    }
    let words = a.as_chunks().0.iter().zip(b.as_chunks().0).zip(c.as_chunks().0.iter().zip(d.as_chunks().0));
    for ((a, b), (c, d)) in words {
        sum_a = step(sum_a, a);
        sum_b = step(sum_b, b);
        sum_c = step(sum_c, c);
        sum_d = step(sum_d, d);
    }
    if a.len() == b.len() && a.len() == c.len() && a.len() == d.len() && a.len() % 8 == 0 {
        // Events of one size: most often.
        return [!(sum_a as u32), !(sum_b as u32), !(sum_c as u32), !(sum_d as u32)];
    }
    let done = a.len().min(b.len()).min(c.len()).min(d.len()) / 8 * 8;
    let [a, b, c, d] = [&a[done..], &b[done..], &c[done..], &d[done..]];
    [one(!(sum_a as u32), a), one(!(sum_b as u32), b), one(!(sum_c as u32), c), one(!(sum_d as u32), d)]
}

/// The sum of one input, begun with `seed`. For a processor that has the instruction.
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::log::format::RECORD_HEADER_BYTES;
    use crate::log::mmap::{crc32c, crc32c_each};

    #[test]
    fn agrees_with_the_crate_at_every_length() {
        let bytes: Vec<u8> = (0..8192_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let expected = |seed, input: &[u8]| crc32c::crc32c_append(seed, input);
        for len in (0..200).chain([1000, 1023, 1024, 1025, 4000]) {
            for seed in [0, 1, 0x0bad_cafe, u32::MAX] {
                assert_eq!(crc32c(seed, &bytes[3..3 + len]), expected(seed, &bytes[3..3 + len]), "{len} bytes");
                // Equal and unequal lengths, each lane the longest once; and too few records for all lanes.
                for (longer, count) in (0..9).zip([8, 8, 8, 8, 8, 8, 7, 5, 3]) {
                    let len = |i| if i == longer { len + 11 + 8 * i } else { len };
                    let mut heads: [[u8; RECORD_HEADER_BYTES]; 8] =
                        std::array::from_fn(|i| *bytes[i..].first_chunk().expect("long enough"));
                    let bodies: [&[u8]; 8] = std::array::from_fn(|i| &bytes[100 + i..][..len(i)]);
                    let sums = heads.map(|head| expected(seed, &head[8..]));
                    let mut staged = heads.iter_mut().zip(bodies).map(|(head, body)| Staged { head, body });
                    let staged: [_; 8] = std::array::from_fn(|i| staged.next().filter(|_| i < count));
                    let found = crc32c_each(seed, &staged);
                    for i in 0..count {
                        assert_eq!(found[i], expected(sums[i], bodies[i]), "{} bytes, number {i}", len(i));
                    }
                }
            }
        }
    }
}
