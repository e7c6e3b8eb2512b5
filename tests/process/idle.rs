//! An idle engine sleeps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::common::own_process::is_own_process;
use crate::common::{Note, small, soon};
use corelane::{Durability, EventLog, Key, Retention, Wait};

/// The kernel's view of a thread of the engine.
#[derive(Debug, PartialEq, Eq)]
struct Thread {
    name: String,
    /// `S` if it sleeps until it is woken.
    state: char,
    /// The number of times that it went to sleep or waited for the disk.
    sleeps: u64,
    /// The number of system calls that read or write, which the kernel counts separately.
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

/// Returns the threads once all of them have slept for a tenth of a second.
fn at_rest() -> BTreeMap<u64, Thread> {
    let (end, mut before) = (soon().unwrap(), threads());
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = threads();
        if now == before && now.values().all(|thread| thread.state == 'S') {
            return now;
        }
        assert!(Instant::now() < end, "the threads never rest: {now:?}");
        before = now;
    }
}

#[test]
fn no_thread_of_an_idle_parking_engine_wakes_up() {
    if !is_own_process("idle::no_thread_of_an_idle_parking_engine_wakes_up") {
        return;
    }
    for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_millis(5)), Durability::OsCache] {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention::bytes(1 << 20).age(Duration::from_secs(3600));
        let config = small(dir.path()).shards(2).durability(durability).wait(Wait::Park).retention(retention);
        let engine = EventLog::<Note>::open(config).unwrap();
        let (mut producer, shared) = (engine.producer(), engine.shared_producer());
        for n in 0..1000 {
            producer.publish(Key(n), Note::sized(n, 100)).unwrap();
            shared.publish(Key(n), Note::new(n)).wait().unwrap();
        }
        // Concurrent flushes request several syncs, and none of them may be missed.
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (engine, shared) = (&engine, shared.clone());
                scope.spawn(move || {
                    for n in 0..300 {
                        shared.publish(Key(thread), Note::new(n)).wait().unwrap();
                        engine.flush(soon()).unwrap();
                    }
                });
            }
        });
        let before = at_rest();
        assert_eq!(before.len(), 7, "a notifier, a keeper, a snapshotter, and two threads per shard: {before:?}");
        let began = Instant::now();
        std::thread::sleep(Duration::from_secs(2));
        let after = threads();
        let seconds = began.elapsed().as_secs() + 1;
        for (id, before) in &before {
            let (after, name) = (&after[id], &before.name);
            let (woken, calls) = (after.sleeps - before.sleeps, after.calls - before.calls);
            // The keeper checks the segments' age once a second and needs no other thread for it.
            let woken_max = if name == "corelane-keeper" { seconds } else { 0 };
            assert!(woken <= woken_max, "{durability:?}: {name} woke up {woken} times in {seconds} s");
            assert_eq!(calls, 0, "{durability:?}: {name} read or wrote");
        }
        assert!(after.values().all(|thread| thread.state == 'S' || thread.name == "corelane-keeper"), "{after:?}");
        // The engine wakes up for an event.
        producer.publish(Key(1), Note::new(1)).unwrap().appended().wait_until(soon().unwrap()).unwrap();
        engine.shutdown(soon()).unwrap();
    }
}
