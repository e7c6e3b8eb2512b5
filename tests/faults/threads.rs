//! Threads that cannot be started, and callers that wait for the engine's threads.

use std::time::{Duration, Instant};

use crate::common::{Note, PATIENCE, fill, numbers, os_cache, small, soon};
use corelane::testing::FaultyStorage;
use corelane::{Deadline, EventLog, Key, OpenError, WaitError};

#[test]
fn a_thread_that_cannot_be_started_is_an_error_and_leaves_the_store_unlocked() {
    let (shards, mut opened) = (3, 0);
    for threads in 0..=12 {
        let storage = FaultyStorage::new();
        let (done, ended) = std::sync::mpsc::channel();
        let disk = storage.clone();
        // On a thread of its own, so that a hang is a failure.
        std::thread::spawn(move || {
            let builder = EventLog::<Note>::builder(small("/s").shards(shards)).faulty_storage(&disk);
            let outcome = builder.threads_max(threads).open().map(drop);
            done.send(outcome).unwrap();
        });
        match ended.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{threads} threads: opening hangs")) {
            Ok(()) => opened += 1,
            Err(OpenError::Io { action, .. }) => assert!(action.contains("thread"), "{threads}: {action}"),
            Err(other) => panic!("{threads}: {other}"),
        }
        // The lock is free, and the store can be opened.
        let engine = EventLog::<Note>::builder(small("/s").shards(shards)).faulty_storage(&storage).open().unwrap();
        engine.producer().publish(Key(1), Note::new(7)).unwrap();
        engine.shutdown(soon()).unwrap();
    }
    assert!(
        (1..=6).contains(&opened),
        "{opened}: the engine needs a keeper, two threads per shard, and threads for opening"
    );
}

#[test]
fn a_shutdown_keeps_its_deadline_while_another_shutdown_waits() {
    let storage = FaultyStorage::new();
    storage.set_space(Some(2 * crate::common::SEGMENT));
    let engine = EventLog::<Note>::builder(os_cache("/s")).faulty_storage(&storage).open().unwrap();
    let accepted = fill(&engine, 0);
    std::thread::scope(|scope| {
        // The disk is full, so accepted events cannot be appended, and this shutdown waits.
        let patient = scope.spawn(|| engine.shutdown(Deadline::NEVER));
        std::thread::sleep(Duration::from_millis(100));
        let impatient = scope.spawn(|| engine.shutdown(Some(Instant::now() + Duration::from_millis(200))));
        let end = soon().unwrap();
        while !impatient.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let in_time = impatient.is_finished() && !patient.is_finished();
        storage.set_space(None);
        assert!(in_time, "the shutdown waits beyond its deadline");
        let outcome = impatient.join().unwrap();
        assert!(matches!(outcome, Err(WaitError::TimedOut)), "{outcome:?}");
        patient.join().unwrap().unwrap();
    });
    engine.shutdown(soon()).unwrap();
    assert_eq!(numbers(&engine).len() as u64, accepted);
}
