//! Calls into the engine from its own threads and from those of its consumers: none waits for itself.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use common::{small, soon, until};
use corelane::consumer::{
    Batch, Consumer, ConsumerError, Judgement, LetterSelector, Poller, Sink, SinkConsumer, Start,
};
use corelane::ingress::{GatePolicy, GateStart};
use corelane::view::ById;
use corelane::{
    Aggregate, BatchEnd, Bounded, Client, CommandError, Config, Deadline, Durability, Emit, Engine, Event, EventId,
    EventType, EventTypeId, GatedProducer, Handler, HandlerError, HistoryError, Key, Meta, Offset, OnError, OpenError,
    Producer, PublishSyncError, Rejected, RejectedReason, ShardId, SharedProducer, Time, Version, WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Where the application's code is run by the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Handler,
    BatchEnd,
    Evolve,
    Decide,
    View,
    Question,
    WakerOfShard,
    WakerOfSyncer,
    Consumer,
    Worker,
    Judge,
    Sink,
    SinkPosition,
}

const OF_SHARDS: [Place; 8] = [
    Place::Handler,
    Place::BatchEnd,
    Place::Evolve,
    Place::Decide,
    Place::View,
    Place::Question,
    Place::WakerOfShard,
    Place::WakerOfSyncer,
];
const OF_CONSUMERS: [Place; 3] = [Place::Consumer, Place::Worker, Place::Judge];
const OF_SINKS: [Place; 2] = [Place::Sink, Place::SinkPosition];

type Hook = Box<dyn FnOnce() + Send>;
static HOOKS: LazyLock<Mutex<BTreeMap<(Place, u64), Hook>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Runs what is to be run at this place, once.
fn fire(place: Place, n: u64) -> bool {
    let hook = HOOKS.lock().unwrap().remove(&(place, n));
    hook.map(|hook| hook()).is_some()
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
struct Ping {
    n: u64,
}

impl Event for Ping {
    const TYPES: &'static [EventType] = &[EventType::new(1, "ping", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct State {
    last: u64,
}

impl Aggregate for State {
    type Event = Ping;
    type Command = u64;
    type Rejection = ();

    fn evolve(&mut self, event: &ArchivedPing, _meta: &Meta) {
        self.last = event.n.to_native();
        fire(Place::Evolve, self.last);
    }

    fn decide(&self, n: u64, emit: &mut Emit<Ping>) -> Result<(), ()> {
        fire(Place::Decide, n);
        emit.event(Ping { n: 0 });
        Ok(())
    }
}

/// The numbers of this batch.
#[derive(Default)]
struct Inline(Vec<u64>);

impl Handler<Ping> for Inline {
    fn on_event(&mut self, event: &ArchivedPing, _meta: &Meta) -> Result<(), HandlerError> {
        let n = event.n.to_native();
        fire(Place::Handler, n);
        self.0.push(n);
        Ok(())
    }

    fn on_batch_end(&mut self, _batch: &BatchEnd) -> Result<(), HandlerError> {
        for n in self.0.drain(..) {
            fire(Place::BatchEnd, n);
        }
        Ok(())
    }
}

struct Taking(u64);

impl Sink<Ping> for Taking {
    fn position(&mut self, _shard: ShardId) -> Result<Option<corelane::Position>, HandlerError> {
        fire(Place::SinkPosition, self.0);
        Ok(None)
    }

    fn apply(&mut self, batch: &mut Batch<'_, Ping>) -> Result<(), HandlerError> {
        while batch.next()?.is_some() {}
        fire(Place::Sink, self.0);
        Ok(())
    }
}

struct Firing(Place, u64);

impl Wake for Firing {
    fn wake(self: Arc<Self>) {
        fire(self.0, self.1);
    }
}

/// An engine, and everything of it that can be called.
struct Rig {
    engine: Arc<Engine<State>>,
    shared: SharedProducer<Ping>,
    producer: Mutex<Producer<Ping>>,
    client: Mutex<Client<State>>,
    gated: Mutex<GatedProducer<Ping>>,
    poller: Mutex<Poller<Ping>>,
    consumer: Mutex<Option<Consumer<Ping>>>,
    sink: Mutex<Option<SinkConsumer>>,
}

const RING: usize = 8;

fn config(dir: &std::path::Path) -> Config {
    small(dir).ring_capacity(RING).durability(Durability::Periodic(Duration::from_millis(1)))
}

fn open(dir: &std::path::Path) -> Result<Engine<State>, OpenError> {
    let view = ById::new(8, |state: &State| {
        fire(Place::View, state.last);
        state.last
    });
    Engine::<State>::builder(config(dir)).handler("inline", OnError::Halt, |_| Inline::default()).view(&view).open()
}

fn start(engine: &Engine<State>, place: Place, n: u64) -> Consumer<Ping> {
    let builder = engine.subscribe("own").concurrency(if place == Place::Worker { 2 } else { 1 });
    let builder = builder.judge(move |_, _| {
        fire(Place::Judge, n);
        Judgement::Skip
    });
    let handler = move |event: &ArchivedPing, _: &Meta| -> Result<(), HandlerError> {
        let is_it = event.n.to_native() == n;
        if is_it && place == Place::Judge {
            return Err("to be judged".into());
        }
        if is_it {
            fire(Place::Consumer, n);
            fire(Place::Worker, n);
        }
        Ok(())
    };
    builder.start(handler).unwrap()
}

impl Rig {
    fn new(dir: &std::path::Path, place: Place, n: u64) -> Arc<Self> {
        let engine = Arc::new(open(dir).unwrap());
        Arc::new(Self {
            shared: engine.shared_producer(),
            producer: Mutex::new(engine.producer()),
            client: Mutex::new(engine.client()),
            gated: Mutex::new(
                engine.gated("in", GatePolicy::default().start(GateStart::FirstSeen), |_: &ArchivedPing| None).unwrap(),
            ),
            poller: Mutex::new(engine.subscribe("polled").poller().unwrap()),
            consumer: Mutex::new(Some(start(&engine, place, n))),
            sink: Mutex::new(None),
            engine,
        })
    }
}

fn wait_word<T>(outcome: Result<T, WaitError>) -> String {
    outcome.map_or_else(|error| format!("{error:?}"), |_| "Ok".into())
}

fn consumer_word<T: Debug>(outcome: Result<T, ConsumerError>) -> String {
    match outcome {
        Err(ConsumerError::Wait(error)) => format!("{error:?}"),
        Err(ConsumerError::AlreadyRunning { .. }) => "AlreadyRunning".into(),
        Err(error) => format!("{error:?}"),
        Ok(_) => "Ok".into(),
    }
}

fn history_word<T>(outcome: Result<T, HistoryError>) -> String {
    match outcome {
        Err(HistoryError::Wait(error)) => format!("{error:?}"),
        Err(error) => format!("{error:?}"),
        Ok(_) => "Ok".into(),
    }
}

fn command_word<T>(outcome: Result<T, CommandError<()>>) -> String {
    match outcome {
        Err(CommandError::NotSent(reason)) => format!("NotSent {reason:?}"),
        Err(CommandError::Unanswered(error)) => format!("Unanswered {error:?}"),
        Err(error) => format!("{error:?}"),
        Ok(_) => "Ok".into(),
    }
}

fn rejected_word<T, E>(outcome: Result<T, Rejected<E>>) -> String {
    outcome.map_or_else(|rejected| format!("{:?}", rejected.reason()), |_| "Ok".into())
}

/// Until it is refused, many times what a lane holds.
fn often(mut publish: impl FnMut() -> String) -> String {
    (0..20 * RING).map(|_| publish()).find(|word| word != "Ok").unwrap_or_else(|| "Ok".into())
}

/// Everything that may wait, and what it says here.
fn calls(rig: &Rig) -> BTreeMap<&'static str, String> {
    let mut said = BTreeMap::new();
    let key = Key(1);
    let late = || Instant::now() + Duration::from_secs(600);
    let ping = || Ping { n: 0 };
    let (engine, shared) = (&*rig.engine, &rig.shared);
    said.insert("SharedProducer::publish", often(|| rejected_word(shared.publish(key, ping()))));
    said.insert("SharedProducer::publish_until", often(|| rejected_word(shared.publish_until(key, ping(), late()))));
    said.insert(
        "SharedReceipt::wait_appended",
        match shared.publish_with_receipt(key, ping()) {
            Ok(receipt) => wait_word(receipt.wait_appended()),
            Err(rejected) => format!("{:?}", rejected.reason()),
        },
    );
    {
        let mut producer = rig.producer.lock().unwrap();
        let receipt = producer.publish(key, ping()).unwrap();
        said.insert("Pending::wait (appended)", wait_word(receipt.appended().wait()));
        said.insert("Pending::wait_until (durable)", wait_word(receipt.durable().wait_until(late())));
        said.insert("Producer::publish", often(|| rejected_word(producer.publish(key, ping()))));
        said.insert("Producer::publish_until", often(|| rejected_word(producer.publish_until(key, ping(), late()))));
        said.insert(
            "Producer::publish_due",
            often(|| rejected_word(producer.publish_due(key, ping(), Duration::from_millis(1)))),
        );
        let mut batch: Vec<_> = (0..20 * RING).map(|_| (key, ping())).collect();
        let published = producer.publish_batch(&mut batch);
        said.insert("Producer::publish_batch", published.map_or_else(|r| format!("{:?}", r.reason), |()| "Ok".into()));
        // With room, as any: nothing is waited for then.
        let consumer = rig.consumer.lock().unwrap();
        let sync = engine.publish_sync(&mut producer, key, ping(), &[consumer.as_ref().unwrap()], Deadline::NEVER);
        said.insert(
            "Engine::publish_sync",
            match sync {
                Err(PublishSyncError::Rejected(rejected)) => format!("{:?}", rejected.reason()),
                Err(error) => format!("{error:?}"),
                Ok(()) => "Ok".into(),
            },
        );
    }
    {
        let mut client = rig.client.lock().unwrap();
        said.insert("Sending::wait", command_word(client.send(key, 0).wait()));
        said.insert("Sending::wait_until", command_word(client.send(key, 0).wait_until(late())));
        let ticket = client.send(key, 0).ticket().unwrap();
        said.insert("Answer::wait", command_word(client.answer(ticket).wait()));
        said.insert(
            "Sending::tell",
            often(|| match client.send(key, 0).tell() {
                Err(rejected) => format!("{:?}", rejected.reason()),
                Ok(()) => "Ok".into(),
            }),
        );
    }
    {
        let mut gated = rig.gated.lock().unwrap();
        let mut sequence = gated.expected(9).unwrap_or(1);
        said.insert(
            "GatedProducer::offer",
            often(|| {
                let offered = gated.offer(9, sequence, key, ping());
                sequence += 1;
                match offered {
                    Err(corelane::GateRefused::Publish(rejected)) => format!("{:?}", rejected.reason()),
                    Err(error) => format!("{error:?}"),
                    Ok(_) => "Ok".into(),
                }
            }),
        );
        said.insert(
            "GatedProducer::save",
            match gated.save(Deadline::NEVER) {
                Err(corelane::GateError::Wait(error)) => format!("{error:?}"),
                Err(error) => format!("{error:?}"),
                Ok(()) => "Ok".into(),
            },
        );
    }
    said.insert("Engine::ask", wait_word(engine.ask(key, |_, _| ())));
    said.insert("Engine::state", wait_word(engine.state(key)));
    said.insert("Engine::stream", history_word(engine.stream(key, Version(1))));
    said.insert("Engine::state_at", history_word(engine.state_at(key, Time(u64::MAX))));
    said.insert("Engine::rebuild", history_word(engine.rebuild(key)));
    said.insert("Engine::compare", history_word(engine.compare()));
    said.insert("Engine::checkpoint", wait_word(engine.checkpoint(Deadline::NEVER)));
    said.insert("Engine::flush", wait_word(engine.flush(Deadline::NEVER)));
    said.insert("Engine::shutdown", wait_word(engine.shutdown(Deadline::NEVER)));
    said.insert("Engine::shutdown (until)", wait_word(engine.shutdown(Some(late()))));
    said.insert("Engine::drain_consumers", engine.drain_consumers(Deadline::NEVER).to_string());
    said.insert("Engine::remove_consumer", consumer_word(engine.remove_consumer("own")));
    said.insert("Engine::metrics", engine.metrics().shards.len().to_string());
    let waited = rig.poller.lock().unwrap().wait(Some(Instant::now() + Duration::from_millis(1)));
    said.insert("Poller::wait", consumer_word(waited));
    let consumer = rig.consumer.lock().unwrap().take().unwrap();
    said.insert("Consumer::pause", consumer_word(consumer.pause()));
    said.insert("Consumer::resume", consumer_word(consumer.resume()));
    said.insert("Consumer::save", consumer_word(consumer.save()));
    said.insert("Consumer::dead_letters", consumer_word(consumer.dead_letters(None, 1)));
    said.insert("Consumer::reprocess", consumer_word(consumer.reprocess(LetterSelector::All)));
    said.insert("Consumer::discard", consumer_word(consumer.discard(LetterSelector::All)));
    said.insert("Consumer::gap_filled", consumer_word(consumer.gap_filled(key)));
    said.insert("Consumer::seek", consumer_word(consumer.seek(Start::Latest)));
    let id = EventId { shard: ShardId(0), offset: Offset(1 << 20) };
    said.insert(
        "Consumer::wait_handled",
        consumer_word(consumer.wait_handled(key, id, Some(Instant::now() + Duration::from_millis(50)))),
    );
    said.insert("Consumer::drain", consumer_word(consumer.drain(Deadline::NEVER)));
    said.insert("Consumer::stop", consumer_word(consumer.stop(Deadline::NEVER)));
    said
}

/// What the calls say on a thread that the engine itself waits for.
fn on_a_shard() -> BTreeMap<&'static str, &'static str> {
    let refused = |names: &'static [&'static str], word| names.iter().map(move |name| (*name, word));
    refused(
        &[
            "SharedProducer::publish",
            "SharedProducer::publish_until",
            "SharedReceipt::wait_appended",
            "Producer::publish",
            "Producer::publish_until",
            "Producer::publish_due",
            "Producer::publish_batch",
            "Sending::tell",
            "GatedProducer::offer",
        ],
        "Full",
    )
    .chain(refused(
        &[
            "Pending::wait (appended)",
            "Pending::wait_until (durable)",
            "Engine::publish_sync",
            "GatedProducer::save",
            "Engine::ask",
            "Engine::state",
            "Engine::stream",
            "Engine::state_at",
            "Engine::rebuild",
            "Engine::compare",
            "Engine::checkpoint",
            "Engine::flush",
            "Engine::shutdown",
            "Engine::shutdown (until)",
            "Consumer::pause",
            "Consumer::resume",
            "Consumer::save",
            "Consumer::dead_letters",
            "Consumer::reprocess",
            "Consumer::discard",
            "Consumer::gap_filled",
            "Consumer::seek",
            "Consumer::wait_handled",
            "Consumer::drain",
            "Consumer::stop",
            "Poller::wait",
        ],
        "OnEngineThread",
    ))
    .chain([
        ("Sending::wait", "NotSent OnEngineThread"),
        ("Sending::wait_until", "NotSent OnEngineThread"),
        ("Answer::wait", "Unanswered OnEngineThread"),
        ("Engine::drain_consumers", "false"),
        ("Engine::remove_consumer", "AlreadyRunning"),
        ("Engine::metrics", "1"),
    ])
    .collect()
}

/// In a handler of the consumer itself: the engine can be waited for, the consumer cannot.
fn in_its_own_handler(place: Place) -> BTreeMap<&'static str, &'static str> {
    let itself = [
        "Engine::publish_sync",
        "Engine::shutdown",
        "Engine::shutdown (until)",
        "Consumer::seek",
        "Consumer::wait_handled",
        "Consumer::drain",
        "Consumer::stop",
    ];
    // Asked of the thread that drives: where workers call the handler, that one is free.
    let driving = [
        "Consumer::pause",
        "Consumer::resume",
        "Consumer::save",
        "Consumer::dead_letters",
        "Consumer::reprocess",
        "Consumer::discard",
        "Consumer::gap_filled",
    ];
    let word = |name: &'static str, word: &'static str| match name {
        _ if itself.contains(&name) => "OnEngineThread",
        _ if driving.contains(&name) && place != Place::Worker => "OnEngineThread",
        _ if ["false", "AlreadyRunning", "1"].contains(&word) => word,
        _ => "Ok",
    };
    on_a_shard().into_iter().map(|(name, of_shard)| (name, word(name, of_shard))).collect()
}

/// A thread of somebody else's consumer may wait for this one, and for the engine; not for the engine's end.
fn in_a_sink() -> BTreeMap<&'static str, &'static str> {
    let word = |name: &'static str, word: &'static str| match name {
        "Engine::shutdown" | "Engine::shutdown (until)" => "OnEngineThread",
        // The event that it is to wait for is none: it ends, and the promise with it.
        "Consumer::wait_handled" => "TimedOut",
        _ if ["false", "AlreadyRunning", "1"].contains(&word) => word,
        _ => "Ok",
    };
    on_a_shard().into_iter().map(|(name, of_shard)| (name, word(name, of_shard))).collect()
}

/// Makes the engine run `hook` at `place`.
fn bring_about(rig: &Arc<Rig>, place: Place, n: u64, hook: Hook) {
    HOOKS.lock().unwrap().insert((place, n), hook);
    match place {
        Place::Decide => drop(rig.client.lock().unwrap().send(Key(1), n).ticket().unwrap()),
        Place::Question => {
            let mut asked = Box::pin(rig.engine.ask_async(Key(1), move |_, _| fire(Place::Question, n)));
            assert!(common::poll_once(&mut asked).is_none_or(|fired| fired.unwrap()));
        }
        Place::WakerOfShard | Place::WakerOfSyncer => {
            let receipt = rig.producer.lock().unwrap().publish(Key(1), Ping { n }).unwrap();
            let mut pending = if place == Place::WakerOfShard { receipt.appended() } else { receipt.durable() };
            let waker = Waker::from(Arc::new(Firing(place, n)));
            // It may have been too late; then another event does.
            if std::pin::Pin::new(&mut pending).poll(&mut Context::from_waker(&waker)).is_ready() {
                let hook = HOOKS.lock().unwrap().remove(&(place, n)).unwrap();
                bring_about(rig, place, n, hook);
            }
        }
        Place::SinkPosition => {
            *rig.sink.lock().unwrap() = Some(rig.engine.consumer("sink").start_sink(100, Taking(n)).unwrap());
        }
        Place::Sink => {
            *rig.sink.lock().unwrap() = Some(rig.engine.consumer("sink").start_sink(100, Taking(n)).unwrap());
            rig.shared.publish(Key(1), Ping { n }).unwrap();
        }
        _ => rig.shared.publish(Key(1), Ping { n }).unwrap(),
    }
}

fn run_at<T: Send + 'static>(
    rig: &Arc<Rig>,
    place: Place,
    n: u64,
    calls: impl FnOnce(&Rig) -> T + Send + 'static,
) -> T {
    let (done, answers): (Sender<T>, _) = channel();
    let called = Arc::clone(rig);
    let hook = Box::new(move || {
        let answer = calls(&called);
        // Before the answer: the last handle is to be the test's.
        drop(called);
        done.send(answer).unwrap();
    });
    bring_about(rig, place, n, hook);
    answers.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("{place:?}: a call waits for itself"))
}

fn every_call_at(place: Place, expected: &BTreeMap<&'static str, &'static str>) {
    let dir = tempfile::tempdir().unwrap();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let rig = Rig::new(dir.path(), place, n);
    let said = run_at(&rig, place, n, calls);
    for (name, word) in &said {
        assert_eq!(Some(&word.as_str()), expected.get(name), "{place:?}: {name}");
    }
    assert_eq!(said.len(), expected.len());
    drop(rig.sink.lock().unwrap().take());
    rig.engine.shutdown(soon()).unwrap_or_else(|error| panic!("{place:?}: {error}"));
}

#[test]
fn no_call_on_a_shard_s_thread_waits_for_it() {
    OF_SHARDS.into_iter().for_each(|place| every_call_at(place, &on_a_shard()));
}

#[test]
fn no_call_in_a_consumer_s_handler_waits_for_the_consumer() {
    OF_CONSUMERS.into_iter().for_each(|place| every_call_at(place, &in_its_own_handler(place)));
}

#[test]
fn no_call_in_a_sink_waits_for_the_sink() {
    let expected = in_a_sink();
    for place in OF_SINKS {
        every_call_at(place, &expected);
        // Its own handle.
        let dir = tempfile::tempdir().unwrap();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let rig = Rig::new(dir.path(), place, n);
        let (drained, stopped) = run_at(&rig, place, n, |rig| {
            let mut sink = None;
            until("the handle is there", || {
                sink = rig.sink.lock().unwrap().take();
                sink.is_some()
            });
            let sink = sink.unwrap();
            (consumer_word(sink.drain(Deadline::NEVER)), consumer_word(sink.stop(Deadline::NEVER)))
        });
        assert_eq!((drained.as_str(), stopped.as_str()), ("OnEngineThread", "OnEngineThread"), "{place:?}");
        rig.engine.shutdown(soon()).unwrap();
    }
}

/// The store can be opened again: whoever closed it has ended.
fn is_closed(dir: &std::path::Path) -> bool {
    match open(dir) {
        Ok(engine) => engine.shutdown(soon()).is_ok(),
        Err(OpenError::Locked { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_last_handle_may_be_dropped_anywhere_and_the_engine_closes_behind_it() {
    for place in OF_SHARDS.into_iter().chain(OF_CONSUMERS).chain([Place::Sink]) {
        let dir = tempfile::tempdir().unwrap();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let rig = Rig::new(dir.path(), place, n);
        let (done, dropped) = channel();
        let (go, gone) = channel::<()>();
        let last = Arc::clone(&rig);
        let hook: Hook = Box::new(move || {
            gone.recv().unwrap_err();
            // The rig with all handles, the engine's among them.
            drop(last);
            done.send(()).unwrap();
        });
        bring_about(&rig, place, n, hook);
        drop(rig);
        drop(go);
        dropped
            .recv_timeout(Duration::from_secs(60))
            .unwrap_or_else(|_| panic!("{place:?}: the drop waits for itself"));
        until("the engine closes", || is_closed(dir.path()));
    }
}

#[test]
fn a_drop_gives_up_on_a_shard_that_hangs_and_the_rest_is_done_when_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let engine = open(dir.path()).unwrap();
    let (go, gone) = channel::<()>();
    let (entered_tx, entered) = channel();
    let hook: Hook = Box::new(move || {
        entered_tx.send(()).unwrap();
        gone.recv().unwrap_err();
    });
    HOOKS.lock().unwrap().insert((Place::Handler, n), hook);
    let mut producer = engine.producer();
    producer.publish(Key(1), Ping { n }).unwrap();
    entered.recv().unwrap();
    for _ in 0..3 {
        producer.publish(Key(1), Ping { n: 0 }).unwrap();
    }
    // Returns at all: after the ten seconds that it promises.
    drop(engine);
    assert!(matches!(open(dir.path()), Err(OpenError::Locked { .. })), "its threads are still there");
    assert!(matches!(producer.try_publish(Key(1), Ping { n: 0 }), Ok(_) | Err(Rejected::Closed(_))));
    drop(go);
    until("the engine closes", || is_closed(dir.path()));
    let engine = open(dir.path()).unwrap();
    assert!(engine.state(Key(1)).unwrap().unwrap().1 >= Version(4), "nothing accepted is lost");
}

#[test]
fn a_consumer_s_handler_that_waits_for_a_checkpoint_does_not_hold_up_the_closing() {
    let dir = tempfile::tempdir().unwrap();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let rig = Rig::new(dir.path(), Place::Consumer, n);
    let (done, said) = channel();
    let called = Arc::clone(&rig);
    let (entered_tx, entered) = channel();
    let hook: Hook = Box::new(move || {
        entered_tx.send(()).unwrap();
        until("the engine closes", || {
            matches!(called.shared.try_publish(Key(1), Ping { n: 0 }), Err(Rejected::Closed(_)))
        });
        let words = [
            wait_word(called.engine.checkpoint(Deadline::NEVER)),
            wait_word(called.engine.ask(Key(1), |_, _| ())),
            wait_word(called.engine.flush(Deadline::NEVER)),
            rejected_word(called.shared.publish(Key(1), Ping { n: 0 })),
            command_word(called.client.lock().unwrap().send(Key(1), 0).wait()),
        ];
        done.send(words).unwrap();
    });
    bring_about(&rig, Place::Consumer, n, hook);
    // A consumer that is asked to stop begins nothing more.
    entered.recv_timeout(Duration::from_secs(60)).unwrap();
    rig.engine.shutdown(soon()).unwrap();
    let words = said.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(words, ["Closed", "Closed", "Ok", "Closed", "NotSent Closed"]);
}

#[test]
fn a_question_that_panics_says_so_and_the_shard_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    let asked = engine.ask(Key(1), |_, _| -> u64 { panic!("no such {}", "thing") });
    assert!(matches!(&asked, Err(WaitError::QuestionPanicked(text)) if text == "no such thing"), "{asked:?}");
    let asked = common::block_on(engine.ask_async(Key(1), |_, _| -> u64 { panic!("nor this") }));
    assert!(matches!(&asked, Err(WaitError::QuestionPanicked(text)) if text == "nor this"), "{asked:?}");
    engine.producer().publish(Key(1), Ping { n: 7_777 }).unwrap();
    engine.flush(soon()).unwrap();
    assert_eq!(engine.ask(Key(1), |state, version| (state.last, version)).unwrap(), (7_777, Version(1)));
    engine.shutdown(soon()).unwrap();
    let asked = engine.ask(Key(1), |_, _| -> u64 { panic!("never asked") });
    assert!(matches!(asked, Err(WaitError::Closed)), "{asked:?}");
}

#[test]
fn a_waker_that_panics_is_its_own_concern() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(dir.path(), Place::WakerOfSyncer, 0);
    for place in [Place::WakerOfShard, Place::WakerOfSyncer] {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let (done, said) = channel();
        let hook: Hook = Box::new(move || {
            done.send(()).unwrap();
            panic!("a waker");
        });
        bring_about(&rig, place, n, hook);
        said.recv_timeout(Duration::from_secs(20)).unwrap();
        let receipt = rig.producer.lock().unwrap().publish(Key(1), Ping { n: 0 }).unwrap();
        receipt.durable().wait().unwrap();
    }
    rig.engine.shutdown(soon()).unwrap();
    assert!(matches!(rig.shared.publish(Key(1), Ping { n: 0 }), Err(Rejected::Closed(_))));
    let reason = rig.client.lock().unwrap().send(Key(1), 0).tell().unwrap_err().reason();
    assert!(matches!(reason, RejectedReason::Closed));
}
