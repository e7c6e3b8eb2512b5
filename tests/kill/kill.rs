//! kill -9 at random points: every event acknowledged as durable exists, each key holds a prefix of its events, and
//! none is invented. `CORELANE_KILL_ROUNDS` sets the rounds (25), and `CORELANE_KILL_SEED` repeats a run.

use std::collections::{HashMap, VecDeque};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use crate::common::killed::run_and_kill;
use crate::common::{Note, env_number, read_shard, small};
use corelane::{Config, EventLog, Key, Receipt, Retention};
use rand::{Rng, SeedableRng};

const KEYS: u64 = 40;
const SHARDS: u16 = 2;

fn config(dir: &Path) -> Config {
    small(dir).shards(SHARDS).segment_bytes(256 << 10).retention(Retention::default())
}

/// The number of events in the log by key. Checks that they are 0, 1, 2, … with the right text.
fn counts(engine: &EventLog<Note>) -> HashMap<u64, u64> {
    let mut counts = HashMap::new();
    for shard in 0..SHARDS {
        for held in read_shard(engine, shard) {
            let count = counts.entry(held.key).or_insert(0);
            assert!(held.key < KEYS, "an invented key");
            assert_eq!(held.n, *count, "key {}: not a prefix", held.key);
            assert_eq!(held.version, *count + 1);
            assert_eq!(held.bytes as u64, held.n % 100, "key {}: another event than was published", held.key);
            *count += 1;
        }
    }
    counts
}

/// The child: publishes until it is killed. Does nothing in the parent.
#[test]
fn child_that_publishes() {
    let Some(dir) = std::env::var_os("CORELANE_TEST_DIR") else { return };
    let mut acked = OpenOptions::new().append(true).open(std::env::var_os("CORELANE_TEST_ACKED").unwrap()).unwrap();
    let engine = EventLog::<Note>::open(config(Path::new(&dir))).unwrap();
    let mut next = counts(&engine);
    let mut producer = engine.producer();
    let mut waiting: [VecDeque<(Receipt, u64, u64)>; SHARDS as usize] = Default::default();
    let mut out = Vec::new();
    for i in 0_u64.. {
        let key = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % KEYS;
        let n = next.entry(key).or_insert(0);
        let receipt = producer.publish(Key(key), Note::sized(*n, (*n % 100) as usize)).unwrap();
        waiting[usize::from(receipt.shard().0)].push_back((receipt, key, *n));
        *n += 1;
        if i % 8 == 0 {
            for waiting in &mut waiting {
                while waiting.front().is_some_and(|(receipt, ..)| receipt.is_durable()) {
                    let (_, key, n) = waiting.pop_front().unwrap();
                    out.extend(key.to_le_bytes());
                    out.extend(n.to_le_bytes());
                }
            }
            // One write call of 16-byte pairs, so that the file survives the kill without torn pairs.
            if !out.is_empty() {
                acked.write_all(&out).unwrap();
                out.clear();
            }
        }
    }
}

#[test]
fn a_killed_process_loses_no_acknowledged_event() {
    let seed = env_number("CORELANE_KILL_SEED", std::process::id().into());
    let rounds = env_number("CORELANE_KILL_ROUNDS", 25);
    eprintln!("seed {seed}, {rounds} rounds");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (mut store, acked) = (dir.path().join("store-0"), dir.path().join("acked"));
    let (mut events, mut acknowledged) = (0, 0);
    for round in 0..rounds {
        // A new store every ten rounds, so that its creation is killed too and the log stays short.
        if round % 10 == 0 {
            std::fs::remove_dir_all(&store).ok();
            store = dir.path().join(format!("store-{round}"));
            std::fs::write(&acked, b"").unwrap();
        }
        // Every fourth child is killed while it starts, the others shortly after their first acknowledgement.
        let env = [("CORELANE_TEST_DIR", store.as_os_str())];
        let delay = Duration::from_micros(random.random_range(100..30_000));
        run_and_kill("kill::child_that_publishes", &env, &acked, round % 4 == 0, delay);

        let engine = EventLog::<Note>::open(config(&store))
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        let found = counts(&engine);
        let pairs = std::fs::read(&acked).unwrap();
        for pair in pairs.chunks_exact(16) {
            let key = u64::from_le_bytes(pair[..8].try_into().unwrap());
            let n = u64::from_le_bytes(pair[8..].try_into().unwrap());
            assert!(
                found.get(&key).is_some_and(|count| *count > n),
                "seed {seed}, round {round}: event {n} of key {key} was acknowledged and is lost"
            );
        }
        events += found.values().sum::<u64>();
        acknowledged += pairs.len() / 16;
    }
    eprintln!("{events} events found, {acknowledged} acknowledgements checked");
    assert!(rounds < 25 || acknowledged > 0, "no round acknowledged an event");
}
