//! Unclaimed answers: each takes one slot of the lane and nothing more, whether it is claimed late, out of order or
//! never.

use std::collections::VecDeque;
use std::future::IntoFuture;
use std::time::{Duration, Instant};

use crate::common::bank::{Account, Order};
use crate::common::{block_on, poll_once, small, until};
use corelane::command::Ticket;
use corelane::error::RejectedReason;
use corelane::{Client, CommandError, Durability, Engine, Key, Outcome, Rejected, Version};

const RING: usize = 16;

fn open(dir: &std::path::Path) -> Engine<Account> {
    Engine::<Account>::open(small(dir).ring_capacity(RING).durability(Durability::OsCache)).unwrap()
}

#[test]
fn an_unclaimed_answer_takes_one_slot_however_many_answers_follow() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    let first = client.send(Key(0), Order::Deposit(1)).ticket().unwrap();
    for i in 1..=10 * RING as u64 {
        let outcome = client.send(Key(1), Order::Deposit(1)).wait().unwrap();
        assert_eq!(outcome.version, Version(i));
    }
    // The same for a task.
    for i in 1..=10 * RING as u64 {
        let outcome = block_on(client.send(Key(2), Order::Deposit(1)).into_future()).unwrap();
        assert_eq!(outcome.version, Version(i));
    }
    let outcome = client.answer(first.clone()).wait().unwrap();
    assert_eq!((outcome.key, outcome.version), (Key(0), Version(1)));
    assert!(matches!(client.answer(first).wait(), Err(CommandError::Claimed)));
}

#[test]
fn sending_is_refused_as_full_exactly_when_the_unclaimed_answers_fill_the_lane() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut client = engine.client();
    let mut kept = Vec::new();
    while kept.len() < RING {
        for _ in 0..2 * RING {
            client.send(Key(1), Order::Deposit(1)).wait().unwrap();
        }
        kept.push(client.send(Key(0), Order::Deposit(1)).ticket().unwrap());
    }
    for _ in 0..3 {
        let refused = client.send(Key(1), Order::Deposit(1)).ticket().unwrap_err();
        assert!(matches!(refused, Rejected::Full(Order::Deposit(1))), "{refused:?}");
        let refused = block_on(client.send(Key(1), Order::Deposit(1)).into_future());
        assert!(matches!(refused, Err(CommandError::NotSent(RejectedReason::Full))), "{refused:?}");
        // A slot that is given back takes one command.
        let at = kept.len() / 2;
        client.forget(kept.remove(at));
        client.send(Key(1), Order::Deposit(1)).wait().unwrap();
        kept.push(client.send(Key(0), Order::Deposit(1)).ticket().unwrap());
    }
    kept.into_iter().for_each(|ticket| assert_eq!(client.answer(ticket).wait().unwrap().key, Key(0)));
}

#[test]
fn a_durable_answer_that_is_polled_early_keeps_its_slot_and_is_returned_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path()).ring_capacity(RING).durability(Durability::Periodic(Duration::from_secs(3600)));
    let engine = Engine::<Account>::open(config).unwrap();
    let mut client = engine.client();
    let ticket = client.send(Key(0), Order::Deposit(1)).durable().ticket().unwrap();
    for i in 1..=3 * RING as u64 {
        assert_eq!(client.send(Key(1), Order::Deposit(1)).wait().unwrap().version, Version(i));
        assert!(client.try_answer(&ticket).is_none(), "not synced yet");
        assert!(poll_once(&mut Box::pin(async { client.send(Key(2), Order::Deposit(1)).durable().await })).is_none());
    }
    engine.flush(crate::common::soon()).unwrap();
    assert_eq!(client.answer(ticket.clone()).wait().unwrap().version, Version(1));
    assert!(matches!(client.try_answer(&ticket), Some(Err(CommandError::Claimed))));
}

/// A client without rings: every sent command gets a version, and its answer stays until it is claimed.
#[derive(Default)]
struct Oracle {
    versions: [u64; 4],
    unclaimed: VecDeque<(Ticket, Key, u64)>,
}

impl Oracle {
    fn next(&mut self, key: Key) -> u64 {
        self.versions[key.0 as usize] += 1;
        self.versions[key.0 as usize]
    }
}

fn is_answer(outcome: Result<Outcome, CommandError<crate::common::bank::Refused>>, key: Key, version: u64) {
    let outcome = outcome.unwrap();
    assert_eq!((outcome.key, outcome.version, outcome.repeated), (key, Version(version), false));
}

/// Takes one random step. Returns the number of commands that it sent.
fn step(client: &mut Client<Account>, oracle: &mut Oracle, random: &mut impl FnMut(u64) -> u64) -> u64 {
    let key = Key(random(4));
    let is_full = oracle.unclaimed.len() == RING;
    let order = Order::Deposit(1);
    match random(9) {
        0 | 1 => match client.send(key, order).ticket() {
            Ok(ticket) => {
                assert!(!is_full);
                let version = oracle.next(key);
                oracle.unclaimed.push_back((ticket, key, version));
                return 1;
            }
            Err(refused) => assert!(is_full && matches!(refused, Rejected::Full(_)), "{refused:?}"),
        },
        2 => match client.send(key, order).wait() {
            Err(CommandError::NotSent(RejectedReason::Full)) => assert!(is_full),
            outcome => {
                is_answer(outcome, key, oracle.next(key));
                return 1;
            }
        },
        3 => match client.send(key, order).tell() {
            Ok(()) => {
                oracle.next(key);
                return 1;
            }
            Err(refused) => assert!(is_full && matches!(refused, Rejected::Full(_)), "{refused:?}"),
        },
        4 => {
            // Cancelled: sent, and dropped before or after its answer came.
            let mut future = Box::pin(client.send(key, order).into_future());
            let answer = poll_once(&mut future);
            drop(future);
            match answer {
                Some(Err(CommandError::NotSent(RejectedReason::Full))) => assert!(is_full),
                None if is_full => {}
                Some(outcome) => {
                    is_answer(outcome, key, oracle.next(key));
                    return 1;
                }
                // Either sent, or waiting for the slot of a command whose answer is not wanted.
                None => return cancelled(client, oracle, key),
            }
        }
        5 if !oracle.unclaimed.is_empty() => {
            let at = random(oracle.unclaimed.len() as u64) as usize;
            let (ticket, _, _) = oracle.unclaimed.remove(at).unwrap();
            match random(3) {
                0 => client.forget(ticket),
                1 => drop(client.answer(ticket)),
                // Given up at once, or answered: claimed in both cases.
                _ => drop(client.answer(ticket).wait_until(Instant::now())),
            }
        }
        _ if !oracle.unclaimed.is_empty() => {
            let at = random(oracle.unclaimed.len() as u64) as usize;
            let (ticket, key, version) = oracle.unclaimed[at].clone();
            let outcome = match random(3) {
                0 => client.answer(ticket.clone()).wait(),
                1 => block_on(client.answer(ticket.clone())),
                _ => match client.try_answer(&ticket) {
                    Some(outcome) => outcome,
                    None => return 0,
                },
            };
            is_answer(outcome, key, version);
            oracle.unclaimed.remove(at);
            assert!(matches!(client.try_answer(&ticket), Some(Err(CommandError::Claimed))));
        }
        _ => {}
    }
    0
}

/// Returns 1 if the command of a dropped future had been sent, or else 0; the key's version shows it.
fn cancelled(client: &mut Client<Account>, oracle: &mut Oracle, key: Key) -> u64 {
    let outcome = match client.send(key, Order::Nothing).wait() {
        Ok(outcome) => outcome,
        // The question needs a free slot, so the cancelled command must have given its slot back.
        Err(CommandError::NotSent(RejectedReason::Full)) => panic!("a cancelled command keeps its slot"),
        Err(error) => panic!("{error}"),
    };
    let sent = outcome.version.0 - oracle.versions[key.0 as usize];
    assert!(sent <= 1, "sent more than once");
    oracle.versions[key.0 as usize] += sent;
    sent
}

#[test]
fn answers_claimed_in_any_order_given_up_or_cancelled_agree_with_an_oracle() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    for seed in 0..8_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let (mut client, mut oracle, mut sent) = (engine.client(), Oracle::default(), 0);
        let (mut fulls, mut long_kept) = (0, 0);
        for key in 0..4 {
            oracle.versions[key as usize] = engine.state(Key(key)).wait().unwrap().map_or(0, |(_, version)| version.0);
        }
        for _ in 0..3_000 {
            let before = sent;
            sent += step(&mut client, &mut oracle, &mut random);
            fulls += u64::from(oracle.unclaimed.len() == RING && sent == before);
            long_kept += u64::from(oracle.unclaimed.len() >= RING / 2);
        }
        assert!(sent > 500 && long_kept > 0, "seed {seed}: {sent} sent, {fulls} full, {long_kept} long kept");
        while let Some((ticket, key, version)) = oracle.unclaimed.pop_back() {
            is_answer(client.answer(ticket).wait(), key, version);
        }
        until("every command is answered", || client.on_their_way() == 0);
        for _ in 0..RING {
            oracle.unclaimed.push_back((client.send(Key(0), Order::Nothing).ticket().unwrap(), Key(0), 0));
        }
    }
}
