//! The processor: the cores this process may use, prefetch instructions, and sleeping.

use std::time::Duration;

/// Returns the number of cores this process may use (cgroup- and affinity-aware), at least 1.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Prefetches the first cache line of `item` and, if `item` is larger than a line, also the last.
#[inline]
pub(crate) fn prefetch<T>(item: &T) {
    prefetch_at(item);
}

/// As [`prefetch`], for an address that need not be valid.
#[inline]
pub(crate) fn prefetch_at<T>(item: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        let first = item.cast::<i8>();
        let last = first.wrapping_add(size_of::<T>().saturating_sub(1));
        // SAFETY: a prefetch reads nothing and faults on nothing, whatever the address.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(first) }
        if size_of::<T>() > 64 {
            // SAFETY: as above.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(last) }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = item;
}

/// As [`prefetch_at`], but for writing: other cores give up their copies of the line.
#[inline]
pub(crate) fn prefetch_to_write<T>(item: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let first = item.cast::<u8>();
        let last = first.wrapping_add(size_of::<T>().saturating_sub(1));
        // SAFETY: a prefetch changes nothing and faults on nothing, whatever the address. (The intrinsic compiles to a
        // prefetch for reading unless the target is a newer processor; older processors execute this instruction as a
        // no-op.)
        unsafe {
            std::arch::asm!("prefetchw [{0}]", "prefetchw [{1}]", in(reg) first, in(reg) last, options(nostack, preserves_flags, readonly))
        }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = item;
}

/// Sleeps for `time`. Only for polling on cold paths.
pub(crate) fn nap(time: Duration) {
    std::thread::sleep(time);
}
