//! Damaged files of saved states, and states of other layouts: opening gives the right states or a typed error, and
//! counts the unreadable files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::common::bank::{Account, ArchivedAccount, ArchivedMoney, Money, Order, Refused};
use crate::common::{SEGMENT, env_number, small, soon};
use corelane::error::HistoryError;
use corelane::testing::FaultyStorage;
use corelane::{Aggregate, Bounded, Config, Durability, Emit, Engine, Key, Meta, OpenError, Retention, Version};
use rkyv::{Archive, Deserialize, Serialize};

type Files = BTreeMap<PathBuf, Vec<u8>>;

const KEYS: u64 = 4;

fn open<A: Aggregate>(storage: &FaultyStorage, config: Config) -> Result<Engine<A>, OpenError> {
    Engine::<A>::builder(config).faulty_storage(storage).open()
}

fn config(keeps: Option<u64>) -> Config {
    let retention = keeps.map_or_else(Retention::default, |segments| Retention::bytes(segments * SEGMENT));
    small("/s").snapshot_every(6).durability(Durability::OsCache).retention(retention)
}

/// The files of a closed store with snapshots, checkpoints and outcomes, and every state of every key.
fn store(keeps: Option<u64>) -> (Files, Vec<Vec<Account>>) {
    let storage = FaultyStorage::new();
    let mut states = vec![vec![Account::default()]; KEYS as usize];
    for round in 0..3 {
        let engine = open::<Account>(&storage, config(keeps)).unwrap();
        let mut client = engine.client();
        for n in 0..if keeps.is_some() { 60 } else { 15 } {
            let bytes = if keeps.is_some() { 1500 } else { 50 };
            for key in 0..KEYS {
                let order = if n % 3 == 0 { Order::Deposit(n) } else { Order::Notes { count: 1, bytes } };
                client.send(Key(key), order).once(1000 * round + n + 1).wait().unwrap();
                states[key as usize].push(engine.state(Key(key)).wait().unwrap().unwrap().0);
            }
            if n % 13 == 7 {
                engine.checkpoint(soon()).unwrap();
            }
        }
        engine.shutdown(soon()).unwrap();
    }
    (storage.files(), states)
}

fn saved_files(files: &Files) -> Vec<PathBuf> {
    files.keys().filter(|path| path.extension().is_some_and(|extension| extension == "snp")).cloned().collect()
}

/// Opens `files` and checks every version. Returns the number of unreadable parts, or `None` if the store is refused.
fn check_versions(files: Files, keeps: Option<u64>, states: &[Vec<Account>], what: &str) -> Option<u64> {
    let storage = FaultyStorage::with_files(files);
    let engine = match open::<Account>(&storage, config(keeps)) {
        Ok(engine) => engine,
        Err(OpenError::StatesLost { .. }) if keeps.is_some() => return None,
        Err(error) => panic!("{what}: {error}"),
    };
    for (key, states) in (0..).zip(states) {
        let newest = states.len() as u64 - 1;
        let (state, version) = engine.state(Key(key)).wait().unwrap().unwrap();
        assert_eq!((&state, version.get()), (&states[newest as usize], newest), "{what}: key {key}");
        for version in 0..=newest {
            match engine.state_at(Key(key), Version(version)) {
                Ok(past) => assert_eq!(past.state, states[version as usize], "{what}: key {key} at {version}"),
                Err(HistoryError::BeyondRetention { earliest, .. }) if keeps.is_some() => {
                    assert!(earliest.get() > version, "{what}: key {key} at {version}, earliest {earliest}");
                    engine.state_at(Key(key), earliest).unwrap();
                }
                Err(error) => panic!("{what}: key {key} at {version}: {error}"),
            }
        }
    }
    assert!(engine.compare().unwrap().differing.is_empty(), "{what}");
    // Repeats a command whose outcome is in the newest checkpoint or in the log after it.
    let repeat = engine.client().send(Key(1), Order::Deposit(1)).once(2000 + states_of_a_round(keeps)).wait().unwrap();
    assert!(repeat.repeated, "{what}");
    let unreadable = engine.snapshot_stats().unreadable;
    engine.shutdown(soon()).unwrap();
    Some(unreadable)
}

fn states_of_a_round(keeps: Option<u64>) -> u64 {
    if keeps.is_some() { 60 } else { 15 }
}

/// Damages every file of saved states at `CORELANE_DAMAGE_PLACES` places: its ends and some between.
fn damage(keeps: Option<u64>, spares_one: bool) -> (u64, u64, u64) {
    let (mut files, states) = store(keeps);
    if spares_one {
        let is_checkpoint = |path: &&PathBuf| path.to_string_lossy().contains("checkpoint-");
        let newest = files.keys().filter(is_checkpoint).max().cloned();
        files.retain(|path, _| !is_checkpoint(&path) || Some(path) == newest.as_ref());
    }
    assert_eq!(check_versions(files.clone(), keeps, &states, "undamaged"), Some(0));
    let places = env_number("CORELANE_DAMAGE_PLACES", 24);
    let (mut noticed, mut refused, mut tried) = (0, 0, 0);
    for path in saved_files(&files) {
        let bytes = files[&path].len() as u64;
        for place in 0..places {
            // Steps of 8 bytes at the head and at the tail, and larger ones between.
            let at = match place {
                0..8 => place * 8,
                8..14 => bytes - 1 - (place - 8) * 8,
                _ => 64 + (bytes - 64) * (place - 14) / (places - 14) + place % 16,
            }
            .min(bytes - 1);
            let mut flipped = files.clone();
            flipped.get_mut(&path).unwrap()[at as usize] ^= 1 << (place % 8);
            let mut truncated = files.clone();
            truncated.get_mut(&path).unwrap().truncate(at as usize);
            for (damaged, how) in [(flipped, "flipped"), (truncated, "truncated")] {
                let what = format!("{} {how} at {at} of {bytes}", path.display());
                tried += 1;
                match check_versions(damaged, keeps, &states, &what) {
                    Some(unreadable) => noticed += u64::from(unreadable > 0),
                    None => refused += 1,
                }
            }
        }
    }
    eprintln!("{tried} damages: {noticed} noticed, {refused} refused");
    (noticed, refused, tried)
}

#[test]
fn damaged_files_of_saved_states_never_give_a_wrong_state() {
    let (noticed, refused, tried) = damage(None, false);
    // Damage to padding is not noticed, nor is a file of snapshots cut between two entries.
    assert!(refused == 0 && noticed * 10 > tried * 8, "{noticed} and {refused} of {tried}");
}

#[test]
fn damaged_files_of_a_store_that_lost_its_beginning_give_right_states_or_are_refused() {
    let (noticed, refused, tried) = damage(Some(2), false);
    assert!((noticed + refused) * 10 > tried * 8, "{noticed} and {refused} of {tried}");
    // The same with only one checkpoint.
    let (noticed, refused, tried) = damage(Some(2), true);
    assert!(refused > 10 && (noticed + refused) * 10 > tried * 8, "{noticed} and {refused} of {tried}");
}

#[test]
fn a_damaged_checkpoint_is_counted_as_unreadable() {
    let (mut files, states) = store(None);
    let checkpoints: Vec<_> =
        saved_files(&files).into_iter().filter(|path| path.to_string_lossy().contains("checkpoint-")).collect();
    // Begins with the newest: an older one is not read while a newer one is valid.
    for (count, path) in (1..).zip(checkpoints.iter().rev()) {
        let bytes = files.get_mut(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        assert_eq!(check_versions(files.clone(), None, &states, "checkpoints"), Some(count));
    }
}

/// The account with another layout.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Wide<const UPGRADES: bool> {
    notes: u64,
    cents: u64,
    hash: u64,
    unused: [u64; 4],
}

impl<const UPGRADES: bool> From<Account> for Wide<UPGRADES> {
    fn from(Account { cents, notes, hash }: Account) -> Self {
        Self { notes, cents, hash, unused: [0; 4] }
    }
}

impl<const UPGRADES: bool> Aggregate for Wide<UPGRADES> {
    type Event = Money;
    type Command = Order;
    type Rejection = Refused;

    const STATE_VERSION: u16 = 2;

    fn evolve(&mut self, event: &ArchivedMoney, meta: &Meta) {
        let mut account = Account { cents: self.cents, notes: self.notes, hash: self.hash };
        account.evolve(event, meta);
        *self = account.into();
    }

    fn decide(&self, _: Order, _: &mut Emit<Money>) -> Result<(), Refused> {
        Ok(())
    }

    fn upgrade(state_version: u16, archived: &[u8]) -> Option<Self> {
        if !UPGRADES || state_version != 1 {
            return None;
        }
        let account = rkyv::access::<ArchivedAccount, rkyv::rancor::Error>(archived).ok()?;
        Some(rkyv::deserialize::<Account, rkyv::rancor::Error>(account).ok()?.into())
    }
}

fn check_wide<const UPGRADES: bool>(engine: &Engine<Wide<UPGRADES>>, states: &[Vec<Account>], keeps: bool) -> u64 {
    let mut found = 0;
    for (key, states) in (0..).zip(states) {
        let newest = states.len() as u64 - 1;
        assert_eq!(engine.state(Key(key)).wait().unwrap().unwrap().0, states[newest as usize].clone().into());
        for version in 0..=newest {
            match engine.state_at(Key(key), Version(version)) {
                Ok(past) => {
                    found += 1;
                    assert_eq!(past.state, states[version as usize].clone().into(), "key {key} at {version}");
                }
                Err(HistoryError::BeyondRetention { earliest, .. }) if keeps => {
                    assert!(earliest.get() > version);
                    engine.state_at(Key(key), earliest).unwrap_or_else(|error| panic!("key {key}: {error}"));
                }
                Err(error) => panic!("key {key} at {version}: {error}"),
            }
        }
        assert_eq!(engine.rebuild(Key(key)).unwrap().0, states[newest as usize].clone().into());
    }
    assert!(engine.compare().unwrap().differing.is_empty());
    found
}

#[test]
fn states_of_an_older_layout_are_upgraded_or_folded_again() {
    let (files, states) = store(None);
    let storage = FaultyStorage::with_files(files.clone());
    let engine = open::<Wide<true>>(&storage, config(None)).unwrap();
    check_wide(&engine, &states, false);
    let past = engine.state_at(Key(1), Version(12)).unwrap();
    assert_eq!(past.applied, 0, "the upgraded snapshot is used");
    drop(engine);
    let storage = FaultyStorage::with_files(files);
    for _ in 0..2 {
        let engine = open::<Wide<false>>(&storage, config(None)).unwrap();
        check_wide(&engine, &states, false);
        engine.checkpoint(soon()).unwrap();
    }
}

#[test]
fn states_of_an_older_layout_without_their_events_are_upgraded_or_refused() {
    let (files, states) = store(Some(2));
    let storage = FaultyStorage::with_files(files.clone());
    for _ in 0..2 {
        let engine = open::<Wide<true>>(&storage, config(Some(2))).unwrap();
        assert!(check_wide(&engine, &states, true) > 0);
        engine.checkpoint(soon()).unwrap();
    }
    let storage = FaultyStorage::with_files(files);
    let refused = open::<Wide<false>>(&storage, config(Some(2)));
    assert!(matches!(refused, Err(OpenError::StatesLost { .. })), "{refused:?}");
    // The refused store is unchanged.
    let engine = open::<Account>(&storage, config(Some(2))).unwrap();
    assert_eq!(engine.state(Key(1)).wait().unwrap().unwrap().0, *states[1].last().unwrap());
}

#[test]
fn a_checkpoint_with_a_missing_entry_is_not_used() {
    let (files, states) = store(None);
    let is_checkpoint = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("checkpoint-");
    let mut damaged = 0;
    for (path, bytes) in files.iter().filter(|(path, _)| is_checkpoint(path)) {
        // Removes the first entry after the header.
        let len = u32::from_le_bytes(bytes[80..84].try_into().unwrap()).next_multiple_of(16) as usize;
        let mut files = files.clone();
        files.get_mut(path).unwrap().drain(80..80 + len);
        let unreadable = check_versions(files, None, &states, &format!("{path:?} without its first entry"));
        damaged += unreadable.unwrap();
    }
    assert!(damaged > 0, "the damage is counted");
}
