//! Consumers on their own threads: order, restarts, failures, dead letters, and their independence of each other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::log::Log;
use crate::common::{Note, SEGMENT, os_cache, small, soon, until};
use corelane::consumer::{
    Consumer, ConsumerError, ConsumerReport, DeadLetterPolicy, Exhausted, HaltCause, Handled, HealthPolicy, Judgement,
    LetterKind, LetterSelector, QueuePolicy, Retry, Start,
};
use corelane::{EventLog, HandlerError, Key, Meta, Retention};
use rkyv::Archived;
use tracing::Level;

/// The events that a handler saw, by key.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<BTreeMap<u64, Vec<u64>>>>);

impl Seen {
    fn add(&self, event: &Archived<Note>, meta: &Meta) {
        self.0.lock().unwrap().entry(meta.key.0).or_default().push(event.n.to_native());
    }

    fn of(&self, key: u64) -> Vec<u64> {
        self.0.lock().unwrap().get(&key).cloned().unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().values().map(Vec::len).sum()
    }
}

fn publish(engine: &EventLog<Note>, events: impl IntoIterator<Item = (u64, u64)>) {
    let mut producer = engine.producer();
    for (key, n) in events {
        drop(producer.publish(Key::new(key), Note::new(n)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

/// `count` events, round robin over `keys` keys; each key's numbers rise.
fn events(keys: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..count).map(move |n| (n % keys, n))
}

fn rising(keys: u64, count: u64, key: u64) -> Vec<u64> {
    (0..count).filter(|n| n % keys == key).collect()
}

fn quick(attempts: u32) -> Retry {
    Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(attempts)
}

/// A health policy that never calls the service unhealthy.
fn patient() -> HealthPolicy {
    HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100)
}

fn report(engine: &EventLog<Note>, name: &str) -> ConsumerReport {
    engine.consumers().into_iter().find(|report| report.name == name).unwrap()
}

#[test]
fn every_event_is_handled_in_order_and_a_restart_continues_after_them() {
    let dir = tempfile::tempdir().unwrap();
    for concurrency in [1, 4] {
        let name = format!("all-{concurrency}");
        let seen = Seen::default();
        for round in 0..3 {
            let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
            publish(&engine, (0..900).map(|i| (i % 7, round * 900 + i)));
            let saw = seen.clone();
            let consumer = engine.consumer(&name).concurrency(concurrency).start(move |event, meta| {
                saw.add(event, meta);
                Ok(())
            });
            let consumer = consumer.unwrap();
            // The same while the consumer runs.
            publish(&engine, (0..100).map(|i| (i % 7, round * 900 + 800 + i)).take(0));
            consumer.drain(soon()).unwrap();
            let report = consumer.report();
            assert_eq!((report.waiting(), report.failed, report.success_rate()), (0, 0, 1.0));
            if round == 1 {
                consumer.stop(soon()).unwrap();
            }
            engine.shutdown(soon()).unwrap();
        }
        let rounds = if concurrency == 1 { 3 } else { 6 };
        for key in 0..7 {
            let all = seen.of(key);
            let per_round = (0..900).filter(|i| i % 7 == key).count();
            assert_eq!(all.len(), per_round * rounds, "{name}: each event once");
            // The second consumer begins with the events of the first consumer's rounds.
            let expected = (0..rounds as u64)
                .flat_map(|round| (0..900).filter(move |i| i % 7 == key).map(move |i| (round % 3) * 900 + i));
            assert_eq!(all, expected.collect::<Vec<_>>(), "{name}: in order");
        }
    }
}

/// The retries come due together and fail one after the other. That says nothing about the service, because other
/// events succeed.
#[test]
fn events_that_always_fail_do_not_make_the_service_unhealthy() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    for concurrency in [1, 16] {
        let name = format!("c-{concurrency}");
        // The default policy with shorter times.
        let health = HealthPolicy::default().pause(Duration::from_millis(100));
        let retry = Retry::exponential(2.0).base(Duration::from_millis(10)).attempts(5);
        let builder = engine.consumer(&name).retry(retry).health(health).concurrency(concurrency);
        // Ten keys of 200, and never two of them in a row.
        let bad = |_: &Archived<Note>, meta: &Meta| {
            if meta.key.0.is_multiple_of(20) { Err("bad player".into()) } else { Ok(()) }
        };
        let consumer = builder.start(bad).unwrap();
        if concurrency == 1 {
            publish(&engine, events(200, 4000));
        }
        until("the good events are handled and the bad ones parked", || {
            let report = consumer.report();
            (report.handled, report.letters.letters) == (190 * 20, 10 * 20)
        });
        let report = consumer.report();
        assert_eq!(report.health.map(|health| (health.outages, health.failed)), Some((0, 10 * 5)));
        consumer.stop(soon()).unwrap();
    }
}

#[test]
fn probes_are_events_that_have_not_failed_yet() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let called = Arc::clone(&calls);
    // Long enough for the next events to be appended before the first probe.
    let health = HealthPolicy::default().pause(Duration::from_secs(2));
    let consumer = engine.consumer("c").retry(quick(1000)).health(health).start(move |_, meta| {
        called.lock().unwrap().push(meta.key.0);
        if meta.key.0 < 5 { Err("bad player".into()) } else { Ok(()) }
    });
    let consumer = consumer.unwrap();
    publish(&engine, (0..5).map(|key| (key, key)));
    until("the service is unhealthy", || consumer.report().health.is_some_and(|health| health.outages == 1));
    publish(&engine, (5..20).map(|key| (key, key)));
    until("the service is healthy again", || calls.lock().unwrap().len() >= 8);
    let calls = calls.lock().unwrap();
    assert!(calls[5..8].iter().all(|key| *key >= 5), "the three probes: {calls:?}");
}

#[test]
fn a_stop_that_gives_up_at_its_deadline_does_not_wait_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let (is_inside, may_go) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (inside, go) = (Arc::clone(&is_inside), Arc::clone(&may_go));
    let consumer = engine.consumer("c").start(move |_, _| {
        inside.store(true, Ordering::SeqCst);
        while !go.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    let consumer = consumer.unwrap();
    let (inside, go) = (Arc::clone(&is_inside), Arc::clone(&may_go));
    let dropped = engine.consumer("dropped").start(move |_, _| {
        while !go.load(Ordering::SeqCst) || !inside.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    let dropped = dropped.unwrap();
    publish(&engine, events(1, 1));
    until("both handlers run", || is_inside.load(Ordering::SeqCst) && dropped.report().running_since.is_some());
    let began = Instant::now();
    let stopped = consumer.stop(Some(began + Duration::from_millis(50)));
    assert!(matches!(stopped, Err(ConsumerError::Busy { .. })), "{stopped:?}");
    let stopped_in = began.elapsed();
    let began = Instant::now();
    drop(dropped);
    assert!(stopped_in < began.elapsed(), "a stop at its deadline waits less than the five seconds of a drop");
    may_go.store(true, Ordering::SeqCst);
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_failing_event_is_retried_before_the_next_of_its_key_and_delays_no_other_key() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let (seen, attempts) = (Seen::default(), Arc::new(AtomicU64::new(0)));
    let (saw, tried) = (seen.clone(), Arc::clone(&attempts));
    let consumer = engine.consumer("c").retry(quick(1000)).health(patient()).start(move |event, meta| {
        // The first event of key 3 succeeds at the 200th attempt.
        if event.n == 3 && tried.fetch_add(1, Ordering::SeqCst) < 199 {
            return Err("not yet".into());
        }
        saw.add(event, meta);
        Ok(())
    });
    let consumer = consumer.unwrap();
    publish(&engine, events(10, 500));
    until("the other keys are handled", || seen.len() >= 450);
    assert_eq!(seen.of(3), [0; 0], "the later events of its key wait");
    consumer.drain(soon()).unwrap();
    for key in 0..10 {
        assert_eq!(seen.of(key), rising(10, 500, key));
    }
    assert_eq!(consumer.report().failed, 199);
}

#[test]
fn a_panicking_handler_counts_as_failing_and_affects_no_other_consumer() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let seen = Seen::default();
    let saw = seen.clone();
    let bad =
        engine.subscribe("bad").retry(quick(2)).health(patient()).start(|_, _| panic!("a panic on purpose")).unwrap();
    let good = engine.subscribe("good").start(move |event, meta| {
        saw.add(event, meta);
        Ok(())
    });
    let good = good.unwrap();
    publish(&engine, events(5, 50));
    good.drain(soon()).unwrap();
    bad.drain(soon()).unwrap();
    assert_eq!(seen.len(), 50);
    let report = bad.report();
    assert_eq!((report.handled, report.parked, report.letters.letters), (0, 50, 50));
    let letters = bad.dead_letters(None, 100).unwrap();
    assert!(letters[0].error.contains("a panic on purpose"), "{}", letters[0].error);
    assert_eq!(letters.iter().filter(|letter| letter.why == LetterKind::Failed).count(), 5, "one per key");
}

#[test]
fn a_parked_key_keeps_its_order_through_reprocessing_and_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (seen, is_well) = (Seen::default(), Arc::new(AtomicBool::new(false)));
    let start = |engine: &EventLog<Note>| -> Consumer<Note> {
        let (saw, well) = (seen.clone(), Arc::clone(&is_well));
        let handler = move |event: &Archived<Note>, meta: &Meta| -> Result<(), HandlerError> {
            if meta.key == Key::new(1) && !well.load(Ordering::SeqCst) {
                return Err("no".into());
            }
            saw.add(event, meta);
            Ok(())
        };
        engine.consumer("c").retry(quick(3)).health(patient()).start(handler).unwrap()
    };
    {
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        publish(&engine, events(3, 30));
        let consumer = start(&engine);
        consumer.drain(soon()).unwrap();
        assert_eq!((seen.of(0), seen.of(1)), (rising(3, 30, 0), vec![]));
        assert_eq!(consumer.report().letters.letters, 10);
        // Reprocessing stops at the first failure, the oldest letter.
        assert_eq!(consumer.reprocess(LetterSelector::All).unwrap(), 1);
        until("the letter was retried", || consumer.dead_letters(None, 1).unwrap()[0].attempts == 4);
        assert_eq!(consumer.report().letters.letters, 10);
    }
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let consumer = start(&engine);
    publish(&engine, (30..60).map(|n| (n % 3, n)));
    consumer.drain(soon()).unwrap();
    assert_eq!(consumer.report().letters.letters, 20, "later events are parked behind it, even after a restart");
    let letters = consumer.dead_letters(None, 100).unwrap();
    assert!(letters.iter().skip(1).all(|letter| letter.why == LetterKind::Behind && letter.attempts == 0));
    is_well.store(true, Ordering::SeqCst);
    assert_eq!(consumer.reprocess(LetterSelector::Of(Key::new(1))).unwrap(), 1);
    until("all letters are handled", || consumer.report().letters.letters == 0);
    publish(&engine, (60..90).map(|n| (n % 3, n)));
    consumer.drain(soon()).unwrap();
    for key in 0..3 {
        assert_eq!(seen.of(key), rising(3, 90, key), "key {key}");
    }
    assert_eq!(consumer.report().letters.handled, 20);
}

#[test]
fn discarded_letters_are_counted_and_unpark_their_key() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let (seen, saw) = (Seen::default(), Seen::default());
    let saw2 = saw.clone();
    drop(saw);
    let consumer = engine.consumer("c").retry(quick(1)).health(patient()).start(move |event, meta| {
        if event.n < 2 {
            return Err("no".into());
        }
        saw2.add(event, meta);
        Ok(())
    });
    let consumer = consumer.unwrap();
    publish(&engine, [(1, 0), (1, 5), (2, 1), (2, 6), (3, 7)]);
    consumer.drain(soon()).unwrap();
    assert_eq!(consumer.discard(LetterSelector::Of(Key::new(1))).unwrap(), 2);
    publish(&engine, [(1, 8), (2, 9)]);
    consumer.drain(soon()).unwrap();
    let report = consumer.report();
    assert_eq!((report.letters.letters, report.letters.discarded), (3, 2));
    assert_eq!(consumer.discard(LetterSelector::All).unwrap(), 3);
    assert_eq!(consumer.discard(LetterSelector::All).unwrap(), 0);
    assert_eq!(seen.len(), 0);
}

#[test]
fn judgements_skip_halt_and_await_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let (seen, is_there) = (Seen::default(), Arc::new(AtomicBool::new(false)));
    let (saw, there) = (seen.clone(), Arc::clone(&is_there));
    let builder =
        engine.consumer("c").health(patient()).queues(QueuePolicy::default().gap_wait_max(Duration::from_secs(3600)));
    let builder = builder.judge(|error, _| match error.to_string().as_str() {
        "skip" => Judgement::Skip,
        "halt" => Judgement::Halt,
        _ => Judgement::AwaitGap,
    });
    let halts = Arc::new(AtomicBool::new(true));
    let halting = Arc::clone(&halts);
    let consumer = builder.start(move |event, meta| {
        match event.n.to_native() {
            10 => return Err("skip".into()),
            20 if halting.load(Ordering::SeqCst) => return Err("halt".into()),
            30 if !there.load(Ordering::SeqCst) => return Err("something is missing".into()),
            _ => {}
        }
        saw.add(event, meta);
        Ok(())
    });
    let consumer = consumer.unwrap();
    publish(&engine, [(1, 10), (1, 11), (2, 20), (2, 21), (3, 30), (3, 31), (4, 40)]);
    until("the consumer halts", || consumer.report().halted.is_some());
    assert!(matches!(consumer.report().halted, Some(HaltCause::Event { key: Key(2), .. })));
    assert_eq!(seen.of(4), [0; 0], "no event runs after a halt");
    halts.store(false, Ordering::SeqCst);
    consumer.resume().unwrap();
    until("the consumer continues", || seen.of(4) == [40]);
    assert_eq!((seen.of(2), seen.of(3)), (vec![20, 21], vec![]));
    assert!(!consumer.gap_filled(Key::new(4)).unwrap(), "that key waits for no gap");
    is_there.store(true, Ordering::SeqCst);
    until("the key waits for its gap", || consumer.gap_filled(Key::new(3)).unwrap());
    consumer.drain(soon()).unwrap();
    assert_eq!((seen.of(1), seen.of(3)), (vec![11], vec![30, 31]));
    let report = consumer.report();
    assert_eq!((report.skipped, report.letters.skipped, report.letters.letters), (1, 1, 0));
}

#[test]
fn parked_events_do_not_count_against_the_service_and_a_panicking_judge_leaves_the_decision_to_the_policy() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let builder = engine.consumer("c").retry(quick(2)).health(HealthPolicy::default().consecutive_max(50));
    let builder = builder.judge(|error, _| match error.to_string().as_str() {
        "poison" => Judgement::Park,
        _ => panic!("a panic on purpose"),
    });
    let consumer = builder.start(|event, _| Err(if event.n == 7 { "what" } else { "poison" }.into())).unwrap();
    publish(&engine, (0..100).map(|n| (n, n)));
    consumer.drain(soon()).unwrap();
    let report = consumer.report();
    assert_eq!((report.parked, report.failed), (100, 101), "the event without a judgement was tried twice");
    let health = report.health.unwrap();
    assert_eq!((health.failed, health.outages), (2, 0));
}

#[test]
fn exhausted_attempts_end_as_configured() {
    for (exhausted, parked, skipped) in [(Exhausted::Park, 2, 0), (Exhausted::Skip, 0, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        let builder = engine.consumer("c").retry(quick(3)).health(patient()).when_exhausted(exhausted);
        let consumer = builder.start(|event, _| if event.n == 0 { Err("no".into()) } else { Ok(()) }).unwrap();
        publish(&engine, [(1, 0), (1, 1), (2, 2)]);
        consumer.drain(soon()).unwrap();
        let report = consumer.report();
        assert_eq!((report.parked, report.skipped, report.failed), (parked, skipped, 3));
    }
}

#[test]
fn a_consumer_without_room_for_dead_letters_halts_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let is_well = Arc::new(AtomicBool::new(false));
    let well = Arc::clone(&is_well);
    let builder = engine.consumer("c").retry(quick(1)).health(patient());
    let builder = builder.dead_letters(DeadLetterPolicy::default().letters_max(3));
    let consumer =
        builder.start(move |_, _| if well.load(Ordering::SeqCst) { Ok(()) } else { Err("no".into()) }).unwrap();
    publish(&engine, events(100, 100));
    until("the consumer halts", || consumer.report().halted == Some(HaltCause::DeadLettersFull));
    assert!(consumer.report().letters.letters <= 3);
    is_well.store(true, Ordering::SeqCst);
    consumer.discard(LetterSelector::All).unwrap();
    until("every event is done", || {
        // The earlier failures are recorded, three at a time.
        consumer.discard(LetterSelector::All).unwrap();
        consumer.resume().unwrap();
        consumer.drain(Some(Instant::now() + Duration::from_millis(20))).is_ok()
    });
    let report = consumer.report();
    let letters = report.letters;
    assert_eq!(report.handled + letters.discarded + letters.letters as u64, 100, "{report:?}");
}

#[test]
fn a_paused_consumer_handles_nothing_and_a_rebuild_repeats_no_side_effect() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let (handled, effect_keys) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (count, effects) = (Arc::clone(&handled), Arc::clone(&effect_keys));
    let consumer = engine.consumer("mail").start_with(move |_, _, call| {
        count.fetch_add(1, Ordering::SeqCst);
        call.effect(|key| -> Result<(), HandlerError> {
            effects.lock().unwrap().push(key.to_string());
            Ok(())
        })?;
        Ok(())
    });
    let consumer = consumer.unwrap();
    publish(&engine, events(4, 40));
    consumer.drain(soon()).unwrap();
    consumer.pause().unwrap();
    publish(&engine, events(4, 20));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(handled.load(Ordering::SeqCst), 40);
    assert!(consumer.report().is_paused && consumer.report().unread >= 20);
    consumer.seek(Start::Beginning).unwrap();
    assert_eq!(handled.load(Ordering::SeqCst), 40, "the consumer is still paused");
    consumer.resume().unwrap();
    consumer.drain(soon()).unwrap();
    assert_eq!(handled.load(Ordering::SeqCst), 100, "40, and then all 60 again");
    assert_eq!(consumer.report().handled, 100, "the counts continue");
    let mut keys = effect_keys.lock().unwrap().clone();
    assert_eq!(keys.len(), 60, "each effect once");
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 60, "each effect has its own key");
    consumer.seek(Start::Latest).unwrap();
    publish(&engine, events(4, 5));
    consumer.drain(soon()).unwrap();
    assert_eq!(handled.load(Ordering::SeqCst), 105);
}

#[test]
fn retention_waits_for_the_slowest_consumer_and_not_for_a_removed_one() {
    let dir = tempfile::tempdir().unwrap();
    let retention = Retention::bytes(2 * SEGMENT);
    let config = || os_cache(dir.path()).retention(retention).spares_max(1);
    let is_open = Arc::new(AtomicBool::new(false));
    let big = |engine: &EventLog<Note>, count: u64| {
        let mut producer = engine.producer();
        for n in 0..count {
            drop(producer.publish(Key::new(n % 5), Note::sized(n, 4000)).unwrap());
        }
        engine.flush(soon()).unwrap();
    };
    {
        let engine = EventLog::<Note>::open(config()).unwrap();
        let open = Arc::clone(&is_open);
        let slow = engine.consumer("slow").save_every(Duration::from_millis(1));
        let slow = slow.start(move |_, _| {
            while !open.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        let slow = slow.unwrap();
        big(&engine, 100);
        assert!(engine.shard_metrics()[0].segments >= 6, "no segment was freed");
        assert!(slow.report().running_since.is_some(), "the report shows which handler is slow");
        assert!(report(&engine, "slow").lag_bytes > 100 * 4000);
        is_open.store(true, Ordering::SeqCst);
        until("retention continues", || engine.shard_metrics()[0].segments <= 3);
        slow.stop(soon()).unwrap();
        // The stopped consumer is still registered.
        big(&engine, 100);
        assert!(engine.shard_metrics()[0].segments >= 6);
    }
    let engine = EventLog::<Note>::open(config()).unwrap();
    big(&engine, 1);
    assert!(engine.shard_metrics()[0].segments >= 6, "the same after a restart");
    engine.remove_consumer("slow").unwrap();
    assert!(matches!(engine.remove_consumer("slow"), Err(ConsumerError::NotRegistered { .. })));
    big(&engine, 20);
    until("no consumer holds the segments", || engine.shard_metrics()[0].segments <= 3);
    assert_eq!(engine.consumers(), []);
    drop(engine);
    let engine = EventLog::<Note>::open(config()).unwrap();
    assert_eq!(engine.consumers(), [], "the consumer stays removed");
}

#[test]
fn a_hanging_handler_is_visible_and_stoppable_and_affects_no_other_consumer() {
    let dir = tempfile::tempdir().unwrap();
    for concurrency in [1, 3] {
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        let release = Arc::new(AtomicBool::new(false));
        let (released, seen) = (Arc::clone(&release), Seen::default());
        let saw = seen.clone();
        let name = format!("hangs-{concurrency}");
        let hanging = engine.consumer(&name).concurrency(concurrency).start_at(Start::Latest).start(move |event, _| {
            while event.n == 0 && !released.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        let hanging = hanging.unwrap();
        let other = engine.subscribe("other").start(move |event, meta| {
            saw.add(event, meta);
            Ok(())
        });
        let other = other.unwrap();
        publish(&engine, events(3, 30));
        other.drain(soon()).unwrap();
        assert_eq!(seen.len(), 30);
        until("the report shows it", || {
            hanging.report().running_since.is_some_and(|since| since > Duration::from_millis(30))
        });
        if concurrency == 3 {
            until("other keys are handled", || hanging.report().handled == 20);
        }
        let drained = hanging.drain(Some(Instant::now() + Duration::from_millis(20)));
        assert!(matches!(drained, Err(ConsumerError::Wait(corelane::WaitError::TimedOut))), "{drained:?}");
        let began = Instant::now();
        let stopped = hanging.stop(Some(began + Duration::from_millis(50)));
        assert!(matches!(stopped, Err(ConsumerError::Busy { .. })), "{stopped:?}");
        let again = engine.consumer(&name).start(|_, _| Ok(()));
        assert!(
            matches!(again, Err(ConsumerError::AlreadyRunning { .. })),
            "the name stays taken while the handler hangs"
        );
        release.store(true, Ordering::SeqCst);
        until("the consumer ends by itself", || engine.consumer(&name).start(|_, _| Ok(())).is_ok());
        drop(other);
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn a_dropped_engine_leaves_a_hanging_handler_behind_and_stops_every_other_consumer() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let release = Arc::new(AtomicBool::new(false));
    let released = Arc::clone(&release);
    let hanging = engine.subscribe("hangs").start(move |_, _| {
        while !released.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    let hanging = hanging.unwrap();
    let other = engine.consumer("other").concurrency(2).start(|_, _| Ok(())).unwrap();
    publish(&engine, events(3, 30));
    until("the handler hangs", || hanging.report().running_since.is_some());
    let log = Log::default();
    log.of(|| drop(engine));
    assert!(log.says(Level::ERROR, &["gives up", "waits_for=consumer hangs ", "waited_ms="]), "{:?}", log.messages());
    assert!(!release.load(Ordering::SeqCst), "the drop gave up on the handler");
    until("the other consumer has ended", || !other.report().is_running);
    assert!(matches!(EventLog::<Note>::open(small(dir.path())), Err(corelane::OpenError::Locked { .. })));
    release.store(true, Ordering::SeqCst);
    drop((hanging, other));
    drop(EventLog::<Note>::open(small(dir.path())).unwrap());
}

#[test]
fn publish_sync_returns_when_the_named_consumers_have_handled_the_event() {
    let dir = tempfile::tempdir().unwrap();
    let inline = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&inline);
    let engine = EventLog::<Note>::builder(small(dir.path()));
    let engine = engine.handler("inline", corelane::OnError::Halt, move |_| {
        let count = Arc::clone(&count);
        move |_: &Archived<Note>, _: &Meta| {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    });
    let engine = engine.open().unwrap();
    let (seen, saw) = (Seen::default(), Seen::default());
    let saw_it = saw.clone();
    let slow = engine.subscribe("slow").retry(quick(2)).health(patient()).start(move |event, meta| {
        std::thread::sleep(Duration::from_millis(2));
        if event.n == 7 {
            return Err("no".into());
        }
        saw_it.add(event, meta);
        Ok(())
    });
    let slow = slow.unwrap();
    let mut producer = engine.producer();
    for n in 0..5 {
        engine.publish_sync(&mut producer, Key::new(1), Note::new(n), &[], soon()).unwrap();
        assert_eq!(inline.load(Ordering::SeqCst), n + 1, "the inline handler has handled the event");
    }
    for n in 8..12 {
        engine.publish_sync(&mut producer, Key::new(1), Note::new(n), &[&slow], soon()).unwrap();
        assert_eq!(saw.of(1).last(), Some(&n), "the consumer has handled the event");
    }
    let refused = engine.publish_sync(&mut producer, Key::new(1), Note::new(7), &[&slow], soon());
    assert!(matches!(refused, Err(corelane::engine::PublishSyncError::Recorded { .. })), "{refused:?}");
    let late = Some(Instant::now());
    let late = engine.publish_sync(&mut producer, Key::new(2), Note::new(1), &[&slow], late);
    assert!(late.is_err(), "the deadline has passed");
    drop(seen);
    let head = engine.stream(Key::new(1), corelane::Version(10)).unwrap();
    drop(head);
    assert_eq!(
        slow.wait_handled(
            Key::new(9),
            corelane::event::EventId { shard: corelane::ShardId(0), offset: corelane::Offset(0) },
            soon()
        )
        .unwrap(),
        Handled::Unknown,
        "the event precedes the consumer's start"
    );
}

#[test]
fn misuse_is_a_typed_error_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let start = |name: &str| engine.consumer(name).start(|_, _| Ok(()));
    for name in ["", "Upper", "a/b", "..", &"x".repeat(65)] {
        assert!(matches!(start(name), Err(ConsumerError::Name { .. })), "{name}");
    }
    let unknown = engine.consumer("c").types(["note", "notes"]).start(|_, _| Ok(()));
    assert!(matches!(unknown, Err(ConsumerError::UnknownType { name }) if name == "notes"));
    let none = engine.consumer("c").types(Vec::<String>::new()).start(|_, _| Ok(()));
    assert!(matches!(none, Err(ConsumerError::NoTypes)));
    assert!(matches!(engine.consumer("c").concurrency(0).start(|_, _| Ok(())), Err(ConsumerError::Config(_))));
    assert!(matches!(engine.consumer("c").retry(quick(0)).start(|_, _| Ok(())), Err(ConsumerError::Config(_))));
    assert_eq!(engine.consumers(), [], "no consumer was registered");
    let first = start("c").unwrap();
    assert!(matches!(start("c"), Err(ConsumerError::AlreadyRunning { .. })));
    assert!(matches!(engine.remove_consumer("c"), Err(ConsumerError::AlreadyRunning { .. })));
    first.stop(soon()).unwrap();
    drop(start("c").unwrap());
    engine.shutdown(soon()).unwrap();
    assert!(matches!(start("c"), Err(ConsumerError::Closed)));
}

#[test]
fn consumers_begin_at_the_configured_start() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
    publish(&engine, events(8, 80));
    std::thread::sleep(Duration::from_millis(5));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let between = corelane::Time(u64::try_from(now.as_nanos()).unwrap());
    std::thread::sleep(Duration::from_millis(5));
    publish(&engine, events(8, 40));
    for (i, (start, expected)) in
        [(Start::Beginning, 120), (Start::Time(between), 40), (Start::Latest, 0)].into_iter().enumerate()
    {
        let seen = Seen::default();
        let saw = seen.clone();
        let consumer = engine.consumer(&format!("c{i}")).start_at(start).start(move |event, meta| {
            saw.add(event, meta);
            Ok(())
        });
        let consumer = consumer.unwrap();
        consumer.drain(soon()).unwrap();
        assert_eq!(seen.len(), expected, "{start:?}");
    }
}
