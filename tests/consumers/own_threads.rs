//! Calls into the engine from its own threads and from those of its consumers never wait for themselves.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use crate::common::log::Log;
use crate::common::{small, soon, until};
use corelane::consumer::{
    Batch, Consumer, ConsumerError, Judgement, LetterSelector, Poller, Sink, SinkConsumer, Start,
};
use corelane::engine::PublishSyncError;
use corelane::error::{HistoryError, LiveError, RejectedReason};
use corelane::event::EventId;
use corelane::handler::BatchEnd;
use corelane::ingress::{GatePolicy, GateStart, GatedProducer, Pending};
use corelane::view::ById;
use corelane::{
    Aggregate, Bounded, Client, CommandError, Config, Deadline, Durability, Emit, Engine, Event, EventType,
    EventTypeId, Handler, HandlerError, Key, Meta, Offset, OnError, OpenError, Producer, Rejected, ShardId,
    SharedClient, SharedProducer, Time, Version, WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};
use tracing::Level;

/// A place at which the engine runs application code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum CallSite {
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

const OF_SHARDS: [CallSite; 8] = [
    CallSite::Handler,
    CallSite::BatchEnd,
    CallSite::Evolve,
    CallSite::Decide,
    CallSite::View,
    CallSite::Question,
    CallSite::WakerOfShard,
    CallSite::WakerOfSyncer,
];
const OF_CONSUMERS: [CallSite; 3] = [CallSite::Consumer, CallSite::Worker, CallSite::Judge];
const OF_SINKS: [CallSite; 2] = [CallSite::Sink, CallSite::SinkPosition];

type Hook = Box<dyn FnOnce() + Send>;
static HOOKS: LazyLock<Mutex<BTreeMap<(CallSite, u64), Hook>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Runs the hook of this place, once.
fn fire(place: CallSite, n: u64) -> bool {
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
        fire(CallSite::Evolve, self.last);
    }

    fn decide(&self, n: u64, emit: &mut Emit<Ping>) -> Result<(), ()> {
        fire(CallSite::Decide, n);
        emit.event(Ping { n: 0 });
        Ok(())
    }
}

/// An inline handler that collects the numbers of a batch.
#[derive(Default)]
struct Inline(Vec<u64>);

impl Handler<Ping> for Inline {
    fn on_event(&mut self, event: &ArchivedPing, _meta: &Meta) -> Result<(), HandlerError> {
        let n = event.n.to_native();
        fire(CallSite::Handler, n);
        self.0.push(n);
        Ok(())
    }

    fn on_batch_end(&mut self, _batch: &BatchEnd) -> Result<(), HandlerError> {
        for n in self.0.drain(..) {
            fire(CallSite::BatchEnd, n);
        }
        Ok(())
    }
}

struct Taking(u64);

impl Sink<Ping> for Taking {
    fn position(&mut self, _shard: ShardId) -> Result<Option<corelane::log::Position>, HandlerError> {
        fire(CallSite::SinkPosition, self.0);
        Ok(None)
    }

    fn apply(&mut self, batch: &mut Batch<'_, Ping>) -> Result<(), HandlerError> {
        while batch.next()?.is_some() {}
        fire(CallSite::Sink, self.0);
        Ok(())
    }
}

struct Firing(CallSite, u64);

impl Wake for Firing {
    fn wake(self: Arc<Self>) {
        fire(self.0, self.1);
    }
}

/// An engine and every handle of it.
struct Rig {
    engine: Arc<Engine<State>>,
    shared: SharedProducer<Ping>,
    producer: Mutex<Producer<Ping>>,
    client: Mutex<Client<State>>,
    gated: Mutex<GatedProducer<Ping>>,
    poller: Mutex<Poller<Ping>>,
    consumer: Mutex<Option<Consumer<Ping>>>,
    sink: Mutex<Option<SinkConsumer>>,
    shared_client: SharedClient<State>,
    pending: Mutex<Vec<Pending>>,
}

const RING: usize = 8;

fn config(dir: &std::path::Path) -> Config {
    small(dir).ring_capacity(RING).durability(Durability::Periodic(Duration::from_millis(1)))
}

fn open(dir: &std::path::Path) -> Result<Engine<State>, OpenError> {
    let view = ById::new(8, |state: &State| {
        fire(CallSite::View, state.last);
        state.last
    });
    Engine::<State>::builder(config(dir)).handler("inline", OnError::Halt, |_| Inline::default()).view(&view).open()
}

fn start(engine: &Engine<State>, place: CallSite, n: u64) -> Consumer<Ping> {
    let builder = engine.subscribe("own").concurrency(if place == CallSite::Worker { 2 } else { 1 });
    let builder = builder.judge(move |_, _| {
        fire(CallSite::Judge, n);
        Judgement::Skip
    });
    let handler = move |event: &ArchivedPing, _: &Meta| -> Result<(), HandlerError> {
        let is_it = event.n.to_native() == n;
        if is_it && place == CallSite::Judge {
            return Err("to be judged".into());
        }
        if is_it {
            fire(CallSite::Consumer, n);
            fire(CallSite::Worker, n);
        }
        Ok(())
    };
    builder.start(handler).unwrap()
}

impl Rig {
    fn new(dir: &std::path::Path, place: CallSite, n: u64) -> Arc<Self> {
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
            shared_client: engine.shared_client(),
            pending: Mutex::default(),
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

/// Publishes until an event is refused, at most 20 times the capacity of a lane.
fn often(mut publish: impl FnMut() -> String) -> String {
    (0..20 * RING).map(|_| publish()).find(|word| word != "Ok").unwrap_or_else(|| "Ok".into())
}

/// Makes every call that may wait and returns the results by name.
fn calls(rig: &Rig) -> BTreeMap<&'static str, String> {
    let mut said = BTreeMap::new();
    let key = Key(1);
    let late = || Instant::now() + Duration::from_secs(600);
    let ping = || Ping { n: 0 };
    let (engine, shared) = (&*rig.engine, &rig.shared);
    // There is still room in the lane, so that the event is published and the wait begins.
    let receipt = shared.publish(key, ping()).with_receipt().wait().unwrap();
    said.insert("SharedPending::wait", wait_word(receipt.appended().wait().map(drop)));
    said.insert("Publishing::wait", often(|| rejected_word(shared.publish(key, ping()).wait())));
    said.insert("Publishing::wait_until", often(|| rejected_word(shared.publish(key, ping()).wait_until(late()))));
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
        // With room in the lane, this call does not wait for it.
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
    let client = &rig.shared_client;
    said.insert("SharedSending::wait", command_word(client.send(key, 0).wait()));
    said.insert("SharedSending::wait_until", command_word(client.send(key, 0).wait_until(late())));
    said.insert("SharedAnswer::wait", command_word(client.send(key, 0).try_submit().unwrap().wait()));
    {
        let mut gated = rig.gated.lock().unwrap();
        let mut sequence = gated.expected(9).unwrap_or(1);
        said.insert(
            "GatedProducer::offer",
            often(|| {
                let offered = gated.offer(9, sequence, key, ping());
                sequence += 1;
                match offered {
                    Err(corelane::ingress::GateRefused::Publish(rejected)) => format!("{:?}", rejected.reason()),
                    Err(error) => format!("{error:?}"),
                    Ok(_) => "Ok".into(),
                }
            }),
        );
        said.insert(
            "GatedProducer::save",
            match gated.save(Deadline::NEVER) {
                Err(corelane::error::GateError::Wait(error)) => format!("{error:?}"),
                Err(error) => format!("{error:?}"),
                Ok(()) => "Ok".into(),
            },
        );
    }
    said.insert("Engine::ask", wait_word(engine.ask(key, |_, _| ()).wait()));
    said.insert("Engine::state", wait_word(engine.state(key).wait()));
    said.insert("Engine::stream", history_word(engine.stream(key, Version(1))));
    said.insert("Engine::state_at", history_word(engine.state_at(key, Time(u64::MAX))));
    said.insert("Engine::rebuild", history_word(engine.rebuild(key)));
    said.insert("Engine::compare", history_word(engine.compare()));
    said.insert("Engine::checkpoint", wait_word(engine.checkpoint(Deadline::NEVER)));
    said.insert("Engine::flush", wait_word(engine.flush(Deadline::NEVER)));
    said.insert("Engine::shutdown", wait_word(engine.shutdown(Deadline::NEVER)));
    said.insert("Engine::shutdown (until)", wait_word(engine.shutdown(Some(late()))));
    said.insert("Engine::drain_consumers", consumer_word(engine.drain_consumers(Deadline::NEVER)));
    said.insert("Engine::remove_consumer", consumer_word(engine.remove_consumer("own")));
    said.insert("Engine::metrics", engine.metrics(Deadline::NEVER).shards.len().to_string());
    // No event of this key exists, so the call waits until its deadline.
    let mut feed = engine.live().key(Key(77)).start().unwrap();
    let waited = match feed.next_until(Duration::from_millis(1)) {
        Err(LiveError::Wait(WaitError::TimedOut)) => Ok(()),
        Err(LiveError::Wait(error)) => Err(error),
        other => panic!("{other:?}"),
    };
    said.insert("Live::next_until", wait_word(waited));
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

/// The expected results on a thread for which the engine itself waits.
fn on_a_shard() -> BTreeMap<&'static str, &'static str> {
    let refused = |names: &'static [&'static str], word| names.iter().map(move |name| (*name, word));
    refused(
        &[
            "Publishing::wait",
            "Publishing::wait_until",
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
            "SharedPending::wait",
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
            "Live::next_until",
        ],
        "OnEngineThread",
    ))
    .chain([
        ("Sending::wait", "NotSent OnEngineThread"),
        ("SharedSending::wait", "NotSent OnEngineThread"),
        ("SharedSending::wait_until", "NotSent OnEngineThread"),
        ("SharedAnswer::wait", "Unanswered OnEngineThread"),
        ("Sending::wait_until", "NotSent OnEngineThread"),
        ("Answer::wait", "Unanswered OnEngineThread"),
        ("Engine::drain_consumers", "OnEngineThread"),
        ("Engine::remove_consumer", "AlreadyRunning"),
        ("Engine::metrics", "1"),
    ])
    .collect()
}

/// The expected results in a handler of the consumer itself: it may wait for the engine, but not for the consumer.
fn in_its_own_handler(place: CallSite) -> BTreeMap<&'static str, &'static str> {
    let itself = [
        "Engine::publish_sync",
        "Engine::shutdown",
        "Engine::shutdown (until)",
        "Engine::drain_consumers",
        "Consumer::seek",
        "Consumer::wait_handled",
        "Consumer::drain",
        "Consumer::stop",
    ];
    // Requests to the driver's thread, which is free if workers call the handler.
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
        _ if driving.contains(&name) && place != CallSite::Worker => "OnEngineThread",
        _ if ["false", "AlreadyRunning", "1"].contains(&word) => word,
        _ => "Ok",
    };
    on_a_shard().into_iter().map(|(name, of_shard)| (name, word(name, of_shard))).collect()
}

/// The expected results in another consumer's sink: it may wait for this consumer and for the engine, but not for the
/// engine's end.
fn in_a_sink() -> BTreeMap<&'static str, &'static str> {
    let word = |name: &'static str, word: &'static str| match name {
        "Engine::shutdown" | "Engine::shutdown (until)" | "Engine::drain_consumers" => "OnEngineThread",
        // No such event exists, so the call waits until its deadline.
        "Consumer::wait_handled" => "TimedOut",
        _ if ["false", "AlreadyRunning", "1"].contains(&word) => word,
        _ => "Ok",
    };
    on_a_shard().into_iter().map(|(name, of_shard)| (name, word(name, of_shard))).collect()
}

/// Makes the engine run `hook` at `place`.
fn bring_about(rig: &Arc<Rig>, place: CallSite, n: u64, hook: Hook) {
    HOOKS.lock().unwrap().insert((place, n), hook);
    match place {
        CallSite::Decide => drop(rig.client.lock().unwrap().send(Key(1), n).ticket().unwrap()),
        CallSite::Question => {
            let mut asked = Box::pin(rig.engine.ask(Key(1), move |_, _| fire(CallSite::Question, n)));
            assert!(crate::common::poll_once(&mut asked).is_none_or(|fired| fired.unwrap()));
        }
        CallSite::WakerOfShard | CallSite::WakerOfSyncer => {
            let receipt = rig.producer.lock().unwrap().publish(Key(1), Ping { n }).unwrap();
            let mut pending = if place == CallSite::WakerOfShard { receipt.appended() } else { receipt.durable() };
            let waker = Waker::from(Arc::new(Firing(place, n)));
            // The event may already be appended. Then tries another one.
            if std::pin::Pin::new(&mut pending).poll(&mut Context::from_waker(&waker)).is_ready() {
                let hook = HOOKS.lock().unwrap().remove(&(place, n)).unwrap();
                return bring_about(rig, place, n, hook);
            }
            // Dropping it would end the wait.
            rig.pending.lock().unwrap().push(pending);
        }
        CallSite::SinkPosition => {
            *rig.sink.lock().unwrap() = Some(rig.engine.consumer("sink").start_sink(100, Taking(n)).unwrap());
        }
        CallSite::Sink => {
            *rig.sink.lock().unwrap() = Some(rig.engine.consumer("sink").start_sink(100, Taking(n)).unwrap());
            rig.shared.publish(Key(1), Ping { n }).wait().unwrap();
        }
        _ => rig.shared.publish(Key(1), Ping { n }).wait().unwrap(),
    }
}

fn run_at<T: Send + 'static>(
    rig: &Arc<Rig>,
    place: CallSite,
    n: u64,
    calls: impl FnOnce(&Rig) -> T + Send + 'static,
) -> T {
    let (done, answers): (Sender<T>, _) = channel();
    let called = Arc::clone(rig);
    let hook = Box::new(move || {
        let answer = calls(&called);
        // Dropped before the answer is sent, so that the test has the last handle.
        drop(called);
        done.send(answer).unwrap();
    });
    bring_about(rig, place, n, hook);
    answers.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("{place:?}: a call waits for itself"))
}

fn every_call_at(place: CallSite, expected: &BTreeMap<&'static str, &'static str>) {
    let dir = tempfile::tempdir().unwrap();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let rig = Rig::new(dir.path(), place, n);
    let said = run_at(&rig, place, n, calls);
    for (name, word) in &said {
        // Wakers run while the shards go on and make room.
        let is_waker = matches!(place, CallSite::WakerOfShard | CallSite::WakerOfSyncer);
        if !(is_waker && expected.get(name) == Some(&"Full") && word == "Ok") {
            assert_eq!(Some(&word.as_str()), expected.get(name), "{place:?}: {name}");
        }
    }
    assert_eq!(said.len(), expected.len());
    drop(rig.sink.lock().unwrap().take());
    rig.engine.shutdown(soon()).unwrap_or_else(|error| panic!("{place:?}: {error}"));
}

#[test]
fn no_call_on_a_shards_thread_waits_for_that_thread() {
    OF_SHARDS.into_iter().for_each(|place| every_call_at(place, &on_a_shard()));
}

#[test]
fn no_call_in_a_consumers_handler_waits_for_the_consumer() {
    OF_CONSUMERS.into_iter().for_each(|place| every_call_at(place, &in_its_own_handler(place)));
}

#[test]
fn no_call_in_a_sink_waits_for_the_sink() {
    let expected = in_a_sink();
    for place in OF_SINKS {
        every_call_at(place, &expected);
        // The same through the sink's own handle.
        let dir = tempfile::tempdir().unwrap();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let rig = Rig::new(dir.path(), place, n);
        let (drained, stopped) = run_at(&rig, place, n, |rig| {
            let mut sink = None;
            until("the handle is set", || {
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

/// Returns `true` if the store can be opened again, so that its engine has ended.
fn is_closed(dir: &std::path::Path) -> bool {
    match open(dir) {
        Ok(engine) => engine.shutdown(soon()).is_ok(),
        Err(OpenError::Locked { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_last_handle_may_be_dropped_on_any_thread_and_the_engine_closes() {
    for place in OF_SHARDS.into_iter().chain(OF_CONSUMERS).chain([CallSite::Sink]) {
        let dir = tempfile::tempdir().unwrap();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let rig = Rig::new(dir.path(), place, n);
        let (done, dropped) = channel();
        let (go, gone) = channel::<()>();
        let last = Arc::clone(&rig);
        let hook: Hook = Box::new(move || {
            gone.recv().unwrap_err();
            // Drops the rig with every handle, including the engine.
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
fn a_drop_gives_up_on_a_hanging_shard_which_closes_the_store_when_it_continues() {
    let dir = tempfile::tempdir().unwrap();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let engine = open(dir.path()).unwrap();
    let (go, gone) = channel::<()>();
    let (entered_tx, entered) = channel();
    let hook: Hook = Box::new(move || {
        entered_tx.send(()).unwrap();
        gone.recv().unwrap_err();
    });
    HOOKS.lock().unwrap().insert((CallSite::Handler, n), hook);
    let mut producer = engine.producer();
    producer.publish(Key(1), Ping { n }).unwrap();
    entered.recv().unwrap();
    for _ in 0..3 {
        producer.publish(Key(1), Ping { n: 0 }).unwrap();
    }
    // Returns after the promised ten seconds.
    let log = Log::default();
    log.of(|| drop(engine));
    let waits_for = "waits_for=shard 0 (its turn does not end)";
    assert!(log.says(Level::ERROR, &["gives up", waits_for, "waited_ms="]), "{:?}", log.messages());
    assert!(matches!(open(dir.path()), Err(OpenError::Locked { .. })), "its threads still run");
    assert!(matches!(producer.try_publish(Key(1), Ping { n: 0 }), Ok(_) | Err(Rejected::Closed(_))));
    drop(go);
    until("the engine closes", || is_closed(dir.path()));
    let engine = open(dir.path()).unwrap();
    assert!(engine.state(Key(1)).wait().unwrap().unwrap().1 >= Version(4), "no accepted event is lost");
}

#[test]
fn a_consumers_handler_that_waits_for_a_checkpoint_does_not_block_the_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let rig = Rig::new(dir.path(), CallSite::Consumer, n);
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
            wait_word(called.engine.ask(Key(1), |_, _| ()).wait()),
            wait_word(called.engine.flush(Deadline::NEVER)),
            rejected_word(called.shared.publish(Key(1), Ping { n: 0 }).wait()),
            command_word(called.client.lock().unwrap().send(Key(1), 0).wait()),
        ];
        done.send(words).unwrap();
    });
    bring_about(&rig, CallSite::Consumer, n, hook);
    // Waits for the handler, because a stopping consumer handles no further event.
    entered.recv_timeout(Duration::from_secs(60)).unwrap();
    rig.engine.shutdown(soon()).unwrap();
    let words = said.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(words, ["Closed", "Closed", "Ok", "Closed", "NotSent Closed"]);
}

#[test]
fn a_panicking_question_returns_the_panic_and_the_shard_continues() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    let asked = engine.ask(Key(1), |_, _| -> u64 { panic!("no such {}", "thing") }).wait();
    assert!(matches!(&asked, Err(WaitError::QuestionPanicked(text)) if text == "no such thing"), "{asked:?}");
    let asked = crate::common::block_on(engine.ask(Key(1), |_, _| -> u64 { panic!("nor this") }));
    assert!(matches!(&asked, Err(WaitError::QuestionPanicked(text)) if text == "nor this"), "{asked:?}");
    engine.producer().publish(Key(1), Ping { n: 7_777 }).unwrap();
    engine.flush(soon()).unwrap();
    assert_eq!(engine.ask(Key(1), |state, version| (state.last, version)).wait().unwrap(), (7_777, Version(1)));
    engine.shutdown(soon()).unwrap();
    let asked = engine.ask(Key(1), |_, _| -> u64 { panic!("never asked") }).wait();
    assert!(matches!(asked, Err(WaitError::Closed)), "{asked:?}");
}

#[test]
fn a_panicking_waker_affects_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(dir.path(), CallSite::WakerOfSyncer, 0);
    for place in [CallSite::WakerOfShard, CallSite::WakerOfSyncer] {
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
    assert!(matches!(rig.shared.publish(Key(1), Ping { n: 0 }).wait(), Err(Rejected::Closed(_))));
    let reason = rig.client.lock().unwrap().send(Key(1), 0).tell().unwrap_err().reason();
    assert!(matches!(reason, RejectedReason::Closed));
}
