//! The same tasks on the runtimes that applications have: tokio with one thread, tokio with several, and the tests' own
//! executor.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use crate::common::bank::{Account, Money, Order};
use crate::common::{poll_once, small, soon, until};
use crate::executor::{run, task};
use corelane::testing::FaultyStorage;
use corelane::{CommandError, Config, Durability, Engine, Key, Version};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Commands that one task has in flight at once.
const PIPELINED: u64 = 50;

fn open(config: Config) -> Engine<Account> {
    Engine::<Account>::open(config.durability(Durability::Periodic(Duration::from_millis(1)))).unwrap()
}

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap()
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

/// Resolves with the first of the two futures that completes; the first one is polled first.
async fn first_of<A: Future + Unpin, B: Future + Unpin>(mut a: A, mut b: B) -> Result<A::Output, B::Output> {
    std::future::poll_fn(|context| {
        if let Poll::Ready(done) = Pin::new(&mut a).poll(context) {
            return Poll::Ready(Ok(done));
        }
        Pin::new(&mut b).poll(context).map(Err)
    })
    .await
}

/// What one task of an application does. `sleep` makes a timer of the runtime, which fires while the shard is stopped.
async fn a_session<T: Future + Unpin>(engine: Arc<Engine<Account>>, key: Key, sleep: impl Fn(Duration) -> T) {
    let (client, producer) = (engine.shared_client(), engine.shared_producer());
    // Publish; the receipt is durable.
    let receipt = producer.publish(key, Money::Deposited { cents: 100 }).with_receipt().await.unwrap();
    assert!(receipt.durable().await.unwrap().is_durable());
    // Commands, pipelined.
    let mut answers = Vec::new();
    for _ in 0..PIPELINED {
        answers.push(client.send(key, Order::Withdraw(2)).submit().await.unwrap());
    }
    for (n, answer) in (2..).zip(answers) {
        assert_eq!(answer.await.unwrap().version, Version(n));
    }
    let refused = client.send(key, Order::Withdraw(1)).durable().await;
    assert!(matches!(refused, Err(CommandError::Rejected(_))), "{refused:?}");
    // A timer that fires first. The answer that was not waited for is still carried out, once.
    let go = stop_shard(&engine, key);
    let mut answer = client.send(key, Order::Deposit(7)).durable().submit().await.unwrap();
    for _ in 0..2 {
        let late = first_of(&mut answer, sleep(Duration::from_millis(5))).await;
        assert!(late.is_err(), "the shard is stopped");
    }
    let abandoned = first_of(client.send(key, Order::Deposit(1)).into_future(), sleep(Duration::from_millis(5))).await;
    assert!(abandoned.is_err(), "the shard is stopped");
    drop(go);
    let outcome = answer.await.unwrap();
    assert_eq!(outcome.version, Version(PIPELINED + 2));
    assert!(outcome.receipt().is_durable());
    // A question sees everything that was sent before.
    let (cents, version) = engine.ask(key, |account, version| (account.cents, version)).await.unwrap();
    assert_eq!((cents, version), (8, Version(PIPELINED + 3)));
}

/// Runs sessions with `run`, and checks the log after a restart.
fn check(run: impl FnOnce(Arc<Engine<Account>>)) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(open(small(dir.path()).ring_capacity(64)));
    run(Arc::clone(&engine));
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = open(small(dir.path()));
    for key in 1..=SESSIONS {
        let (account, version) = engine.state(Key(key)).wait().unwrap().unwrap();
        assert_eq!((account.cents, version), (8, Version(PIPELINED + 3)), "key {key}");
    }
}

/// Sessions, one after the other, because each stops the shard.
const SESSIONS: u64 = 3;

async fn sessions<T: Future + Unpin>(engine: Arc<Engine<Account>>, sleep: impl Fn(Duration) -> T) {
    for key in 1..=SESSIONS {
        a_session(Arc::clone(&engine), Key(key), &sleep).await;
    }
}

#[test]
fn tasks_work_on_a_tokio_runtime_of_one_thread() {
    check(|engine| current_thread().block_on(sessions(engine, |d| Box::pin(tokio::time::sleep(d)))));
}

#[test]
fn tasks_work_on_a_tokio_runtime_of_several_threads() {
    check(|engine| {
        let runtime = multi_thread();
        let task = runtime.spawn(sessions(engine, |d| Box::pin(tokio::time::sleep(d))));
        runtime.block_on(task).unwrap();
    });
}

#[test]
fn tasks_work_on_an_executor_of_twenty_lines() {
    // A timer of one thread, which needs no runtime.
    let sleep = |duration| {
        let (fired, fires) = tokio::sync::oneshot::channel::<()>();
        std::thread::spawn(move || {
            std::thread::sleep(duration);
            drop(fired);
        });
        fires
    };
    check(|engine| run(2, [task(sessions(engine, sleep))]));
}

/// A task whose wakers can be counted: while one lives, it holds a reference to `wakers`. Says when it first waits.
struct Watched {
    inner: Pin<Box<dyn Future<Output = ()> + Send>>,
    wakers: Arc<()>,
    waits: Option<UnboundedSender<()>>,
}

struct WatchedWaker {
    _counted: Arc<()>,
    waker: Waker,
}

impl Wake for WatchedWaker {
    fn wake(self: Arc<Self>) {
        self.waker.wake_by_ref();
    }
}

impl Future for Watched {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let watched = WatchedWaker { _counted: Arc::clone(&self.wakers), waker: context.waker().clone() };
        let polled = self.inner.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::new(watched))));
        if let Some(waits) = self.waits.take() {
            waits.send(()).unwrap();
        }
        polled
    }
}

/// Waits until `tasks` more tasks wait.
async fn all_wait(waiting: &mut UnboundedReceiver<()>, tasks: usize) {
    for _ in 0..tasks {
        waiting.recv().await.unwrap();
    }
}

/// Drops the runtime while its tasks wait for room, answers, durability and a question. The shard is stopped and the
/// disk holds every sync, so no wait can end by itself.
fn check_dropped(runtime: Runtime) {
    let storage = FaultyStorage::new();
    let config = small("/s").ring_capacity(4).durability(Durability::GroupCommit);
    let open = || Engine::<Account>::builder(config.clone()).faulty_storage(&storage).open().unwrap();
    let engine = open();
    let (client, producer, key) = (engine.shared_client(), engine.shared_producer(), Key(1));
    // The first segment is there.
    client.send(Key(2), Order::Deposit(1)).durable().wait().unwrap();
    storage.hold(true);

    let wakers = Arc::new(());
    let accepted = Arc::new(AtomicU64::new(0));
    let (waits, mut waiting) = unbounded_channel();
    let start = |inner: Pin<Box<dyn Future<Output = ()> + Send>>| {
        runtime.spawn(Watched { inner, wakers: Arc::clone(&wakers), waits: Some(waits.clone()) });
    };
    let publish = |n: u64| {
        let (producer, accepted) = (producer.clone(), Arc::clone(&accepted));
        task(async move {
            let receipt = producer.publish(key, Money::Deposited { cents: n }).with_receipt().await.unwrap();
            accepted.fetch_add(n, SeqCst);
            panic!("the disk holds its syncs: {:?}", receipt.durable().await);
        })
    };
    let command = |n: u64| {
        let (client, accepted) = (client.clone(), Arc::clone(&accepted));
        task(async move {
            let answer = client.send(key, Order::Deposit(n)).durable().submit().await.unwrap();
            accepted.fetch_add(n, SeqCst);
            panic!("the disk holds its syncs: {:?}", answer.await);
        })
    };
    // These are appended, and wait for the sync.
    for n in 0..3 {
        start(publish(1 << (2 * n)));
        start(command(2 << (2 * n)));
    }
    runtime.block_on(all_wait(&mut waiting, 6));
    until("they are appended", || engine.state(key).wait().unwrap().is_some_and(|(_, version)| version == Version(6)));
    // These fill the lanes of the stopped shard, and then wait for room.
    let go = stop_shard(&engine, key);
    for n in 3..15 {
        start(publish(1 << (2 * n)));
        start(command(2 << (2 * n)));
    }
    let asked = engine.ask(key, |account, _| account.cents);
    start(task(async move { panic!("the shard is stopped: {:?}", asked.await) }));
    runtime.block_on(all_wait(&mut waiting, 25));
    let accepted = accepted.load(SeqCst);
    assert!(
        (1..24).contains(&(accepted >> 6).count_ones()),
        "some lie in the lanes and some wait for room: {accepted:b}"
    );

    drop(runtime);
    until("no task and no waker is left", || Arc::strong_count(&wakers) == 1);

    drop(go);
    storage.hold(false);
    let outcome = client.send(key, Order::Deposit(1 << 40)).durable().wait().unwrap();
    assert_eq!(outcome.version, Version(u64::from(accepted.count_ones()) + 1));
    let receipt = producer.publish(key, Money::Deposited { cents: 1 << 41 }).with_receipt().wait().unwrap();
    receipt.durable().wait().unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let (account, _) = open().state(key).wait().unwrap().unwrap();
    assert_eq!(account.cents, accepted + (3 << 40), "exactly what was accepted is in the log");
}

#[test]
fn a_dropped_runtime_of_one_thread_leaves_nothing_behind_and_loses_nothing() {
    check_dropped(current_thread());
}

#[test]
fn a_dropped_runtime_of_several_threads_leaves_nothing_behind_and_loses_nothing() {
    check_dropped(multi_thread());
}
