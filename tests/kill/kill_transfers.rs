//! kill -9 at random points while money is transferred between accounts: money is conserved at every restart, each
//! transfer exists for both accounts or for none, and a repeat gets the first answer. `CORELANE_KILL_ROUNDS` sets the
//! rounds (25), and `CORELANE_KILL_SEED` repeats a run.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use crate::common::bank::{Account, Money, Order, folded, logged};
use crate::common::killed::run_and_kill;
use crate::common::{env_number, small, soon};
use corelane::{CommandError, Config, Engine, Key, Placement};
use rand::{Rng, SeedableRng};

const SHARDS: u16 = 2;
const ZONES: u64 = 6;
/// Accounts of a zone.
const ACCOUNTS: u64 = 10;
const OPENING_CENTS: u64 = 1000;
/// The distance between the first ids of two rounds.
const IDS: u64 = 10_000_000;
/// The number of transfers in flight.
const PIPELINED: usize = 50;
/// Bytes of an acknowledged transfer: its id, and the versions of both accounts.
const ACK_BYTES: usize = 24;

fn config(dir: &Path) -> Config {
    let zones = Placement::new("zone", 1, |key| key.0 >> 32);
    small(dir).shards(SHARDS).segment_bytes(256 << 10).outcomes_kept(1024).snapshot_every(20).placement(zones)
}

fn account(zone: u64, n: u64) -> Key {
    Key(zone << 32 | n)
}

fn accounts(zone: u64) -> Vec<Key> {
    (0..ACCOUNTS).map(|n| account(zone, n)).collect()
}

/// The accounts of the transfer with this id, the payer first, and the amount.
fn transfer(id: u64) -> ([Key; 2], u64) {
    let mixed = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    let (zone, from, step) = (mixed % ZONES, mixed / 8 % ACCOUNTS, 1 + mixed / 128 % (ACCOUNTS - 1));
    ([account(zone, from), account(zone, (from + step) % ACCOUNTS)], mixed / 4096 % 300)
}

/// The child: transfers until it is killed. Does nothing in the parent.
#[test]
fn child_that_transfers() {
    let Some(dir) = std::env::var_os("CORELANE_TEST_DIR") else { return };
    let mut acked = OpenOptions::new().append(true).open(std::env::var_os("CORELANE_TEST_ACKED").unwrap()).unwrap();
    let engine = Engine::<Account>::open(config(Path::new(&dir))).unwrap();
    let mut client = engine.client();
    for zone in 0..ZONES {
        // Once in the life of the store. The zone's own key, which no transfer names, keeps the outcome.
        let keys = [&[account(zone, ACCOUNTS)][..], &accounts(zone)].concat();
        let mut cents = vec![OPENING_CENTS; keys.len()];
        cents[0] = 0;
        client.send_many(&keys, Order::Deposits(cents)).once(0).wait().unwrap();
    }
    let mut open = VecDeque::new();
    let mut out = Vec::new();
    for id in env_number("CORELANE_TEST_FIRST", 0).. {
        let (keys, cents) = transfer(id);
        open.push_back((client.send_many(&keys, Order::Pay(cents)).once(id).durable().ticket().unwrap(), id));
        if open.len() >= PIPELINED / 2 {
            let (ticket, id) = open.pop_front().unwrap();
            match client.answer(ticket).wait() {
                Ok(outcome) => {
                    assert!(!outcome.repeated && outcome.events == 2);
                    out.extend(id.to_le_bytes());
                    outcome.versions().for_each(|(_, version)| out.extend(version.0.to_le_bytes()));
                }
                Err(CommandError::Rejected(_)) => {}
                Err(other) => panic!("{other:?}"),
            }
            // One write call of whole acknowledgements, so that the file survives the kill without torn ones.
            if id % 8 == 0 && !out.is_empty() {
                acked.write_all(&out).unwrap();
                out.clear();
            }
        }
    }
}

/// Checks that every transfer in the log is whole, that the states are those of the log, and that no money has come or
/// gone. Returns the number of transfers.
fn check(engine: &Engine<Account>, how: &str) -> usize {
    let mut transfers = 0;
    for shard in 0..SHARDS {
        let log = logged(engine, shard);
        for (key, (state, version)) in folded(&log) {
            let held = engine.state(Key(key)).wait().unwrap().map(|(state, version)| (state, version.0));
            assert_eq!(held, Some((state, version)), "{how}: the state of key {key}");
        }
        let mut rest = &log[..];
        while let [first, others @ ..] = rest {
            match first.money {
                Money::Deposited { .. } => {
                    // The opening deposits of a zone.
                    assert!(others.len() >= ACCOUNTS as usize, "{how}: a part of a zone's opening");
                    rest = &others[ACCOUNTS as usize..];
                }
                Money::Withdrawn { cents } => {
                    let paid = others.first().unwrap_or_else(|| panic!("{how}: half a transfer: {first:?}"));
                    assert_eq!(paid.money, Money::Deposited { cents }, "{how}: {first:?}");
                    assert_ne!(paid.key, first.key);
                    transfers += 1;
                    rest = &others[1..];
                }
                Money::Noted { .. } => panic!("{how}: an invented event: {first:?}"),
            }
        }
    }
    for zone in 0..ZONES {
        let cents = accounts(zone).into_iter().map(|key| engine.ask(key, |state, _| state.cents).wait().unwrap());
        let total: u64 = cents.sum();
        let is_open = engine.state(account(zone, ACCOUNTS)).wait().unwrap().is_some();
        assert_eq!(total, if is_open { OPENING_CENTS * ACCOUNTS } else { 0 }, "{how}: the money of zone {zone}");
    }
    transfers
}

#[test]
fn a_killed_process_neither_loses_nor_makes_money() {
    let seed = env_number("CORELANE_KILL_SEED", std::process::id().into());
    let rounds = env_number("CORELANE_KILL_ROUNDS", 25);
    eprintln!("seed {seed}, {rounds} rounds");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (mut store, acked) = (dir.path().join("store-0"), dir.path().join("acked"));
    let (mut transfers, mut repeats) = (0, 0);
    for round in 0..rounds {
        // A new store every eight rounds, so that the log stays short.
        if round % 8 == 0 {
            std::fs::remove_dir_all(&store).ok();
            store = dir.path().join(format!("store-{round}"));
            std::fs::write(&acked, b"").unwrap();
        }
        let first = (round + 1) * IDS;
        let first_text = first.to_string();
        let before = std::fs::read(&acked).unwrap().len();
        // Every fourth child is killed while it starts, the others shortly after their first acknowledgement.
        let env = [("CORELANE_TEST_DIR", store.as_os_str()), ("CORELANE_TEST_FIRST", first_text.as_ref())];
        let delay = Duration::from_micros(random.random_range(100..30_000));
        run_and_kill("kill_transfers::child_that_transfers", &env, &acked, round % 4 == 0, delay);

        let how = format!("seed {seed}, round {round}");
        let engine = Engine::<Account>::open(config(&store)).unwrap_or_else(|error| panic!("{how}: {error}"));
        let found = check(&engine, &how);
        transfers += found;
        // The newest acknowledged transfers, while their outcomes are remembered.
        let acks = std::fs::read(&acked).unwrap();
        let mut client = engine.client();
        for ack in acks[before..].chunks_exact(ACK_BYTES).rev().take(200) {
            let number = |at: usize| u64::from_le_bytes(ack[at..at + 8].try_into().unwrap());
            let (id, (keys, cents)) = (number(0), transfer(number(0)));
            let again = client.send_many(&keys, Order::Pay(cents)).once(id).wait_until(soon().unwrap()).unwrap();
            assert!(again.repeated, "{how}: transfer {id} was acknowledged and is lost");
            let versions: Vec<u64> = again.versions().map(|(_, version)| version.0).collect();
            assert_eq!(versions, [number(8), number(16)], "{how}: transfer {id}");
            repeats += 1;
        }
        assert_eq!(check(&engine, &how), found, "{how}: a repeat changed the log");
        engine.shutdown(soon()).unwrap();
    }
    eprintln!("{transfers} transfers found, {repeats} repeats checked");
    assert!(rounds < 25 || (transfers > 0 && repeats > 0), "no round carried out a transfer");
}
