//! Reports about running and ended consumers, under every kind of driver; and a consumer is refused in a log that is
//! not its own.

use crate::common::{ArchivedNote, Note, open_on, small, soon, until};
use corelane::consumer::{ConsumerError, Judgement};
use corelane::error::PositionError;
use corelane::testing::FaultyStorage;
use corelane::{EventLog, HandlerError, Key, Meta, OpenError};

/// The report of `Engine::consumers` about the consumer `name`.
fn shown(engine: &EventLog<Note>, name: &str) -> corelane::consumer::ConsumerReport {
    engine.consumers().into_iter().find(|report| report.name == name).unwrap()
}

#[test]
fn a_consumer_with_a_position_of_another_history_is_refused_and_shown_as_failed() {
    let (storage, dir) = (FaultyStorage::new(), "/s");
    let run = |storage: &FaultyStorage, numbers: std::ops::Range<u64>| {
        let engine = open_on(storage, small(dir)).unwrap();
        let consumer = engine.consumer("c").start(|_, _| Ok(())).unwrap();
        let mut producer = engine.producer();
        for n in numbers {
            drop(producer.publish(Key(n), Note::new(n)).unwrap());
        }
        engine.flush(soon()).unwrap();
        consumer.drain(soon()).unwrap();
        consumer.stop(soon()).unwrap();
        engine.shutdown(soon()).unwrap();
    };
    run(&storage, 0..50);
    let older = storage.files();
    run(&storage, 50..100);
    // The log is restored and continues differently; the consumer's folder is not restored.
    let position_file = std::path::Path::new("/s/consumers/c/checkpoint");
    let newer = storage.files().remove(position_file).unwrap();
    let other = FaultyStorage::with_files(older);
    run(&other, 500..900);
    let mut files = other.files();
    files.insert(position_file.to_owned(), newer.clone());
    let engine = open_on(&FaultyStorage::with_files(files), small(dir)).unwrap();
    let refused = engine.consumer("c").start(|_, _| Ok(()));
    assert!(matches!(refused, Err(ConsumerError::Position(PositionError::OtherHistory { .. }))), "{refused:?}");
    let failure = shown(&engine, "c").failure.expect("the failure is shown");
    assert!(matches!(failure.error(), ConsumerError::Position(PositionError::OtherHistory { .. })), "{failure}");
    let drained = engine.drain_consumers(soon());
    assert!(matches!(drained, Err(ConsumerError::Ended { failure: Some(_) })), "{drained:?}");
    engine.remove_consumer("c").unwrap();
    let anew = engine.consumer("c").start(|_, _| Ok(())).unwrap();
    anew.drain(soon()).unwrap();
    engine.drain_consumers(soon()).unwrap();
    assert_eq!((anew.report().handled, shown(&engine, "c").failure), (450, None));
    drop((anew, engine));

    let foreign = FaultyStorage::new();
    run(&foreign, 0..10);
    let mut files = foreign.files();
    files.insert(position_file.to_owned(), newer);
    let refused = open_on(&FaultyStorage::with_files(files), small(dir));
    assert!(matches!(refused, Err(OpenError::ForeignFile { .. })), "of another store: {refused:?}");
}

#[test]
fn reports_show_every_driver_and_how_a_consumer_ended() {
    let engine = open_on(&FaultyStorage::new(), small("/s")).unwrap();
    let mut producer = engine.producer();
    let mut publish = |n| producer.publish(Key(n), Note::new(n)).unwrap().appended().wait().unwrap();
    (0..3).for_each(&mut publish);
    engine.flush(soon()).unwrap();
    let mut poller = engine.consumer("poller").poller().unwrap();
    assert!(shown(&engine, "poller").is_running, "a poller drives it");
    let delivery = poller.next().unwrap().unwrap();
    poller.failed(delivery, "down").unwrap();
    while let Some(delivery) = poller.next().unwrap() {
        poller.succeeded(delivery).unwrap();
    }
    let report = shown(&engine, "poller");
    assert_eq!((report.handled, report.failed, report.is_running), (2, 1, true));
    drop(poller);
    let report = shown(&engine, "poller");
    assert_eq!((report.is_running, report.failure), (false, None));
    assert!(report.lag_bytes > 0);

    let parks = |_: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> { Err("down".into()) };
    let judge = |_: &HandlerError, _| Judgement::Park;
    let consumer = engine.consumer("parks").judge(judge).start(parks).unwrap();
    until("every event is a letter", || consumer.report().letters.letters == 3);
    consumer.stop(soon()).unwrap();
    let report = shown(&engine, "parks");
    assert_eq!(
        (report.is_running, report.letters.letters, report.letters.parked),
        (false, 3, 3),
        "the stopped consumer keeps its counts"
    );
    let text = corelane::consumer::prometheus(&[report]);
    assert!(text.contains("corelane_consumer_dead_letters{consumer=\"parks\"} 3"), "{text}");
    // A stopped consumer is not a failed one.
    engine.drain_consumers(soon()).unwrap();
}
