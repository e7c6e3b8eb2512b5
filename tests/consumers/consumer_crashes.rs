//! The machine stops at every operation and sync of a scripted consumer run: between effects, saved positions, dead
//! letters and their outcomes. After the restart no event is missed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Note, open_on, os_cache, read_shard, small, soon};
use corelane::consumer::{ConsumerError, HealthPolicy, Judgement, LetterSelector, Poller, QueuePolicy};
use corelane::event::EventId;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{EventLog, Key, Offset, ShardId};

/// The key whose events become letters, and the key whose event is skipped.
const PARKED: u64 = 1;
const SKIPPED: u64 = 2;

fn poller(
    engine: &EventLog<Note>,
    now_ms: &Arc<AtomicU64>,
    before_durable: bool,
) -> Result<Poller<Note>, ConsumerError> {
    let builder = engine.consumer("c").concurrency(2).save_every(Duration::from_millis(50));
    let builder = builder.health(HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100));
    let builder = builder.queues(QueuePolicy::default()).judge(|error, _| match error.to_string().as_str() {
        "park" => Judgement::Park,
        "skip" => Judgement::Skip,
        _ => Judgement::RetryIn(Duration::from_millis(10)),
    });
    let builder = if before_durable { builder.before_durable() } else { builder };
    let clock = Arc::clone(now_ms);
    let poller = builder.poller()?;
    Ok(poller.clock(move || Duration::from_millis(clock.load(Ordering::SeqCst))))
}

/// Data outside the machine, which survives a crash: the effects, and the requests to the consumer.
#[derive(Default)]
struct Outside {
    /// In order.
    effects: Vec<(u64, u64)>,
    published: BTreeMap<u64, u64>,
    durable: BTreeSet<u64>,
    to_park: BTreeSet<u64>,
    skipped: BTreeSet<u64>,
    reprocessed: BTreeSet<u64>,
    discarded: BTreeSet<u64>,
    /// Handled before a durable save of the position.
    saved: BTreeSet<u64>,
    next: u64,
    now_ms: Arc<AtomicU64>,
}

/// The machine stops.
#[derive(Debug)]
struct Stops;

impl Outside {
    fn publish(&mut self, engine: &EventLog<Note>, keys: &[u64]) -> Result<(), Stops> {
        let mut producer = engine.producer();
        for &key in keys {
            let n = self.next;
            self.next += 1;
            self.published.insert(n, key);
            let deadline = Instant::now() + Duration::from_millis(500);
            producer.publish_until(Key(key), Note::sized(n, 40 * n as usize % 700), deadline).map_err(|_| Stops)?;
        }
        engine.flush(Some(Instant::now() + Duration::from_secs(2))).map_err(|_| Stops)?;
        self.durable.extend(self.published.keys().copied());
        Ok(())
    }

    /// Handles every delivery; events fail as `fails` decides.
    fn take(
        &mut self,
        poller: &mut Poller<Note>,
        fails: impl Fn(u64, u64) -> Option<&'static str>,
    ) -> Result<(), Stops> {
        for _ in 0..6 {
            self.now_ms.fetch_add(20, Ordering::SeqCst);
            while let Some(delivery) = poller.next().map_err(|_| Stops)? {
                let (event, meta) = poller.event(&delivery).ok_or(Stops)?;
                let (n, key) = (event.n.to_native(), meta.key.0);
                match fails(key, n) {
                    None => {
                        self.effects.push((key, n));
                        poller.succeeded(delivery).map_err(|_| Stops)?;
                    }
                    Some(how) => {
                        match how {
                            "park" => drop(self.to_park.insert(n)),
                            "skip" => drop(self.skipped.insert(n)),
                            _ => {}
                        }
                        poller.failed(delivery, how).map_err(|_| Stops)?;
                    }
                }
            }
            // The next events of a key wait for a record, which waits for a sync.
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn save(&mut self, poller: &mut Poller<Note>) -> Result<(), Stops> {
        poller.save().map_err(|_| Stops)?;
        self.saved.extend(self.effects.iter().map(|(_, n)| *n));
        Ok(())
    }

    /// The run that the fault interrupts.
    fn script(&mut self, engine: &EventLog<Note>, before_durable: bool) -> Result<(), Stops> {
        let clock = Arc::clone(&self.now_ms);
        let mut poller = poller(engine, &clock, before_durable).map_err(|_| Stops)?;
        self.publish(engine, &[1, 2, 3, 1, 2, 3, 1, 4])?;
        // The second event of key 1 is parked, that of key 2 is skipped, and that of key 3 is retried.
        self.take(&mut poller, |_, n| match n {
            3 => Some("park"),
            4 => Some("skip"),
            5 => Some("retry"),
            _ => None,
        })?;
        self.save(&mut poller)?;
        self.publish(engine, &[1, 1, 2, 3, 5])?;
        self.take(&mut poller, |_, n| (n == 12).then_some("park"))?;
        self.reprocess(&mut poller, |n| n == 6)?;
        self.save(&mut poller)?;
        self.publish(engine, &[1, 5, 4])?;
        self.take(&mut poller, |_, _| None)?;
        self.discarded
            .extend(Self::letters(&poller, &self.ids(engine)).into_iter().filter(|n| self.published[n] == PARKED));
        poller.discard(LetterSelector::Of(Key(PARKED))).map_err(|_| Stops)?;
        self.publish(engine, &[1, 2])?;
        self.take(&mut poller, |_, _| None)?;
        Ok(())
    }

    /// Reprocesses the letters of key 1 until one fails.
    fn reprocess(&mut self, poller: &mut Poller<Note>, fails: impl Fn(u64) -> bool) -> Result<(), Stops> {
        poller.reprocess(LetterSelector::Of(Key(PARKED)));
        while let Some(delivery) = poller.next().map_err(|_| Stops)? {
            let (event, meta) = poller.event(&delivery).ok_or(Stops)?;
            let (n, key) = (event.n.to_native(), meta.key.0);
            if fails(n) {
                poller.failed(delivery, "again").map_err(|_| Stops)?;
            } else {
                self.effects.push((key, n));
                self.reprocessed.insert(n);
                poller.succeeded(delivery).map_err(|_| Stops)?;
            }
        }
        Ok(())
    }

    fn ids(&self, engine: &EventLog<Note>) -> BTreeMap<EventId, u64> {
        let id = |held: &crate::common::LoggedNote| EventId { shard: ShardId(0), offset: Offset(held.offset) };
        read_shard(engine, 0).iter().map(|held| (id(held), held.n)).collect()
    }

    fn letters(poller: &Poller<Note>, ids: &BTreeMap<EventId, u64>) -> BTreeSet<u64> {
        let letters = poller.dead_letters(None, 1000).unwrap();
        let number = |id| *ids.get(&id).unwrap_or_else(|| panic!("a letter of no event: {id}"));
        letters.iter().map(|letter| number(letter.id)).collect()
    }

    /// The run after the crash, in which everything works.
    fn continue_after(mut self, storage: &FaultyStorage, before_durable: bool, what: &str) {
        let engine = open_on(storage, small("/s")).unwrap();
        let ids = self.ids(&engine);
        let alive: BTreeSet<u64> = ids.values().copied().collect();
        assert!(alive.is_superset(&self.durable), "{what}: durable events are lost");
        let handled: BTreeSet<u64> = self.effects.iter().map(|(_, n)| *n).collect();
        let clock = Arc::clone(&self.now_ms);
        let mut poller = poller(&engine, &clock, before_durable).unwrap();
        let letters = Self::letters(&poller, &ids);

        let position = poller.report().positions[0];
        for (id, n) in ids.iter().filter(|(id, _)| id.offset < position) {
            let is_recorded = letters.contains(n) || self.skipped.contains(n) || self.discarded.contains(n);
            assert!(handled.contains(n) || is_recorded, "{what}: the position is after the unfinished {n} at {id}");
        }
        for n in letters.intersection(&handled) {
            assert!(self.reprocessed.contains(n), "{what}: {n} was handled, and is a letter");
            assert!(Some(n) == self.reprocessed.last(), "{what}: {n} was handled, and its letter still waits");
        }
        let parked: BTreeSet<u64> = letters.iter().map(|n| self.published[n]).collect();
        let skips = poller.report().letters.skipped;

        // Events of parked keys must not come.
        let mut again = Vec::new();
        let before = self.effects.len();
        self.take(&mut poller, |_, _| None).unwrap();
        for (key, n) in &self.effects[before..] {
            assert!(!parked.contains(key), "{what}: {n} is handled although its key is parked");
            assert!(!self.saved.contains(n), "{what}: {n} was handled and saved, and is handled again");
            again.push(*n);
        }
        let was_skipped = self.skipped.iter().filter(|n| alive.contains(n) && !again.contains(n)).count();
        assert_eq!(was_skipped as u64, skips, "{what}: an event is skipped if and only if the skip is recorded");

        self.publish(&engine, &[1, 2, 3, 4, 5]).unwrap();
        let end = soon().unwrap();
        while poller.report().waiting() > 0 || poller.report().letters.letters > 0 {
            assert!(Instant::now() < end, "{what}: {:?}", poller.report());
            poller.reprocess(LetterSelector::All);
            self.take(&mut poller, |_, _| None).unwrap();
        }
        let handled: BTreeSet<u64> = self.effects.iter().map(|(_, n)| *n).collect();
        for n in self.ids(&engine).values() {
            let is_recorded = self.skipped.contains(n) || self.discarded.contains(n);
            assert!(handled.contains(n) || is_recorded, "{what}: {n} is neither handled nor recorded");
        }
        self.check_order(what);
        let counts = poller.report().letters;
        assert_eq!(counts.parked, counts.handled + counts.discarded, "{what}: every letter ended");
    }

    /// Checks that every key's events were first handled in publish order.
    fn check_order(&self, what: &str) {
        let mut first: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (key, n) in &self.effects {
            let of = first.entry(*key).or_default();
            if !of.contains(n) {
                of.push(*n);
            }
        }
        for (key, of) in first {
            assert!(of.is_sorted(), "{what}: key {key} was handled in the order {of:?}");
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Everything stops at this operation.
    Gone(u64),
    Operation(u64),
    Sync(u64),
}

impl Fault {
    fn set(self, storage: &FaultyStorage) {
        match self {
            Self::Gone(n) => storage.be_gone(n),
            Self::Operation(n) => storage.fail_operation(n),
            Self::Sync(n) => storage.fail_sync(n),
        }
    }
}

/// Runs the script with a fault, cuts the power, and continues. Returns `true` if the script reached its end.
fn run(fault: Fault, unsynced: Unsynced, before_durable: bool, opening_stops_at: Option<u64>) -> bool {
    let what = format!("{fault:?}, {unsynced:?}, before durable: {before_durable}, opening {opening_stops_at:?}");
    let storage = FaultyStorage::new();
    let mut outside = Outside::default();
    let ran = {
        let engine = open_on(&storage, small("/s")).unwrap();
        // Creates the first segment.
        outside.publish(&engine, &[]).unwrap();
        let mut producer = engine.producer();
        producer.publish(Key(9), Note::new(1000)).unwrap();
        outside.published.insert(1000, 9);
        engine.flush(soon()).unwrap();
        fault.set(&storage);
        let ran = outside.script(&engine, before_durable);
        if !matches!(fault, Fault::Gone(_)) {
            // The cut comes when the script ends, before the shutdown syncs.
            let cut = storage.after_crash(unsynced);
            drop((producer, engine));
            return ended(outside, &cut, before_durable, ran.is_ok(), &what);
        }
        ran
    };
    storage.crash(unsynced);
    if let Some(n) = opening_stops_at {
        storage.be_gone(n);
        drop(open_on(&storage, small("/s")).map(|engine| poller(&engine, &Arc::default(), before_durable).is_ok()));
        storage.crash(unsynced);
    }
    ended(outside, &storage, before_durable, ran.is_ok(), &what)
}

fn ended(outside: Outside, storage: &FaultyStorage, before_durable: bool, ran: bool, what: &str) -> bool {
    outside.continue_after(storage, before_durable, what);
    ran
}

/// Tries every fault of a kind until the script runs through three times in a row.
fn all(kind: fn(u64) -> Fault, opening: bool) {
    let (mut n, mut in_a_row) = (0, 0);
    while in_a_row < 3 {
        n += 1;
        let stops_at = opening.then_some(1 + n % 23);
        let unsynced = if n % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(n) };
        let ran = run(kind(n), unsynced, n % 4 < 2, stops_at);
        let other = if n % 2 == 1 { Unsynced::Lost } else { Unsynced::Random(n) };
        let ran = run(kind(n), other, n % 4 >= 2, stops_at) && ran;
        in_a_row = if ran { in_a_row + 1 } else { 0 };
        assert!(n < 500, "the script never runs through");
    }
    assert!(n > 20, "only {n} faults were tried");
}

#[test]
fn a_machine_that_stops_at_any_operation_misses_no_event() {
    all(Fault::Gone, false);
}

#[test]
fn a_machine_that_stops_again_during_opening_misses_no_event() {
    all(Fault::Gone, true);
}

#[test]
fn a_machine_that_stops_after_a_failed_operation_misses_no_event() {
    for n in 1..60 {
        run(Fault::Operation(n), if n % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(n) }, n % 4 < 2, None);
    }
}

#[test]
fn a_machine_that_stops_after_a_failed_sync_misses_no_event() {
    for n in 1..40 {
        run(Fault::Sync(n), if n % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(n) }, n % 4 < 2, None);
    }
}

/// Handles every delivery. Returns the numbers in order.
fn take_all(poller: &mut Poller<Note>, now_ms: &AtomicU64) -> Vec<u64> {
    let mut taken = Vec::new();
    let end = soon().unwrap();
    loop {
        now_ms.fetch_add(10, Ordering::SeqCst);
        while let Some(delivery) = poller.next().unwrap() {
            taken.push(poller.event(&delivery).unwrap().0.n.to_native());
            poller.succeeded(delivery).unwrap();
        }
        if poller.report().waiting() == 0 {
            return taken;
        }
        assert!(Instant::now() < end, "{:?}", poller.report());
    }
}

#[test]
fn events_that_the_log_lost_are_removed_from_the_position_and_their_replacements_are_handled() {
    // The first `durable` events are durable and the rest is lost. Some are in flight when the position is saved,
    // and one waits for a retry.
    for (durable, out, seed) in (0..6).flat_map(|durable| (0..4).map(move |out| (durable * 3, out, durable + 10 * out)))
    {
        let what = format!("{durable} durable, {out} out");
        let (storage, now_ms) = (FaultyStorage::new(), Arc::new(AtomicU64::new(0)));
        let engine = open_on(&storage, os_cache("/s")).unwrap();
        let mut poller = poller(&engine, &now_ms, true).unwrap();
        let mut producer = engine.producer();
        for n in 0..20 {
            producer.publish(Key(n), Note::sized(n, 300)).unwrap();
            if n + 1 == durable {
                engine.flush(soon()).unwrap();
            }
        }
        producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
        let (mut held, mut handled) = (Vec::new(), BTreeSet::new());
        while let Some(delivery) = poller.next().unwrap() {
            let n = poller.event(&delivery).unwrap().0.n.to_native();
            if held.len() < usize::from(out > 0) && n >= 5 * out {
                held.push(delivery);
            } else if n == 11 && out == 3 {
                poller.failed(delivery, "retry").unwrap();
            } else {
                handled.insert(n);
                poller.succeeded(delivery).unwrap();
            }
        }
        poller.save().unwrap();
        let old_end = poller.report().positions[0];
        let unsynced = if seed % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(seed) };
        let cut = storage.after_crash(unsynced);
        drop((held, poller, producer, engine));

        let engine = open_on(&cut, os_cache("/s")).unwrap();
        let kept: BTreeSet<u64> = read_shard(&engine, 0).iter().map(|held| held.n).collect();
        assert!(kept.len() as u64 >= durable, "{what}");
        assert!(engine.consumers()[0].positions[0] <= engine.recovery().shards[0].end, "{what}");
        let mut producer = engine.producer();
        // Appends beyond the old position, in records of other sizes, before anything is read.
        for n in 100..160 {
            producer.publish(Key(n % 25), Note::sized(n, (n as usize * 37) % 500)).unwrap();
        }
        producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
        assert!(read_shard(&engine, 0).last().unwrap().offset > old_end.0, "{what}");
        let mut poller = self::poller(&engine, &now_ms, true).unwrap();
        let taken: BTreeSet<u64> = take_all(&mut poller, &now_ms).into_iter().collect();
        let expected: BTreeSet<u64> = kept.difference(&handled).copied().chain(100..160).collect();
        assert_eq!(taken, expected, "{what}");
    }
}

#[test]
fn no_record_names_an_event_that_the_log_may_lose() {
    let mut lost = 0;
    for round in 0..40_u64 {
        let (storage, now_ms) = (FaultyStorage::new(), Arc::new(AtomicU64::new(0)));
        let engine = open_on(&storage, os_cache("/s")).unwrap();
        let mut poller = poller(&engine, &now_ms, true).unwrap();
        let mut producer = engine.producer();
        for n in 0..6 {
            producer.publish(Key(n % 3), Note::sized(n, 200)).unwrap().appended().wait().unwrap();
        }
        while let Some(delivery) = poller.next().unwrap() {
            let (_, meta) = poller.event(&delivery).unwrap();
            let how = if meta.key.0 == SKIPPED { "skip" } else { "park" };
            poller.failed(delivery, how).unwrap();
        }
        // The log becomes durable before the records are written; the power fails before, between or after.
        let began = Instant::now();
        while began.elapsed() < Duration::from_micros(100 * (round % 8)) {
            now_ms.fetch_add(1, Ordering::SeqCst);
            assert!(poller.next().unwrap().is_none() || round > 0);
        }
        let cut = storage.after_crash(Unsynced::Lost);
        drop((poller, producer, engine));

        let engine = open_on(&cut, os_cache("/s")).unwrap();
        let ids = Outside::default().ids(&engine);
        lost += 6 - ids.len();
        let mut poller = self::poller(&engine, &now_ms, true).unwrap();
        let letters = Outside::letters(&poller, &ids);
        let skips = poller.report().letters.skipped as usize;
        assert!(letters.len() + skips <= ids.len(), "{skips} skips, {letters:?}, {ids:?}");
        // New events take the offsets of the lost ones.
        let mut producer = engine.producer();
        for n in 100..106 {
            producer.publish(Key(10 + n % 3), Note::sized(n, 200)).unwrap().appended().wait().unwrap();
        }
        let taken = take_all(&mut poller, &now_ms);
        assert_eq!(taken.iter().filter(|n| **n >= 100).count(), 6, "round {round}: {taken:?}");
    }
    assert!(lost > 0, "no round lost an event");
}

#[test]
fn a_restart_repeats_only_events_unfinished_at_the_last_save() {
    let (storage, now_ms) = (FaultyStorage::new(), Arc::new(AtomicU64::new(0)));
    {
        let engine = open_on(&storage, small("/s")).unwrap();
        let mut producer = engine.producer();
        for n in 0..30 {
            producer.publish(Key(n % 10), Note::new(n)).unwrap();
        }
        engine.flush(soon()).unwrap();
        let mut poller = poller(&engine, &now_ms, false).unwrap();
        let mut held = None;
        while let Some(delivery) = poller.next().unwrap() {
            let n = poller.event(&delivery).unwrap().0.n.to_native();
            match n {
                3 => held = Some(delivery),
                5 => poller.failed(delivery, "retry").unwrap(),
                _ => poller.succeeded(delivery).unwrap(),
            }
        }
        drop(held);
        poller.save().unwrap();
        let cut = storage.after_crash(Unsynced::Lost);
        drop((poller, producer, engine));
        let engine = open_on(&cut, small("/s")).unwrap();
        let mut poller = self::poller(&engine, &now_ms, false).unwrap();
        let mut taken = take_all(&mut poller, &now_ms);
        taken.sort_unstable();
        assert_eq!(taken, [3, 5, 13, 15, 23, 25]);
    }
}
