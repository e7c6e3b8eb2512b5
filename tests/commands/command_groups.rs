//! The events of a command and its outcome are atomic: after a power cut or damage all of them exist or none does, and
//! every command answered as durable exists.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::bank::{Account, Logged, Money, Order, Refused, folded, logged};
use crate::common::{PAGE, SEGMENT, env_number, small, soon};
use corelane::event::{Encode, Scratch};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Client, CommandError, Durability, Engine, Key};
use rand::{Rng, SeedableRng};

const KEYS: u64 = 3;

fn open(storage: &FaultyStorage, durability: Durability) -> Engine<Account> {
    let config = small("/s").durability(durability).outcomes_kept(1024);
    Engine::<Account>::builder(config).faulty_storage(storage).open().unwrap()
}

/// A command that was carried out: its id and the versions of its events.
#[derive(Debug, Clone)]
struct Done {
    key: u64,
    id: u64,
    first: u64,
    last: u64,
    sizes: Vec<usize>,
    durable: bool,
}

fn notes(client: &mut Client<Account>, key: u64, id: u64, sizes: Vec<usize>, durable: bool) -> Done {
    let sending = client.send(Key(key), Order::NotesOf(sizes.clone())).once(id);
    let outcome = if durable { sending.durable().wait() } else { sending.wait() }.unwrap();
    assert_eq!((outcome.events as usize, outcome.repeated), (sizes.len(), false));
    Done { key, id, first: outcome.version.0 - sizes.len() as u64 + 1, last: outcome.version.0, sizes, durable }
}

/// Checks that the log holds a prefix of the commands, each whole and with its outcome. Returns the number of commands.
fn check(how: &str, engine: &Engine<Account>, done: &[Done]) -> usize {
    let log = logged(engine, 0);
    for (key, (state, version)) in folded(&log) {
        let found = engine.state(Key(key)).wait().unwrap().map(|(state, version)| (state, version.0));
        assert_eq!(found, Some((state, version)), "{how}: the state of key {key}");
    }
    let mut rest = &log[..];
    let mut whole = 0;
    for command in done {
        if rest.is_empty() {
            break;
        }
        let found: Vec<_> = rest.iter().take(command.sizes.len()).map(seen).collect();
        let wanted: Vec<_> = (command.first..).zip(&command.sizes).map(|(v, bytes)| (command.key, v, *bytes)).collect();
        assert_eq!(found, wanted, "{how}: all of a command or nothing");
        rest = &rest[found.len()..];
        whole += 1;
    }
    assert!(rest.is_empty(), "{how}: invented events: {rest:?}");
    let durable = done.iter().rposition(|command| command.durable).map_or(0, |last| last + 1);
    assert!(whole >= durable, "{how}: {whole} commands, but {durable} had been durable");
    // The commands of the log are answered as repeats. The others are carried out for the first time.
    let mut client = engine.client();
    for (i, Done { key, id, last, sizes, .. }) in done.iter().enumerate() {
        let again = client.send(Key(*key), Order::NotesOf(vec![1; sizes.len()])).once(*id).wait().unwrap();
        assert_eq!(again.repeated, i < whole, "{how}: command {i} of {whole}");
        assert_eq!((again.version.0, again.events as usize), (*last, sizes.len()), "{how}: command {i} of {whole}");
    }
    whole
}

fn seen(event: &Logged) -> (u64, u64, usize) {
    let Money::Noted { text } = &event.money else { panic!("an invented event: {event:?}") };
    (event.key, event.version, text.len())
}

#[test]
fn a_power_cut_keeps_all_of_a_command_or_nothing() {
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
            done.push(notes(&mut client, random.random_range(0..KEYS), id, sizes, durable));
            if random.random_bool(0.05) {
                engine.flush(soon()).unwrap();
                done.last_mut().unwrap().durable = true;
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
fn a_remembered_rejection_is_lost_with_the_events_before_it() {
    for seed in 1..=env_number("CORELANE_POWER_CUTS", 60) {
        let storage = FaultyStorage::new();
        let engine = open(&storage, Durability::OsCache);
        let mut client = engine.client();
        client.send(Key(1), Order::Deposit(10)).once(1).wait().unwrap();
        let durable = seed % 2 == 0;
        if durable {
            engine.flush(soon()).unwrap();
        }
        let refuse =
            |client: &mut Client<Account>, id: u64| match client.send(Key(1), Order::Withdraw(id)).once(id).wait() {
                Err(CommandError::Rejected(Refused::NotEnough { missing })) => missing,
                other => panic!("{other:?}"),
            };
        assert_eq!(refuse(&mut client, 100), 90);
        let flushed = seed % 4 == 0;
        if flushed {
            engine.flush(soon()).unwrap();
        }
        client.send(Key(1), Order::NotesOf(vec![600; 3])).once(2).wait().unwrap();
        let disk = storage.after_crash(if seed % 3 == 0 { Unsynced::Lost } else { Unsynced::Random(seed * 7919) });
        let engine = open(&disk, Durability::OsCache);
        let mut client = engine.client();
        let cents = engine.ask(Key(1), |state, _| state.cents).wait().unwrap();
        let first = client.send(Key(1), Order::Deposit(10)).once(1).wait().unwrap();
        assert!(first.repeated || !durable, "seed {seed}");
        assert_eq!(first.repeated, cents == 10, "seed {seed}: an outcome exists if and only if its event does");
        client.send(Key(1), Order::Deposit(3)).wait().unwrap();
        // A rejection that the power cut took is decided again, and then less is missing.
        let missing = refuse(&mut client, 100);
        assert!(if flushed { missing == 90 } else { [90, 87].contains(&missing) }, "seed {seed}: {missing}");
        assert!(first.repeated || missing == 87, "seed {seed}: a later outcome exists without an earlier one");
    }
}

/// The number of bytes of a note's record, by the length of its text.
fn note_bytes(text_bytes_max: usize) -> Vec<usize> {
    let (mut out, mut scratch) = (rkyv::util::AlignedVec::<16>::with_capacity(64 << 10), Scratch::new(1 << 10));
    out.resize(64 << 10, 0);
    let mut len = |bytes| Money::Noted { text: "n".repeat(bytes) }.encode(&mut out, &mut scratch).unwrap();
    (0..=text_bytes_max).map(|bytes| (48 + len(bytes)).next_multiple_of(16)).collect()
}

#[test]
fn a_command_goes_whole_into_the_segment_if_it_just_fits_and_else_into_the_next() {
    let note_bytes = note_bytes(13_000);
    let mut places = [0; 2];
    for (delta, noted) in (-5_i64..=5).flat_map(|steps| [(16 * steps, false), (16 * steps, true)]) {
        let storage = FaultyStorage::new();
        let engine = open(&storage, Durability::OsCache);
        let mut client = engine.client();
        let mut done = vec![notes(&mut client, 0, 1, vec![10, 20], false)];
        let sizes = vec![700, 0, 90];
        let needed = sizes.iter().map(|&bytes| note_bytes[bytes]).sum::<usize>() + if noted { 48 } else { 0 };
        // Fills the segment so that `needed + delta` bytes are left, in steps of 16 bytes.
        let target = (SEGMENT as i64 - needed as i64 - delta) as u64;
        let mut id = 2;
        loop {
            let at = engine.shard_metrics()[0].appended_to.0;
            let left = (target - at) as usize;
            if left == 0 {
                break;
            }
            // Leaves room for another note and its outcome; the last note fills the segment up.
            let bytes = (0..=13_000).rev().find(|&bytes| {
                let taken = note_bytes[bytes] + 48;
                taken == left || taken + note_bytes[0] + 48 <= left
            });
            done.push(notes(&mut client, id % KEYS, id, vec![bytes.unwrap()], false));
            id += 1;
        }
        if noted {
            done.push(notes(&mut client, 1, 1000, sizes, false));
        } else {
            client.send(Key(1), Order::NotesOf(sizes.clone())).wait().unwrap();
        }
        let last = logged(&engine, 0).len() - 3;
        let segments: Vec<u64> = logged(&engine, 0)[last..].iter().map(|event| event.offset / SEGMENT).collect();
        let fits = delta >= 0;
        assert_eq!(segments, vec![u64::from(!fits); 3], "room for {delta} bytes more than needed");
        places[usize::from(fits)] += 1;
        for unsynced in [None, Some(Unsynced::Lost), Some(Unsynced::Random(7)), Some(Unsynced::Random(8))] {
            let disk = match unsynced {
                Some(unsynced) => storage.after_crash(unsynced),
                None => FaultyStorage::with_files(storage.files()),
            };
            let engine = open(&disk, Durability::OsCache);
            if noted {
                let whole = check(&format!("{delta}, {unsynced:?}"), &engine, &done);
                assert!(unsynced.is_some() || whole == done.len(), "killed: {whole} of {}", done.len());
            } else {
                let found = logged(&engine, 0).len();
                assert!(found <= last || found == last + 3, "{delta}, {unsynced:?}: {found} of {last} + 3");
                assert!(unsynced.is_some() || found == last + 3, "killed: {found} of {last} + 3");
            }
        }
    }
    assert_eq!(places, [10, 12]);
}

fn first_segment() -> PathBuf {
    Path::new("/s/shard-0000/000000000000.seg").to_owned()
}

/// Opens the store with other bytes in its first segment. `ends` are the ends of the commands. Returns the number of
/// commands found.
fn damaged(how: &str, files: &BTreeMap<PathBuf, Vec<u8>>, bytes: Vec<u8>, done: &[Done], ends: &[usize]) -> usize {
    let mut files = files.clone();
    files.insert(first_segment(), bytes.clone());
    let disk = FaultyStorage::with_files(files);
    let engine = open(&disk, Durability::OsCache);
    let torn = engine.recovery().shards[0].torn_tail.clone().map(|tail| tail.offset.0 as usize);
    let whole = check(how, &engine, done);
    // Zeros between two commands are an ordinary end of the log.
    let end = ends[whole];
    assert_eq!(torn, bytes[end..].iter().any(|byte| *byte != 0).then_some(end), "{how}");
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = open(&disk, Durability::OsCache);
    assert!(engine.recovery().shards[0].torn_tail.is_none(), "{how}: opens clean the second time");
    whole
}

#[test]
fn a_command_cut_anywhere_in_its_records_is_lost_whole() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, Durability::OsCache);
    let mut client = engine.client();
    let mut done = Vec::new();
    let mut ends = vec![PAGE];
    for (id, sizes) in
        [(1, vec![30]), (2, vec![5, 60]), (3, vec![100, 0, 9, 40, 300]), (4, vec![0, 70, 200, 8, 90, 33])]
    {
        done.push(notes(&mut client, id % 2, id, sizes, false));
        ends.push(engine.shard_metrics()[0].appended_to.0 as usize);
    }
    let end = ends[4];
    let files = storage.files();
    let content = files[&first_segment()].clone();
    assert_eq!(damaged("undamaged", &files, content.clone(), &done, &ends), 4);
    // `CORELANE_TORN_ALL=1` damages in each way at every step. By default the ways take turns.
    let all = env_number("CORELANE_TORN_ALL", 0) == 1;
    for at in (ends[2]..end).step_by(16) {
        let whole = if at < ends[3] { 2 } else { 3 };
        let kinds = if all { 0..4 } else { at / 16 % 4..at / 16 % 4 + 1 };
        for kind in kinds {
            let mut bytes = content.clone();
            let (how, may_be_padding) = match kind {
                0 => {
                    bytes[at..].fill(0);
                    ("zeroed from", false)
                }
                1 => {
                    let garbled = bytes[at..end].iter_mut().enumerate();
                    garbled.for_each(|(i, byte)| *byte = !*byte ^ (i as u8).wrapping_mul(31));
                    ("garbled from", false)
                }
                2 => {
                    bytes[at + at / 16 % 16] ^= 0x10;
                    ("one byte changed near", true)
                }
                _ => {
                    bytes[at..at + 16].fill(0);
                    ("a hole at", true)
                }
            };
            let found = damaged(&format!("{how} {at}"), &files, bytes, &done, &ends);
            // No checksum covers the padding after a record.
            assert!(found == whole || may_be_padding && found == 4, "{how} {at}: {found} commands, not {whole}");
        }
    }
}

#[test]
fn the_answer_to_a_command_that_waited_for_a_segment_reaches_its_client_although_another_client_leaves() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, Durability::OsCache);
    // In the shard's list, a client that leaves precedes the one that waits, and one that stays follows it.
    let mut leaving = engine.client();
    leaving.send(Key(0), Order::Nothing).wait().unwrap();
    let mut waiting = engine.client();
    waiting.send(Key(0), Order::Nothing).wait().unwrap();
    let mut staying = engine.client();
    let mut version = 0;
    for round in 0..50 {
        staying.send(Key(0), Order::Nothing).wait().unwrap();
        // Each command takes more than half a segment, and the keeper cannot prepare segments.
        storage.hold(true);
        let order = || Order::NotesOf(vec![14_000; 3]);
        let tickets: Vec<_> = (0..3).map(|_| waiting.send(Key(1), order()).ticket().unwrap()).collect();
        drop(leaving);
        std::thread::sleep(std::time::Duration::from_millis(2));
        storage.hold(false);
        for ticket in tickets {
            version += 3;
            let outcome = waiting.answer(ticket).wait_until(soon().unwrap()).unwrap_or_else(|e| panic!("{round}: {e}"));
            assert_eq!((outcome.version.0, outcome.events), (version, 3), "round {round}");
        }
        // The next client to leave precedes the others again.
        (leaving, waiting, staying) = (waiting, staying, engine.client());
    }
}
