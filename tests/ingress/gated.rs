//! Gated producers against plain oracles: the log's contents across restarts and power cuts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::{ArchivedNote, Note, SEGMENT, env_number, open_on, os_cache, read_shard, small, soon};
use corelane::error::{GateError, GateOpenError, RejectedReason};
use corelane::ingress::{Accepted, Gap, GatePolicy, GateRefused, GateStart, GatedProducer, OfferRefused};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Config, EventLog, Key, OpenError, Rejected, Retention, ShardId};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

const DIR: &str = "/store";
const HOUR: Duration = Duration::from_secs(3600);
const WINDOW: usize = 64;

/// An event that carries its partition and sequence.
fn note(partition: u64, sequence: u64) -> Note {
    Note::new(partition << 32 | sequence)
}

fn source(note: &ArchivedNote) -> Option<(u64, u64)> {
    let n = note.n.to_native();
    Some((n >> 32, n & 0xffff_ffff))
}

/// Each partition has many keys, so that its events spread over the shards.
fn key(partition: u64, sequence: u64) -> Key {
    Key::new((partition * 31 + sequence) % 7)
}

fn policy() -> GatePolicy {
    GatePolicy::default().gap_wait_max(HOUR)
}

fn gated(engine: &EventLog<Note>) -> GatedProducer<Note> {
    engine.gated("in", policy(), source).unwrap()
}

fn offer(gated: &mut GatedProducer<Note>, partition: u64, sequence: u64) -> Accepted<Note> {
    gated.offer(partition, sequence, key(partition, sequence), note(partition, sequence)).unwrap()
}

/// Advances the gate's time so that every gap times out.
fn close_gaps(gated: &mut GatedProducer<Note>) {
    gated.pass_time(2 * HOUR);
    gated.pump().unwrap();
}

/// The partitions and sequences in each shard's log, in log order.
fn logs(engine: &EventLog<Note>) -> Vec<Vec<(u64, u64)>> {
    engine.flush(soon()).unwrap();
    let shard = |shard| read_shard(engine, shard).iter().map(|held| (held.n >> 32, held.n & 0xffff_ffff)).collect();
    (0..engine.config().shards()).map(shard).collect()
}

/// The sequences of each partition in all shards. Checks that they rise within a shard and that none occurs twice.
fn by_partition(engine: &EventLog<Note>) -> BTreeMap<u64, BTreeSet<u64>> {
    let mut all: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for log in logs(engine) {
        let mut last: BTreeMap<u64, u64> = BTreeMap::new();
        for (partition, sequence) in log {
            if let Some(before) = last.insert(partition, sequence) {
                assert!(before < sequence, "{sequence} of partition {partition} follows {before}");
            }
            assert!(all.entry(partition).or_default().insert(sequence), "{sequence} of partition {partition} twice");
        }
    }
    all
}

fn spans(gaps: &[Gap]) -> BTreeSet<(u64, u64)> {
    let mut spans = BTreeSet::new();
    for gap in gaps {
        for sequence in gap.from..=gap.to {
            assert!(spans.insert((gap.partition, sequence)), "{gap:?} was recorded already");
        }
    }
    spans
}

/// A source with several partitions: some sequences are missing, some come twice, and each block is shuffled.
struct Input {
    blocks: Vec<Vec<(u64, u64)>>,
    offered: BTreeMap<u64, BTreeSet<u64>>,
}

impl Input {
    fn new(random: &mut SmallRng, partitions: u64, blocks: usize) -> Self {
        let mut next = vec![0; partitions as usize];
        let (mut offered, mut made): (BTreeMap<u64, BTreeSet<u64>>, Vec<_>) = (BTreeMap::new(), Vec::new());
        for _ in 0..blocks {
            let mut block = Vec::new();
            while block.len() < WINDOW {
                let partition = random.random_range(0..partitions);
                let sequence = next[partition as usize];
                next[partition as usize] += 1;
                if random.random_bool(0.03) {
                    continue;
                }
                offered.entry(partition).or_default().insert(sequence);
                block.extend(std::iter::repeat_n((partition, sequence), 1 + usize::from(random.random_bool(0.1))));
            }
            block.shuffle(random);
            made.push(block);
        }
        Self { blocks: made, offered }
    }

    /// The sequences missing below the last one of each partition.
    fn missing(&self) -> BTreeSet<(u64, u64)> {
        let of = |(partition, offered): (&u64, &BTreeSet<u64>)| {
            let partition = *partition;
            let missing: Vec<_> =
                (0..*offered.last().unwrap()).filter(|sequence| !offered.contains(sequence)).collect();
            missing.into_iter().map(move |sequence| (partition, sequence))
        };
        self.offered.iter().flat_map(of).collect()
    }
}

#[test]
fn the_log_holds_every_partition_in_rising_sequence_and_every_event_that_came_in_time() {
    for shards in [1, 3] {
        let mut random = SmallRng::seed_from_u64(shards.into());
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(os_cache(dir.path()).shards(shards)).unwrap();
        let mut gated = gated(&engine);
        let input = Input::new(&mut random, 5, 60);
        // The oracle: per partition the expected sequence, the early ones, and those that passed in time.
        let mut model: BTreeMap<u64, (u64, BTreeSet<u64>, BTreeSet<u64>)> = BTreeMap::new();
        let (mut gaps, mut duplicates, mut behind) = (BTreeSet::new(), 0, 0);
        for block in &input.blocks {
            let at = random.random_range(0..block.len());
            for (i, (partition, sequence)) in block.iter().copied().enumerate() {
                let (expected, early, passed) = model.entry(partition).or_default();
                let answer = offer(&mut gated, partition, sequence);
                if passed.contains(&sequence) || early.contains(&sequence) {
                    assert!(matches!(answer, Accepted::Duplicate), "{answer:?}");
                    duplicates += 1;
                } else if sequence < *expected {
                    // The gaps may have been closed in the middle of the block, and a late event may come twice.
                    assert!(matches!(answer, Accepted::Late(_) | Accepted::Duplicate), "{answer:?}");
                    behind += 1;
                } else {
                    let is_next = sequence == *expected;
                    assert!(matches!((&answer, is_next), (Accepted::Published(_), true) | (Accepted::Buffered, false)));
                    early.insert(sequence);
                    while early.remove(expected) {
                        passed.insert(*expected);
                        *expected += 1;
                    }
                }
                if i == at {
                    close_gaps(&mut gated);
                    for (partition, (expected, early, passed)) in &mut model {
                        for sequence in std::mem::take(early) {
                            gaps.extend((*expected..sequence).map(|missing| (*partition, missing)));
                            passed.insert(sequence);
                            *expected = sequence + 1;
                        }
                    }
                }
            }
        }
        gated.finish().unwrap();
        for (partition, (expected, early, passed)) in &mut model {
            for sequence in std::mem::take(early) {
                gaps.extend((*expected..sequence).map(|missing| (*partition, missing)));
                passed.insert(sequence);
                *expected = sequence + 1;
            }
            assert_eq!(gated.expected(*partition), Some(*expected));
        }
        let passed: BTreeMap<u64, BTreeSet<u64>> = model.into_iter().map(|(of, (_, _, passed))| (of, passed)).collect();
        assert_eq!(by_partition(&engine), passed);
        assert_eq!(spans(&gated.gaps().unwrap()), gaps);
        assert_eq!(gated.gaps().unwrap(), engine.gaps("in").unwrap());
        let statistics = gated.statistics();
        assert_eq!(statistics.duplicates + statistics.late, duplicates + behind);
        assert!(duplicates > 100 && behind > 5 && gaps.len() > 50, "{duplicates} {behind} {}", gaps.len());
    }
}

/// How one run of the engine ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Dropped,
    Saved,
    PowerCut,
    SyncFailed,
}

#[test]
fn a_source_replayed_after_any_end_loses_nothing_and_duplicates_nothing() {
    let seeds = env_number("CORELANE_GATED_SEEDS", 40);
    let (mut lost, mut found) = (0, 0);
    for seed in 0..seeds {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut storage = FaultyStorage::new();
        let shards = random.random_range(1..=3);
        let config = if seed % 2 == 0 { os_cache(DIR) } else { small(DIR) }.shards(shards);
        let input = Input::new(&mut random, 4, 12);
        for _ in 0..4 {
            let ends = [End::Dropped, End::Saved, End::PowerCut, End::SyncFailed];
            let end = ends[random.random_range(0..ends.len())];
            let stop = random.random_range(0..input.blocks.len() * WINDOW);
            let (held, cut) = live(&storage, &config, &input, end, stop, &mut random);
            if let Some(cut) = cut {
                storage = cut;
                let engine = open_on(&storage, config.clone()).unwrap();
                let left = logs(&engine).iter().map(Vec::len).sum::<usize>();
                (lost, found) = (lost + held - left, found + left);
            } else if matches!(end, End::SyncFailed) {
                storage.heal();
                storage.crash(Unsynced::Random(random.random()));
            }
        }
        let engine = open_on(&storage, config.clone()).unwrap();
        let mut gated = gated(&engine);
        for block in &input.blocks {
            for (partition, sequence) in block {
                let answer = offer(&mut gated, *partition, *sequence);
                assert!(
                    !matches!(answer, Accepted::Late(_)),
                    "seed {seed}: a missing sequence never comes: {answer:?}"
                );
            }
            close_gaps(&mut gated);
        }
        gated.finish().unwrap();
        assert_eq!(by_partition(&engine), input.offered, "seed {seed}");
        assert_eq!(spans(&gated.gaps().unwrap()), input.missing(), "seed {seed}");
    }
    eprintln!("{seeds} seeds: power cuts took {lost} events and left {found}");
    assert!(lost > 1000 && found > 1000, "both happen: {lost} lost, {found} left");
}

/// Runs one engine: offers the input from its beginning up to `stop`. For a power cut, returns the number of events in
/// the log before it and the disk after it.
fn live(
    storage: &FaultyStorage,
    config: &Config,
    input: &Input,
    end: End,
    stop: usize,
    random: &mut SmallRng,
) -> (usize, Option<FaultyStorage>) {
    let engine = open_on(storage, config.clone()).unwrap();
    let mut gated = gated(&engine);
    if matches!(end, End::SyncFailed) {
        storage.fail_sync(random.random_range(1..8));
    }
    let save_at = random.random_range(0..2 * stop + 1);
    let mut offered = 0;
    'offering: for block in &input.blocks {
        for (partition, sequence) in block.iter().copied() {
            if offered == stop {
                break 'offering;
            }
            if offered == save_at && gated.save(soon()).is_err() {
                break 'offering;
            }
            offered += 1;
            match gated.offer(partition, sequence, key(partition, sequence), note(partition, sequence)) {
                Ok(answer) => assert!(!matches!(answer, Accepted::Late(_)), "a missing sequence never comes"),
                Err(refused) => {
                    assert!(matches!(end, End::SyncFailed), "{refused:?}");
                    break 'offering;
                }
            }
        }
        gated.pass_time(2 * HOUR);
        if gated.pump().is_err() {
            break;
        }
    }
    if matches!(end, End::Saved) {
        gated.close(soon()).unwrap();
    } else {
        drop(gated);
    }
    if !matches!(end, End::PowerCut) {
        return (0, None);
    }
    // Every accepted event is appended, but not synced in `OsCache` mode. The power cut happens in this state.
    while engine.shard_metrics().iter().any(|shard| shard.backlog > 0) {
        std::thread::yield_now();
    }
    let held = (0..engine.config().shards()).map(|shard| read_shard(&engine, shard).len()).sum();
    (held, Some(storage.after_crash(Unsynced::Random(random.random()))))
}

/// A short run: sequence 1 never comes, so 2 and 3 wait behind a gap.
fn story(gated: &mut GatedProducer<Note>) -> Result<(), GateError> {
    for sequence in [0, 3, 2] {
        if let Err(refused) = gated.offer(0, sequence, Key::new(1), note(0, sequence)) {
            // `pump` returns the reason.
            refused.into_event();
            return gated.pump().map(drop);
        }
    }
    gated.pass_time(2 * HOUR);
    gated.pump()?;
    gated.save(soon())
}

#[test]
fn a_crash_at_any_operation_leaves_no_event_behind_an_unrecorded_gap() {
    for unsynced in [Unsynced::Lost, Unsynced::Random(7)] {
        let mut outcomes = BTreeSet::new();
        for at in 2..50 {
            let storage = FaultyStorage::new();
            let engine = open_on(&storage, small(DIR)).unwrap();
            let mut gate = gated(&engine);
            // The keeper runs concurrently, so the n-th operation varies; every kind of operation occurs.
            if at % 2 == 0 {
                storage.fail_sync(at / 2)
            } else {
                storage.fail_operation(at / 2)
            }
            let outcome = story(&mut gate);
            drop((gate, engine));
            storage.heal();
            storage.crash(unsynced);

            let engine = open_on(&storage, small(DIR)).unwrap();
            let gaps = engine.gaps("in").unwrap();
            let held: Vec<u64> = logs(&engine)[0].iter().map(|(_, sequence)| *sequence).collect();
            assert!([0, 2, 3].starts_with(&held), "{held:?}");
            assert!(held.len() < 2 || spans(&gaps) == BTreeSet::from([(0, 1)]), "{at}: {held:?} behind {gaps:?}");
            if outcome.is_ok() {
                assert_eq!((held.len(), gaps.len()), (3, 1), "the save succeeded, so all of it is durable");
            }
            outcomes.insert((held.len(), gaps.len()));
            // Replays the source, now with 1: it comes in time unless its gap is recorded.
            let mut gate = gated(&engine);
            let late = gaps.len() == 1;
            for sequence in 0..4 {
                let answer = offer(&mut gate, 0, sequence);
                match (sequence, late) {
                    (1, true) => assert!(matches!(answer, Accepted::Late(_) | Accepted::TooOld(_)), "{answer:?}"),
                    _ => assert!(!matches!(answer, Accepted::Late(_)), "{answer:?}"),
                }
            }
            let whole = if late { vec![0, 2, 3] } else { vec![0, 1, 2, 3] };
            assert_eq!(by_partition(&engine)[&0], BTreeSet::from_iter(whole));
        }
        assert!(outcomes.contains(&(3, 1)), "{outcomes:?}");
        assert!(outcomes.iter().any(|(held, gaps)| *held < 2 && *gaps == 0), "{outcomes:?}");
    }
}

#[test]
fn a_crash_after_a_gap_is_recorded_keeps_the_gap_and_accepts_the_lost_events_again() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache(DIR)).unwrap();
    story_without_save(&mut gated(&engine));
    while engine.shard_metrics()[0].backlog > 0 {
        std::thread::yield_now();
    }
    // In `OsCache` mode the log is not synced, but the gap's record is.
    let cut = storage.after_crash(Unsynced::Lost);
    let engine = open_on(&cut, os_cache(DIR)).unwrap();
    assert_eq!(spans(&engine.gaps("in").unwrap()), BTreeSet::from([(0, 1)]));
    assert_eq!(logs(&engine)[0], []);
    let mut gated = gated(&engine);
    assert!(matches!(offer(&mut gated, 0, 2), Accepted::Buffered), "0 was lost and must come first");
    assert!(matches!(offer(&mut gated, 0, 1), Accepted::Late(_)), "the gap stays closed");
    assert!(matches!(offer(&mut gated, 0, 0), Accepted::Published(_)));
    assert!(matches!(offer(&mut gated, 0, 3), Accepted::Published(_)));
    assert!(matches!(offer(&mut gated, 0, 1), Accepted::Duplicate), "it came a second time");
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0, 2, 3]));
    assert_eq!(gated.gaps().unwrap().len(), 1, "the gap is not recorded twice");
}

fn story_without_save(gated: &mut GatedProducer<Note>) {
    [0, 3, 2].into_iter().for_each(|sequence| drop(offer(gated, 0, sequence)));
    close_gaps(gated);
}

/// A store with two recorded gaps, closed cleanly.
fn with_gaps() -> FaultyStorage {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gated = gated(&engine);
    [0, 2, 5].into_iter().for_each(|sequence| drop(offer(&mut gated, 0, sequence)));
    gated.finish().unwrap();
    gated.close(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    storage
}

/// The same disk with one file changed.
fn changed(storage: &FaultyStorage, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> FaultyStorage {
    let mut files = storage.files();
    change(files.get_mut(&gate_file(name)).unwrap());
    FaultyStorage::with_files(files)
}

fn gate_file(name: &str) -> PathBuf {
    Path::new(DIR).join("gates/in").join(name)
}

#[test]
fn a_torn_gap_record_is_cut_and_the_gate_continues() {
    let storage = with_gaps();
    let whole = storage.files()[&gate_file("gaps")].clone();
    let torn = whole[whole.len() - 48..].to_vec();
    for kept in [1, 8, 47, 48] {
        let storage = changed(&storage, "gaps", |gaps| {
            gaps.extend(&torn[..kept]);
            *gaps.last_mut().unwrap() ^= u8::from(kept == 48);
        });
        let engine = open_on(&storage, small(DIR)).unwrap();
        assert_eq!(engine.gaps("in").unwrap().len(), 2, "a torn record does not count");
        let mut gated = gated(&engine);
        assert!(storage.files()[&gate_file("gaps")] == whole, "the torn record is cut");
        assert!(matches!(offer(&mut gated, 0, 7), Accepted::Buffered));
        gated.finish().unwrap();
        let gaps = spans(&gated.gaps().unwrap());
        assert_eq!(gaps, BTreeSet::from([(0, 1), (0, 3), (0, 4), (0, 6)]));
        assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0, 2, 5, 7]));
    }
}

#[test]
fn damaged_gap_records_are_a_typed_error_and_stay_unchanged() {
    let storage = with_gaps();
    // Bytes of the header and of each of the two entries.
    for at in [0, 8, 13, 16, 30, 63, 64, 80, 111] {
        let storage = changed(&storage, "gaps", |gaps| gaps[at] ^= 4);
        let before = storage.files()[&gate_file("gaps")].clone();
        let engine = open_on(&storage, small(DIR)).unwrap();
        let error = engine.gated("in", policy(), source).expect_err("damaged");
        let GateOpenError::File(OpenError::ForeignFile { path, .. } | OpenError::DamagedFile { path, .. }) = &error
        else {
            panic!("byte {at}: {error}");
        };
        assert_eq!(*path, gate_file("gaps"), "byte {at}");
        assert!(storage.files()[&gate_file("gaps")] == before);
        // The rest of the store works, and so does a gate of another name.
        engine.gated("other", policy(), |_| None).unwrap();
        assert!(matches!(engine.gated("in", policy(), source), Err(GateOpenError::File(_))), "its name is free again");
    }
}

#[test]
fn a_gate_with_missing_or_damaged_positions_rebuilds_them_from_the_log() {
    let storage = with_gaps();
    let changes: [fn(&mut Vec<u8>); 3] =
        [|_| {}, |positions| positions[20] ^= 1, |positions| positions.truncate(positions.len() / 2)];
    for change in changes {
        let storage = changed(&storage, "positions", change);
        let engine = open_on(&storage, small(DIR)).unwrap();
        assert_eq!(gated(&engine).expected(0), Some(6));
    }
    let mut files = storage.files();
    files.remove(&gate_file("positions"));
    let engine = open_on(&FaultyStorage::with_files(files), small(DIR)).unwrap();
    let mut gated = gated(&engine);
    assert_eq!(gated.expected(0), Some(6));
    for sequence in 0..6 {
        let answer = offer(&mut gated, 0, sequence);
        match sequence {
            1 | 3 | 4 => assert!(matches!(answer, Accepted::Late(_)), "{sequence}: {answer:?}"),
            _ => assert!(matches!(answer, Accepted::TooOld(_) | Accepted::Duplicate), "{sequence}: {answer:?}"),
        }
    }
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0, 2, 5]));
}

#[test]
fn positions_ahead_of_the_log_are_ignored() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gate = gated(&engine);
    (0..10).for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
    gate.save(soon()).unwrap();
    // A backup of the store, into which only the positions of later events are copied.
    let backup = storage.after_crash(Unsynced::Lost);
    (10..20).for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
    gate.save(soon()).unwrap();
    let positions = storage.files()[&gate_file("positions")].clone();
    let backup = changed(&backup, "positions", |old| *old = positions);
    let engine = open_on(&backup, small(DIR)).unwrap();
    let mut gated = gated(&engine);
    assert_eq!(gated.expected(0), Some(10));
    (0..20).for_each(|sequence| drop(offer(&mut gated, 0, sequence)));
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from_iter(0..20));
}

#[test]
fn a_full_disk_loses_nothing_and_keeps_the_order() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gated = gated(&engine);
    storage.set_space(Some(0));
    let (mut refused, mut random) = (Vec::new(), SmallRng::seed_from_u64(3));
    let mut input: Vec<u64> = (0..4096).collect();
    input.chunks_mut(WINDOW).for_each(|block| block.shuffle(&mut random));
    for sequence in input {
        let mut event = Note::sized(sequence, 100);
        // The lane may be full only for a moment until the shard stops on the full disk.
        let stuck_at = Instant::now() + Duration::from_millis(if refused.is_empty() { 300 } else { 0 });
        loop {
            match gated.try_offer(0, sequence, Key::new(1), event) {
                Ok(answer) => assert!(!matches!(answer, Accepted::Duplicate | Accepted::Late(_)), "{answer:?}"),
                Err(error) => {
                    assert!(error.is_full(), "{error:?}");
                    event = error.into_event();
                    assert_eq!((event.n, event.text.len()), (sequence, 100), "the event comes back");
                    if Instant::now() < stuck_at {
                        continue;
                    }
                    refused.push(event);
                }
            }
            break;
        }
    }
    assert!(refused.len() > 1000, "the disk was full");
    assert!(matches!(gated.try_pump(), Err(GateError::Publish(RejectedReason::StorageFull))));
    assert_eq!(gated.next_due(), Some(Duration::ZERO));
    storage.set_space(None);
    for event in refused {
        let sequence = event.n;
        let answer = gated.offer(0, sequence, Key::new(1), event).unwrap();
        assert!(matches!(answer, Accepted::Published(_) | Accepted::Buffered), "{answer:?}");
    }
    assert_eq!(gated.next_due().and_then(|due| due.checked_sub(HOUR)), None, "nothing is ready");
    let held: Vec<u64> = logs(&engine)[0].iter().map(|(_, sequence)| *sequence).collect();
    assert!(held.into_iter().eq(0..4096));
}

#[test]
fn a_waiting_event_is_neither_saved_as_published_nor_overtaken() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gate = gated(&engine);
    offer(&mut gate, 0, 0).await_durable();
    // The shard fails; the gate may take one event that then waits in front.
    storage.fail_sync(1);
    let mut offered = 1;
    let refused = loop {
        match gate.offer(0, offered, Key::new(1), note(0, offered)) {
            Ok(Accepted::Published(_) | Accepted::Waiting) => offered += 1,
            Ok(other) => panic!("{other:?}"),
            Err(refused) => break refused,
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    assert!(matches!(&refused, GateRefused::Publish(Rejected::ShardFailed(event, _)) if event.n == offered));
    assert!(matches!(gate.pump(), Err(GateError::Publish(RejectedReason::ShardFailed(_)))));
    assert!(
        matches!(gate.save(soon()), Err(GateError::Wait(_))),
        "positions of events that are not durable are not saved"
    );
    drop((gate, engine));
    storage.crash(Unsynced::Lost);
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gate = gated(&engine);
    (0..offered + 5).for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from_iter(0..offered + 5));
}

trait AwaitDurable {
    fn await_durable(self);
}

impl AwaitDurable for Accepted<Note> {
    fn await_durable(self) {
        let Accepted::Published(receipt) = self else { panic!("{self:?}") };
        receipt.durable().wait().unwrap();
    }
}

#[test]
fn positions_saved_while_an_event_waits_do_not_count_it() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache(DIR)).unwrap();
    let mut gate = gated(&engine);
    storage.set_space(Some(2 * SEGMENT));
    let mut offered = 0;
    while !matches!(gate.try_pump(), Err(GateError::Publish(RejectedReason::StorageFull))) {
        match gate.try_offer(0, offered, Key::new(1), Note::sized(offered, 2000)) {
            Ok(Accepted::Published(_)) => offered += 1,
            Ok(Accepted::Waiting) => {
                offered += 1;
                assert_eq!(gate.next_due(), Some(Duration::ZERO), "it waits until the next call");
            }
            // The lane was full for a moment, or the disk has just filled up.
            Err(refused) => assert!(matches!(refused, GateRefused::Publish(_)), "{refused:?}"),
            Ok(other) => panic!("{other:?}"),
        }
        assert!(offered < 1000);
    }
    // `flush` waits for space; the engine has not accepted the waiting event yet.
    storage.set_space(None);
    gate.save(soon()).unwrap();
    let cut = storage.after_crash(Unsynced::Lost);
    let engine = open_on(&cut, os_cache(DIR)).unwrap();
    let mut gate = gated(&engine);
    assert_eq!(gate.expected(0), Some(offered - 1));
    assert!(matches!(offer(&mut gate, 0, offered - 1), Accepted::Published(_)));
}

#[test]
fn a_gate_reopened_in_the_same_engine_continues_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).shards(2)).unwrap();
    for round in 0..20 {
        let mut gated = gated(&engine);
        assert!(matches!(engine.gated("in", policy(), source), Err(GateOpenError::Taken { name }) if name == "in"));
        assert_eq!(gated.expected(0), (round > 0).then_some(round * 10));
        (0..(round + 1) * 10).for_each(|sequence| drop(offer(&mut gated, 0, sequence)));
    }
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from_iter(0..200));
    for name in ["", ".", "../x", "A", "a/b"] {
        assert!(matches!(engine.gated(name, policy(), source), Err(GateOpenError::Name { .. })), "{name}");
        assert!(matches!(engine.gaps(name), Err(GateOpenError::Name { .. })), "{name}");
    }
    assert_eq!(engine.gaps("never").unwrap(), []);
    let few = policy().partitions_max(1);
    drop(offer(&mut gated(&engine), 1, 0));
    assert!(matches!(engine.gated("in", few, source), Err(GateOpenError::TooManyPartitions { partitions: 2 })));
    let error = engine.gated("in", policy().ahead_max(0), source).expect_err("out of range");
    assert!(matches!(error, GateOpenError::Policy(_)), "{error}");
}

#[test]
fn a_late_event_is_published_only_on_request_and_does_not_move_the_gate() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache(DIR)).unwrap();
    let mut gate = gated(&engine);
    story_without_save(&mut gate);
    let Accepted::Late(late) = offer(&mut gate, 0, 1) else { panic!("its gap is closed") };
    assert_eq!((late.partition, late.sequence, late.event.n), (0, 1, 1));
    gate.publish_late(late).unwrap();
    assert_eq!(gate.expected(0), Some(4));
    assert_eq!(logs(&engine)[0], [(0, 0), (0, 2), (0, 3), (0, 1)], "out of order, as requested");
    drop(gate);
    let mut gate = gated(&engine);
    assert_eq!(gate.expected(0), Some(4));
    assert!(matches!(offer(&mut gate, 0, 1), Accepted::TooOld(_)), "no longer known, and handed back");
    assert!(matches!(offer(&mut gate, 0, 4), Accepted::Published(_)));
    let refused = gate.offer(0, u64::MAX, Key::new(1), note(0, 0)).expect_err("no sequence");
    assert!(matches!(refused, GateRefused::Gate(OfferRefused::TooFarAhead(_))));
    let large = Note::sized(0, 1 << 20);
    let refused = gate.offer(0, 5, Key::new(1), large).expect_err("too large for a segment of this size");
    assert!(matches!(&refused, GateRefused::Publish(Rejected::TooLarge { event, .. }) if event.text.len() == 1 << 20));
    assert_eq!(gate.expected(0), Some(5), "the gate still expects it");
}

#[test]
fn a_partition_that_starts_at_its_first_sequence_keeps_that_start_after_a_restart() {
    let storage = FaultyStorage::new();
    let first_seen = || policy().start(GateStart::FirstSeen);
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gate = engine.gated("in", first_seen(), source).unwrap();
    (100..110).for_each(|sequence| drop(offer(&mut gate, 7, sequence)));
    drop((gate, engine));
    let mut files = storage.files();
    files.remove(&gate_file("positions"));
    for storage in [storage, FaultyStorage::with_files(files)] {
        let engine = open_on(&storage, small(DIR)).unwrap();
        let mut gate = engine.gated("in", first_seen(), source).unwrap();
        assert_eq!(gate.expected(7), Some(110));
        assert!(matches!(offer(&mut gate, 7, 99), Accepted::TooOld(_)));
    }
}

#[test]
fn retention_frees_nothing_that_the_gate_has_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let config = os_cache(dir.path()).retention(Retention::bytes(2 * SEGMENT));
    let fill = |gated: &mut GatedProducer<Note>, from: u64| {
        for sequence in from..from + 400 {
            drop(gated.offer(0, sequence, Key::new(1), Note::sized(sequence, 1000)).unwrap());
        }
    };
    let is_freed = |engine: &EventLog<Note>| {
        let segment = dir.path().join("shard-0000/000000000000.seg");
        (0..50).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            engine.checkpoint(soon()).unwrap();
            !segment.exists()
        })
    };
    let engine = EventLog::<Note>::open(config.clone()).unwrap();
    let mut gate = gated(&engine);
    fill(&mut gate, 0);
    assert!(!is_freed(&engine), "the gate has not saved its positions");
    drop((gate, engine));
    // The same while the gate is not open.
    let engine = EventLog::<Note>::open(config.clone()).unwrap();
    assert!(!is_freed(&engine));
    let mut gate = gated(&engine);
    assert_eq!(gate.expected(0), Some(400));
    fill(&mut gate, 400);
    gate.save(soon()).unwrap();
    assert!(is_freed(&engine), "now the gate has saved its positions");
    drop((gate, engine));
    // The log has lost its beginning. With its positions the gate is exact; without them it expects nothing older.
    let engine = EventLog::<Note>::open(config.clone()).unwrap();
    assert_eq!(gated(&engine).expected(0), Some(800));
    drop(engine);
    std::fs::remove_file(dir.path().join("gates/in/positions")).unwrap();
    let engine = EventLog::<Note>::open(config).unwrap();
    let mut gate = gated(&engine);
    assert_eq!(gate.expected(0), Some(800));
    assert!(matches!(offer(&mut gate, 0, 3), Accepted::TooOld(_)), "handed back, because it may be new");
    assert_eq!(engine.reader(ShardId(0)).next().unwrap().unwrap().event.text.len(), 1000);
}

#[test]
fn a_gate_can_be_closed_after_its_engine_has_shut_down() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache(DIR).shards(2)).unwrap();
    let mut gate = gated(&engine);
    (0..50).for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
    engine.shutdown(soon()).unwrap();
    let refused = gate.offer(0, 50, Key::new(1), note(0, 50));
    assert!(matches!(refused, Ok(Accepted::Waiting)), "it is the next one, and waits");
    assert!(matches!(gate.pump(), Err(GateError::Publish(RejectedReason::Closed))));
    drop(engine);
    assert!(
        matches!(open_on(&storage, os_cache(DIR).shards(2)), Err(OpenError::Locked { .. })),
        "the gate still holds the store"
    );
    gate.close(soon()).unwrap();
    let engine = open_on(&storage, os_cache(DIR).shards(2)).unwrap();
    assert_eq!(gated(&engine).expected(0), Some(50));
}

#[test]
fn no_event_is_published_behind_a_gap_whose_record_failed() {
    let failed = |_| {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small(DIR)).unwrap();
        let mut gate = gated(&engine);
        [0, 2, 3].into_iter().for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
        engine.flush(soon()).unwrap();
        gate.pass_time(2 * HOUR);
        std::thread::sleep(Duration::from_millis(50));
        storage.fail_sync(1);
        let pumped = gate.pump();
        storage.heal();
        // Otherwise another thread's sync failed.
        matches!(pumped, Err(GateError::GapRecord { .. })).then_some((storage, engine, gate))
    };
    let (storage, engine, mut gate) = (0..100).find_map(failed).unwrap();
    for _ in 0..3 {
        assert!(matches!(gate.pump(), Err(GateError::GapRecord { .. })), "the failure is final");
        assert!(gate.offer(0, 4, Key::new(1), note(0, 4)).is_err());
    }
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0]));
    // The record that the failed sync left behind is made durable before an event is published after it.
    drop(gate);
    let mut gate = gated(&engine);
    assert_eq!(spans(&gate.gaps().unwrap()), BTreeSet::from([(0, 1)]));
    for sequence in [2, 3] {
        let Accepted::Published(receipt) = offer(&mut gate, 0, sequence) else { panic!("nothing is missing") };
        receipt.durable().wait().unwrap();
    }
    let engine = open_on(&storage.after_crash(Unsynced::Lost), small(DIR)).unwrap();
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0, 2, 3]));
    assert_eq!(spans(&engine.gaps("in").unwrap()), BTreeSet::from([(0, 1)]));
}

#[test]
fn retention_frees_nothing_for_positions_that_could_not_be_saved() {
    let refused = |_| {
        let storage = FaultyStorage::new();
        let config = os_cache(DIR).retention(Retention::bytes(2 * SEGMENT));
        let engine = open_on(&storage, config).unwrap();
        let mut gate = gated(&engine);
        for sequence in 0..400 {
            drop(gate.offer(0, sequence, Key::new(1), Note::sized(sequence, 1000)).unwrap());
        }
        engine.checkpoint(soon()).unwrap();
        engine.flush(soon()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        storage.refuse_files(true);
        let saved = gate.save(soon());
        storage.refuse_files(false);
        // Otherwise the keeper was refused a file too.
        let is_alone = matches!(saved, Err(GateError::Positions(_))) && engine.failures().is_empty();
        is_alone.then_some((engine, gate))
    };
    let (engine, mut gate) = (0..100).find_map(refused).unwrap();
    engine.checkpoint(soon()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(engine.shard_metrics()[0].segments_freed, 0);
    gate.save(soon()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while engine.shard_metrics()[0].segments_freed == 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Keys of shard 0 and shard 1, of two.
fn keys_of_two_shards() -> [Key; 2] {
    [0, 1].map(|shard| (0..).map(Key).find(|key| key.shard(2) == ShardId(shard)).unwrap())
}

fn first_seen() -> GatePolicy {
    policy().start(GateStart::FirstSeen)
}

#[test]
fn a_late_event_in_another_shard_does_not_move_a_partition_back() {
    let [k0, k1] = keys_of_two_shards();
    for (late_in, first_in) in [(k0, k1), (k1, k0)] {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small(DIR).shards(2)).unwrap();
        let mut gate = engine.gated("in", first_seen(), source).unwrap();
        for sequence in [10, 11] {
            assert!(matches!(gate.offer(7, sequence, first_in, note(7, sequence)), Ok(Accepted::Published(_))));
        }
        let Ok(Accepted::TooOld(late)) = gate.offer(7, 5, late_in, note(7, 5)) else { panic!("below the start") };
        gate.publish_late(late).unwrap();
        assert_eq!(gate.expected(7), Some(12));
        engine.flush(soon()).unwrap();
        drop((gate, engine));
        let mut files = storage.files();
        files.remove(&gate_file("positions"));
        for storage in [storage, FaultyStorage::with_files(files)] {
            let engine = open_on(&storage, small(DIR).shards(2)).unwrap();
            let mut gate = engine.gated("in", first_seen(), source).unwrap();
            assert_eq!(gate.expected(7), Some(12));
            assert!(matches!(gate.offer(7, 6, first_in, note(7, 6)), Ok(Accepted::TooOld(_))));
            assert!(matches!(gate.offer(7, 12, first_in, note(7, 12)), Ok(Accepted::Published(_))));
        }
    }
}

/// A store whose gate has closed nine gaps.
fn nine_gaps() -> FaultyStorage {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gate = gated(&engine);
    (0..20).step_by(2).for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
    close_gaps(&mut gate);
    assert_eq!(gate.gaps().unwrap().len(), 9);
    engine.flush(soon()).unwrap();
    drop((gate, engine));
    storage
}

#[test]
fn a_cut_or_removed_gap_record_is_reported_as_damage_and_the_folder_stays_unchanged() {
    let storage = nine_gaps();
    let entries = |count: usize| 24 + count * 48;
    type Change = (&'static str, Box<dyn Fn(&mut BTreeMap<PathBuf, Vec<u8>>)>);
    let file = |name: &'static str, change: fn(&mut Vec<u8>, usize), count: usize| -> Change {
        (name, Box::new(move |files| change(files.get_mut(&gate_file(name)).unwrap(), entries(count))))
    };
    let mut changes: Vec<Change> =
        (0..9).map(|count| file("gaps", |gaps, bytes| gaps.truncate(bytes), count)).collect();
    changes.extend((0..9).map(|count| file("gaps", |gaps, bytes| gaps.truncate(bytes + 20), count)));
    changes.extend((0..9).map(|count| file("gaps", |gaps, bytes| gaps[bytes + 9] ^= 1, count)));
    changes.push(file("gaps", |gaps, _| drop(gaps.drain(24..72)), 0));
    changes.push(("gaps", Box::new(|files| drop(files.remove(&gate_file("gaps"))))));
    changes.push((
        "gaps",
        Box::new(|files| files.retain(|path, _| *path != gate_file("gaps") && *path != gate_file("witness"))),
    ));
    changes.push(("witness", Box::new(|files| drop(files.remove(&gate_file("witness"))))));
    for (i, (name, change)) in changes.iter().enumerate() {
        for has_positions in [true, false] {
            let mut files = storage.files();
            change(&mut files);
            if !has_positions {
                files.remove(&gate_file("positions"));
            }
            // Removing all files of a gate is how an operator gives it up.
            if files.keys().all(|path| path.parent() != gate_file("gaps").parent()) {
                continue;
            }
            let before: Vec<_> = files.iter().filter(|(path, _)| path.starts_with("/store/gates")).collect();
            let storage = FaultyStorage::with_files(files.clone());
            let engine = open_on(&storage, small(DIR)).unwrap();
            for error in [engine.gated("in", policy(), source).expect_err("lost"), engine.gaps("in").expect_err("lost")]
            {
                let GateOpenError::File(OpenError::DamagedFile { path, .. }) = &error else { panic!("{i}: {error}") };
                assert_eq!(*path, gate_file(name), "{i}");
            }
            let after = storage.files();
            let after: Vec<_> = after.iter().filter(|(path, _)| path.starts_with("/store/gates")).collect();
            assert!(before == after, "{i}: the folder is unchanged");
        }
    }
    // A witness that lags behind, as after a power cut, is completed, and the gate continues.
    for cut in 24..=24 + 9 * 8 {
        let storage = changed(&storage, "witness", |witness| witness.truncate(cut));
        let engine = open_on(&storage, small(DIR)).unwrap();
        let mut gate = gated(&engine);
        assert_eq!(gate.gaps().unwrap().len(), 9);
        drop(offer(&mut gate, 0, 21));
        close_gaps(&mut gate);
        assert_eq!(storage.files()[&gate_file("witness")].len(), 24 + 10 * 8);
        drop(gate);
        assert_eq!(gated(&engine).gaps().unwrap().len(), 10);
    }
}

#[test]
fn gap_records_removed_under_a_running_gate_are_a_typed_error_at_the_next_gap() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 6] = [
        ("gaps", |dir| std::fs::remove_file(dir.join("gaps")).unwrap()),
        ("gaps", |dir| std::fs::write(dir.join("gaps"), b"").unwrap()),
        ("gaps", |dir| {
            let gaps = std::fs::read(dir.join("gaps")).unwrap();
            std::fs::write(dir.join("gaps"), &gaps[..24]).unwrap();
        }),
        ("gaps", |dir| std::fs::write(dir.join("gaps"), vec![7; 4096]).unwrap()),
        ("witness", |dir| std::fs::remove_file(dir.join("witness")).unwrap()),
        ("gaps", |dir| std::fs::remove_dir_all(dir).unwrap()),
    ];
    for (i, (name, change)) in changes.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(os_cache(dir.path())).unwrap();
        let mut gate = gated(&engine);
        [0, 2].into_iter().for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
        close_gaps(&mut gate);
        let folder = dir.path().join("gates/in");
        change(&folder);
        let before =
            crate::common::tree(dir.path()).into_keys().filter(|path| path.starts_with(&folder)).collect::<Vec<_>>();
        drop(offer(&mut gate, 0, 4));
        gate.pass_time(2 * HOUR);
        for _ in 0..2 {
            let Err(GateError::GapRecord { path, .. }) = gate.pump() else { panic!("{i}: the gap was recorded") };
            assert!(path.ends_with(name), "{i}: {}", path.display());
        }
        let after =
            crate::common::tree(dir.path()).into_keys().filter(|path| path.starts_with(&folder)).collect::<Vec<_>>();
        assert_eq!(before, after, "{i}: no file is created in its place");
        assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0, 2]), "{i}: nothing is published behind it");
    }
}

#[test]
fn a_gap_waits_while_the_disk_is_full_and_is_recorded_when_space_returns() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gate = gated(&engine);
    [0, 2, 4].into_iter().for_each(|sequence| drop(offer(&mut gate, 0, sequence)));
    engine.flush(soon()).unwrap();
    storage.refuse_files(true);
    gate.pass_time(2 * HOUR);
    for pumped in [gate.pump(), gate.try_pump(), gate.pump()] {
        assert!(matches!(pumped, Err(GateError::Publish(RejectedReason::StorageFull))), "{pumped:?}");
    }
    let refused = gate.offer(0, 1, Key::new(1), note(0, 1)).expect_err("nothing overtakes the gap");
    assert!(refused.is_full(), "{refused:?}");
    assert_eq!(refused.into_event().n, 1);
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0]));
    assert_eq!(gate.gaps().unwrap(), []);
    assert!(matches!(gate.save(soon()), Err(GateError::Positions(OpenError::Io { .. }))));
    // A kill at this point leaves a torn entry.
    let torn = FaultyStorage::with_files(storage.files());
    assert_eq!(torn.files()[&gate_file("gaps")].len(), 24 + 24, "half of the entry was written");
    let after_kill = open_on(&torn, small(DIR)).unwrap();
    assert_eq!(gated(&after_kill).gaps().unwrap(), []);
    assert_eq!(gated(&after_kill).expected(0), Some(1));

    storage.refuse_files(false);
    assert_eq!(gate.pump().unwrap(), 4, "two gaps and the event behind each");
    gate.save(soon()).unwrap();
    drop((gate, engine));
    let engine = open_on(&storage.after_crash(Unsynced::Lost), small(DIR)).unwrap();
    let gate = gated(&engine);
    assert_eq!((gate.expected(0), spans(&gate.gaps().unwrap())), (Some(5), BTreeSet::from([(0, 1), (0, 3)])));
    assert_eq!(by_partition(&engine)[&0], BTreeSet::from([0, 2, 4]));
}

#[test]
fn a_full_disk_refuses_a_new_partition_and_hands_its_first_event_back() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    let mut gate = engine.gated("in", first_seen(), source).unwrap();
    drop(offer(&mut gate, 0, 5));
    // Creates the segment, because its span is a file too.
    engine.flush(soon()).unwrap();
    storage.refuse_files(true);
    let refused = gate.offer(1, 7, Key::new(1), note(1, 7)).expect_err("its start cannot be recorded");
    assert!(refused.is_full(), "{refused:?}");
    assert_eq!((refused.into_event().n, gate.expected(1)), (1 << 32 | 7, None));
    assert!(
        matches!(gate.offer(0, 6, Key::new(1), note(0, 6)), Ok(Accepted::Published(_))),
        "another partition continues"
    );
    // The positions are a cache, so a gate can be opened without them.
    drop(gate);
    let mut gate = engine.gated("in", first_seen(), source).unwrap();
    assert_eq!(gate.expected(0), Some(7));
    storage.refuse_files(false);
    assert!(matches!(gate.offer(1, 9, Key::new(1), note(1, 9)), Ok(Accepted::Published(_))));
    assert!(
        matches!(gate.offer(1, 7, Key::new(1), note(1, 7)), Ok(Accepted::TooOld(_))),
        "it starts at the first accepted sequence"
    );
}

/// A partition as plain sets. Every sequence from `start` up to `expected` is in `log` or in `gaps`.
#[derive(Debug, Default)]
struct Plain {
    start: Option<u64>,
    expected: u64,
    log: BTreeSet<u64>,
    gaps: BTreeSet<u64>,
    early: BTreeSet<u64>,
    /// Reported as late in this run.
    late: BTreeSet<u64>,
}

impl Plain {
    fn settle(&mut self, closes_gaps: bool) {
        loop {
            let next = self.expected;
            if self.early.remove(&next) {
                self.log.insert(next);
            } else if !self.log.contains(&next) && !self.gaps.contains(&next) {
                if !closes_gaps || self.early.is_empty() {
                    break;
                }
                self.gaps.insert(next);
            }
            self.expected += 1;
        }
    }

    fn restart(&mut self, log: Option<&BTreeSet<u64>>) {
        (self.log, self.early, self.late) = (log.cloned().unwrap_or_default(), BTreeSet::new(), BTreeSet::new());
        self.expected = self.start.unwrap_or_default();
        self.settle(false);
    }
}

/// Offers one event, and compares the answer with the plain sets.
fn offer_and_compare(gate: &mut GatedProducer<Note>, plain: &mut Plain, at: (u64, u64), key: Key, takes_late: bool) {
    let (partition, sequence) = at;
    match gate.offer(partition, sequence, key, note(partition, sequence)).unwrap() {
        Accepted::Published(_) => {
            let start = *plain.start.get_or_insert(sequence);
            plain.expected = plain.expected.max(start);
            assert_eq!(sequence, plain.expected, "{at:?} {plain:?}");
            plain.early.insert(sequence);
        }
        Accepted::Buffered => {
            let is_new = plain.early.insert(sequence) && !plain.log.contains(&sequence);
            assert!(is_new && sequence > plain.expected && !plain.gaps.contains(&sequence), "{at:?} {plain:?}");
        }
        Accepted::Duplicate => {
            let is_known = plain.log.contains(&sequence) || plain.early.contains(&sequence);
            assert!(is_known || plain.late.contains(&sequence), "{at:?} {plain:?}");
        }
        Accepted::Late(late) | Accepted::TooOld(late) => {
            assert!(sequence < plain.expected || plain.gaps.contains(&sequence), "{at:?} {plain:?}");
            plain.late.insert(sequence);
            if takes_late && plain.log.insert(sequence) {
                drop(gate.publish_late(late).unwrap());
            }
        }
        Accepted::Waiting => panic!("the lane has room"),
    }
    plain.settle(false);
    assert_eq!(gate.expected(partition), Some(plain.expected), "{at:?} {plain:?}");
}

#[test]
fn after_any_restart_a_gate_agrees_with_plain_sets() {
    const PARTITIONS: u64 = 3;
    let (mut lates, mut cuts) = (0, 0);
    for seed in 0..env_number("CORELANE_GATED_SEEDS", 10) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut storage = FaultyStorage::new();
        let config = if seed % 2 == 0 { os_cache(DIR) } else { small(DIR) }.shards(random.random_range(1..=3));
        let start = if seed % 3 == 0 { GateStart::At(20) } else { GateStart::FirstSeen };
        let mut plains: BTreeMap<u64, Plain> = (0..PARTITIONS).map(|of| (of, Plain::default())).collect();
        if let GateStart::At(first) = start {
            plains.values_mut().for_each(|plain| (plain.start, plain.expected) = (Some(first), first));
        }
        for life in 0..6 {
            let engine = open_on(&storage, config.clone()).unwrap();
            let mut gate = engine.gated("in", policy().start(start), source).unwrap();
            for (partition, plain) in &plains {
                let is_known = start == GateStart::FirstSeen || !plain.log.is_empty() || !plain.gaps.is_empty();
                let expected = plain.start.filter(|_| is_known).map(|_| plain.expected);
                assert_eq!(gate.expected(*partition), expected, "seed {seed}, life {life}: {plain:?}");
            }
            let gaps: BTreeSet<(u64, u64)> =
                plains.iter().flat_map(|(of, plain)| plain.gaps.iter().map(|gap| (*of, *gap))).collect();
            assert_eq!(spans(&gate.gaps().unwrap()), gaps, "seed {seed}, life {life}");
            for _ in 0..random.random_range(0..80) {
                let partition = random.random_range(0..PARTITIONS);
                let plain = plains.get_mut(&partition).unwrap();
                let base = if plain.start.is_some() { plain.expected } else { 20 };
                let sequence = match random.random_range(0..10) {
                    0..5 => base,
                    5..8 => base + random.random_range(0..6),
                    _ => random.random_range(0..=base),
                };
                let key = Key::new(random.random_range(0..7));
                let before = plain.late.len();
                offer_and_compare(&mut gate, plain, (partition, sequence), key, random.random_bool(0.5));
                lates += plain.late.len() - before;
                if random.random_bool(0.05) {
                    close_gaps(&mut gate);
                    plains.values_mut().for_each(|plain| plain.settle(true));
                }
                if random.random_bool(0.02) {
                    gate.save(soon()).unwrap();
                }
            }
            let mut is_cut = false;
            let mut disk = match random.random_range(0..4) {
                0 => {
                    gate.close(soon()).unwrap();
                    engine.shutdown(soon()).unwrap();
                    None
                }
                1 => {
                    drop(gate);
                    engine.flush(soon()).unwrap();
                    None
                }
                how => {
                    while engine.shard_metrics().iter().any(|shard| shard.backlog > 0) {
                        std::thread::yield_now();
                    }
                    is_cut = how == 2;
                    let seed = random.random();
                    let kill = || FaultyStorage::with_files(storage.files());
                    Some(if is_cut { storage.after_crash(Unsynced::Random(seed)) } else { kill() })
                }
            };
            drop(engine);
            if random.random_bool(0.5) {
                let mut files = disk.as_ref().unwrap_or(&storage).files();
                files.remove(&gate_file("positions"));
                disk = Some(FaultyStorage::with_files(files));
            }
            storage = disk.unwrap_or(storage);
            // Restarts the oracle from the log, which only a power cut may have changed.
            let held = held_by_partition(&open_on(&storage, config.clone()).unwrap());
            for (partition, plain) in &mut plains {
                let held = held.get(partition);
                if !is_cut {
                    assert_eq!(held.unwrap_or(&BTreeSet::new()), &plain.log, "seed {seed}, life {life}");
                }
                cuts += plain.log.len() - held.map_or(0, BTreeSet::len);
                plain.restart(held);
            }
        }
    }
    assert!(lates > 100 && cuts > 30, "both happen: {lates} late, {cuts} cut");
}

/// The sequences of each partition in the logs. Checks that each occurs once.
fn held_by_partition(engine: &EventLog<Note>) -> BTreeMap<u64, BTreeSet<u64>> {
    let mut all: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for (partition, sequence) in logs(engine).into_iter().flatten() {
        assert!(all.entry(partition).or_default().insert(sequence), "{sequence} of partition {partition} twice");
    }
    all
}
