//! Resilience: services fail; their events are retried, held back, parked and reprocessed, and none is lost.
//!
//! ```text
//! cargo run --release --example resilience
//! ```
//!
//! A database fails 5 % of its calls, analytics 3 %. Three orders are malformed and always fail. Then the database is
//! down for a while. In the end both have handled every event, each player's in order.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use corelane::consumer::{
    Consumer, HealthPolicy, HealthReport, HealthStatus, Judgement, LetterKind, LetterSelector, Retry,
};
use corelane::{Bounded, Config, Event, EventLog, EventType, EventTypeId, HandlerError, Key};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rkyv::{Archive, Serialize};

const PLAYERS: u64 = 200;
/// Orders of each player in each of the three phases.
const ORDERS: u64 = 10;

#[derive(Archive, Serialize, Bounded)]
struct Ordered {
    number: u64,
    is_malformed: bool,
}

impl Event for Ordered {
    const TYPES: &'static [EventType] = &[EventType::new(1, "ordered", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

/// The error of a service.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the connection was lost")]
    Connection,
    #[error("the service is down")]
    Down,
    #[error("the order is malformed")]
    Malformed,
}

/// A remote service, as its handler sees it.
struct Service {
    fails_percent: u32,
    random: Mutex<StdRng>,
    is_down: AtomicBool,
    takes_malformed: AtomicBool,
    /// The orders of each player in the order of storing.
    stored: Mutex<BTreeMap<Key, Vec<u64>>>,
}

impl Service {
    fn new(fails_percent: u32, takes_malformed: bool) -> Arc<Self> {
        Arc::new(Self {
            fails_percent,
            random: Mutex::new(StdRng::seed_from_u64(7)),
            is_down: AtomicBool::new(false),
            takes_malformed: AtomicBool::new(takes_malformed),
            stored: Mutex::default(),
        })
    }

    fn store(&self, player: Key, order: &ArchivedOrdered) -> Result<(), Failure> {
        sleep(Duration::from_micros(200));
        if self.is_down.load(Ordering::SeqCst) {
            return Err(Failure::Down);
        }
        if order.is_malformed && !self.takes_malformed.load(Ordering::SeqCst) {
            return Err(Failure::Malformed);
        }
        if lock(&self.random).random_range(0..100) < self.fails_percent {
            return Err(Failure::Connection);
        }
        lock(&self.stored).entry(player).or_default().push(order.number.to_native());
        Ok(())
    }

    /// Checks that it has the first `orders` orders of every player, each once and in order.
    fn check(&self, orders: u64) -> Result<()> {
        let stored = lock(&self.stored);
        ensure!(stored.len() as u64 == PLAYERS, "{} players", stored.len());
        for (player, numbers) in &*stored {
            ensure!(numbers.iter().copied().eq(0..orders), "player {player}: {numbers:?}");
        }
        Ok(())
    }
}

/// Starts the consumer that passes events to a service.
fn start(engine: &EventLog<Ordered>, name: &str, service: &Arc<Service>) -> Result<Consumer<Ordered>> {
    let service = Arc::clone(service);
    Ok(engine
        .consumer(name)
        .concurrency(8)
        .retry(Retry::exponential(2.0).base(Duration::from_millis(5)).attempts(6))
        .judge(|error: &HandlerError, _attempts| match error.downcast_ref::<Failure>() {
            // No retry helps: park it at once, and the player's later events behind it.
            Some(Failure::Malformed) => Judgement::Park,
            // The event is not the cause: the failure does not count as an attempt.
            Some(Failure::Down) => Judgement::RetryIn(Duration::from_millis(50)),
            _ => Judgement::ByPolicy,
        })
        .health(HealthPolicy::default().failure_percent_max(25).pause(Duration::from_millis(100)))
        .start(move |order, meta| Ok(service.store(meta.key, order)?))?)
}

/// Publishes the orders of one phase. In the first phase one order of each of three players is malformed. Returns the
/// time until all are durable.
fn publish(engine: &EventLog<Ordered>, phase: u64) -> Result<Duration> {
    let began = Instant::now();
    let mut producer = engine.producer();
    for number in phase * ORDERS..(phase + 1) * ORDERS {
        for player in 0..PLAYERS {
            let is_malformed = number == ORDERS / 2 && player < 3;
            producer.publish(Key::new(player), Ordered { number, is_malformed })?;
        }
    }
    engine.flush(soon())?;
    Ok(began.elapsed())
}

/// Prints notes with the time since the start.
struct Timeline(Instant);

impl Timeline {
    fn note(&self, note: impl fmt::Display) {
        println!("{:>5.2} s  {note}", self.0.elapsed().as_secs_f64());
    }
}

fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let engine = EventLog::<Ordered>::open(Config::new(dir.path()).segment_bytes(4 << 20))?;
    let (database, analytics) = (Service::new(5, false), Service::new(3, true));
    let (to_database, to_analytics) =
        (start(&engine, "database", &database)?, start(&engine, "analytics", &analytics)?);
    let timeline = Timeline(Instant::now());

    let before_outage = publish(&engine, 0)?;
    timeline.note(format!("{} orders are durable after {:.0} ms", PLAYERS * ORDERS, ms(before_outage)));
    to_database.drain(soon())?;
    to_analytics.drain(soon())?;
    let report = to_database.report();
    timeline.note(format!("the database has handled {}; {} attempts failed", report.handled, report.failed));
    ensure!(is_healthy(&to_database) && report.failed > 3, "isolated failures are not an outage: {report:?}");
    // The malformed orders, and the later orders of their players.
    let behind = ORDERS - ORDERS / 2;
    timeline.note(format!("{} letters are parked", report.letters.letters));
    ensure!(report.letters.letters as u64 == 3 * behind, "{report:?}");
    for letter in to_database.dead_letters(None, 1_000)?.iter().filter(|letter| letter.why == LetterKind::Failed) {
        timeline.note(format!("  player {}, version {}: {}", letter.key, letter.version, letter.error));
    }

    let failed = report.failed;
    database.is_down.store(true, Ordering::SeqCst);
    timeline.note("the database goes down");
    let during_outage = publish(&engine, 1)?;
    timeline.note(format!("{} further orders are durable after {:.0} ms", PLAYERS * ORDERS, ms(during_outage)));
    until("the database is unhealthy", || !is_healthy(&to_database))?;
    timeline.note(health(&to_database));
    ensure!(to_analytics.drain(soon()).is_ok() && is_healthy(&to_analytics));
    timeline.note("analytics has handled all of them: the outage does not affect it");
    sleep(Duration::from_millis(600));
    let report = to_database.report();
    timeline.note(health(&to_database));
    // The eight calls in progress, and from then on occasional probes.
    let calls = report.failed - failed;
    timeline.note(format!("{} orders wait; {calls} calls have failed since it went down", report.waiting()));
    ensure!(report.waiting() > 0 && calls < 40 && !is_healthy(&to_database), "{report:?}");

    database.is_down.store(false, Ordering::SeqCst);
    timeline.note("the database is up again");
    until("the database is healthy", || is_healthy(&to_database))?;
    timeline.note(health(&to_database));
    publish(&engine, 2)?;
    to_database.drain(soon())?;
    to_analytics.drain(soon())?;
    let report = to_database.report();
    timeline.note(format!("the database has handled {}, {} letters wait", report.handled, report.letters.letters));
    ensure!(report.handled + report.letters.letters as u64 == 3 * PLAYERS * ORDERS, "{report:?}");

    database.takes_malformed.store(true, Ordering::SeqCst);
    timeline.note("the database now accepts malformed orders; the letters are reprocessed");
    // A letter that fails again stops its player's letters, so they are requested again.
    until("no letters are left", || {
        to_database.reprocess(LetterSelector::All).is_ok() && to_database.report().letters.letters == 0
    })?;

    for (name, consumer, service) in [("database", &to_database, &database), ("analytics", &to_analytics, &analytics)] {
        let report = consumer.report();
        timeline.note(format!(
            "{name}: {} handled, {} letters handled, {} discarded, {} attempts failed ({:.1} % of the attempts succeeded)",
            report.handled,
            report.letters.handled,
            report.letters.discarded,
            report.failed,
            report.success_rate() * 100.0
        ));
        timeline.note(health(consumer));
        ensure!(report.handled + report.letters.handled == 3 * PLAYERS * ORDERS && report.waiting() == 0, "{report:?}");
        service.check(3 * ORDERS)?;
    }
    engine.shutdown(soon())?;
    println!("both have every order of every player, each once and in order");
    Ok(())
}

fn health(consumer: &Consumer<Ordered>) -> String {
    consumer.report().health.as_ref().map(HealthReport::to_string).unwrap_or_default()
}

fn is_healthy(consumer: &Consumer<Ordered>) -> bool {
    consumer.report().health.is_some_and(|health| health.status == HealthStatus::Healthy)
}

/// Waits until `condition` holds.
fn until(name: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        ensure!(Instant::now() < end, "timed out: {name}");
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}
