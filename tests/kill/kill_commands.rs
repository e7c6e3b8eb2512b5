//! kill -9 at random points while commands are sent: each command answered as durable exists once, and a repeat under
//! its idempotency key gets the same answer. An unanswered command exists once or not at all. `CORELANE_KILL_ROUNDS`
//! sets the rounds (25), and `CORELANE_KILL_SEED` repeats a run.

use std::collections::{HashMap, VecDeque};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use crate::common::bank::{Account, Money, Order, folded, logged};
use crate::common::killed::run_and_kill;
use crate::common::{env_number, small};
use corelane::{Config, Engine, Key};
use rand::{Rng, SeedableRng};

const KEYS: u64 = 40;
const SHARDS: u16 = 2;
/// The number of outcomes remembered per key.
const KEPT: usize = 1024;
/// The distance between the first ids of two rounds.
const IDS: u64 = 10_000_000;
/// The number of commands in flight.
const PIPELINED: usize = 100;

fn config(dir: &Path) -> Config {
    small(dir).shards(SHARDS).segment_bytes(256 << 10).outcomes_kept(KEPT)
}

/// The key of the command with this id, and the command: 1 to 4 deposits of its id.
fn command(id: u64) -> (Key, Order) {
    (Key(id.wrapping_mul(0x9e37_79b9_7f4a_7c15) % KEYS), Order::Deposits(vec![id; events(id)]))
}

fn events(id: u64) -> usize {
    1 + (id % 4) as usize
}

/// The child: sends commands until it is killed. Does nothing in the parent.
#[test]
fn child_that_commands() {
    let Some(dir) = std::env::var_os("CORELANE_TEST_DIR") else { return };
    let mut acked = OpenOptions::new().append(true).open(std::env::var_os("CORELANE_TEST_ACKED").unwrap()).unwrap();
    let engine = Engine::<Account>::open(config(Path::new(&dir))).unwrap();
    let mut client = engine.client();
    let mut open = VecDeque::new();
    let mut out = Vec::new();
    for id in env_number("CORELANE_TEST_FIRST", 0).. {
        let (key, order) = command(id);
        open.push_back((client.send(key, order).once(id).durable().ticket().unwrap(), id));
        if open.len() >= PIPELINED / 2 {
            let (ticket, id) = open.pop_front().unwrap();
            let outcome = client.answer(ticket).wait().unwrap();
            assert!(!outcome.repeated && outcome.events as usize == events(id));
            out.extend(id.to_le_bytes());
            out.extend(outcome.version.0.to_le_bytes());
            // One write call of 16-byte pairs, so that the file survives the kill without torn pairs.
            if id % 8 == 0 {
                acked.write_all(&out).unwrap();
                out.clear();
            }
        }
    }
}

/// Every command id in the log with the version of its last event, by key in log order. Checks that each command occurs
/// once and whole.
fn found(engine: &Engine<Account>) -> HashMap<u64, Vec<(u64, u64)>> {
    let mut found: HashMap<u64, Vec<(u64, u64)>> = HashMap::new();
    let mut seen = std::collections::HashSet::new();
    for shard in 0..SHARDS {
        let log = logged(engine, shard);
        for (key, (state, version)) in folded(&log) {
            let held = engine.state(Key(key)).wait().unwrap().map(|(state, version)| (state, version.0));
            assert_eq!(held, Some((state, version)), "the state of key {key}");
        }
        let mut rest = &log[..];
        while let Some(first) = rest.first() {
            let Money::Deposited { cents: id } = first.money else { panic!("an invented event: {first:?}") };
            let group = rest.iter().take_while(|event| event.money == first.money).count();
            assert_eq!(group, events(id), "command {id}: the events of one command, together and once");
            assert!(seen.insert(id), "command {id} twice");
            assert_eq!(command(id).0.0, first.key);
            let last = &rest[group - 1];
            assert!(rest[..group].iter().all(|event| event.key == first.key));
            found.entry(first.key).or_default().push((id, last.version));
            rest = &rest[group..];
        }
    }
    found
}

#[test]
fn a_killed_process_runs_no_command_twice_and_forgets_no_answer() {
    let seed = env_number("CORELANE_KILL_SEED", std::process::id().into());
    let rounds = env_number("CORELANE_KILL_ROUNDS", 25);
    eprintln!("seed {seed}, {rounds} rounds");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (mut store, acked) = (dir.path().join("store-0"), dir.path().join("acked"));
    let (mut repeats, mut unanswered) = (0, [0, 0]);
    for round in 0..rounds {
        // A new store every eight rounds, so that the log stays short.
        if round % 8 == 0 {
            std::fs::remove_dir_all(&store).ok();
            store = dir.path().join(format!("store-{round}"));
            std::fs::write(&acked, b"").unwrap();
        }
        let first = (round + 1) * IDS;
        let first_text = first.to_string();
        // Every fourth child is killed while it starts, the others shortly after their first acknowledgement.
        let env = [("CORELANE_TEST_DIR", store.as_os_str()), ("CORELANE_TEST_FIRST", first_text.as_ref())];
        let delay = Duration::from_micros(random.random_range(100..30_000));
        run_and_kill("kill_commands::child_that_commands", &env, &acked, round % 4 == 0, delay);

        let how = format!("seed {seed}, round {round}");
        let engine = Engine::<Account>::open(config(&store)).unwrap_or_else(|error| panic!("{how}: {error}"));
        let there = found(&engine);
        let versions: HashMap<u64, u64> = there.values().flatten().copied().collect();
        let pairs = std::fs::read(&acked).unwrap();
        let mut client = engine.client();
        let mut last = first;
        for pair in pairs.chunks_exact(16) {
            let id = u64::from_le_bytes(pair[..8].try_into().unwrap());
            let version = u64::from_le_bytes(pair[8..].try_into().unwrap());
            assert_eq!(versions.get(&id), Some(&version), "{how}: command {id} was acknowledged and is lost");
            last = last.max(id);
        }
        // A repeat of a remembered command gets the first answer, whatever the repeat requests.
        let remembered: Vec<_> = there
            .iter()
            .flat_map(|(key, commands)| commands.iter().rev().take(KEPT).map(move |done| (*key, *done)))
            .collect();
        for pipelined in remembered.chunks(PIPELINED / 2) {
            let tickets: Vec<_> = pipelined
                .iter()
                .map(|(key, (id, _))| client.send(Key(*key), Order::Deposit(1)).once(*id).ticket().unwrap())
                .collect();
            for ((key, (id, version)), ticket) in pipelined.iter().zip(tickets) {
                let again = client.answer(ticket).wait().unwrap();
                assert!(again.repeated, "{how}: command {id} of key {key} was carried out again");
                assert_eq!((again.version.0, again.events as usize), (*version, events(*id)), "{how}: command {id}");
                repeats += 1;
            }
        }
        assert_eq!(found(&engine), there, "{how}: a repeat changed the log");
        // Sends the last commands again, whose answers may be missing: each exists once afterwards, even if it
        // existed before.
        for id in (first..last + PIPELINED as u64).filter(|id| *id + 2 * PIPELINED as u64 > last) {
            let (key, order) = command(id);
            let outcome = client.send(key, order).once(id).durable().wait().unwrap();
            assert_eq!(outcome.repeated, versions.contains_key(&id), "{how}: command {id}");
            unanswered[usize::from(outcome.repeated)] += 1;
        }
        let after = found(&engine);
        let ids: usize = after.values().map(Vec::len).sum();
        assert!(ids >= versions.len(), "{how}");
    }
    eprintln!("{repeats} repeats checked; sent again without having been answered: {unanswered:?} (new, repeated)");
    assert!(rounds < 25 || repeats > 0, "no round carried out a command");
}
