//! The shared client: every command is answered, in order, whatever tasks do with the answers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::common::bank::{Account, ArchivedMoney, Money, Order, Refused};
use crate::common::{block_on, poll_once, small, soon, until};
use crate::executor::{Counted, run, task};
use corelane::command::ExpectedVersion;
use corelane::error::{KeysError, RejectedReason};
use corelane::testing::FaultyStorage;
use corelane::{
    Aggregate, Bounded, CommandError, Config, Deadline, Durability, Emit, Engine, Key, Meta, Rejected, SharedClient,
    Version, WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

fn open(config: Config) -> Engine<Account> {
    Engine::<Account>::open(config.durability(Durability::Periodic(Duration::from_millis(1)))).unwrap()
}

/// Stops the shard of `key` between two batches until the sender is dropped.
fn stop_shard(engine: &Engine<Account>, key: Key) -> Sender<()> {
    let (go, gone) = channel::<()>();
    let (stopped_tx, stopped) = channel();
    let mut asked = Box::pin(engine.ask(key, move |_, _| {
        stopped_tx.send(()).unwrap();
        gone.recv().unwrap_err();
    }));
    assert!(poll_once(&mut asked).is_none());
    stopped.recv().unwrap();
    go
}

#[test]
fn ten_thousand_tasks_publish_and_command_at_once() {
    for threads in [1, 3] {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(small(dir.path()).shards(2).keys_expected(20_000));
        let (client, producer) = (engine.shared_client(), engine.shared_producer());
        let tasks = (0..10_000_u64).map(|n| {
            let (client, producer) = (client.clone(), producer.clone());
            task(async move {
                let key = Key(n);
                producer.publish(key, crate::common::bank::Money::Deposited { cents: 10 }).await.unwrap();
                let receipt = producer.publish(key, crate::common::bank::Money::Deposited { cents: 1 });
                receipt.with_receipt().await.unwrap().appended().await.unwrap();
                let first = client.send(key, Order::Deposit(5)).submit().await.unwrap();
                let second = client.send(key, Order::Withdraw(16)).submit().await.unwrap();
                let refused = client.send(key, Order::Withdraw(1)).await;
                assert!(matches!(refused, Err(CommandError::Rejected(Refused::NotEnough { missing: 1 }))));
                assert_eq!(second.await.unwrap().version, Version(4), "key {n}");
                assert_eq!(first.await.unwrap().version, Version(3), "key {n}");
            })
        });
        run(threads, tasks.collect::<Vec<_>>());
        for n in 0..10_000 {
            let (state, version) = engine.state(Key(n)).wait().unwrap().unwrap();
            assert_eq!((state.cents, version), (0, Version(4)), "key {n}");
        }
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn a_full_lane_makes_tasks_wait_their_turn_and_answers_everything() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).ring_capacity(2));
    let client = engine.shared_client();
    let tasks = (0..200_u64).map(|n| {
        let client = client.clone();
        task(async move {
            for version in 1..=20 {
                let sent = client.send(Key(n), Order::Deposit(1));
                let outcome = if version % 5 == 0 { sent.durable().await } else { sent.await };
                assert_eq!(outcome.unwrap().version, Version(version), "key {n}");
            }
        })
    });
    run(2, tasks.collect::<Vec<_>>());
    // Nothing is claimed here, so only the replies themselves make room.
    let tells = (0..200_u64).map(|n| {
        let client = client.clone();
        task(async move { client.send(Key(n), Order::Deposit(1)).tell().await.unwrap() })
    });
    run(2, tells.collect::<Vec<_>>());
    let last = client.send(Key(1), Order::Nothing).wait().unwrap();
    assert_eq!(last.version, Version(21));
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_command_dropped_before_it_is_sent_is_not_carried_out_and_the_next_caller_gets_its_turn() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).ring_capacity(2));
    let client = engine.shared_client();
    let key = Key(1);
    let go = stop_shard(&engine, key);
    let in_flight: Vec<_> = (0..2).map(|_| client.send(key, Order::Deposit(1)).try_submit().unwrap()).collect();
    let waker = Arc::new(Counted::default());
    let mut first = client.send(key, Order::Deposit(100)).into_future();
    let mut second = client.send(key, Order::Deposit(10)).submit();
    assert!(waker.poll(&mut first).is_pending());
    assert!(waker.poll(&mut second).is_pending());
    match client.send(key, Order::Deposit(1000)).try_submit() {
        Err(Rejected::Full(Order::Deposit(1000))) => {}
        other => panic!("the command comes back: {other:?}"),
    }
    let waited = client.send(key, Order::Deposit(1000)).wait_until(Duration::from_millis(20));
    assert!(matches!(waited, Err(CommandError::NotSent(RejectedReason::Full))), "{waited:?}");
    let before = waker.wakes();
    drop(first);
    assert_eq!(waker.wakes(), before + 1, "the next caller in the queue is woken");
    drop(go);
    let outcome = block_on(async { second.await.unwrap().await }).unwrap();
    assert_eq!(outcome.version, Version(3));
    drop(in_flight);
    assert_eq!(engine.state(key).wait().unwrap().unwrap().0.cents, 12);
    until("no waker is left", || waker.wakers() == 0);
}

#[test]
fn a_later_command_does_not_overtake_one_that_waits_for_room() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).ring_capacity(2));
    let client = engine.shared_client();
    let key = Key(1);
    let go = stop_shard(&engine, key);
    let in_flight: Vec<_> = (0..2).map(|_| client.send(key, Order::Deposit(1)).try_submit().unwrap()).collect();
    let waker = Arc::new(Counted::default());
    let mut first = client.send(key, Order::Deposit(1)).submit();
    assert!(waker.poll(&mut first).is_pending());
    drop(go);
    in_flight.into_iter().for_each(|answer| drop(answer.wait().unwrap()));
    // There is room now, but it is the turn of the first one, which has not polled yet.
    let mut later = client.send(key, Order::Deposit(1)).submit();
    assert!(waker.poll(&mut later).is_pending());
    let tried = client.send(key, Order::Deposit(1)).try_submit();
    assert!(matches!(tried, Err(Rejected::Full(_))), "{tried:?}");
    let (first, later) = (block_on(first).unwrap(), block_on(later).unwrap());
    assert_eq!(later.wait().unwrap().version, Version(4));
    assert_eq!(first.wait().unwrap().version, Version(3));
}

#[test]
fn answers_take_no_room_and_a_command_whose_answer_is_dropped_is_carried_out() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).ring_capacity(2));
    let client = engine.shared_client();
    let key = Key(1);
    let mut answers: Vec<_> =
        (0..100).map(|_| block_on(client.send(key, Order::Deposit(1)).submit()).unwrap()).collect();
    // All are answered, so the lane is empty.
    client.send(key, Order::Nothing).wait().unwrap();
    let go = stop_shard(&engine, key);
    let waker = Arc::new(Counted::default());
    // In the way of `select!` with a timer.
    let mut late = client.send(key, Order::Deposit(1)).into_future();
    assert!(waker.poll(&mut late).is_pending());
    drop(late);
    assert_eq!(waker.wakers(), 0, "a dropped answer leaves its waker");
    drop(go);
    assert_eq!(client.send(key, Order::Nothing).wait().unwrap().version, Version(101), "it was carried out");
    let last = answers.pop().unwrap();
    drop(answers);
    assert_eq!(block_on(last).unwrap().version, Version(100), "an answer waits for its owner");
}

#[test]
fn options_mean_the_same_as_for_a_client() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()));
    let client = engine.shared_client();
    let key = Key(3);
    let wrong = client.send(key, Order::Deposit(1)).expect(ExpectedVersion::Exists).wait();
    assert!(matches!(
        wrong,
        Err(CommandError::WrongVersion { expected: ExpectedVersion::Exists, found: Version(0), .. })
    ));
    let first = client.send(key, Order::Deposit(1)).once("a").durable().wait().unwrap();
    assert!(first.receipt().is_durable());
    let repeated = client.send(key, Order::Deposit(1)).once("a").wait_until(Duration::from_secs(60)).unwrap();
    assert_eq!((repeated.version, repeated.repeated), (Version(1), true));
    let answer = block_on(client.send(key, Order::Panic).submit()).unwrap();
    assert!(matches!(answer.wait(), Err(CommandError::Panicked(_))));
}

/// Starts tasks that wait for room, for a reply and for durability. Returns what each got.
fn waits_of_every_kind(
    client: &SharedClient<Account>,
    key: Key,
    stop: impl FnOnce() + Send + 'static,
) -> Vec<Result<Version, String>> {
    let (said_tx, said) = channel();
    let mut tasks: Vec<_> = (0..30_u64)
        .map(|n| {
            let (client, said) = (client.clone(), said_tx.clone());
            task(async move {
                let sent = client.send(key, Order::Deposit(1));
                let outcome = if n % 2 == 0 { sent.durable().await } else { sent.await };
                said.send(outcome.map(|outcome| outcome.version).map_err(|error| format!("{error:?}"))).unwrap();
            })
        })
        .collect();
    drop(said_tx);
    tasks.push(task(async move { stop() }));
    run(1, tasks);
    said.iter().collect()
}

#[test]
fn a_shutdown_ends_every_wait() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(open(small(dir.path()).ring_capacity(4)));
    let client = engine.shared_client();
    let go = stop_shard(&engine, Key(1));
    let closing = Arc::clone(&engine);
    let (closed_tx, closed) = channel();
    let said = waits_of_every_kind(&client, Key(1), move || {
        std::thread::spawn(move || closed_tx.send(closing.shutdown(soon())).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        drop(go);
    });
    closed.recv().unwrap().unwrap();
    let carried_out = said.iter().filter(|said| said.is_ok()).count();
    assert_eq!(said.len(), 30);
    assert!(said.iter().flat_map(|said| said.as_ref().err()).all(|error| error.contains("Closed")), "{said:?}");
    drop(engine);
    let engine = open(small(dir.path()).ring_capacity(4));
    let (_, version) = engine.state(Key(1)).wait().unwrap().unwrap();
    assert_eq!(version.0, carried_out as u64, "a command is carried out exactly if it was answered so");
    assert!(matches!(client.send(Key(1), Order::Nothing).wait(), Err(CommandError::NotSent(RejectedReason::Closed))));
}

#[test]
fn a_failed_shard_ends_every_wait() {
    let storage = FaultyStorage::new();
    let config = small("/s").ring_capacity(4).durability(Durability::GroupCommit);
    let engine = Engine::<Account>::builder(config).faulty_storage(&storage).open().unwrap();
    let client = engine.shared_client();
    // The first segment is there.
    client.send(Key(2), Order::Deposit(1)).durable().wait().unwrap();
    storage.hold(true);
    let failing = storage.clone();
    let said = waits_of_every_kind(&client, Key(1), move || {
        failing.fail_sync(1);
        failing.hold(false);
    });
    assert_eq!(said.len(), 30);
    assert!(said.iter().any(|said| said.is_err()), "a wait for durability fails: {said:?}");
    let failed = client.send(Key(1), Order::Deposit(1)).wait();
    assert!(matches!(failed, Err(CommandError::NotSent(RejectedReason::ShardFailed(_)))), "{failed:?}");
}

#[test]
fn a_wait_until_a_deadline_says_what_is_known() {
    let storage = FaultyStorage::new();
    let config = small("/s").durability(Durability::GroupCommit);
    let engine = Engine::<Account>::builder(config).faulty_storage(&storage).open().unwrap();
    let client = engine.shared_client();
    // The first segment is there.
    client.send(Key(2), Order::Deposit(1)).durable().wait().unwrap();
    storage.hold(true);
    let late = client.send(Key(1), Order::Deposit(1)).durable().wait_until(Duration::from_millis(50));
    assert!(matches!(late, Err(CommandError::NotDurable(WaitError::TimedOut))), "{late:?}");
    let go = stop_shard(&engine, Key(1));
    let late = client.send(Key(1), Order::Deposit(1)).wait_until(Duration::from_millis(50));
    assert!(matches!(late, Err(CommandError::Unanswered(WaitError::TimedOut))), "{late:?}");
    drop(go);
    storage.hold(false);
    let outcome = client.send(Key(1), Order::Deposit(1)).durable().wait_until(Deadline::NEVER).unwrap();
    assert_eq!(outcome.version, Version(3));
}

#[test]
fn a_full_lane_of_a_failed_shard_refuses_instead_of_waiting() {
    let storage = FaultyStorage::new();
    let config = small("/s").ring_capacity(2).durability(Durability::GroupCommit);
    let engine = Engine::<Account>::builder(config).faulty_storage(&storage).open().unwrap();
    let (mut client, shared) = (engine.client(), engine.shared_client());
    client.send(Key(2), Order::Deposit(1)).durable().wait().unwrap();
    let key = Key(1);
    // The sync that fails waits until the shard is stopped.
    storage.hold(true);
    storage.fail_sync(1);
    client.send(key, Order::Deposit(1)).tell().unwrap();
    let go = stop_shard(&engine, key);
    for _ in 0..2 {
        drop(client.send(key, Order::Deposit(1)).try_ticket());
    }
    let in_flight = [(); 2].map(|()| shared.send(key, Order::Deposit(1)).try_submit().unwrap());
    // One that watches the lane and is not polled again, and one behind it.
    let waker = Arc::new(Counted::default());
    let mut waiting = [(); 2].map(|()| shared.send(key, Order::Deposit(1)).submit());
    assert!(waiting.iter_mut().all(|waiting| waker.poll(waiting).is_pending()));
    storage.hold(false);
    until("the sync has failed", || engine.shard_metrics()[0].failure.is_some());
    until("both callers are woken", || waker.wakes() >= 2);
    let refused = client.send(key, Order::Deposit(1)).ticket();
    assert!(matches!(refused, Err(Rejected::ShardFailed(..))), "{refused:?}");
    let refused = block_on(client.send(key, Order::Deposit(1)).into_future());
    assert!(matches!(refused, Err(CommandError::NotSent(RejectedReason::ShardFailed(_)))), "{refused:?}");
    let refused = shared.send(key, Order::Deposit(1)).wait();
    assert!(matches!(refused, Err(CommandError::NotSent(RejectedReason::ShardFailed(_)))), "{refused:?}");
    // The one behind is refused, although the first does not leave the queue.
    let [_first, second] = waiting;
    let waited = block_on(second);
    assert!(matches!(waited, Err(Rejected::ShardFailed(..))), "{waited:?}");
    let refused = shared.send(key, Order::Deposit(1)).try_submit();
    assert!(matches!(refused, Err(Rejected::ShardFailed(..))), "{refused:?}");
    // No reply comes while the shard is stopped.
    for answer in in_flight {
        let unanswered = block_on(answer);
        let is_unknown = matches!(unanswered, Err(CommandError::Unanswered(WaitError::ShardFailed(_))));
        assert!(is_unknown, "{unanswered:?}");
    }
    drop(go);
}

#[test]
fn transfers_of_many_tasks_conserve_the_money_and_wrong_keys_send_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).ring_capacity(8));
    let client = engine.shared_client();
    for account in 0..10 {
        client.send(Key(account), Order::Deposit(100)).wait().unwrap();
    }
    let tasks = (0..100_u64).map(|n| {
        let client = client.clone();
        task(async move {
            for i in 0..20 {
                let (from, to) = (Key((n + i) % 10), Key((n + 3 * i + 1 + n % 7) % 10));
                if from == to {
                    continue;
                }
                match client.send_many(&[from, to], Order::Pay(7)).await {
                    Ok(outcome) => assert_eq!(outcome.versions().count(), 2),
                    Err(CommandError::Rejected(Refused::NotEnough { .. })) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        })
    });
    run(2, tasks.collect::<Vec<_>>());
    let cents = |key| engine.ask(Key(key), |state, _| state.cents).wait().unwrap();
    assert_eq!((0..10).map(cents).sum::<u64>(), 1000);
    let wrong = client.send_many(&[Key(1), Key(1)], Order::Pay(1)).try_submit();
    assert!(matches!(wrong, Err(Rejected::Keys(Order::Pay(1), KeysError::Twice { key: Key(1) }))), "{wrong:?}");
    let wrong = block_on(client.send_many(&[], Order::Pay(1)).into_future());
    assert!(matches!(wrong, Err(CommandError::NotSent(RejectedReason::Keys(KeysError::None)))), "{wrong:?}");
    let wrong = client.send_many(&[Key(1), Key(2)], Order::Pay(1)).expect_of(Key(3), ExpectedVersion::Exists).wait();
    assert!(matches!(wrong, Err(CommandError::NotSent(RejectedReason::Keys(KeysError::NotNamed { .. })))), "{wrong:?}");
    let wrong = client.send_many(&[Key(1), Key(2)], Order::Pay(1)).expect_of(Key(2), ExpectedVersion::NoEvents).wait();
    assert!(matches!(wrong, Err(CommandError::WrongVersion { key: Key(2), .. })), "{wrong:?}");
}

static OF_REJECTIONS: OnceLock<SharedClient<Strict>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Rejects `false`.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default)]
struct Strict;

/// Sends a command when it is dropped.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Calling {
    n: u64,
}

impl Drop for Calling {
    fn drop(&mut self) {
        DROPPED.fetch_add(self.n, Ordering::SeqCst);
        drop(OF_REJECTIONS.get().map(|client| client.send(Key(1), true).try_submit()));
    }
}

impl Aggregate for Strict {
    type Event = Money;
    type Command = bool;
    type Rejection = Calling;

    fn evolve(&mut self, _event: &ArchivedMoney, _meta: &Meta) {}

    fn decide(&self, is_right: bool, _emit: &mut Emit<Money>) -> Result<(), Calling> {
        if is_right { Ok(()) } else { Err(Calling { n: 1 }) }
    }
}

#[test]
fn a_discarded_rejection_is_dropped_outside_the_lock_and_may_call_the_client() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Strict>::open(small(dir.path()).ring_capacity(8)).unwrap();
    let client = OF_REJECTIONS.get_or_init(|| engine.shared_client());
    for n in 0..300 {
        let answer = block_on(client.send(Key(1), false).submit()).unwrap();
        if n % 2 == 0 {
            // A later reply has come, so this one is kept or waits in the lane.
            block_on(client.send(Key(1), true).into_future()).unwrap();
        }
        drop(answer);
    }
    block_on(client.send(Key(1), true).into_future()).unwrap();
    assert_eq!(DROPPED.load(Ordering::SeqCst), 300);
}
