//! The events of a command for several keys are atomic: after a power cut or a cut anywhere in the log, all of them
//! exist or none does, for every key.

use std::path::Path;

use crate::common::bank::{Account, Logged, Money, Order, folded, logged};
use crate::common::{PAGE, env_number, small, soon};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Client, Durability, Engine, Key};
use rand::{Rng, SeedableRng};

const KEYS: u64 = 5;

fn open(storage: &FaultyStorage, durability: Durability) -> Engine<Account> {
    let config = small("/s").durability(durability).outcomes_kept(1024).snapshot_every(2);
    Engine::<Account>::builder(config).faulty_storage(storage).open().unwrap()
}

/// A command that was carried out.
#[derive(Debug, Clone)]
struct Done {
    id: u64,
    /// Its keys, with their versions afterwards.
    versions: Vec<(u64, u64)>,
    sizes: Vec<usize>,
    durable: bool,
}

impl Done {
    /// The key of each event.
    fn key(&self, event: usize) -> u64 {
        self.versions[event % self.versions.len()].0
    }
}

fn send(client: &mut Client<Account>, keys: &[u64], id: u64, sizes: Vec<usize>, durable: bool) -> Done {
    let keys: Vec<Key> = keys.iter().copied().map(Key).collect();
    let sending = client.send_many(&keys, Order::NotesOf(sizes.clone())).once(id);
    let outcome = if durable { sending.durable().wait() } else { sending.wait() }.unwrap();
    assert_eq!((outcome.events as usize, outcome.repeated), (sizes.len(), false));
    Done { id, versions: outcome.versions().map(|(key, version)| (key.0, version.0)).collect(), sizes, durable }
}

/// Checks that the log holds a prefix of the commands, each whole and with its outcome. Returns the number of commands.
fn check(how: &str, engine: &Engine<Account>, done: &[Done]) -> usize {
    let log = logged(engine, 0);
    let states = folded(&log);
    for key in 0..KEYS {
        let found = engine.state(Key(key)).wait().unwrap().map(|(state, version)| (state, version.0));
        assert_eq!(found.as_ref(), states.get(&key), "{how}: the state of key {key}");
        if let Some((state, version)) = states.get(&key) {
            let past = engine.state_at(Key(key), corelane::Version(*version)).unwrap();
            assert_eq!(&past.state, state, "{how}: the newest state in the history of key {key}");
        }
    }
    assert!(engine.compare().unwrap().differing.is_empty(), "{how}");
    let mut rest = &log[..];
    let mut whole = 0;
    for command in done {
        if rest.is_empty() {
            break;
        }
        let found: Vec<_> = rest.iter().take(command.sizes.len()).map(seen).collect();
        let wanted: Vec<_> = command.sizes.iter().enumerate().map(|(i, bytes)| (command.key(i), *bytes)).collect();
        assert_eq!(found, wanted, "{how}: all keys of a command or none");
        rest = &rest[found.len()..];
        whole += 1;
    }
    assert!(rest.is_empty(), "{how}: invented events: {rest:?}");
    let durable = done.iter().rposition(|command| command.durable).map_or(0, |last| last + 1);
    assert!(whole >= durable, "{how}: {whole} commands, but {durable} had been durable");
    // The commands of the log are answered as repeats with all versions. The others are carried out for the first time,
    // from the versions that the lost ones had.
    let mut client = engine.client();
    for (i, Done { id, versions, sizes, .. }) in done.iter().enumerate() {
        let keys: Vec<Key> = versions.iter().map(|(key, _)| Key(*key)).collect();
        let again = client.send_many(&keys, Order::NotesOf(vec![1; sizes.len()])).once(*id).wait().unwrap();
        assert_eq!(again.repeated, i < whole, "{how}: command {i} of {whole}");
        let found: Vec<_> = again.versions().map(|(key, version)| (key.0, version.0)).collect();
        assert_eq!((&found, again.events as usize), (versions, sizes.len()), "{how}: command {i} of {whole}");
    }
    whole
}

fn seen(event: &Logged) -> (u64, usize) {
    let Money::Noted { text } = &event.money else { panic!("an invented event: {event:?}") };
    (event.key, text.len())
}

/// A few different keys, in any order.
fn keys(random: &mut impl Rng) -> Vec<u64> {
    let mut keys: Vec<u64> = (0..KEYS).collect();
    for i in (1..keys.len()).rev() {
        keys.swap(i, random.random_range(0..=i));
    }
    keys.truncate(random.random_range(1..=KEYS as usize));
    keys
}

#[test]
fn a_power_cut_keeps_all_keys_of_a_command_or_none() {
    let mut kept = [0; 2];
    for seed in 1..=env_number("CORELANE_POWER_CUTS", 60) {
        let durability = if seed % 2 == 0 { Durability::OsCache } else { Durability::GroupCommit };
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let storage = FaultyStorage::new();
        let engine = open(&storage, durability);
        let mut client = engine.client();
        let mut done = Vec::new();
        for id in 1..=random.random_range(5..40) {
            let bytes_max = [40, 600, 4900][random.random_range(0..3)];
            let sizes = (0..random.random_range(1..=12)).map(|_| random.random_range(0..bytes_max)).collect();
            let durable = durability == Durability::GroupCommit && random.random_bool(0.1);
            done.push(send(&mut client, &keys(&mut random), id, sizes, durable));
            if random.random_bool(0.05) {
                engine.flush(soon()).unwrap();
                done.last_mut().unwrap().durable = true;
            }
            if random.random_bool(0.03) {
                engine.checkpoint(soon()).unwrap();
            }
        }
        for unsynced in [Unsynced::Lost, Unsynced::Random(seed * 7919), Unsynced::Random(seed * 104_729)] {
            let disk = storage.after_crash(unsynced);
            let engine = open(&disk, durability);
            let whole = check(&format!("seed {seed}, {unsynced:?}"), &engine, &done);
            kept[0] += whole;
            kept[1] += done.len() - whole;
            engine.shutdown(soon()).unwrap();
            drop(engine);
            let engine = open(&disk, durability);
            assert!(engine.recovery().shards[0].torn_tail.is_none(), "seed {seed}: opens clean the second time");
        }
    }
    assert!(kept[0] > 100 && kept[1] > 100, "some survived and some did not: {kept:?}");
}

#[test]
fn a_cut_at_every_step_of_the_log_keeps_all_keys_of_a_command_or_none() {
    for checkpoint in [None, Some(2)] {
        let storage = FaultyStorage::new();
        let engine = open(&storage, Durability::OsCache);
        let mut client = engine.client();
        let (mut done, mut ends) = (Vec::new(), vec![PAGE]);
        let sizes = [vec![30], vec![5, 60, 7], vec![100, 0, 9, 40, 300], vec![0, 70, 200, 8, 90, 33], vec![]];
        let named: [&[u64]; 5] = [&[3], &[0, 1], &[4, 2, 0], &[1, 2, 3, 4, 0], &[0, 3]];
        for ((id, sizes), keys) in (1..).zip(sizes).zip(named) {
            done.push(send(&mut client, keys, id, sizes, false));
            ends.push(engine.shard_metrics()[0].appended_to.0 as usize);
            if checkpoint == Some(id) {
                engine.checkpoint(soon()).unwrap();
            }
        }
        let path = Path::new("/s/shard-0000/000000000000.seg");
        let files = storage.files();
        let end = ends[5];
        for at in (PAGE..=end).step_by(16) {
            // Zeros, and bytes that were never records: in turn, or with `CORELANE_TORN_ALL=1` both.
            let both = env_number("CORELANE_TORN_ALL", 0) == 1;
            for garbled in [false, true].into_iter().filter(|garbled| both || *garbled == (at / 16 % 2 == 1)) {
                let mut cut = files.clone();
                let bytes = &mut cut.get_mut(path).unwrap()[at..];
                bytes.fill(0);
                if garbled {
                    bytes.iter_mut().take(end - at).enumerate().for_each(|(i, byte)| *byte = 1 + (i % 250) as u8);
                }
                let disk = FaultyStorage::with_files(cut);
                disk.crash(Unsynced::Lost);
                let engine = open(&disk, Durability::OsCache);
                let whole = ends.iter().filter(|&&end| end <= at).count() - 1;
                let how = format!("checkpoint {checkpoint:?}, cut at {at}, garbled: {garbled}");
                let log = logged(&engine, 0).len();
                assert_eq!(log, done[..whole].iter().map(|done| done.sizes.len()).sum::<usize>(), "{how}");
                // A command without events leaves only its outcome.
                let found = check(&how, &engine, &done[..done.len() - 1]);
                assert_eq!(found, whole.min(4), "{how}");
                engine.shutdown(soon()).unwrap();
                drop(engine);
                let engine = open(&disk, Durability::OsCache);
                assert!(engine.recovery().shards[0].torn_tail.is_none(), "{how}: opens clean the second time");
            }
        }
    }
}
