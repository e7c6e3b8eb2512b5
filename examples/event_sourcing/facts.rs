//! Facts about the recorded matches, every one computed by the engine.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context as _, Result, ensure};
use corelane::event::Correlation;
use corelane::{Engine, Key, Time, Version};
use serde::Serialize;
use serde_json::{Number, Value, json};
use sha2::{Digest as _, Sha256};

use crate::game::{ArchivedGameEvent, LEVEL_UP, Player, UNLISTED, name_of};

/// The answers. The field names are those of the file with the expected answers.
#[derive(Serialize, PartialEq, Debug)]
pub(crate) struct Facts {
    total_events: u64,
    users: usize,
    matches: usize,
    first_timestamp: u64,
    last_timestamp: u64,
    events_by_type: BTreeMap<String, u64>,
    events_by_user_top20: Vec<(u64, u64)>,
    median_timestamp: u64,
    events_up_to_median: u64,
    users_up_to_median: usize,
    totals: Totals,
    all_users_final_state_sha256: String,
    all_users_state_at_median_sha256: String,
    chosen_users: Vec<Chosen>,
    time_travel: Vec<Travelled>,
}

#[derive(Serialize, PartialEq, Debug)]
struct Totals {
    kill_count: i64,
    inventory: i64,
}

#[derive(Serialize, PartialEq, Debug)]
struct Chosen {
    user_id: u64,
    why: &'static str,
    events: u64,
    #[serde(rename = "final")]
    now: Value,
    sequence_sha256: String,
}

#[derive(Serialize, PartialEq, Debug)]
struct Travelled {
    user_id: u64,
    timestamp: u64,
    events_up_to: u64,
    state: Option<Value>,
}

/// The results of one pass over all events in time order.
#[derive(Default)]
struct Passed {
    users: BTreeSet<Key>,
    matches: HashSet<Correlation>,
    first: Time,
    last: Time,
    median: Time,
    events: u64,
    unlisted: BTreeMap<String, u64>,
}

/// A user now and at the median time.
struct User {
    now: Player,
    then: Player,
    /// The number of events, which is the version.
    events: u64,
    events_then: u64,
    level_ups: u64,
}

/// Computes all answers. Also returns the greatest number of events applied to compute a past state.
pub(crate) fn answer(engine: &Engine<Player>) -> Result<(Facts, u64)> {
    let counts = engine.counts()?;
    let passed = pass(engine, counts.events)?;
    ensure!(passed.events == counts.events, "{} events were counted and {} read", counts.events, passed.events);
    let (mut users, mut applied_max) = (BTreeMap::new(), 0);
    for &key in &passed.users {
        let (now, Version(events)) = engine.state(key).wait()?.context("a key with events has a state")?;
        let past = engine.state_at(key, passed.median)?;
        applied_max = applied_max.max(past.applied);
        let (mut stream, mut level_ups) = (engine.stream(key, Version(1))?, 0);
        while let Some(record) = stream.next()? {
            level_ups += u64::from(record.meta.event_type == LEVEL_UP);
        }
        users.insert(key.get(), User { now, then: past.state, events, events_then: past.version.get(), level_ups });
    }
    let past = || users.iter().filter(|(_, user)| user.events_then > 0);
    let chosen = choose(&users);
    let time_travel = chosen.iter().take(3).map(|(id, _)| {
        let user = &users[id];
        let state = (user.events_then > 0).then(|| shown(&user.then));
        Travelled { user_id: *id, timestamp: passed.median.as_ms(), events_up_to: user.events_then, state }
    });
    let listed = counts.by_type.iter().filter(|(kind, count)| kind.id != UNLISTED && *count > 0);
    let mut most: Vec<_> = users.iter().map(|(id, user)| (*id, user.events)).collect();
    most.sort_by_key(|(id, events)| (Reverse(*events), *id));
    most.truncate(20);
    let facts = Facts {
        total_events: counts.events,
        users: users.len(),
        matches: passed.matches.len(),
        first_timestamp: passed.first.as_ms(),
        last_timestamp: passed.last.as_ms(),
        events_by_type: listed.map(|(kind, count)| (kind.name.to_owned(), *count)).chain(passed.unlisted).collect(),
        events_by_user_top20: most,
        median_timestamp: passed.median.as_ms(),
        events_up_to_median: users.values().map(|user| user.events_then).sum(),
        users_up_to_median: past().count(),
        totals: Totals {
            kill_count: users.values().map(|user| user.now.kills).sum(),
            inventory: users.values().map(|user| user.now.carried()).sum(),
        },
        all_users_final_state_sha256: digest(users.iter().map(|(id, user)| (*id, &user.now))),
        all_users_state_at_median_sha256: digest(past().map(|(id, user)| (*id, &user.then))),
        time_travel: time_travel.collect(),
        chosen_users: chosen
            .iter()
            .map(|&(user_id, why)| {
                let user = &users[&user_id];
                let sequence_sha256 = sequence(engine, Key(user_id))?;
                Ok(Chosen { user_id, why, events: user.events, now: shown(&user.now), sequence_sha256 })
            })
            .collect::<Result<_>>()?,
    };
    Ok((facts, applied_max))
}

fn pass(engine: &Engine<Player>, events: u64) -> Result<Passed> {
    let mut passed = Passed::default();
    let mut all = engine.events_between(Time(0), Time(u64::MAX));
    while let Some(record) = all.next()? {
        let time = record.meta.time;
        if passed.events == 0 {
            passed.first = time;
        }
        if passed.events == (events - 1) / 2 {
            passed.median = time;
        }
        ensure!(time >= passed.last, "the events are not in time order");
        passed.last = time;
        passed.events += 1;
        passed.users.insert(record.meta.key);
        passed.matches.insert(record.meta.correlation);
        if let ArchivedGameEvent::Unlisted { name, .. } = record.event {
            *passed.unlisted.entry(name.to_string()).or_default() += 1;
        }
    }
    Ok(passed)
}

/// Chooses ten users. Each rule chooses among the users that earlier rules left; ties go to the lowest id.
fn choose(users: &BTreeMap<u64, User>) -> Vec<(u64, &'static str)> {
    let mut chosen: Vec<(u64, &'static str)> = Vec::new();
    let mut take = |count, why, rank: fn(&User) -> i64| {
        let mut left: Vec<_> = users.iter().filter(|(id, _)| chosen.iter().all(|(other, _)| other != *id)).collect();
        left.sort_by_key(|(id, user)| (Reverse(rank(user)), **id));
        let best: Vec<_> = left.into_iter().take(count).map(|(id, _)| (*id, why)).collect();
        chosen.extend(best);
    };
    take(3, "most events on the smaller side of the median timestamp", |user| {
        user.events_then.min(user.events - user.events_then).cast_signed()
    });
    take(2, "most events", |user| user.events.cast_signed());
    take(2, "most kills", |user| user.now.kills);
    take(2, "largest inventory", |user| user.now.carried());
    take(1, "most level-ups", |user| user.level_ups.cast_signed());
    chosen
}

/// Returns the hash of the times and types in a user's stream.
fn sequence(engine: &Engine<Player>, key: Key) -> Result<String> {
    let mut digest = Sha256::new();
    let mut stream = engine.stream(key, Version(1))?;
    while let Some(record) = stream.next()? {
        let name = match record.event {
            ArchivedGameEvent::Unlisted { name, .. } => name,
            _ => name_of(record.meta.event_type),
        };
        digest.update(format!("{},{name}\n", record.meta.time.as_ms()));
    }
    Ok(hex(digest))
}

/// Returns the hash of states in the order of ids.
fn digest<'s>(states: impl Iterator<Item = (u64, &'s Player)>) -> String {
    let mut digest = Sha256::new();
    for (id, player) in states {
        let Player { level, kills, last_update_ms, .. } = player;
        let (x, y) = position(player);
        digest.update(format!("{id},{level},{kills},{},{x},{y},{last_update_ms}\n", player.carried()));
    }
    hex(digest)
}

fn shown(player: &Player) -> Value {
    let (x, y) = position(player);
    json!({
        "level": player.level,
        "kill_count": player.kills,
        "inventory": player.carried(),
        "x": x,
        "y": y,
        "last_update": player.last_update_ms,
    })
}

fn position(player: &Player) -> (Value, Value) {
    player.position.map_or((Value::Null, Value::Null), |place| (number(place.x), number(place.y)))
}

/// Returns a number in its shortest decimal form, as the file writes it.
fn number(number: f64) -> Value {
    let is_whole = number.fract() == 0.0 && number.abs() < 1e15;
    if is_whole { Value::from(number as i64) } else { Number::from_f64(number).map_or(Value::Null, Value::Number) }
}

pub(crate) fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
