//! Measures the forms for tasks beside the forms for threads, in turn, in one run.
//!
//! ```text
//! cargo run --release -p perf --bin tasks -- publish    # one task beside one thread, through a shared producer
//! cargo run --release -p perf --bin tasks -- commands   # 1,000 tasks that share a client beside one client's thread
//! cargo run --release -p perf --bin tasks -- durable    # 64 tasks that wait for `durable`: one client or 64
//! cargo run --release -p perf --bin tasks -- wake       # the time to wake a waiter, by the number of waiters
//! ```
//!
//! `durable` runs in the default mode (`GroupCommit`), the others with the log in the system's cache (`OsCache`). Each
//! prints medians of the rounds and their ratio.
#![expect(clippy::print_stdout, reason = "a tool's results belong on standard output")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use corelane::{
    Aggregate, Bounded, Config, Deadline, Durability, Emit, Engine, Event, EventType, EventTypeId, Key, Meta,
    Retention, SharedClient,
};
use rkyv::{Archive, Deserialize, Serialize};
use tokio::runtime::{Builder, Runtime};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 7;
const ACCOUNTS: u64 = 1000;
/// Events that a round of `publish` publishes.
const EVENTS: u64 = 1_000_000;
/// Commands that a round of `commands` sends.
const COMMANDS: u64 = 1_000_000;
/// Tasks that share a client.
const TASKS: u64 = 1000;
/// Commands that each of them has in flight.
const PIPELINED: usize = 50;
/// Tasks that wait for durability.
const DURABLE_TASKS: u64 = 64;
const DURABLE_ROUND: Duration = Duration::from_secs(2);

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Deposited {
    cents: u64,
}

impl Event for Deposited {
    const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default)]
struct Account {
    cents: u64,
}

impl Aggregate for Account {
    type Event = Deposited;
    type Command = u64;
    type Rejection = u8;

    fn evolve(&mut self, event: &ArchivedDeposited, _meta: &Meta) {
        self.cents += event.cents.to_native();
    }

    fn decide(&self, cents: u64, emit: &mut Emit<Deposited>) -> Result<(), u8> {
        if cents == 0 {
            return Err(0);
        }
        emit.event(Deposited { cents });
        Ok(())
    }
}

fn main() -> Result<()> {
    let what = std::env::args().nth(1).context("usage: tasks publish|commands|durable|wake")?;
    let dir = tempfile::tempdir_in("target")
        .context("creating a folder for the store in ./target (run from the repository's root)")?;
    let config = Config::new(dir.path()).retention(Retention::bytes(512 << 20));
    let config = if what == "durable" { config } else { config.durability(Durability::OsCache) };
    let engine = Arc::new(Engine::<Account>::open(config)?);
    // Prepares the first segment.
    engine.client().send(Key::new(0), 1).wait()?;
    match what.as_str() {
        "publish" => publish(&engine)?,
        "commands" => commands(&engine)?,
        "durable" => durable(&engine)?,
        "wake" => wake(&engine)?,
        other => bail!("there is no measure \"{other}\""),
    }
    engine.shutdown(Deadline::NEVER)?;
    Ok(())
}

fn multi_thread() -> Result<Runtime> {
    Builder::new_multi_thread().enable_time().build().context("starting a runtime")
}

/// Prints the medians of two kinds of rounds, in millions a second, and the ratio of the first to the second.
fn show(names: [&str; 2], rates: &mut [Vec<f64>; 2]) {
    let [first, second] = rates.each_mut().map(|rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    println!("{:<44} {:.4} M/s", names[0], first / 1e6);
    println!("{:<44} {:.4} M/s", names[1], second / 1e6);
    println!("ratio {:.2}", first / second);
}

fn rate(count: u64, run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    run()?;
    Ok(count as f64 / began.elapsed().as_secs_f64())
}

fn publish(engine: &Engine<Account>) -> Result<()> {
    let producer = engine.shared_producer();
    let runtime = Builder::new_current_thread().build()?;
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        let of_task = rate(EVENTS, || {
            runtime.block_on(async {
                for i in 0..EVENTS {
                    producer.publish(Key::new(i % ACCOUNTS), Deposited { cents: 1 }).await?;
                }
                anyhow::Ok(())
            })?;
            Ok(engine.flush(Deadline::NEVER)?)
        })?;
        let of_thread = rate(EVENTS, || {
            for i in 0..EVENTS {
                producer.publish(Key::new(i % ACCOUNTS), Deposited { cents: 1 }).wait()?;
            }
            Ok(engine.flush(Deadline::NEVER)?)
        })?;
        // The first round warms up.
        if round > 0 {
            rates[0].push(of_task);
            rates[1].push(of_thread);
        }
    }
    show(["one task, shared producer", "one thread, shared producer"], &mut rates);
    Ok(())
}

/// Sends this task's part of the commands, `PIPELINED` at a time.
async fn pipeline(client: SharedClient<Account>, task: u64) -> Result<()> {
    let mut answers = Vec::with_capacity(PIPELINED);
    let mut left = COMMANDS / TASKS;
    while left > 0 {
        let count = left.min(PIPELINED as u64);
        for i in 0..count {
            answers.push(client.send(Key::new((task * 7 + i) % ACCOUNTS), 1).submit().await?);
        }
        for answer in answers.drain(..) {
            ensure!(answer.await?.events == 1, "an answer for one event");
        }
        left -= count;
    }
    Ok(())
}

fn commands(engine: &Arc<Engine<Account>>) -> Result<()> {
    let (runtime, shared) = (multi_thread()?, engine.shared_client());
    let mut client = engine.client();
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        let of_tasks = rate(COMMANDS, || {
            runtime.block_on(async {
                let tasks: Vec<_> = (0..TASKS).map(|task| tokio::spawn(pipeline(shared.clone(), task))).collect();
                for task in tasks {
                    task.await??;
                }
                Ok(())
            })
        })?;
        let of_thread = rate(COMMANDS, || {
            let mut tickets = std::collections::VecDeque::new();
            for i in 0..COMMANDS {
                tickets.push_back(client.send(Key::new(i % ACCOUNTS), 1).ticket()?);
                if tickets.len() == 2048 {
                    for ticket in tickets.drain(..1024) {
                        client.answer(ticket).wait()?;
                    }
                }
            }
            for ticket in tickets {
                client.answer(ticket).wait()?;
            }
            Ok(())
        })?;
        if round > 0 {
            rates[0].push(of_tasks);
            rates[1].push(of_thread);
        }
    }
    show(["1,000 tasks, one shared client", "one thread, a client of its own"], &mut rates);
    let expected = 1 + 2 * (ROUNDS as u64 + 1) * COMMANDS;
    let mut total = 0;
    for account in 0..ACCOUNTS {
        total += engine.ask(Key::new(account), |state, _| state.cents).wait()?;
    }
    ensure!(total == expected, "the accounts hold {total} cents instead of {expected}");
    Ok(())
}

/// Runs `answer` in 64 tasks again and again for one round. Returns the answers per second.
fn durable_round<F>(runtime: &Runtime, mut task: impl FnMut(u64, Instant) -> F) -> Result<f64>
where
    F: Future<Output = Result<u64>> + Send + 'static,
{
    let began = Instant::now();
    let end = began + DURABLE_ROUND;
    let answers = runtime.block_on(async {
        let tasks: Vec<_> = (0..DURABLE_TASKS).map(|n| tokio::spawn(task(n, end))).collect();
        let mut answers = 0;
        for task in tasks {
            answers += task.await??;
        }
        anyhow::Ok(answers)
    })?;
    Ok(answers as f64 / began.elapsed().as_secs_f64())
}

fn durable(engine: &Arc<Engine<Account>>) -> Result<()> {
    let (runtime, shared) = (multi_thread()?, engine.shared_client());
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        let of_shared = durable_round(&runtime, |n, end| {
            let client = shared.clone();
            async move {
                let mut answers = 0;
                while Instant::now() < end {
                    client.send(Key::new(n), 1).durable().await?;
                    answers += 1;
                }
                Ok(answers)
            }
        })?;
        // Each task has a client behind a lock, awaits the answer, lets go of the lock and awaits the receipt.
        let of_own = durable_round(&runtime, |n, end| {
            let client = tokio::sync::Mutex::new(engine.client());
            async move {
                let mut answers = 0;
                while Instant::now() < end {
                    let outcome = client.lock().await.send(Key::new(n), 1).await?;
                    outcome.receipt().durable().await?;
                    answers += 1;
                }
                Ok(answers)
            }
        })?;
        if round > 0 {
            rates[0].push(of_shared);
            rates[1].push(of_own);
        }
    }
    show(["64 tasks, one shared client, durable", "64 tasks, 64 clients, lock then receipt"], &mut rates);
    Ok(())
}

/// Counts wake-ups.
struct Count(AtomicU64);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Returns the nanoseconds from the shard's continuing until `waiters` waits for appends are woken, for each.
fn wake_round(engine: &Engine<Account>, waiters: u64) -> Result<f64> {
    let ((go, gone), (stopped, is_stopped)) = (channel::<()>(), channel());
    let mut stopping = Box::pin(engine.ask(Key::new(0), move |_, _| {
        // Both ends are dropped before the shard continues.
        let _ended = (stopped.send(()), gone.recv());
    }));
    ensure!(stopping.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())).is_pending(), "the shard stops");
    is_stopped.recv()?;
    let producer = engine.shared_producer();
    let receipt = producer.publish(Key::new(0), Deposited { cents: 1 }).with_receipt().wait()?;
    let count = Arc::new(Count(AtomicU64::new(0)));
    let waker = Waker::from(Arc::clone(&count));
    let mut waits: Vec<_> = (0..waiters).map(|_| Box::pin(receipt.appended())).collect();
    for wait in &mut waits {
        ensure!(wait.as_mut().poll(&mut TaskContext::from_waker(&waker)).is_pending(), "the shard is stopped");
    }
    let began = Instant::now();
    drop(go);
    while count.0.load(Ordering::Relaxed) < waiters {
        std::thread::yield_now();
    }
    let ns = began.elapsed().as_nanos() as f64 / waiters as f64;
    ensure!(
        matches!(waits[0].as_mut().poll(&mut TaskContext::from_waker(&waker)), Poll::Ready(Ok(_))),
        "it is appended"
    );
    Ok(ns)
}

fn wake(engine: &Engine<Account>) -> Result<()> {
    for waiters in [1000, 10_000, 100_000] {
        let mut ns = (0..ROUNDS).map(|_| wake_round(engine, waiters)).collect::<Result<Vec<_>>>()?;
        ns.sort_by(f64::total_cmp);
        println!("{waiters:>7} waiters: {:.0} ns each", ns[ROUNDS / 2]);
    }
    Ok(())
}
