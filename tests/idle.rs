//! An idle engine sleeps. A binary of its own, because it measures the process.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::time::{Duration, Instant};

use common::{Note, small, soon};
use corelane::{Durability, EventLog, Key, Retention, Wait};

/// Time on a processor of all threads of this process that live, in ns.
fn busy_ns() -> u64 {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("schedstat")).ok())
        .map(|stat| stat.split_whitespace().next().unwrap().parse::<u64>().unwrap())
        .sum()
}

#[test]
fn an_idle_engine_that_parks_uses_less_than_a_hundredth_of_a_core() {
    if !std::path::Path::new("/proc/self/schedstat").exists() {
        eprintln!("skipped: this kernel does not count");
        return;
    }
    for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_millis(5)), Durability::OsCache] {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention { bytes_max: Some(1 << 20), age_max: Some(Duration::from_secs(3600)) };
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
        std::thread::sleep(Duration::from_millis(300));
        let (before, began) = (busy_ns(), Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let (busy, over) = (busy_ns() - before, began.elapsed());
        eprintln!("{durability:?}: {busy} ns in {over:?}");
        assert!(u128::from(busy) * 100 < over.as_nanos(), "{durability:?}: {busy} ns in {over:?}");
        // And wakes up.
        producer.publish(Key(1), Note::new(1)).unwrap().appended().wait_until(soon().unwrap()).unwrap();
        engine.shutdown(soon()).unwrap();
    }
}
