//! Consumers for which the system starts no thread. A binary of its own, because it takes all the room there is for threads.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::sync::mpsc::{Sender, channel};

use common::{ArchivedNote, Note, open_on, settle, small, soon};
use corelane::consumer::{Batch, Consumer, ConsumerBuilder, ConsumerError, Sink, SinkConsumer};
use corelane::testing::FaultyStorage;
use corelane::{EventLog, HandlerError, Key, Meta, Position, ShardId};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Takes everything in, and keeps nothing.
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

/// No thread can be started until it is dropped.
struct NoThreads {
    before: Rlimit,
    /// While it is there, so are the threads that took what room there was.
    _ends: Vec<Sender<()>>,
}

impl NoThreads {
    fn new() -> Self {
        let before = getrlimit(Resource::As);
        let mut ends = Vec::new();
        limit(&before, 8 << 20);
        // Stacks of threads that have ended are used again.
        loop {
            let (end, ended) = channel::<()>();
            match std::thread::Builder::new().spawn(move || ended.recv()) {
                Ok(_) => ends.push(end),
                Err(_) => break,
            }
        }
        // Room for what is allocated, and not for a stack.
        limit(&before, 1 << 20);
        Self { before, _ends: ends }
    }
}

impl Drop for NoThreads {
    fn drop(&mut self) {
        setrlimit(Resource::As, self.before).unwrap();
    }
}

/// Lets this process have so much more address space than it has.
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
    let starts: [(&str, Start); 3] = [
        ("one", |builder| builder.start(handle).map(Started::Consumer)),
        ("four", |builder| builder.concurrency(4).start(handle).map(Started::Consumer)),
        ("sink", |builder| builder.start_sink(10, Taker).map(Started::Sink)),
    ];
    let storage = FaultyStorage::new();
    let engine: EventLog<Note> = open_on(&storage, small("/s")).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap().appended().wait().unwrap();
    // What the engine's threads prepare needs room too.
    settle(&storage);
    let nothing_more = NoThreads::new();
    let refused = starts.map(|(name, start)| start(engine.consumer(name)).map(drop));
    drop(nothing_more);
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
        assert!(!engine.drain_consumers(soon()), "{name} has failed");
        let started = start(engine.consumer(name)).unwrap();
        assert_eq!(shown().failure, None);
        let is_drained = match &started {
            Started::Consumer(consumer) => consumer.drain(soon()),
            Started::Sink(sink) => sink.drain(soon()),
        };
        assert!(is_drained, "{name}");
    }
    engine.shutdown(soon()).unwrap();
}
