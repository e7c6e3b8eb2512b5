//! The four services. They sleep instead of working, and check the order in which they receive events.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use corelane::consumer::Consumer;
use corelane::{EventLog, HandlerError, Key, Meta, Version};

use crate::game::{ArchivedGameEvent, BOUGHT, GameEvent, KILLED, LEVELLED_UP, MOVED};

pub(crate) const NAMES: [&str; 4] = ["analytics", "database", "notifications", "leaderboard"];

/// The event types of each service.
const TYPES: [&[&str]; 4] =
    [&[MOVED, KILLED, BOUGHT, LEVELLED_UP], &[KILLED, BOUGHT, LEVELLED_UP], &[LEVELLED_UP], &[KILLED, LEVELLED_UP]];

/// The events that a service has received, over all its starts.
#[derive(Default)]
pub(crate) struct Seen(Mutex<Received>);

#[derive(Default)]
struct Received {
    /// The last version of each key.
    last: HashMap<Key, Version>,
    events: u64,
    /// A key with an event out of order or delivered twice.
    wrong: Option<Key>,
}

impl Seen {
    fn note(&self, meta: &Meta) {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = received.last.insert(meta.key, meta.version);
        if last.is_some_and(|last| last >= meta.version) {
            received.wrong = Some(meta.key);
        }
        received.events += 1;
    }

    /// Returns the number of events, and a key whose events were out of order.
    pub(crate) fn get(&self) -> (u64, Option<Key>) {
        let received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (received.events, received.wrong)
    }
}

/// The running services, in the order of [`NAMES`].
pub(crate) struct Services(pub(crate) [Consumer<GameEvent>; 4]);

impl Services {
    /// Starts the services. With a cost of 0 each handles events in place on its own thread.
    pub(crate) fn start(engine: &EventLog<GameEvent>, cost_percent: u32, seen: &[Arc<Seen>; 4]) -> Result<Self> {
        let cost = |ms: u32| Duration::from_micros(u64::from(ms * cost_percent * 10));
        let at_once = |keys: usize| if cost_percent == 0 { 1 } else { keys };
        let analytics = engine
            .subscribe(NAMES[0])
            .types(TYPES[0].to_vec())
            .concurrency(at_once(64))
            .start(taking(cost(3), &seen[0]))?;
        let database = engine
            .subscribe(NAMES[1])
            .types(TYPES[1].to_vec())
            .concurrency(at_once(32))
            .start(taking(cost(10), &seen[1]))?;
        let (mail_cost, mailed) = (cost(100), Arc::clone(&seen[2]));
        let notifications = engine.subscribe(NAMES[2]).types(TYPES[2].to_vec()).concurrency(at_once(64)).start_with(
            move |_event: &ArchivedGameEvent, meta: &Meta, call: &_| {
                // The mail carries the idempotency key, by which the mail server drops duplicates.
                call.effect(|key| send_mail(&key.to_string(), mail_cost, meta, call.attempt()))?;
                mailed.note(meta);
                Ok(())
            },
        )?;
        let leaderboard = engine
            .subscribe(NAMES[3])
            .types(TYPES[3].to_vec())
            .concurrency(at_once(16))
            .start(taking(cost(5), &seen[3]))?;
        Ok(Self([analytics, database, notifications, leaderboard]))
    }

    /// Returns the event types of the service with this index.
    pub(crate) fn types(at: usize) -> &'static [&'static str] {
        TYPES[at]
    }
}

/// Returns a handler that takes `cost` per event.
fn taking(
    cost: Duration,
    seen: &Arc<Seen>,
) -> impl Fn(&ArchivedGameEvent, &Meta) -> Result<(), HandlerError> + Send + Sync + 'static {
    let seen = Arc::clone(seen);
    move |_, meta| {
        if !cost.is_zero() {
            sleep(cost);
        }
        seen.note(meta);
        Ok(())
    }
}

/// Sends a mail to a server that is sometimes busy.
fn send_mail(_idempotency_key: &str, cost: Duration, meta: &Meta, attempt: u32) -> Result<(), HandlerError> {
    if !cost.is_zero() {
        sleep(cost);
    }
    if attempt == 1 && meta.key.hash().is_multiple_of(32) { Err("the mail server is busy".into()) } else { Ok(()) }
}
