//! Consumers whose threads the operating system refuses to start.

use std::sync::mpsc::{Sender, channel};

use crate::common::own_process::is_own_process;
use crate::common::{ArchivedNote, Note, open_on, settle, small, soon};
use corelane::consumer::{Batch, Consumer, ConsumerBuilder, ConsumerError, Sink, SinkConsumer};
use corelane::log::Position;
use corelane::testing::FaultyStorage;
use corelane::{EventLog, HandlerError, Key, Meta, ShardId};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A sink that takes every event and keeps none.
struct Taker;

impl Sink<Note> for Taker {
    fn position(&mut self, _: ShardId) -> Result<Option<Position>, HandlerError> {
        Ok(None)
    }

    fn apply(&mut self, batch: &mut Batch<'_, Note>) -> Result<(), HandlerError> {
        while batch.next()?.is_some() {}
        Ok(())
    }
}

/// While this exists, no thread can be started.
struct NoThreads {
    before: Rlimit,
    /// Keeps the threads alive that fill the address space.
    _ends: Vec<Sender<()>>,
}

impl NoThreads {
    fn new() -> Self {
        let before = getrlimit(Resource::As);
        let mut ends = Vec::new();
        limit(&before, 8 << 20);
        // Cached stacks of ended threads are reused, so uses them up first.
        loop {
            let (end, ended) = channel::<()>();
            match std::thread::Builder::new().spawn(move || ended.recv()) {
                Ok(_) => ends.push(end),
                Err(_) => break,
            }
        }
        // Leaves room for allocations, but not for a stack.
        limit(&before, 1 << 20);
        Self { before, _ends: ends }
    }
}

impl Drop for NoThreads {
    fn drop(&mut self) {
        setrlimit(Resource::As, self.before).unwrap();
    }
}

/// Limits the address space of this process to `more_bytes` more than it has.
fn limit(before: &Rlimit, more_bytes: u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let bytes = size.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
    setrlimit(Resource::As, Rlimit { current: Some(bytes + more_bytes), maximum: before.maximum }).unwrap();
}

enum Started {
    Consumer(Consumer<Note>),
    Sink(SinkConsumer),
}

type Start = fn(ConsumerBuilder<Note>) -> Result<Started, ConsumerError>;

fn handle(_: &ArchivedNote, _: &Meta) -> Result<(), HandlerError> {
    Ok(())
}

#[test]
fn a_consumer_whose_thread_cannot_be_started_is_shown_with_the_reason() {
    if !is_own_process("refused_threads::a_consumer_whose_thread_cannot_be_started_is_shown_with_the_reason") {
        return;
    }
    let starts: [(&str, Start); 3] = [
        ("one", |builder| builder.start(handle).map(Started::Consumer)),
        ("four", |builder| builder.concurrency(4).start(handle).map(Started::Consumer)),
        ("sink", |builder| builder.start_sink(10, Taker).map(Started::Sink)),
    ];
    let storage = FaultyStorage::new();
    let engine: EventLog<Note> = open_on(&storage, small("/s")).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap().appended().wait().unwrap();
    // Waits until the engine's threads have prepared their files, which needs memory too.
    settle(&storage);
    let no_threads = NoThreads::new();
    let refused = starts.map(|(name, start)| start(engine.consumer(name)).map(drop));
    drop(no_threads);
    for ((name, start), refused) in starts.iter().zip(refused) {
        let refused = refused.unwrap_err();
        let source = std::error::Error::source(&refused).unwrap();
        let error = format!("{refused}: {source}");
        assert!(error.contains("starting a thread"), "{name}: {error}");
        let shown = || engine.consumers().into_iter().find(|report| report.name == *name).unwrap();
        let report = shown();
        assert!(!report.is_running, "{report:?}");
        let failure = report.failure.unwrap_or_else(|| panic!("{name}: no failure is shown"));
        assert!(matches!(failure.error(), ConsumerError::NotStarted { why } if *why == error), "{name}: {failure}");
        let drained = engine.drain_consumers(soon());
        assert!(matches!(drained, Err(ConsumerError::Ended { failure: Some(_) })), "{name}: {drained:?}");
        let started = start(engine.consumer(name)).unwrap();
        assert_eq!(shown().failure, None);
        let is_drained = match &started {
            Started::Consumer(consumer) => consumer.drain(soon()).is_ok(),
            Started::Sink(sink) => sink.drain(soon()).is_ok(),
        };
        assert!(is_drained, "{name}");
    }
    engine.shutdown(soon()).unwrap();
}
