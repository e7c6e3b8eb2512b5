//! A consumer against a plain oracle: after any series of events, failures, retries, letters, saves, seeks, restarts,
//! disk errors and power cuts, every key keeps its order and no event is missed.
//!
//! `CORELANE_MODEL_CASES` sets the number of runs (30) and `CORELANE_MODEL_SEED` the first seed. A seed repeats a run
//! except for thread timing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::{SEGMENT, env_number, small, soon};
use corelane::consumer::{
    DeadLetterPolicy, Delivery, Exhausted, HealthPolicy, Judgement, LetterSelector, Poller, QueuePolicy, Retry, Start,
    WhenFull,
};
use corelane::event::EventId;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{
    Bounded, Config, Durability, Event, EventLog, EventType, EventTypeId, Key, Offset, Producer, Retention, ShardId,
};
use rkyv::{Archive, Deserialize, Serialize};

const SHARDS: u16 = 3;
const KEYS: u64 = 7;
const ATTEMPTS: u32 = 3;
const GAP_WAIT: Duration = Duration::from_secs(5);
const NAMES: [&str; 3] = ["paid", "noted", "left"];

/// An event of one of three types.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
enum Deed {
    Paid { n: u64, text: String },
    Noted { n: u64, text: String },
    Left { n: u64 },
}

impl Event for Deed {
    const TYPES: &'static [EventType] =
        &[EventType::new(1, "paid", 1), EventType::new(2, "noted", 1), EventType::new(3, "left", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(match self {
            Self::Paid { .. } => 1,
            Self::Noted { .. } => 2,
            Self::Left { .. } => 3,
        })
    }
}

fn number(event: &ArchivedDeed) -> u64 {
    match event {
        ArchivedDeed::Paid { n, .. } | ArchivedDeed::Noted { n, .. } | ArchivedDeed::Left { n } => n.to_native(),
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// How an event ended for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Handled,
    /// Judged to be skipped. The report of a record does not name the event.
    Skipped,
    Discarded,
}

/// The oracle's knowledge of an event.
#[derive(Debug)]
struct Known {
    key: u64,
    kind: usize,
    id: EventId,
    /// The log cannot lose it.
    is_durable: bool,
    /// Every filter since it was published includes it, and no seek skipped it.
    must_end: bool,
    end: Option<End>,
    /// It ended in this run of the poller, since the last seek.
    ended_here: bool,
    /// It must not be delivered from the log again, even in another run.
    ended_for_good: bool,
    /// It was judged to be parked in this run, and no letter of it has been seen yet.
    to_park: bool,
    /// It was judged to be skipped and has not been delivered since.
    skipped: bool,
    /// Failed attempts in this run.
    attempts: u32,
}

impl Known {
    /// Notes that the event was delivered again, so its skip was not recorded.
    fn is_not_skipped(&mut self) {
        self.skipped = false;
        self.end = self.end.filter(|end| *end != End::Skipped);
    }
}

/// A delivery in flight.
struct Out {
    n: u64,
    is_letter: bool,
    delivery: Delivery,
}

#[derive(Debug, Clone)]
struct Setting {
    durability: Durability,
    keeps: Option<u64>,
    before_durable: bool,
    exhausted: Exhausted,
    letters_max: usize,
    unfinished_max: usize,
    seeks: bool,
    fails: bool,
    cuts: bool,
}

impl Setting {
    fn of(random: &mut Random) -> Self {
        Self {
            durability: if random.one_in(3) { Durability::OsCache } else { Durability::GroupCommit },
            keeps: random.one_in(2).then(|| 2 + random.below(3)),
            before_durable: random.one_in(2),
            exhausted: [Exhausted::Park, Exhausted::Skip, Exhausted::Halt][random.below(3) as usize],
            letters_max: if random.one_in(4) { 2 + random.below(4) as usize } else { 10_000 },
            unfinished_max: if random.one_in(4) { 3 } else { 1000 },
            seeks: random.one_in(3),
            fails: random.one_in(2),
            cuts: !random.one_in(4),
        }
    }

    fn has_room(&self) -> bool {
        self.letters_max == 10_000
    }
}

struct World {
    random: Random,
    setting: Setting,
    storage: FaultyStorage,
    engine: Option<EventLog<Deed>>,
    producer: Option<Producer<Deed>>,
    poller: Option<Poller<Deed>>,
    now_ns: Arc<AtomicU64>,
    concurrency: usize,
    filter: Vec<usize>,
    out: Vec<Out>,
    next: u64,
    events: BTreeMap<u64, Known>,
    /// By key, oldest first.
    letters: BTreeMap<u64, BTreeSet<u64>>,
    /// Keys whose last letter has ended and that had no delivery since: a record may be in flight.
    freed: BTreeSet<u64>,
    /// Keys that ever had letters.
    parked: BTreeSet<u64>,
    /// Keys whose letters are being reprocessed.
    asked: BTreeSet<u64>,
    /// Keys with a letter that failed while the disk may have refused the record of the failure. Until the record is
    /// written, the key may still be reprocessed.
    perhaps_asked: BTreeSet<u64>,
    /// Letters whose outcome could not be written.
    unsure: BTreeSet<u64>,
    /// The newest event of each key that was delivered from the log in this run.
    newest: BTreeMap<u64, u64>,
    gaps: BTreeSet<u64>,
    is_armed: bool,
    /// A failure may have stopped a shard since the store was opened.
    is_suspect: bool,
    /// The previous poller could record every outcome.
    was_saved: bool,
    /// The counts of records are predictable.
    counts: bool,
    trace: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in self.trace.iter().rev().take(env_number("CORELANE_MODEL_TRACE", 60) as usize).rev() {
                eprintln!("{line}");
            }
            eprintln!("{:?}, filter {:?}, letters {:?}", self.setting, self.filter, self.letters);
        }
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let setting = Setting::of(&mut random);
        Self::of(random, setting)
    }

    fn of(random: Random, setting: Setting) -> Self {
        let mut world = Self {
            random,
            storage: FaultyStorage::new(),
            engine: None,
            producer: None,
            poller: None,
            now_ns: Arc::default(),
            concurrency: 1,
            filter: vec![0, 1, 2],
            out: Vec::new(),
            next: 0,
            events: BTreeMap::new(),
            letters: BTreeMap::new(),
            freed: BTreeSet::new(),
            parked: BTreeSet::new(),
            asked: BTreeSet::new(),
            perhaps_asked: BTreeSet::new(),
            unsure: BTreeSet::new(),
            newest: BTreeMap::new(),
            gaps: BTreeSet::new(),
            is_armed: false,
            is_suspect: false,
            was_saved: false,
            counts: !setting.seeks && setting.has_room(),
            trace: Vec::new(),
            setting,
        };
        world.open();
        world.attach(false);
        world
    }

    fn note(&mut self, line: impl Into<String>) {
        self.trace.push(line.into());
    }

    fn config(&self) -> Config {
        let retention = self.setting.keeps.map_or_else(Retention::default, |keeps| Retention::bytes(keeps * SEGMENT));
        small("/s").shards(SHARDS).durability(self.setting.durability).retention(retention).spares_max(1)
    }

    fn engine(&self) -> &EventLog<Deed> {
        self.engine.as_ref().unwrap()
    }

    fn poller(&mut self) -> &mut Poller<Deed> {
        self.poller.as_mut().unwrap()
    }

    fn disarm(&mut self) {
        self.storage.fail_operation(1 << 60);
        self.storage.fail_sync(1 << 60);
        self.is_armed = false;
    }

    /// Opens the store and removes the events that the log has lost.
    fn open(&mut self) {
        let open = |world: &Self| EventLog::<Deed>::builder(world.config()).faulty_storage(&world.storage).open();
        let engine = match open(self) {
            Ok(engine) => engine,
            Err(error) => {
                assert!(self.is_armed, "{error}");
                self.note(format!("opening fails: {error}"));
                self.disarm();
                open(self).unwrap()
            }
        };
        self.is_suspect = self.is_armed;
        let ends: Vec<Offset> = engine.recovery().shards.iter().map(|shard| shard.end).collect();
        self.producer = Some(engine.producer());
        self.engine = Some(engine);
        let lost: Vec<u64> = self
            .events
            .iter()
            .filter(|(_, known)| known.id.offset >= ends[usize::from(known.id.shard.0)])
            .map(|(n, _)| *n)
            .collect();
        for n in lost {
            let known = self.events.remove(&n).unwrap();
            assert!(!known.is_durable, "the log lost event {n}: {known:?}");
            assert!(
                self.letters.get(&known.key).is_none_or(|letters| !letters.contains(&n)),
                "the letter {n} has no event"
            );
            self.note(format!("the log lost {n}"));
        }
    }

    /// Begins a new run of the poller.
    fn attach(&mut self, refilter: bool) {
        if refilter && self.random.one_in(3) {
            let wanted = 1 + self.random.below(7);
            self.filter = (0..3).filter(|kind| wanted >> kind & 1 == 1).collect();
        }
        self.concurrency = 1 + self.random.below(8) as usize;
        for known in self.events.values_mut() {
            (known.ended_here, known.attempts) = (false, 0);
            let is_wanted = self.filter.contains(&known.kind);
            known.must_end &= known.end.is_some() || is_wanted;
            // Skipped, and perhaps not recorded.
            self.counts &= is_wanted || !known.skipped || known.ended_for_good;
        }
        self.newest.clear();
        self.gaps.clear();
        self.asked.clear();
        self.perhaps_asked.clear();
        self.poller = match self.build() {
            Ok(poller) => Some(poller),
            Err(error) => {
                assert!(self.is_armed, "{error}");
                self.note(format!("the poller does not start: {error}"));
                self.disarm();
                Some(self.build().unwrap())
            }
        };
        self.note(format!("a run with filter {:?}, concurrency {}", self.filter, self.concurrency));
        self.check_letters(&BTreeSet::new());
        if std::mem::take(&mut self.was_saved) {
            self.all_is_recorded();
        }
        // An outcome that a poller could not record is forgotten with it, and the event comes again.
        self.events.values_mut().for_each(|known| known.to_park = false);
        self.unsure.clear();
    }

    fn build(&self) -> Result<Poller<Deed>, corelane::consumer::ConsumerError> {
        let builder = self.engine().consumer("c").concurrency(self.concurrency);
        let builder =
            if self.filter.len() < 3 { builder.types(self.filter.iter().map(|i| NAMES[*i])) } else { builder };
        let builder = if self.setting.before_durable { builder.before_durable() } else { builder };
        let clock = Arc::clone(&self.now_ns);
        let when_full = if self.setting.has_room() { WhenFull::Halt } else { WhenFull::DiscardOldest };
        builder
            .retry(Retry::fixed().base(Duration::from_millis(50)).jitter(1.0, 1.0).attempts(ATTEMPTS))
            .when_exhausted(self.setting.exhausted)
            .health(HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100))
            .queues(QueuePolicy::default().gap_wait_max(GAP_WAIT).unfinished_max(self.setting.unfinished_max))
            .dead_letters(DeadLetterPolicy::default().letters_max(self.setting.letters_max).when_full(when_full))
            .save_every(Duration::from_millis(200))
            .judge(|error, _| match error.to_string().as_str() {
                "retry" => Judgement::RetryIn(Duration::from_millis(70)),
                "gap" => Judgement::AwaitGap,
                "park" => Judgement::Park,
                "skip" => Judgement::Skip,
                "halt" => Judgement::Halt,
                _ => Judgement::ByPolicy,
            })
            .poller()
            .map(|poller| poller.clock(move || Duration::from_nanos(clock.load(Ordering::SeqCst))))
    }

    /// Ends the poller's run, which saves its position if the disk allows it.
    fn detach(&mut self) {
        self.out.clear();
        self.poller = None;
        // A failed log never becomes durable, and no record names an event that it may lose.
        self.was_saved = !self.is_armed && !self.is_suspect;
        if !self.is_armed {
            self.saved(self.was_saved);
        }
    }

    /// Notes that the position is durable: events that ended here are not delivered again, nor are skipped events whose
    /// records are written.
    fn saved(&mut self, is_recorded: bool) {
        for known in self.events.values_mut().filter(|known| known.ended_here && (is_recorded || !known.skipped)) {
            known.ended_for_good = true;
        }
    }

    /// Notes that every outcome is recorded and the letters are up to date.
    fn all_is_recorded(&mut self) {
        for (n, known) in self.events.iter_mut().filter(|(_, known)| known.to_park) {
            assert!(!self.setting.has_room(), "event {n} was judged to be parked, and is no letter: {known:?}");
            // Its letter made room for others.
            known.end.get_or_insert(End::Discarded);
            (known.to_park, known.ended_for_good) = (false, true);
        }
    }

    /// Checks the dead letters against the oracle. Those of `gone` may have ended.
    fn check_letters(&mut self, gone: &BTreeSet<u64>) {
        let listed = self.poller.as_ref().unwrap().dead_letters(None, usize::MAX).unwrap();
        let by_id: BTreeMap<EventId, u64> = self.events.iter().map(|(n, known)| (known.id, *n)).collect();
        let mut letters: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for letter in &listed {
            let n = *by_id.get(&letter.id).unwrap_or_else(|| panic!("a letter without an event: {letter:?}"));
            assert_eq!(letter.key.0, self.events[&n].key);
            letters.entry(letter.key.0).or_default().insert(n);
        }
        let count: usize = letters.values().map(BTreeSet::len).sum();
        assert_eq!(count, listed.len(), "each letter is listed once");
        assert_eq!(self.poller.as_ref().unwrap().report().letters.letters, count);
        assert!(count <= self.setting.letters_max);
        let flat =
            |letters: &BTreeMap<u64, BTreeSet<u64>>| -> BTreeSet<u64> { letters.values().flatten().copied().collect() };
        let (before, after) = (flat(&self.letters), flat(&letters));
        for n in after.difference(&before) {
            let parked_keys = |key: u64| {
                letters[&key].len() > 1
                    || self.letters.contains_key(&key)
                    || self.freed.contains(&key)
                    || self.events.values().any(|e| e.key == key && e.to_park)
            };
            let known = &self.events[n];
            assert!(known.to_park || parked_keys(known.key), "event {n} is a letter for no reason: {known:?}");
            assert!(!known.ended_for_good, "event {n} had ended, and is a letter: {known:?}");
            assert!(!known.ended_here, "event {n} was handled here, and is a letter: {known:?}");
            let is_out = self.out.iter().any(|out| out.n == *n);
            assert!(!is_out, "event {n} is in flight and a letter");
            self.trace.push(format!("{n} of {} is a letter", known.key));
        }
        for n in before.difference(&after) {
            // A handled letter whose outcome could not be recorded is recorded later.
            let may = gone.contains(n) || self.unsure.contains(n) || !self.setting.has_room();
            assert!(may, "the letter {n} is lost");
            self.trace.push(format!("the letter {n} is gone"));
            self.events.get_mut(n).unwrap().end.get_or_insert(End::Discarded);
        }
        for n in &after {
            let known = self.events.get_mut(n).unwrap();
            known.is_not_skipped();
            // This holds while the event is a letter and afterwards.
            (known.to_park, known.ended_for_good) = (false, true);
        }
        self.freed.extend(self.letters.keys().filter(|key| !letters.contains_key(key)));
        self.letters = letters;
    }

    fn publish(&mut self) {
        let count = 1 + self.random.below(12);
        for _ in 0..count {
            let (n, key, kind) = (self.next, self.random.below(KEYS), self.random.below(3) as usize);
            self.publish_one(n, key, kind);
        }
    }

    fn publish_one(&mut self, n: u64, key: u64, kind: usize) {
        self.next += 1;
        let text = "x".repeat(self.random.below(2500) as usize);
        let event = match kind {
            0 => Deed::Paid { n, text },
            1 => Deed::Noted { n, text },
            _ => Deed::Left { n },
        };
        let shard = Key(key).shard(SHARDS);
        let receipt = self.producer.as_mut().unwrap().publish_until(Key(key), event, soon().unwrap());
        let appended = receipt
            .map_err(|rejected| format!("{rejected}"))
            .and_then(|receipt| receipt.appended().wait_until(soon().unwrap()).map_err(|error| error.to_string()));
        if let Err(error) = appended {
            assert!(self.is_suspect, "event {n}: {error}");
            self.note(format!("publishing {n} fails: {error}"));
            self.restart_after_failure();
        }
        let Some(id) = self.find(shard, n) else {
            self.note(format!("{n} is not in the log"));
            return;
        };
        let must_end = self.filter.contains(&kind);
        let known = Known {
            key,
            kind,
            id,
            is_durable: false,
            must_end,
            end: None,
            ended_here: false,
            ended_for_good: false,
            to_park: false,
            skipped: false,
            attempts: 0,
        };
        self.trace.push(format!("published {n} of {key}, {}, at {id}", NAMES[kind]));
        self.events.insert(n, known);
    }

    /// Finds the event in its shard.
    fn find(&self, shard: ShardId, n: u64) -> Option<EventId> {
        for _ in 0..100 {
            let mut reader = self.engine().reader(shard);
            loop {
                match reader.next() {
                    Ok(Some(record)) if number(record.event) == n => return Some(record.meta.id()),
                    Ok(Some(_)) => {}
                    Ok(None) => return None,
                    // A segment was freed while it was read.
                    Err(_) => break,
                }
            }
        }
        panic!("the log cannot be read");
    }

    /// Restarts the engine after an injected failure stopped the log.
    fn restart_after_failure(&mut self) {
        self.disarm();
        self.out.clear();
        self.poller = None;
        (self.engine, self.producer) = (None, None);
        self.open();
        self.attach(false);
    }

    fn flush(&mut self) {
        match self.engine().flush(soon()) {
            Ok(()) => self.events.values_mut().for_each(|known| known.is_durable = true),
            Err(error) => {
                assert!(self.is_suspect, "{error}");
                self.note(format!("flushing fails: {error}"));
                self.restart_after_failure();
            }
        }
    }

    fn take(&mut self) {
        let next = self.poller().next();
        self.check_letters(&BTreeSet::new());
        let delivery = match next {
            Ok(Some(delivery)) => delivery,
            Ok(None) => return,
            Err(error) => {
                assert!(self.is_armed, "{error}");
                self.note(format!("next fails: {error}"));
                return self.again();
            }
        };
        let id = self.poller().id(&delivery);
        let (event, meta) = self.poller.as_mut().unwrap().event(&delivery).unwrap();
        let (n, key) = (number(event), meta.key.0);
        let is_letter = self.letters.get(&key).is_some_and(|letters| letters.contains(&n));
        self.trace.push(format!("{n} of {key} is delivered, {}", if is_letter { "a letter" } else { "from the log" }));
        let known = self.events.get(&n).unwrap_or_else(|| panic!("event {n} is not in the log"));
        assert_eq!((known.key, known.id), (key, id));
        assert!(self.out.len() < self.concurrency, "more than `concurrency` deliveries are in flight");
        assert!(self.out.iter().all(|out| self.events[&out.n].key != key), "two events of key {key} are in flight");
        self.overflow(key, n);
        let known = &self.events[&n];
        for (m, earlier) in self.events.range(..n).filter(|(_, earlier)| earlier.key == key && earlier.must_end) {
            assert!(earlier.end.is_some(), "event {n} of key {key} before {m}: {earlier:?}");
        }
        if is_letter {
            assert_eq!(self.letters[&key].first(), Some(&n), "oldest first");
            assert!(self.asked.contains(&key) || !self.setting.has_room(), "the letter {n} is not being reprocessed");
        } else {
            assert!(!self.letters.contains_key(&key), "event {n} is delivered although key {key} is parked");
            assert!(self.filter.contains(&known.kind), "the filter excludes event {n}");
            assert!(!known.ended_for_good, "event {n} had ended: {known:?}");
            assert!(!known.ended_here, "event {n} had ended here: {known:?}");
            assert!(!known.to_park, "event {n} was judged to be parked: {known:?}");
            assert!(
                self.newest.get(&key).is_none_or(|newest| *newest <= n),
                "event {n} after {:?}",
                self.newest.get(&key)
            );
            assert_eq!(delivery.attempt(), known.attempts + 1);
            self.newest.insert(key, n);
            self.freed.remove(&key);
            self.events.get_mut(&n).unwrap().is_not_skipped();
            // The skips before it in its key are recorded.
            for (_, earlier) in self.events.range_mut(..n).filter(|(_, earlier)| earlier.key == key) {
                earlier.ended_for_good |= earlier.skipped && earlier.ended_here;
            }
        }
        self.out.push(Out { n, is_letter, delivery });
    }

    /// With little room, letters may come and end unseen; only their counts show them.
    fn overflow(&mut self, key: u64, before: u64) {
        if self.setting.has_room() || !self.parked.contains(&key) {
            return;
        }
        let is_unseen = |known: &Known| known.key == key && known.must_end && known.end.is_none();
        for (_, known) in self.events.range_mut(..before).filter(|(_, known)| is_unseen(known)) {
            (known.end, known.ended_for_good, known.to_park) = (Some(End::Discarded), true, false);
        }
    }

    /// Replaces the poller.
    fn again(&mut self) {
        self.detach();
        self.disarm();
        self.attach(true);
    }

    fn succeed(&mut self, at: usize) {
        let Out { n, is_letter, delivery } = self.out.swap_remove(at);
        self.note(format!("{n} succeeds"));
        self.poller().succeeded(delivery).unwrap();
        let known = self.events.get_mut(&n).unwrap();
        known.end = Some(End::Handled);
        if is_letter {
            self.letter_is_done(n);
        } else {
            known.ended_here = true;
        }
    }

    fn letter_is_done(&mut self, n: u64) {
        let key = self.events[&n].key;
        self.check_letters(&BTreeSet::from([n]));
        match self.letters.get(&key) {
            Some(letters) if letters.contains(&n) => {
                assert!(self.is_armed, "the letter {n} is handled and still there");
                self.unsure.insert(n);
                self.counts = false;
            }
            Some(_) => {}
            None => drop(self.asked.remove(&key)),
        }
    }

    fn fail(&mut self, at: usize) {
        let Out { n, is_letter, delivery } = self.out.swap_remove(at);
        let how =
            ["retry", "policy", "policy", "gap", "park", "skip", "halt", "undecodable"][self.random.below(8) as usize];
        self.note(format!("{n} fails: {how}"));
        let attempt = delivery.attempt();
        let outcome = match how {
            "undecodable" => self.poller().undecodable(delivery),
            how => self.poller().failed(delivery, how),
        };
        outcome.unwrap();
        let (exhausted, key) = (self.setting.exhausted, self.events[&n].key);
        let known = self.events.get_mut(&n).unwrap();
        if is_letter {
            self.asked.remove(&key);
            if self.is_armed {
                self.perhaps_asked.insert(key);
            }
            return self.check_letters(&BTreeSet::new());
        }
        let how = match (how, exhausted) {
            ("policy", _) if attempt < ATTEMPTS => "retry",
            ("policy", Exhausted::Park) => "park",
            ("policy", Exhausted::Skip) => "skip",
            ("policy", Exhausted::Halt) => "halt",
            (how, _) => how,
        };
        known.attempts += u32::from(how != "gap");
        match how {
            "gap" => drop(self.gaps.insert(key)),
            "park" | "undecodable" => {
                known.to_park = true;
                self.parked.insert(key);
            }
            "skip" => {
                (known.skipped, known.ended_here) = (true, true);
                known.end.get_or_insert(End::Skipped);
            }
            "halt" => {
                assert!(self.poller().report().halted.is_some());
                let next = self.poller().next();
                if !self.is_armed {
                    assert!(next.unwrap().is_none(), "the consumer has halted");
                }
                self.check_letters(&BTreeSet::new());
                self.poller().resume();
            }
            _ => {}
        }
    }

    fn which(&mut self) -> (LetterSelector, BTreeSet<u64>) {
        if self.random.one_in(2) {
            return (LetterSelector::All, (0..KEYS).collect());
        }
        let key = self.random.below(KEYS);
        (LetterSelector::Of(Key(key)), BTreeSet::from([key]))
    }

    fn reprocess(&mut self) {
        let (which, keys) = self.which();
        self.note(format!("reprocess {which:?}"));
        let keys: Vec<u64> = keys.into_iter().filter(|key| self.letters.contains_key(key)).collect();
        let perhaps = keys.iter().filter(|key| self.perhaps_asked.contains(key)).count();
        let new = keys.into_iter().filter(|key| self.asked.insert(*key)).count();
        let asked = self.poller().reprocess(which);
        // Keys whose letters made room may still be reprocessed.
        assert!(asked.abs_diff(new) <= perhaps || !self.setting.has_room(), "{asked} keys are reprocessed, not {new}");
    }

    fn discard(&mut self) {
        let (which, keys) = self.which();
        self.note(format!("discard {which:?}"));
        let out: BTreeSet<u64> =
            self.out.iter().filter(|out| out.is_letter).map(|out| self.events[&out.n].key).collect();
        let keys: BTreeSet<u64> = keys.difference(&out).copied().collect();
        let gone: BTreeSet<u64> = keys.iter().filter_map(|key| self.letters.get(key)).flatten().copied().collect();
        let discarded = self.poller().discard(which);
        self.check_letters(&gone);
        let left: BTreeSet<u64> =
            gone.iter().filter(|n| self.letters.values().any(|of| of.contains(n))).copied().collect();
        match discarded {
            Ok(count) => {
                // A handled letter that is not recorded yet is recorded as handled.
                let handled = gone.intersection(&self.unsure).count();
                assert!((gone.len() - handled..=gone.len()).contains(&(count as usize)) && left.is_empty());
            }
            Err(error) => {
                assert!(self.is_armed, "{error}");
                self.counts = false;
                self.unsure.extend(left);
            }
        }
        self.asked.retain(|key| !keys.contains(key) || self.letters.contains_key(key));
        // The reprocessing of keys that could not be discarded has ended.
        let still: Vec<u64> = self.asked.intersection(&keys).copied().collect();
        for key in still {
            self.poller().reprocess(LetterSelector::Of(Key(key)));
        }
    }

    fn seek(&mut self) {
        if !self.out.is_empty() {
            let sought = self.poller().seek(Start::Beginning);
            assert!(matches!(sought, Err(corelane::consumer::ConsumerError::Busy { .. })), "{sought:?}");
            return;
        }
        let to_end = self.random.one_in(2);
        self.note(if to_end { "seek to the end" } else { "seek to the beginning" });
        let sought = self.poller().seek(if to_end { Start::Latest } else { Start::Beginning });
        match &sought {
            Ok(()) => {
                self.check_letters(&BTreeSet::new());
                self.all_is_recorded();
            }
            Err(error) => assert!(self.is_suspect, "{error}"),
        }
        self.newest.clear();
        self.gaps.clear();
        let letters: BTreeSet<u64> = self.letters.values().flatten().copied().collect();
        let positions = self.poller().report().positions;
        for (n, known) in &mut self.events {
            known.attempts = 0;
            if letters.contains(n) {
                continue;
            }
            if to_end {
                known.must_end &= known.end.is_some();
                (known.ended_here, known.ended_for_good) = (true, sought.is_ok());
                continue;
            }
            (known.ended_here, known.ended_for_good) = (false, false);
            if sought.is_ok() {
                // Every event of the log is handled again as if it were new.
                let is_there = known.id.offset >= positions[usize::from(known.id.shard.0)];
                (known.end, known.skipped) = (None, false);
                known.must_end = is_there && self.filter.contains(&known.kind);
            }
        }
        if sought.is_err() {
            self.again();
        }
    }

    fn save(&mut self) {
        let saved = self.poller().save();
        self.check_letters(&BTreeSet::new());
        match saved {
            Ok(()) => {
                self.all_is_recorded();
                self.saved(true);
            }
            Err(error) => assert!(self.is_suspect, "{error}"),
        }
    }

    fn restart(&mut self) {
        self.note("a restart");
        self.detach();
        let closed = self.engine().shutdown(soon());
        if closed.is_ok() {
            self.events.values_mut().for_each(|known| known.is_durable = true);
        } else {
            assert!(self.is_suspect, "{closed:?}");
        }
        (self.engine, self.producer) = (None, None);
        self.disarm();
        self.open();
        self.attach(true);
    }

    /// Cuts the power.
    fn cut(&mut self) {
        let unsynced = if self.random.one_in(2) { Unsynced::Lost } else { Unsynced::Random(self.random.next()) };
        self.note(format!("a power cut, {unsynced:?}"));
        let cut = self.storage.after_crash(unsynced);
        self.disarm();
        self.out.clear();
        self.poller = None;
        (self.engine, self.producer) = (None, None);
        self.storage = cut;
        if self.setting.fails && self.random.one_in(3) {
            self.arm();
        }
        self.open();
        self.attach(true);
    }

    fn arm(&mut self) {
        let n = 1 + self.random.below(12);
        if self.random.one_in(3) {
            self.note(format!("sync {n} will fail"));
            self.storage.fail_sync(n);
        } else {
            self.note(format!("operation {n} will fail"));
            self.storage.fail_operation(n);
        }
        (self.is_armed, self.is_suspect) = (true, true);
    }

    fn advance(&mut self) {
        let ms = [1, 50, 70, 200, 600, 6000][self.random.below(6) as usize];
        self.now_ns.fetch_add(ms * 1_000_000, Ordering::SeqCst);
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..14 => self.publish(),
            14..50 => self.take(),
            50..74 if !self.out.is_empty() => {
                let at = self.random.below(self.out.len() as u64) as usize;
                if self.random.one_in(3) { self.fail(at) } else { self.succeed(at) }
            }
            50..82 => self.advance(),
            82..86 => self.reprocess(),
            86 => self.discard(),
            87 if self.setting.seeks => self.seek(),
            88..90 => self.save(),
            90 => {
                let key = self.random.below(KEYS);
                let waited = self.poller().gap_filled(Key(key));
                assert!(!waited || self.gaps.remove(&key), "key {key} waited for no gap");
            }
            91 if !self.is_armed => {
                self.note("the poller is dropped");
                self.again();
            }
            92 => self.restart(),
            93..95 if self.setting.cuts => self.cut(),
            95..97 if self.setting.fails => self.arm(),
            _ => self.flush(),
        }
    }

    /// Removes every fault and handles deliveries until none is left.
    fn settle(&mut self) {
        self.disarm();
        if self.is_suspect {
            self.restart();
        }
        self.note("everything works");
        while !self.out.is_empty() {
            self.succeed(0);
        }
        self.flush();
        let end = soon().unwrap();
        loop {
            self.advance();
            self.poller().resume();
            self.take();
            while !self.out.is_empty() {
                self.succeed(0);
                self.take();
            }
            if !self.letters.is_empty() {
                self.poller().reprocess(LetterSelector::All);
                self.asked = self.letters.keys().copied().collect();
            } else if self.poller().report().waiting() == 0 {
                break;
            }
            assert!(Instant::now() < end, "{:?}", self.poller().report());
        }
    }

    fn finish(&mut self) {
        self.settle();
        (0..KEYS).for_each(|key| self.overflow(key, u64::MAX));
        for (n, known) in self.events.iter().filter(|(_, known)| known.must_end) {
            assert!(known.end.is_some(), "event {n} was neither handled nor recorded: {known:?}");
        }
        let counts = self.poller().report().letters;
        assert_eq!(counts.parked, counts.handled + counts.discarded);
        if self.counts {
            let skipped = self.events.values().filter(|known| known.skipped).count();
            let discarded = self.events.values().filter(|known| known.end == Some(End::Discarded)).count();
            assert_eq!(counts.skipped as usize, skipped, "skips are recorded");
            assert!(discarded <= counts.discarded as usize, "discards are recorded");
        }
        // Every key is unparked, so new events are handled at once.
        self.check_live();
        self.restart();
        self.check_live();
    }

    fn check_live(&mut self) {
        self.settle();
        let (from, parked) = (self.next, self.poller().report().letters.parked);
        for key in 0..KEYS {
            let kind = self.filter[0];
            self.publish_one(self.next, key, kind);
        }
        self.settle();
        for (n, known) in self.events.range(from..) {
            assert_eq!(known.end, Some(End::Handled), "event {n} of an unparked key");
        }
        assert_eq!(self.poller().report().letters.parked, parked, "every key is unparked");
    }
}

/// A setting without faults.
fn plain() -> Setting {
    Setting {
        durability: Durability::GroupCommit,
        keeps: None,
        before_durable: true,
        exhausted: Exhausted::Park,
        letters_max: 10_000,
        unfinished_max: 1000,
        seeks: false,
        fails: false,
        cuts: false,
    }
}

#[test]
fn an_unfinished_event_of_a_newly_excluded_type_is_not_saved_with_the_position() {
    let mut world = World::of(Random(0), plain());
    world.poller = None;
    world.concurrency = 8;
    world.poller = Some(world.build().unwrap());
    // All keys belong to one shard.
    for (kind, key) in [1, 2].into_iter().enumerate() {
        assert_eq!(Key(key).shard(SHARDS), ShardId(1));
        world.publish_one(kind as u64, key, kind);
    }
    world.flush();
    (0..2).for_each(|_| world.take());
    let at = world.out.iter().position(|out| out.n == 1).unwrap();
    world.succeed(at);
    world.detach();
    // Event 0 was in flight and 1 is done. Now the filter excludes both, and no other event comes.
    world.filter = vec![2];
    world.attach(false);
    world.take();
    assert!(world.out.is_empty());
    world.save();
    world.restart();
    world.check_live();
}

#[test]
fn an_unfinished_event_of_a_newly_excluded_type_hides_no_later_event() {
    let mut world = World::of(Random(0), plain());
    world.poller = None;
    world.concurrency = 8;
    world.poller = Some(world.build().unwrap());
    // All keys belong to one shard.
    for (kind, key) in [1, 2, 4].into_iter().enumerate() {
        assert_eq!(Key(key).shard(SHARDS), ShardId(1));
        world.publish_one(kind as u64, key, kind);
    }
    world.flush();
    for _ in 0..3 {
        world.take();
    }
    let at = world.out.iter().position(|out| out.n == 2).unwrap();
    world.succeed(at);
    world.detach();
    // Events 0 and 1 were in flight and 2 is done. Now the filter excludes 0.
    world.filter = vec![1, 2];
    world.attach(false);
    world.take();
    assert_eq!(world.out.iter().map(|out| out.n).collect::<Vec<_>>(), [1]);
}

#[test]
fn every_key_keeps_its_order_and_no_event_is_missed() {
    let (cases, first) = (env_number("CORELANE_MODEL_CASES", 30), env_number("CORELANE_MODEL_SEED", 1));
    for seed in first..first + cases {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..250 {
                world.step();
            }
            world.finish();
        });
        if let Err(panic) = run {
            eprintln!("CORELANE_MODEL_SEED={seed} CORELANE_MODEL_CASES=1 repeats this run");
            std::panic::resume_unwind(panic);
        }
    }
}
