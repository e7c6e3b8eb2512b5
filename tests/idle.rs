//! An idle engine sleeps. A binary of its own, because it counts what every thread of the process does.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Note, small, soon};
use corelane::{Durability, EventLog, Key, Retention, Wait};

/// A thread of the engine as the kernel sees it.
#[derive(Debug, PartialEq, Eq)]
struct Thread {
    name: String,
    /// `S`: it sleeps until somebody wakes it.
    state: char,
    /// How often it went to sleep or waited for the disk.
    sleeps: u64,
    /// Calls of the kernel that read or write, which leave their own count.
    calls: u64,
}

fn threads() -> BTreeMap<u64, Thread> {
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line[name.len()..].trim_start_matches(':').trim().to_owned()
    };
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| {
            let path = task.unwrap().path();
            let id = path.file_name()?.to_str()?.parse().ok()?;
            let status = std::fs::read_to_string(path.join("status")).ok()?;
            let io = std::fs::read_to_string(path.join("io")).unwrap_or_default();
            let calls = |name| field(&io, name).parse().unwrap_or(0);
            let thread = Thread {
                name: field(&status, "Name"),
                state: field(&status, "State").chars().next()?,
                sleeps: field(&status, "voluntary_ctxt_switches").parse().ok()?,
                calls: calls("syscr") + calls("syscw"),
            };
            thread.name.starts_with("corelane-").then_some((id, thread))
        })
        .collect()
}

/// The threads once all of them have slept through a tenth of a second.
fn at_rest() -> BTreeMap<u64, Thread> {
    let (end, mut before) = (soon().unwrap(), threads());
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = threads();
        if now == before && now.values().all(|thread| thread.state == 'S') {
            return now;
        }
        assert!(Instant::now() < end, "they never rest: {now:?}");
        before = now;
    }
}

#[test]
fn an_idle_engine_that_parks_is_woken_by_nobody() {
    for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_millis(5)), Durability::OsCache] {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention::bytes(1 << 20).age(Duration::from_secs(3600));
        let config = small(dir.path()).shards(2).durability(durability).wait(Wait::Park).retention(retention);
        let engine = EventLog::<Note>::open(config).unwrap();
        let (mut producer, shared) = (engine.producer(), engine.shared_producer());
        for n in 0..1000 {
            producer.publish(Key(n), Note::sized(n, 100)).unwrap();
            shared.publish(Key(n), Note::new(n)).unwrap();
        }
        // Flushes that meet each other's events ask for more than one sync; none may be asked for that never comes.
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (engine, shared) = (&engine, shared.clone());
                scope.spawn(move || {
                    for n in 0..300 {
                        shared.publish(Key(thread), Note::new(n)).unwrap();
                        engine.flush(soon()).unwrap();
                    }
                });
            }
        });
        let before = at_rest();
        assert_eq!(before.len(), 6, "the keeper, the saver, and two for each shard: {before:?}");
        let began = Instant::now();
        std::thread::sleep(Duration::from_secs(2));
        let after = threads();
        let seconds = began.elapsed().as_secs() + 1;
        for (id, before) in &before {
            let (after, name) = (&after[id], &before.name);
            let (woken, calls) = (after.sleeps - before.sleeps, after.calls - before.calls);
            // The keeper looks at the segments' age once a second, and asks nobody for it.
            let woken_max = if name == "corelane-keeper" { seconds } else { 0 };
            assert!(woken <= woken_max, "{durability:?}: {name} was woken {woken} times in {seconds} s");
            assert_eq!(calls, 0, "{durability:?}: {name} read or wrote");
        }
        assert!(after.values().all(|thread| thread.state == 'S' || thread.name == "corelane-keeper"), "{after:?}");
        // And wakes up.
        producer.publish(Key(1), Note::new(1)).unwrap().appended().wait_until(soon().unwrap()).unwrap();
        engine.shutdown(soon()).unwrap();
    }
}
