//! Limits of this machine: the work of the hot path without anything around it.
//!
//! Two probes, which share no code with the engine (`disk.rs` has the probes of the disk):
//!
//! - [`engine_limit`]: one producer thread, one ring, one thread that archives, checksums and
//!   commits records into a prefaulted file mapping. No key table, no state, no histogram, no clock
//!   per event.
//! - [`keyed_limit`]: the same loop plus the work per event that every engine needs: users and types come in random
//!   order, the user's version and last record go into the header, and its state changes. An array indexed by user
//!   replaces the key table; it is cheaper than any table.
//!
//! A record is 96 bytes:
//!
//! ```text
//!  0        4        8            16           24       26       32       40        48          96
//!  ├────────┼────────┼────────────┼────────────┼────────┼────────┼────────┼─────────┼───────────┤
//!  │ length │ CRC-32C│ time (ns)  │ key        │ type   │ zero   │ version│ previous│ event     │
//!  └────────┴────────┴────────────┴────────────┴────────┴────────┴────────┴─────────┴───────────┘
//!  stored last       └──────────────────────── the CRC covers ──────────────────────────────────┘
//! ```

use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use core_affinity::CoreId;
use corelane::Bounded;
use rkyv::rancor::Failure;
use rkyv::ser::allocator::SubAllocator;
use rkyv::ser::writer::Buffer;
use rkyv::{Archive, Archived, Serialize};
use rtrb::chunks::ChunkError;
use rtrb::{Consumer, Producer, RingBuffer};

use crate::disk::{MAPPING_BYTES_MAX, Mapping};

const HEADER_BYTES: usize = 48;
const BODY_BYTES: usize = 48;
pub(crate) const RECORD_BYTES: usize = HEADER_BYTES + BODY_BYTES;
/// Records filled before their checksums are computed side by side. A CRC of bytes stored just before waits for the
/// stores, and a single CRC waits for its own previous step. One record at a time runs at half the speed.
const GROUP: usize = 4;
/// Prefetch distance in the mapping. Without prefetching the loop runs at two thirds of the speed.
const PREFETCH_RECORD_BYTES: usize = 2048;
/// Prefetch distance in the ring.
const PREFETCH_SLOTS: usize = 32;
/// Prefetch distance for users.
const PREFETCH_KEYS: usize = 16;
/// Users and event types drawn before the clock starts and reused in turn.
const DRAWS: usize = 1 << 20;
const KEYS: u64 = 10_000;
const SPINS_BEFORE_YIELD: u32 = 1 << 10;

const _: () = assert!(size_of::<Archived<ProbeEvent>>() == BODY_BYTES);
const _: () = assert!(size_of::<Slot>() == 64, "one ring slot is one cache line");

/// The configuration of [`engine_limit`] and [`keyed_limit`].
#[derive(Clone, Debug)]
pub(crate) struct LimitConfig {
    /// The number of events.
    pub(crate) events: u64,
    /// Slots of the ring, at least one batch.
    pub(crate) ring_capacity: usize,
    /// The most events that either side moves between two reads of the other side's index.
    pub(crate) batch: usize,
    /// Folder of the mapped file.
    pub(crate) dir: std::path::PathBuf,
    /// The core of the producer and the core of the writer.
    pub(crate) pin: Option<(usize, usize)>,
}

/// Game events of the same size as the load generator's.
#[derive(Archive, Serialize, Bounded, Clone, Copy, Debug)]
enum ProbeEvent {
    Moved { x: f64, y: f64, heading: f64, zone: u64, tick: u64 },
    Attacked { target: u64, damage: u64, x: f64, y: f64, tick: u64 },
    LevelledUp { experience: u64, level: u64, points: u64, tick: u64 },
}

impl ProbeEvent {
    /// Returns event number `n`; of eight kinds five move and two attack.
    #[inline]
    fn nth(n: u64, kind: u64) -> Self {
        let x = (n & 0xffff) as f64;
        match kind {
            0..=4 => Self::Moved { x, y: 2.0, heading: 0.5, zone: n >> 8, tick: n },
            5 | 6 => Self::Attacked { target: n ^ 1, damage: n & 0xff, x, y: 2.0, tick: n },
            _ => Self::LevelledUp { experience: n, level: n & 127, points: 3, tick: n },
        }
    }

    #[inline]
    const fn type_id(&self) -> u16 {
        match self {
            Self::Moved { .. } => 1,
            Self::Attacked { .. } => 2,
            Self::LevelledUp { .. } => 3,
        }
    }
}

/// One slot of the ring.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Slot {
    key: u64,
    event: ProbeEvent,
}

/// Additional work of the loop for each event.
trait Duty: Send {
    /// Prefetches the data of a key whose event follows soon.
    fn prefetch(&self, key: u64);

    /// Counts the key's event at `offset`. Returns its version and the offset of the key's previous event.
    fn place(&mut self, key: u64, offset: u64) -> (u64, u64);

    /// Applies the archived event to the user's state.
    fn fold(&mut self, key: u64, event: &ArchivedProbeEvent);
}

/// No additional work.
struct Bare;

impl Duty for Bare {
    #[inline(always)]
    fn prefetch(&self, _key: u64) {}

    #[inline(always)]
    fn place(&mut self, _key: u64, _offset: u64) -> (u64, u64) {
        (0, 0)
    }

    #[inline(always)]
    fn fold(&mut self, _key: u64, _event: &ArchivedProbeEvent) {}
}

/// The data of a user: one cache line.
#[derive(Clone, Debug, Default)]
#[repr(align(64))]
struct User {
    version: u64,
    head: u64,
    x: f64,
    y: f64,
    level: u32,
    attacks: u32,
    experience: u64,
    tick: u64,
}

const _: () = assert!(size_of::<User>() == 64);

/// Versions and chains of all users and, if `FOLDS`, their states.
struct Users<const FOLDS: bool>(Box<[User]>);

impl<const FOLDS: bool> Duty for Users<FOLDS> {
    #[inline(always)]
    fn prefetch(&self, key: u64) {
        if let Some(user) = self.0.get(key as usize) {
            prefetch_line(user);
        }
    }

    #[inline(always)]
    fn place(&mut self, key: u64, offset: u64) -> (u64, u64) {
        let user = &mut self.0[key as usize];
        user.version += 1;
        (user.version, std::mem::replace(&mut user.head, offset))
    }

    #[inline(always)]
    fn fold(&mut self, key: u64, event: &ArchivedProbeEvent) {
        if !FOLDS {
            return;
        }
        let user = &mut self.0[key as usize];
        match event {
            ArchivedProbeEvent::Moved { x, y, tick, .. } => {
                (user.x, user.y, user.tick) = (x.to_native(), y.to_native(), tick.to_native());
            }
            ArchivedProbeEvent::Attacked { x, y, tick, .. } => {
                user.attacks += 1;
                (user.x, user.y, user.tick) = (x.to_native(), y.to_native(), tick.to_native());
            }
            ArchivedProbeEvent::LevelledUp { experience, level, tick, .. } => {
                user.level = level.to_native() as u32;
                user.experience = user.experience.wrapping_add(experience.to_native());
                user.tick = tick.to_native();
            }
        }
    }
}

/// Returns the events per second of the bare loop: ring, archive, checksum, commit.
///
/// # Errors
///
/// Fails if the configuration is invalid, a core does not exist, or the directory cannot hold the mapping (at most 256
/// MiB).
pub(crate) fn engine_limit(config: &LimitConfig) -> Result<f64> {
    rate(config, |n| Slot { key: key(n), event: ProbeEvent::nth(n, n % 8) }, &mut Bare)
}

/// Returns the events per second of the same loop with versions, chains and, if `folds`, states of `users` users.
///
/// # Errors
///
/// The same as [`engine_limit`].
pub(crate) fn keyed_limit(config: &LimitConfig, users: u64, folds: bool) -> Result<f64> {
    let mut random = 1_u64;
    let draws: Vec<(u32, u8)> = std::iter::repeat_with(|| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((((random >> 32) * users) >> 32) as u32, (random >> 24) as u8 % 8)
    })
    .take(DRAWS)
    .collect();
    let draw = |n: u64| {
        let (user, kind) = draws[n as usize % DRAWS];
        Slot { key: u64::from(user), event: ProbeEvent::nth(n, u64::from(kind)) }
    };
    let users = vec![User::default(); users as usize].into_boxed_slice();
    if folds { rate(config, draw, &mut Users::<true>(users)) } else { rate(config, draw, &mut Users::<false>(users)) }
}

fn rate(config: &LimitConfig, nth: impl Fn(u64) -> Slot + Sync, duty: &mut impl Duty) -> Result<f64> {
    ensure!(config.events > 0, "the limit probe needs at least one event");
    ensure!(config.batch > 0, "a batch holds at least one event");
    ensure!(
        config.ring_capacity >= config.batch,
        "a ring of {} slots cannot take a batch of {}",
        config.ring_capacity,
        config.batch
    );
    let cores = config.pin.map(|(producer, writer)| Ok::<_, anyhow::Error>((core(producer)?, core(writer)?)));
    let (producer_core, writer_core) = cores.transpose()?.unzip();

    let bytes = config.events.saturating_mul(RECORD_BYTES as u64).min(MAPPING_BYTES_MAX) as usize;
    let mut mapping = Mapping::create(&config.dir, bytes - bytes % RECORD_BYTES)?;
    mapping.prefault(0, mapping.map.len())?;

    let (mut lane, mut ring) = RingBuffer::new(config.ring_capacity);
    let start = Barrier::new(2);
    let elapsed = thread::scope(|scope| -> Result<Duration> {
        let producer = scope.spawn(|| -> Result<()> {
            let pinned = pin(producer_core);
            start.wait();
            // Runs even if pinning failed: the other side must not wait for ever.
            produce(&mut lane, config.events, config.batch, &nth);
            pinned
        });
        let writer = scope.spawn(|| -> Result<Duration> {
            let pinned = pin(writer_core);
            start.wait();
            let started = Instant::now();
            write(&mut ring, &mut mapping.map, config.events, config.batch, duty);
            let elapsed = started.elapsed();
            pinned.map(|()| elapsed)
        });
        producer.join().map_err(|_| anyhow!("the probe's producer panicked"))??;
        writer.join().map_err(|_| anyhow!("the probe's writer panicked"))?
    })?;
    Ok(config.events as f64 / elapsed.as_secs_f64())
}

/// Fills the ring in chunks of `batch`, with one release store per chunk.
fn produce(lane: &mut Producer<Slot>, events: u64, batch: usize, nth: impl Fn(u64) -> Slot) {
    let mut next = 0_u64;
    while next < events {
        let want = (events - next).min(batch as u64) as usize;
        let mut spins = 0;
        let chunk = loop {
            match lane.write_chunk_uninit(want) {
                Ok(chunk) => break chunk,
                Err(ChunkError::TooFewSlots(_)) => relax(&mut spins),
            }
        };
        next += chunk.fill_from_iter((next..).map(&nth)) as u64;
    }
}

/// Spreads the keys like a hash, without a division.
#[inline]
fn key(n: u64) -> u64 {
    let hash = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((hash >> 32) * KEYS) >> 32
}

/// Turns slots into committed records; wraps around at the end of the mapping.
fn write(ring: &mut Consumer<Slot>, mapping: &mut [u8], events: u64, batch: usize, duty: &mut impl Duty) {
    let (records, rest) = mapping.as_chunks_mut::<RECORD_BYTES>();
    assert!(rest.is_empty() && !records.is_empty());
    let mut at = 0;
    let mut written = 0;
    let mut spins = 0;
    while written < events {
        let chunk = match ring.read_chunk(batch) {
            Ok(chunk) => chunk,
            Err(ChunkError::TooFewSlots(0)) => {
                relax(&mut spins);
                continue;
            }
            Err(ChunkError::TooFewSlots(some)) => match ring.read_chunk(some) {
                Ok(chunk) => chunk,
                Err(_) => unreachable!("only this thread takes slots"),
            },
        };
        spins = 0;
        let time_ns = now_ns();
        let (first, second) = chunk.as_slices();
        for mut slots in [first, second] {
            while !slots.is_empty() {
                let n = slots.len().min(records.len() - at);
                let (now, later) = slots.split_at(n);
                for (i, (slots, records)) in now.chunks(GROUP).zip(records[at..at + n].chunks_mut(GROUP)).enumerate() {
                    let ahead = |slots: usize| now.get((i + slots / GROUP) * GROUP..).unwrap_or_default();
                    prefetch_ahead(records, ahead(PREFETCH_SLOTS));
                    ahead(PREFETCH_KEYS).iter().take(GROUP).for_each(|slot| duty.prefetch(slot.key));
                    for (n, (slot, record)) in slots.iter().zip(&mut *records).enumerate() {
                        let offset = ((at + i * GROUP + n) * RECORD_BYTES) as u64;
                        let archived = fill(slot, time_ns, duty.place(slot.key, offset), record);
                        duty.fold(slot.key, archived);
                    }
                    commit_group(records);
                }
                at = if at + n == records.len() { 0 } else { at + n };
                slots = later;
            }
        }
        written += chunk.len() as u64;
        chunk.commit_all();
    }
}

/// Prefetches later records and slots: a store that misses the cache delays all later stores, and slots come from the
/// other core's cache.
#[inline(always)]
fn prefetch_ahead(records: &[[u8; RECORD_BYTES]], slots: &[Slot]) {
    let later = records.as_ptr().cast::<u8>().wrapping_add(PREFETCH_RECORD_BYTES);
    for line in 0..GROUP * RECORD_BYTES / 64 {
        prefetch_line(later.wrapping_add(line * 64));
    }
    slots.iter().take(GROUP).for_each(|slot| prefetch_line(slot));
}

/// Prefetches the cache line in which an item begins.
#[inline(always)]
fn prefetch_line<T>(item: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and faults at no address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(item.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = item;
}

/// Writes a record without its first eight bytes.
#[inline(always)]
fn fill<'a>(
    slot: &Slot,
    time_ns: u64,
    (version, previous): (u64, u64),
    record: &'a mut [u8; RECORD_BYTES],
) -> &'a ArchivedProbeEvent {
    record[8..16].copy_from_slice(&time_ns.to_le_bytes());
    record[16..24].copy_from_slice(&slot.key.to_le_bytes());
    record[24..32].copy_from_slice(&u64::from(slot.event.type_id()).to_le_bytes());
    record[32..40].copy_from_slice(&version.to_le_bytes());
    record[40..48].copy_from_slice(&previous.to_le_bytes());
    let body = &mut record[HEADER_BYTES..];
    let archived = rkyv::api::low::to_bytes_in_with_alloc::<_, _, Failure>(
        &slot.event,
        Buffer::from(&mut *body),
        SubAllocator::empty(),
    );
    assert!(archived.is_ok_and(|body| body.len() == BODY_BYTES));
    // SAFETY: these bytes were archived just above, and a body begins at a multiple of 16.
    unsafe { rkyv::access_unchecked(body) }
}

/// Writes the checksums, then the length words.
#[inline(always)]
fn commit_group(records: &mut [[u8; RECORD_BYTES]]) {
    #[cfg(target_arch = "x86_64")]
    if let [a, b, c, d] = &*records
        && std::arch::is_x86_feature_detected!("sse4.2")
    {
        // SAFETY: the processor has the instruction.
        let crcs = unsafe { checksums([a, b, c, d]) };
        records.iter_mut().zip(crcs).for_each(|(record, crc)| commit(record, crc));
        return;
    }
    for record in records {
        commit(record, crc32c::crc32c(&record[8..]));
    }
}

/// Computes four checksums side by side: a single one waits two of three cycles for its previous step.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
#[inline]
fn checksums([a, b, c, d]: [&[u8; RECORD_BYTES]; GROUP]) -> [u32; GROUP] {
    use std::arch::x86_64::_mm_crc32_u64 as step;
    let (a, b, c, d) = (a.as_chunks::<8>().0, b.as_chunks::<8>().0, c.as_chunks::<8>().0, d.as_chunks::<8>().0);
    let [mut of_a, mut of_b, mut of_c, mut of_d] = [u64::from(u32::MAX); GROUP];
    for word in 1..RECORD_BYTES / 8 {
        of_a = step(of_a, u64::from_le_bytes(a[word]));
        of_b = step(of_b, u64::from_le_bytes(b[word]));
        of_c = step(of_c, u64::from_le_bytes(c[word]));
        of_d = step(of_d, u64::from_le_bytes(d[word]));
    }
    [!of_a as u32, !of_b as u32, !of_c as u32, !of_d as u32]
}

/// Writes the checksum, then the length word.
#[inline(always)]
fn commit(record: &mut [u8; RECORD_BYTES], crc: u32) {
    record[4..8].copy_from_slice(&crc.to_le_bytes());
    // SAFETY: the pointer is to the record's first four bytes, exclusively borrowed and 4-aligned
    // (a record is a multiple of 96 bytes into a page-aligned mapping).
    let length = unsafe { AtomicU32::from_ptr(record.as_mut_ptr().cast()) };
    // Release: a reader that sees the length sees the record. The probe has no reader, but must pay the same cost as
    // the engine.
    length.store((RECORD_BYTES as u32).to_le(), Ordering::Release);
}

pub(crate) fn core(id: usize) -> Result<CoreId> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let found = cores.iter().copied().find(|core| core.id == id);
    found.with_context(|| {
        format!(
            "core {id} does not exist or is not allowed: this process may run on {:?}",
            cores.iter().map(|c| c.id).collect::<Vec<_>>()
        )
    })
}

pub(crate) fn pin(core: Option<CoreId>) -> Result<()> {
    core.is_none_or(core_affinity::set_for_current).then_some(()).with_context(|| format!("pinning to {core:?}"))
}

#[inline]
fn relax(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS_BEFORE_YIELD {
        std::hint::spin_loop();
    } else {
        *spins = 0;
        thread::yield_now();
    }
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use memmap2::MmapMut;

    use super::*;

    #[test]
    fn every_record_is_committed_and_its_checksum_covers_key_and_event() {
        let events = 1_000;
        let (mut lane, mut ring) = RingBuffer::new(64);
        let mut map = MmapMut::map_anon(events as usize * RECORD_BYTES).expect("memory");
        let bytes = &mut map[..];
        let mut users = Users::<true>(vec![User::default(); KEYS as usize].into_boxed_slice());
        thread::scope(|scope| {
            let nth = |n| Slot { key: key(n), event: ProbeEvent::nth(n, n % 8) };
            scope.spawn(move || produce(&mut lane, events, 48, nth));
            write(&mut ring, bytes, events, 48, &mut users);
        });
        for (n, record) in (0..).zip(bytes.as_chunks::<RECORD_BYTES>().0) {
            assert_eq!(record[..4], (RECORD_BYTES as u32).to_le_bytes());
            assert_eq!(record[4..8], crc32c::crc32c(&record[8..]).to_le_bytes());
            assert_eq!(record[16..24], key(n).to_le_bytes());
            let version = (0..=n).filter(|&other| key(other) == key(n)).count() as u64;
            assert_eq!(record[32..40], version.to_le_bytes());
            let previous = (0..n).rfind(|&other| key(other) == key(n)).map_or(0, |other| other * RECORD_BYTES as u64);
            assert_eq!(record[40..48], previous.to_le_bytes());
            assert_eq!(record[24..26], ProbeEvent::nth(n, n % 8).type_id().to_le_bytes());
        }
        let folded = (0..events).filter(|n| matches!(n % 8, 5 | 6)).count();
        assert_eq!(users.0.iter().map(|user| user.attacks as usize).sum::<usize>(), folded);
    }

    #[test]
    fn the_limit_probes_return_rates_and_remove_their_files() {
        let dir = std::env::temp_dir().join(format!("limit-test-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        let config =
            |ring_capacity, pin| LimitConfig { events: 10_000, ring_capacity, batch: 64, dir: dir.clone(), pin };
        assert!(engine_limit(&config(256, None)).expect("a rate") > 0.0);
        assert!(keyed_limit(&config(256, None), 100, false).expect("a rate") > 0.0);
        assert!(keyed_limit(&config(256, None), 100, true).expect("a rate") > 0.0);
        assert!(engine_limit(&config(32, None)).is_err(), "a batch larger than the ring");
        assert!(engine_limit(&config(256, Some((0, 1 << 20)))).is_err(), "no such core");
        // Fails when a probe's file is still there.
        fs::remove_dir(&dir).expect("an empty directory");
    }
}
