//! Limits of the disk for a synced log, measured without any code of the engine.
//!
//! - [`disk_limit`] measures throughput: it writes to a prefaulted mapping with an `fdatasync` every 4 MiB.
//! - [`paced_disk`] measures latency: the time an event waits if each millisecond's bytes are written and synced, with
//!   idle cores and with as many busy cores as a run has. On a virtual machine the same processors serve the device.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hdrhistogram::Histogram;
use memmap2::{Advice, MmapMut, MmapOptions};

use crate::limit::{RECORD_BYTES, core, pin};

/// The greatest size of a probe's file.
pub(crate) const MAPPING_BYTES_MAX: u64 = 256 << 20;
const SYNC_BYTES: usize = 4 << 20;
const PACE: Duration = Duration::from_millis(1);

/// A disk's throughput when every 4 MiB is synced before the next is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskLimit {
    /// Median of the passes over blocks that were written before.
    pub(crate) recycled_bytes_per_second: f64,
    /// Result of the one pass over newly allocated blocks.
    pub(crate) new_bytes_per_second: f64,
}

/// Measures the throughput of `dir` when every 4 MiB is synced before the next is written.
///
/// The first pass writes newly allocated blocks, later passes the same blocks again, until `bytes_total` are written or
/// `seconds_max` have passed. At least one sync of each kind is measured. Page faults occur outside the measured time,
/// as with a preparing thread.
///
/// # Errors
///
/// Fails if the directory cannot hold the file (a quarter of the bytes, at most 256 MiB), or if a sync fails.
pub(crate) fn disk_limit(dir: &Path, bytes_total: u64, seconds_max: f64) -> Result<DiskLimit> {
    ensure!(seconds_max > 0.0, "the disk probe needs a time limit above 0");
    let steps = (bytes_total / 4).min(MAPPING_BYTES_MAX) as usize / SYNC_BYTES;
    let mut mapping = Mapping::create(dir, steps.max(1) * SYNC_BYTES)?;
    let started = Instant::now();
    let until = |share: f64| started + Duration::from_secs_f64(seconds_max * share);

    let new = synced_pass(&mut mapping, usize::MAX, until(0.5))?;
    let mut bytes = new.bytes as u64;
    let mut recycled = Vec::new();
    loop {
        let pass = synced_pass(&mut mapping, new.bytes, until(1.0))?;
        bytes += pass.bytes as u64;
        // A pass that the time limit cut short is less accurate; it counts only if there is no other.
        if pass.bytes == new.bytes || recycled.is_empty() {
            recycled.push(pass.bytes_per_second());
        }
        if bytes >= bytes_total || Instant::now() >= until(1.0) {
            break;
        }
    }
    recycled.sort_unstable_by(f64::total_cmp);
    Ok(DiskLimit {
        recycled_bytes_per_second: recycled[recycled.len() / 2],
        new_bytes_per_second: new.bytes_per_second(),
    })
}

struct Pass {
    bytes: usize,
    elapsed: Duration,
}

impl Pass {
    fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64()
    }
}

/// Writes and syncs 4 MiB at a time from the start of the mapping. Makes at least one step.
fn synced_pass(mapping: &mut Mapping, bytes_max: usize, until: Instant) -> Result<Pass> {
    let bytes = mapping.map.len().min(bytes_max);
    let mut pass = Pass { bytes: 0, elapsed: Duration::ZERO };
    let mut record = [0_u8; RECORD_BYTES];
    while pass.bytes < bytes && (pass.bytes == 0 || Instant::now() < until) {
        // Prefaults this step only: prefaulted pages are dirty, and a sync writes all dirty pages.
        mapping.prefault(pass.bytes, SYNC_BYTES)?;
        let started = Instant::now();
        for (n, to) in mapping.map[pass.bytes..][..SYNC_BYTES].chunks_mut(RECORD_BYTES).enumerate() {
            record[..8].copy_from_slice(&(n as u64).to_le_bytes());
            to.copy_from_slice(&record[..to.len()]);
        }
        mapping.file.sync_data().context("fdatasync in the disk probe")?;
        pass.elapsed += started.elapsed();
        pass.bytes += SYNC_BYTES;
    }
    Ok(pass)
}

/// Measures the time (ns) for which an event waits for the disk alone, from its due time until it is synced.
///
/// Each millisecond adds `bytes_per_second / 1000` bytes. They overwrite recycled blocks and are synced together with
/// all bytes that came during the previous sync, as a log is synced, but in one file and without other work. On each
/// core of `busy` a thread spins meanwhile and yields often.
///
/// # Errors
///
/// Fails if a core does not exist, if the directory cannot hold the file (256 MiB), or if a write or sync fails.
pub(crate) fn paced_disk(
    dir: &Path,
    bytes_per_second: u64,
    time: Duration,
    busy: Option<(usize, usize)>,
) -> Result<Histogram<u64>> {
    let step = (bytes_per_second / 1000).clamp(1, MAPPING_BYTES_MAX / 4) as usize;
    let mapping = Mapping::create(dir, MAPPING_BYTES_MAX as usize)?;
    let bytes = vec![1; step];
    for at in (0..=MAPPING_BYTES_MAX - step as u64).step_by(step) {
        mapping.file.write_all_at(&bytes, at).context("writing the disk probe's file")?;
    }
    mapping.file.sync_data().context("fdatasync in the disk probe")?;
    let cores: Vec<_> = busy.into_iter().flat_map(|(a, b)| [a, b]).map(core).collect::<Result<_>>()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for &core in &cores {
            let over = &over;
            scope.spawn(move || {
                // An unpinned thread keeps a core busy too, so a failure does not matter.
                let _pinned = pin(Some(core));
                while !over.load(Ordering::Relaxed) {
                    (0..64).for_each(|_| std::hint::spin_loop());
                    thread::yield_now();
                }
            });
        }
        let waits = paced_syncs(&mapping.file, &bytes, time);
        over.store(true, Ordering::Relaxed);
        waits
    })
}

fn paced_syncs(file: &File, bytes: &[u8], time: Duration) -> Result<Histogram<u64>> {
    let mut waits = Histogram::new_with_max((1 << 42) - 1, 3)?;
    let (started, mut due, mut at) = (Instant::now(), Instant::now(), 0);
    while started.elapsed() < time {
        let first = due;
        // A disk slower than the offered rate never catches up; the time limit ends the loop.
        while due <= Instant::now() && started.elapsed() < time {
            if at + bytes.len() as u64 > MAPPING_BYTES_MAX {
                at = 0;
            }
            file.write_all_at(bytes, at).context("writing in the disk probe")?;
            at += bytes.len() as u64;
            due += PACE;
        }
        if due == first {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            continue;
        }
        file.sync_data().context("fdatasync in the disk probe")?;
        let synced = Instant::now();
        let mut of = first;
        while of < due {
            waits.saturating_record((synced - of).as_nanos() as u64);
            of += PACE;
        }
    }
    Ok(waits)
}

/// A mapped file with allocated blocks. Dropping it removes the file.
pub(crate) struct Mapping {
    pub(crate) map: MmapMut,
    file: File,
    path: std::path::PathBuf,
}

impl Mapping {
    pub(crate) fn create(dir: &Path, bytes: usize) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("limit-{}-{count}.probe", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("creating {}", path.display()))?;
        let mapped = Self::map(&file, bytes).with_context(|| format!("mapping {bytes} bytes of {}", path.display()));
        match mapped {
            Ok(map) => Ok(Self { map, file, path }),
            Err(error) => {
                fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
                Err(error)
            }
        }
    }

    fn map(file: &File, bytes: usize) -> Result<MmapMut> {
        // Allocates blocks first: a store through a sparse mapping on a full disk raises SIGBUS.
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64)?;
        // SAFETY: this process created the file under a unique name, and nothing truncates it.
        let map = unsafe { MmapOptions::new().len(bytes).map_mut(file) }?;
        // Only advice: small pages work too, with more page faults.
        if let Err(error) = map.advise(Advice::HugePage) {
            ensure!(error.kind() == std::io::ErrorKind::InvalidInput, error);
        }
        Ok(map)
    }

    pub(crate) fn prefault(&self, at: usize, bytes: usize) -> Result<()> {
        self.map.advise_range(Advice::PopulateWrite, at, bytes).context("prefaulting (MADV_POPULATE_WRITE, Linux 5.14)")
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            say!("cannot remove the probe's file {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_probes_return_rates_and_remove_their_files() {
        let dir = std::env::temp_dir().join(format!("disk-test-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        let disk = disk_limit(&dir, 16 << 20, 5.0).expect("rates");
        assert!(disk.recycled_bytes_per_second > 0.0 && disk.new_bytes_per_second > 0.0);
        let waits = paced_disk(&dir, 64 << 20, Duration::from_millis(50), None).expect("waits");
        // The number of waits depends on the disk; every wait is longer than 0.
        assert!((1..=50).contains(&waits.len()) && waits.min() > 0, "{} waits", waits.len());
        // More than any disk can write: the probe still ends.
        assert!(!paced_disk(&dir, 1 << 40, Duration::from_millis(50), None).expect("waits").is_empty());
        assert!(paced_disk(&dir, 1 << 20, Duration::from_millis(1), Some((0, 1 << 20))).is_err(), "no such core");
        // Fails if a probe's file remains.
        fs::remove_dir(&dir).expect("an empty directory");
    }
}
