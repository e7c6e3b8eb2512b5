//! Replays a store after a restart: every event must be there, once, in its key's order.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use corelane::{Config, Deadline, Engine, Key, ShardId};

use crate::events::{Carried, Traced as _};

/// A hasher for keys: one multiplication spreads them well enough.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = Key::new(self.0 ^ key).hash();
    }
}

/// A map by key.
pub(crate) type ByKey<T> = HashMap<u64, T, BuildHasherDefault<KeyHasher>>;

/// The number of a key's events and a digest of them in order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct History {
    pub(crate) events: u64,
    pub(crate) digest: u64,
}

impl History {
    #[inline]
    pub(crate) fn add(&mut self, trace: u64) {
        self.events += 1;
        self.digest = (self.digest ^ trace).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    }
}

/// The result of a replay.
#[derive(Debug, Clone, Default)]
pub(crate) struct Replay {
    pub(crate) events: u64,
    /// Events that retention had freed before the replay.
    pub(crate) freed: u64,
    pub(crate) keys: u64,
    pub(crate) opening: Duration,
    pub(crate) replaying: Duration,
    /// The first faults found.
    pub(crate) faults: Vec<String>,
}

const FAULTS_SHOWN: usize = 5;

impl Replay {
    fn fault(&mut self, what: impl FnOnce() -> String) {
        if self.faults.len() < FAULTS_SHOWN {
            self.faults.push(what());
        }
    }
}

#[derive(Clone, Copy)]
struct Seen {
    version: u64,
    last: u64,
    history: History,
}

/// Reopens the store and reads all of it. If the store was empty before the run (`fresh`), also checks the events' own
/// order and, if `expected` is given, the history of every key.
pub(crate) fn replay<A: Carried>(config: Config, fresh: bool, expected: Option<&ByKey<History>>) -> Result<Replay> {
    let began = Instant::now();
    let engine = Engine::<A>::open(config).context("reopening the store")?;
    let mut replay = Replay { opening: began.elapsed(), ..Replay::default() };
    for torn in engine.recovery().shards.iter().filter_map(|shard| shard.torn_tail.as_ref()) {
        replay.fault(|| format!("a torn tail after an orderly shutdown: {torn:?}"));
    }
    let began = Instant::now();
    let mut keys = ByKey::default();
    for shard in 0..engine.config().shards() {
        replay_shard(&engine, ShardId(shard), fresh, &mut replay, &mut keys)?;
    }
    replay.replaying = began.elapsed();
    replay.keys = keys.len() as u64;
    if let Some(expected) = expected
        && fresh
    {
        compare(expected, &keys, &mut replay);
    }
    engine.shutdown(Deadline::NEVER).context("closing the store")?;
    Ok(replay)
}

fn replay_shard<A: Carried>(
    engine: &Engine<A>,
    shard: ShardId,
    ordered: bool,
    replay: &mut Replay,
    keys: &mut ByKey<Seen>,
) -> Result<()> {
    let mut reader = engine.reader(shard);
    let mut next = None;
    while let Some(record) = reader.next().context("replaying")? {
        let meta = &record.meta;
        let expected = *next.get_or_insert_with(|| {
            replay.freed += meta.sequence.get();
            meta.sequence.get()
        });
        if meta.sequence.get() != expected {
            replay.fault(|| format!("shard {shard}: sequence {} instead of {expected}", meta.sequence));
        }
        next = Some(meta.sequence.get() + 1);
        replay.events += 1;
        let trace = A::Event::trace(record.event);
        // The first version of a key is 1, unless retention has freed earlier events.
        let unseen = || Seen {
            version: if replay.freed > 0 { meta.version.get() - 1 } else { 0 },
            last: 0,
            history: History::default(),
        };
        let seen = keys.entry(meta.key.get()).or_insert_with(unseen);
        if meta.version.get() != seen.version + 1 {
            let was = seen.version;
            replay.fault(|| format!("key {}: version {} after {was}", meta.key, meta.version));
        }
        if ordered && seen.history.events > 0 && !A::Event::may_follow(seen.last, trace) {
            replay.fault(|| format!("key {}: version {} is out of its producer's order", meta.key, meta.version));
        }
        if meta.key.shard(engine.config().shards()) != shard {
            replay.fault(|| format!("key {} is in shard {shard}, not its own", meta.key));
        }
        seen.version = meta.version.get();
        seen.last = trace;
        seen.history.add(trace);
    }
    Ok(())
}

fn compare(expected: &ByKey<History>, keys: &ByKey<Seen>, replay: &mut Replay) {
    for (key, history) in expected {
        let found = keys.get(key).map(|seen| seen.history);
        if found != Some(*history) {
            let found = found.map_or(0, |found| found.events);
            replay.fault(|| {
                format!(
                    "key {key}: sent {} events and read {found}, or other events, or in another order",
                    history.events
                )
            });
        }
    }
    if keys.len() > expected.len() {
        replay.fault(|| format!("{} keys that were never sent", keys.len() - expected.len()));
    }
}

#[cfg(test)]
mod tests {
    use corelane::EventLog;
    use corelane::envelope::Envelope;

    use super::*;

    fn event(user: u64, payload: &str) -> (Key, Envelope) {
        (Key::new(user), Envelope::new("test", user, payload).expect("JSON"))
    }

    fn history(payloads: &[&str]) -> History {
        let mut history = History::default();
        payloads.iter().for_each(|payload| history.add(crate::events::trace_of("test", None, None, payload)));
        history
    }

    #[test]
    fn a_missing_a_foreign_and_a_swapped_event_are_faults() {
        let dir = tempfile::tempdir().expect("a folder");
        let config = || Config::new(dir.path()).segment_bytes(1 << 20);
        let engine = EventLog::<Envelope>::open(config()).expect("opens");
        let mut events = vec![event(1, "1"), event(2, "2"), event(1, "3")];
        engine.producer().publish_batch(&mut events).expect("publishes");
        engine.shutdown(Deadline::NEVER).expect("shuts down");
        drop(engine);
        let faults = |expected: &[(u64, History)]| {
            let expected = expected.iter().copied().collect();
            replay::<corelane::Stateless<Envelope>>(config(), true, Some(&expected)).expect("replays").faults.len()
        };
        assert_eq!(faults(&[(1, history(&["1", "3"])), (2, history(&["2"]))]), 0);
        assert_eq!(faults(&[(1, history(&["1", "3", "4"])), (2, history(&["2"]))]), 1, "one is missing");
        assert_eq!(faults(&[(1, history(&["1", "3"]))]), 1, "a key that was never sent");
        assert_eq!(faults(&[(1, history(&["3", "1"])), (2, history(&["2"]))]), 1, "another order");
    }
}
