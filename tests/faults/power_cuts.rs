//! Power cuts after runs in different durability modes: every acknowledgement rests on synced files, whichever run
//! wrote them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::common::bank::{Account, ArchivedMoney, Money, Order, Refused};
use crate::common::{SEGMENT, small, soon, until};
use corelane::consumer::Judgement;
use corelane::ingress::GatePolicy;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{CommandError, Config, Durability, Engine, Key, OpenError, Retention, WaitError};

const MODES: [Durability; 3] =
    [Durability::OsCache, Durability::GroupCommit, Durability::Periodic(Duration::from_millis(1))];
/// Keys with many events each.
const KEYS: u64 = 5;
/// The key whose only content is outcomes of commands.
const REFUSED: Key = Key(1_000);
/// Deposits of at least this amount come through the gate; the rest of the amount is their sequence.
const GATED: u64 = 1 << 40;
const HOUR: Duration = Duration::from_secs(3600);

fn config(durability: Durability) -> Config {
    let retention = Retention::bytes(2 * SEGMENT);
    small("/s").durability(durability).retention(retention).snapshot_every(20)
}

fn open(storage: &FaultyStorage, durability: Durability) -> Result<Engine<Account>, OpenError> {
    Engine::<Account>::builder(config(durability)).faulty_storage(storage).open()
}

/// The contents given to the store, and the part of it that must not be lost.
#[derive(Debug, Default)]
struct Model {
    events: BTreeMap<u64, Vec<Money>>,
    /// The least number of events by key.
    versions: BTreeMap<u64, u64>,
    commands: u64,
    commands_acknowledged: u64,
    /// The next sequence offered to the gate, and gaps that were recorded.
    sequence: u64,
    gaps: usize,
    letters: usize,
    lives: u64,
}

impl Model {
    /// Publishes several segments, so that retention frees the log's beginning, and uses every other feature. Returns
    /// when all of it is appended.
    fn live(&mut self, engine: &Engine<Account>) {
        self.lives += 1;
        for _ in 0..3 {
            self.publish(engine, 250);
            self.consume(engine);
            self.offer(engine);
        }
        self.command(engine);
    }

    /// Sends commands without events, whose outcomes are remembered.
    fn command(&mut self, engine: &Engine<Account>) {
        for _ in 0..5 {
            self.commands += 1;
            let refused = engine.client().send(REFUSED, Order::Withdraw(self.commands)).once(self.commands).wait();
            assert!(matches!(refused, Err(CommandError::Rejected(Refused::NotEnough { .. }))), "{refused:?}");
        }
    }

    /// Publishes events of several keys and waits until they are appended.
    fn publish(&mut self, engine: &Engine<Account>, count: u64) {
        let mut producer = engine.producer();
        for n in 0..count {
            let event = Money::Noted { text: "n".repeat(300 + n as usize % 7 + self.lives as usize) };
            producer.publish(Key(n % KEYS), event.clone()).unwrap();
            self.events.entry(n % KEYS).or_default().push(event);
        }
        producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
    }

    /// Runs a consumer that handles every event and parks one.
    fn consume(&mut self, engine: &Engine<Account>) {
        let judge = engine.consumer("c").before_durable().judge(|_, _| Judgement::Park);
        let mut poller = judge.poller().unwrap();
        let mut is_first = true;
        while let Some(delivery) = poller.next().unwrap() {
            if std::mem::take(&mut is_first) {
                poller.failed(delivery, "not this one").unwrap();
            } else {
                poller.succeeded(delivery).unwrap();
            }
        }
        poller.save().unwrap();
        self.letters = poller.report().letters.letters;
    }

    /// Offers events with a gap to the gate.
    fn offer(&mut self, engine: &Engine<Account>) {
        let policy = GatePolicy::default().gap_wait_max(HOUR);
        let mut gate = engine.gated("g", policy, from_gate).unwrap();
        for n in [0, 1, 3] {
            let event = Money::Deposited { cents: GATED + self.sequence + n };
            drop(gate.offer(1, self.sequence + n, Key(2_000), event).unwrap());
        }
        gate.pass_time(2 * HOUR);
        gate.pump().unwrap();
        gate.save(soon()).unwrap();
        self.sequence += 4;
        self.gaps += 1;
    }

    /// Notes that all contents are acknowledged, so a power cut must not lose them.
    fn acknowledged(&mut self) {
        self.versions = self.events.iter().map(|(key, events)| (*key, events.len() as u64)).collect();
        self.commands_acknowledged = self.commands;
    }

    /// Checks that the store holds everything acknowledged, and removes its lost contents from the model.
    fn check(&mut self, engine: &Engine<Account>, what: &str) {
        for (key, events) in &mut self.events {
            let (state, version) = engine.state(Key(*key)).wait().unwrap().unwrap_or_default();
            let acknowledged = self.versions.get(key).copied().unwrap_or(0);
            assert!(version.get() >= acknowledged, "{what}: key {key} has {version} events of {acknowledged}");
            events.truncate(version.get() as usize);
            let mut expected = Account::default();
            (1..).zip(events.iter()).for_each(|(version, event)| expected.apply(event, version));
            assert_eq!(state, expected, "{what}: key {key}, version {version}");
        }
        assert!(engine.compare().unwrap().differing.is_empty(), "{what}");
        let (mut client, kept) = (engine.client(), self.commands_acknowledged);
        for id in kept.saturating_sub(3).max(1)..=kept {
            let again = client.send(REFUSED, Order::Withdraw(7_777)).once(id).wait();
            let Err(CommandError::Rejected(Refused::NotEnough { missing })) = again else {
                panic!("{what}: {again:?}")
            };
            assert_eq!(missing, id, "{what}: the first answer to command {id} was forgotten");
        }
        assert_eq!(engine.gaps("g").unwrap().len(), self.gaps, "{what}: gaps");
        let reports = engine.consumers();
        assert!(self.letters == 0 || reports.iter().any(|report| report.name == "c"), "{what}: the consumer is lost");
        if self.letters > 0 {
            let mut poller = engine.consumer("c").judge(|_, _| Judgement::Park).poller().unwrap();
            assert_eq!(poller.report().letters.letters, self.letters, "{what}: letters");
            // The consumer's unfinished events must be in the log.
            drop(poller.next().unwrap());
        }
        if self.sequence > 0 {
            let gate = engine.gated("g", GatePolicy::default(), from_gate).unwrap();
            assert!(gate.expected(1) <= Some(self.sequence), "{what}: {:?}", gate.expected(1));
        }
    }
}

fn from_gate(money: &ArchivedMoney) -> Option<(u64, u64)> {
    match money {
        ArchivedMoney::Deposited { cents } => cents.to_native().checked_sub(GATED).map(|sequence| (1, sequence)),
        _ => None,
    }
}

/// Kills the process: the operating system still has every byte, synced or not.
fn kill(storage: &FaultyStorage, engine: Engine<Account>) {
    storage.be_gone(1);
    drop(engine);
    storage.heal();
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Shutdown,
    FlushAndKill,
    Kill,
}

#[test]
fn acknowledged_events_survive_a_power_cut_in_every_sequence_of_durability_modes() {
    for (n, first) in MODES.into_iter().enumerate() {
        for (m, second) in MODES.into_iter().enumerate() {
            for end in [End::Shutdown, End::FlushAndKill, End::Kill] {
                let what = format!("{first:?}, {end:?}, then {second:?}");
                let (storage, mut model) = (FaultyStorage::new(), Model::default());
                let engine = open(&storage, first).unwrap();
                model.live(&engine);
                // The log's beginning is freed, so some states exist only in a checkpoint.
                until("retention frees", || engine.shard_metrics()[0].segments_freed > 0);
                match end {
                    End::Shutdown => engine.shutdown(soon()).unwrap(),
                    End::FlushAndKill => engine.flush(soon()).unwrap(),
                    End::Kill => {}
                }
                if end != End::Kill {
                    model.acknowledged();
                    // The cut comes before anything else can sync the files.
                    for unsynced in [Unsynced::Lost, Unsynced::Random(7 + n as u64)] {
                        let cut = storage.after_crash(unsynced);
                        model.check(&open(&cut, second).expect(&what), &what);
                    }
                }
                kill(&storage, engine);

                let engine = open(&storage, second).unwrap();
                model.publish(&engine, 1);
                match second {
                    Durability::OsCache => engine.flush(soon()).unwrap(),
                    _ => {
                        let mut producer = engine.producer();
                        producer.publish(Key(0), Money::Deposited { cents: 1 }).unwrap();
                        model.events.get_mut(&0).unwrap().push(Money::Deposited { cents: 1 });
                        producer.receipts().iter().for_each(|receipt| receipt.durable().wait().unwrap());
                    }
                }
                model.acknowledged();
                kill(&storage, engine);
                storage.crash(if m == 1 { Unsynced::Random(3 + n as u64) } else { Unsynced::Lost });
                let engine = open(&storage, first).expect(&what);
                model.check(&engine, &what);
                model.live(&engine);
                engine.shutdown(soon()).unwrap();
                model.acknowledged();
                storage.crash(Unsynced::Lost);
                model.check(&open(&storage, second).expect(&what), &what);
            }
        }
    }
}

#[test]
fn flushed_events_survive_later_appends_and_retention_in_os_cache_mode() {
    for lives in 1..6_u64 {
        let (storage, mut model) = (FaultyStorage::new(), Model::default());
        let engine = open(&storage, Durability::OsCache).unwrap();
        model.publish(&engine, 500);
        model.command(&engine);
        engine.flush(soon()).unwrap();
        model.acknowledged();
        let freed = engine.shard_metrics()[0].segments_freed;
        for _ in 0..lives {
            model.publish(&engine, 250);
        }
        // Retention passes the flushed events; nothing else requests a sync here.
        until("retention frees", || engine.shard_metrics()[0].segments_freed >= freed + lives);
        for unsynced in [Unsynced::Lost, Unsynced::Random(lives)] {
            let events = model.events.clone();
            let again = open(&storage.after_crash(unsynced), Durability::OsCache).unwrap();
            model.check(&again, &format!("{lives} lives, {unsynced:?}"));
            model.events = events;
        }
    }
}

#[test]
fn the_first_flush_or_a_shutdown_makes_durable_what_os_cache_freed_before_it() {
    for ends in [false, true] {
        let (storage, mut model) = (FaultyStorage::new(), Model::default());
        let engine = open(&storage, Durability::OsCache).unwrap();
        model.publish(&engine, 900);
        model.command(&engine);
        until("retention frees", || engine.shard_metrics()[0].segments_freed > 0);
        assert_eq!(engine.shard_metrics()[0].durable_to.get(), 4096, "this mode syncs nothing until a flush");
        if ends {
            engine.shutdown(soon()).unwrap();
        } else {
            engine.flush(soon()).unwrap();
        }
        model.acknowledged();
        for unsynced in [Unsynced::Lost, Unsynced::Random(5)] {
            model.check(&open(&storage.after_crash(unsynced), Durability::OsCache).unwrap(), "before anything else");
        }
    }
}

/// The first sync comes from a flush, from a consumer's records, or from a gate's positions.
#[test]
fn the_first_sync_in_os_cache_acknowledges_nothing_that_rests_on_an_unsynced_checkpoint() {
    for how in ["flush", "letters", "gate"] {
        let (storage, mut model) = (FaultyStorage::new(), Model::default());
        let engine = open(&storage, Durability::OsCache).unwrap();
        // Opened while the log is empty, so that its own positions need no sync yet.
        let mut gate = (how == "gate").then(|| engine.gated("h", GatePolicy::default(), from_gate).unwrap());
        model.publish(&engine, 900);
        let earliest = || engine.reader(corelane::ShardId(0)).offset();
        match gate {
            // The gate blocks retention until it has saved its positions.
            Some(_) => engine.checkpoint(soon()).unwrap(),
            None => until("retention frees", || earliest().get() > 4096),
        }
        assert_eq!(engine.shard_metrics()[0].durable_to.get(), 4096, "{how}: no event is synced yet");
        match &mut gate {
            Some(gate) => gate.save(soon()).unwrap(),
            None if how == "letters" => model.consume(&engine),
            None => engine.flush(soon()).unwrap(),
        }
        model.acknowledged();
        until("retention frees", || earliest().get() > 4096);
        for unsynced in [Unsynced::Lost, Unsynced::Random(3)] {
            let events = model.events.clone();
            let again = open(&storage.after_crash(unsynced), Durability::OsCache);
            model.check(&again.unwrap_or_else(|error| panic!("{how}, {unsynced:?}: {error}")), how);
            model.events = events;
        }
    }
}

#[test]
fn a_failed_sync_before_the_first_acknowledgement_acknowledges_nothing() {
    for n in 1..10 {
        let (storage, mut model) = (FaultyStorage::new(), Model::default());
        let engine = open(&storage, Durability::OsCache).unwrap();
        model.publish(&engine, 900);
        until("retention frees", || engine.shard_metrics()[0].segments_freed > 0);
        storage.fail_sync(n);
        let flushed = engine.flush(soon());
        storage.fail_sync(1 << 60);
        assert!(matches!(flushed, Ok(()) | Err(WaitError::ShardFailed(_))), "sync {n}: {flushed:?}");
        let cut = open(&storage.after_crash(Unsynced::Lost), Durability::OsCache);
        if flushed.is_ok() {
            model.acknowledged();
            model.check(&cut.unwrap_or_else(|error| panic!("sync {n}: {error}")), "after a flush");
        } else {
            assert!(matches!(cut, Ok(_) | Err(OpenError::StatesLost { .. })), "sync {n}: {cut:?}");
        }
    }
}

fn is_letters(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "log")
}

#[test]
fn opening_makes_everything_durable_on_which_later_acknowledgements_rest() {
    for first in MODES {
        for second in MODES {
            let what = format!("{first:?}, then {second:?}");
            let (storage, mut model) = (FaultyStorage::new(), Model::default());
            let engine = open(&storage, first).unwrap();
            model.live(&engine);
            until("retention frees", || engine.shard_metrics()[0].segments_freed > 0);
            engine.shutdown(soon()).unwrap();
            model.acknowledged();
            drop(engine);
            let held = storage.files();
            let newest_letters = held.keys().rfind(|path| is_letters(path)).unwrap();
            // Small files are written under another name, synced and renamed; the files named here grow. A new file of
            // letters is begun once the previous one is durable.
            let grows = |path: &Path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                ["gaps", "witness"].contains(&name)
                    || name.ends_with(".seg")
                    || name.ends_with(".snp")
                    || path == newest_letters
            };
            storage.forget_syncs(grows);
            let engine = open(&storage, second).unwrap();
            let cut = storage.after_crash(Unsynced::Lost);
            assert!(
                cut.files().contains_key(Path::new("/s/consumers/c/checkpoint")),
                "{what}: the consumer's position is durable"
            );
            // Opening the consumer opens its dead letters.
            drop(engine.consumer("c").poller().unwrap());
            let cut = storage.after_crash(Unsynced::Lost);
            for path in held.keys() {
                let name = path.file_name().unwrap().to_str().unwrap();
                // Caches of the log, and spare files.
                let is_spared = name.starts_with("snapshots-") || name.starts_with("spare-");
                // The running engine may have freed it.
                let is_there = cut.files().contains_key(path) || !storage.files().contains_key(path);
                assert!(is_spared || is_there, "{what}: {} is lost", path.display());
            }
            drop(engine);
            model.check(&open(&cut, first).expect(&what), &what);
        }
    }
}

#[test]
fn an_acknowledged_checkpoint_is_durable_in_every_mode() {
    for durability in MODES {
        let storage = FaultyStorage::new();
        let engine = open(&storage, durability).unwrap();
        let mut model = Model::default();
        model.publish(&engine, 50);
        // In `OsCache` mode a checkpoint is not synced before the first acknowledgement.
        engine.flush(soon()).unwrap();
        engine.checkpoint(soon()).unwrap();
        let cut = storage.after_crash(Unsynced::Lost);
        assert!(cut.files().keys().any(|path| path.to_str().unwrap().contains("/checkpoint-")), "{durability:?}");
        model.acknowledged();
        model.check(&open(&cut, durability).unwrap(), "after a checkpoint");
    }
}

#[test]
fn after_a_kill_at_any_operation_later_acknowledgements_survive_a_power_cut() {
    for durability in [Durability::OsCache, Durability::GroupCommit] {
        let (mut n, mut step) = (1, 1);
        loop {
            let what = format!("{durability:?}, killed at operation {n}");
            let (storage, mut model) = (FaultyStorage::new(), Model::default());
            storage.be_gone(n);
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let engine = open(&storage, durability).ok()?;
                model.live(&engine);
                engine.checkpoint(soon()).ok()?;
                let removed = engine.remove_consumer("c");
                engine.shutdown(soon()).ok().filter(|()| removed.is_ok())
            }));
            storage.heal();
            let engine = open(&storage, Durability::GroupCommit).expect(&what);
            let found: Vec<_> = (0..KEYS).map(|key| engine.state(Key(key)).wait().unwrap()).collect();
            let (gaps, positions) = (engine.gaps("g").unwrap(), engine.consumers());
            let mut producer = engine.producer();
            producer.publish(Key(KEYS), Money::Deposited { cents: 1 }).unwrap();
            producer.receipts().iter().for_each(|receipt| receipt.durable().wait().unwrap());
            let cut = storage.after_crash(Unsynced::Lost);
            drop((producer, engine));
            let again = open(&cut, Durability::GroupCommit).expect(&what);
            for (key, found) in (0..).zip(found) {
                assert_eq!(again.state(Key(key)).wait().unwrap(), found, "{what}: key {key}");
            }
            assert_eq!(again.gaps("g").unwrap(), gaps, "{what}");
            let names = |reports: &[corelane::consumer::ConsumerReport]| {
                reports.iter().map(|report| (report.name.clone(), report.positions.clone())).collect::<Vec<_>>()
            };
            assert_eq!(names(&again.consumers()), names(&positions), "{what}");
            if let Ok(Some(())) = ended {
                break;
            }
            // Every operation at first, while the store is created, and then a sample.
            (n, step) = (n + step, if n > 40 { 23 } else { 1 });
        }
    }
}
