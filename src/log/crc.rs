//! CRC-32C as records need it: short inputs, one after the other, and at the writing end several at once.
//!
//! The processor's instruction takes 8 bytes each cycle but answers after three, so one record alone waits most
//! of the time. Four side by side do not. Long inputs go to the crate, which splits them likewise.

/// Records whose sums are computed side by side.
pub(crate) const LANES: usize = 4;

/// From this length on, splitting one input pays more than what it costs.
#[cfg(target_arch = "x86_64")]
const LONG_BYTES: usize = 1024;

/// Sums of four inputs, each begun with `seed`. For a processor that has the instruction.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
pub(crate) fn four(seed: u32, [a, b, c, d]: [&[u8]; LANES]) -> [u32; LANES] {
    // Written out: a closure would not be compiled for the instruction.
    let common = a.len().min(b.len()).min(c.len()).min(d.len()) / 8;
    let (a_words, b_words) = (&a.as_chunks().0[..common], &b.as_chunks().0[..common]);
    let (c_words, d_words) = (&c.as_chunks().0[..common], &d.as_chunks().0[..common]);
    let start = u64::from(!seed);
    let [mut sum_a, mut sum_b, mut sum_c, mut sum_d] = [start; LANES];
    for word in 0..common {
        sum_a = step(sum_a, &a_words[word]);
        sum_b = step(sum_b, &b_words[word]);
        sum_c = step(sum_c, &c_words[word]);
        sum_d = step(sum_d, &d_words[word]);
    }
    let done = common * 8;
    if a.len() | b.len() | c.len() | d.len() == done {
        // Four of one length, and nothing left over: most often.
        return [!(sum_a as u32), !(sum_b as u32), !(sum_c as u32), !(sum_d as u32)];
    }
    [finish(sum_a, &a[done..]), finish(sum_b, &b[done..]), finish(sum_c, &c[done..]), finish(sum_d, &d[done..])]
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
    use crate::log::mmap::{crc32c, crc32c_lanes};

    #[test]
    fn agrees_with_the_crate_at_every_length() {
        let bytes: Vec<u8> = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let expected = |seed, input: &[u8]| crc32c::crc32c_append(seed, input);
        for len in (0..200).chain([1000, 1023, 1024, 1025, 4000]) {
            for seed in [0, 1, 0x0bad_cafe, u32::MAX] {
                assert_eq!(crc32c(seed, &bytes[3..3 + len]), expected(seed, &bytes[3..3 + len]), "{len} bytes");
                // Equal and unequal lengths, each lane the longest once.
                for longer in 0..5 {
                    let inputs: [&[u8]; 4] =
                        std::array::from_fn(|i| &bytes[i..i + len + if i == longer { 11 + 8 * i } else { 0 }]);
                    assert_eq!(crc32c_lanes(seed, inputs), inputs.map(|input| expected(seed, input)), "{len} bytes");
                }
            }
        }
    }
}
