//! A poller or consumer records every reported failure: by the time `save` returns, before a `seek`, and when it ends.

use crate::common::{Note, open_on, os_cache, small, soon, until};
use corelane::consumer::{
    ConsumerError, DeadLetterPolicy, HealthPolicy, Judgement, LetterSelector, LetterStatistics, Poller, Start,
    WhenFull, WriteRefused,
};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Config, EventLog, HandlerError, Key, OpenError};

fn publish(engine: &EventLog<Note>, numbers: std::ops::Range<u64>) {
    let mut producer = engine.producer();
    for n in numbers {
        producer.publish(Key(n), Note::new(n)).unwrap().appended().wait().unwrap();
    }
}

fn judging(engine: &EventLog<Note>, judgement: Judgement) -> Poller<Note> {
    let health = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
    engine.consumer("c").before_durable().health(health).judge(move |_, _| judgement).poller().unwrap()
}

/// How the poller ends after the failures were reported.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Save,
    SaveAndPowerCut,
    Drop,
    SeekLatest,
    SeekBeginning,
}

#[test]
fn a_reported_failure_is_recorded_however_the_poller_ends() {
    let configs: [fn(&'static str) -> Config; 2] = [|dir| small(dir), |dir| os_cache(dir)];
    for config in configs {
        for judgement in [Judgement::Park, Judgement::Skip] {
            for end in [End::Save, End::SaveAndPowerCut, End::Drop, End::SeekLatest, End::SeekBeginning] {
                let what = format!("{judgement:?}, {end:?}");
                let mut storage = FaultyStorage::new();
                let mut engine = open_on(&storage, config("/s")).unwrap();
                publish(&engine, 0..3);
                let mut poller = judging(&engine, judgement);
                for _ in 0..2 {
                    let delivery = poller.next().unwrap().unwrap();
                    poller.failed(delivery, "down").unwrap();
                }
                match end {
                    End::Save | End::SaveAndPowerCut => poller.save().unwrap(),
                    End::Drop => {}
                    End::SeekLatest => poller.seek(Start::Latest).unwrap(),
                    End::SeekBeginning => poller.seek(Start::Beginning).unwrap(),
                }
                let recorded = |letters: LetterStatistics| match judgement {
                    Judgement::Park => letters.letters,
                    _ => letters.skipped as usize,
                };
                if end != End::Drop {
                    assert_eq!(recorded(poller.report().letters), 2, "{what}");
                }
                if end == End::SaveAndPowerCut {
                    storage = storage.after_crash(Unsynced::Lost);
                }
                drop(poller);
                assert_eq!(recorded(engine.consumers()[0].letters), 2, "{what}");
                if end == End::SaveAndPowerCut {
                    engine = open_on(&storage, config("/s")).unwrap();
                    assert_eq!(recorded(engine.consumers()[0].letters), 2, "{what}");
                }
                let mut again = judging(&engine, judgement);
                let mut numbers = Vec::new();
                while let Some(delivery) = again.next().unwrap() {
                    numbers.push(again.event(&delivery).unwrap().0.n.to_native());
                    again.succeeded(delivery).unwrap();
                }
                let expected: &[u64] = match (end, judgement) {
                    // Only the unrecorded last event comes again, provided that it was durable.
                    (End::SaveAndPowerCut, _) => &numbers.clone(),
                    (End::SeekLatest, _) => &[],
                    // After a seek back, skipped events come again and letters do not.
                    (End::SeekBeginning, Judgement::Skip) => &[0, 1, 2],
                    _ => &[2],
                };
                assert_eq!(numbers, expected, "{what}");
                assert!(!(end == End::SaveAndPowerCut && numbers.iter().any(|n| *n < 2)), "{what}: {numbers:?}");
            }
        }
    }
}

#[test]
fn a_poller_that_cannot_record_a_failure_returns_an_error() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    publish(&engine, 0..2);
    engine.flush(soon()).unwrap();
    let policy = DeadLetterPolicy::default().letters_max(1).when_full(WhenFull::Halt);
    let health = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
    let builder = engine.consumer("c").health(health).dead_letters(policy).judge(|_, _| Judgement::Park);
    let mut poller = builder.poller().unwrap();
    for _ in 0..2 {
        let delivery = poller.next().unwrap().unwrap();
        poller.failed(delivery, "down").unwrap();
    }
    for _ in 0..2 {
        let saved = poller.save();
        assert!(matches!(saved, Err(ConsumerError::Records(WriteRefused::Full))), "{saved:?}");
        let sought = poller.seek(Start::Latest);
        assert!(matches!(sought, Err(ConsumerError::Records(WriteRefused::Full))), "the position stays: {sought:?}");
    }
    assert_eq!(poller.report().letters.letters, 1);
    drop(poller);
    let mut again = engine.consumer("c").poller().unwrap();
    let delivery = again.next().unwrap().unwrap();
    assert_eq!(again.event(&delivery).unwrap().0.n.to_native(), 1, "the unrecorded event comes again");
}

#[test]
fn a_stopped_consumer_has_recorded_every_failure() {
    for n in 0..30 {
        let engine = open_on(&FaultyStorage::new(), os_cache("/s")).unwrap();
        publish(&engine, 0..10);
        let handled = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counts = std::sync::Arc::clone(&handled);
        let fails = move |_: &_, _: &_| -> Result<(), HandlerError> {
            counts.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            Err("down".into())
        };
        let health = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
        let builder = engine.consumer("c").health(health).judge(|_, _| Judgement::Park).concurrency(1 + n % 3);
        let consumer = builder.start(fails).unwrap();
        until("some events were handled", || handled.load(std::sync::atomic::Ordering::SeqCst) > n as u64 % 9);
        consumer.stop(soon()).unwrap();
        let recorded = handled.load(std::sync::atomic::Ordering::SeqCst) as usize;
        assert_eq!(engine.consumers()[0].letters.letters, recorded, "round {n}");
    }
}

#[test]
fn a_missing_letters_file_is_an_error_as_soon_as_the_letter_is_counted() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    publish(&engine, 0..3);
    engine.flush(soon()).unwrap();
    let health = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
    let hour = std::time::Duration::from_secs(3_600);
    let builder = engine.consumer("c").health(health).checkpoint_every(hour).judge(|_, _| Judgement::Park);
    let mut poller = builder.poller().unwrap();
    // The first call saves the position; the next save is due in an hour.
    let delivery = poller.next().unwrap().unwrap();
    poller.failed(delivery, "down").unwrap();
    let mut out = Vec::new();
    until("the letter is recorded", || {
        out.extend(poller.next().unwrap());
        poller.report().letters.letters == 1
    });
    // As after a kill: no further save happens.
    let mut files = storage.after_crash(Unsynced::Lost).files();
    let letters = files.keys().filter(|path| path.to_str().unwrap().contains("letters-")).cloned().collect::<Vec<_>>();
    assert_eq!(letters.len(), 1);
    files.remove(&letters[0]);
    let engine = open_on(&FaultyStorage::with_files(files), small("/s")).unwrap();
    let refused = engine.consumer("c").poller();
    assert!(matches!(refused, Err(ConsumerError::Files(OpenError::DamagedFile { .. }))), "{refused:?}");
    let report = engine.consumers().remove(0);
    assert!(report.failure.is_some() && report.letters == LetterStatistics::default());
    let text = corelane::consumer::prometheus(&[report]);
    assert!(!text.contains("dead_letters{"), "the count is unknown, so it is not exported: {text}");
}

#[test]
fn a_letter_discarded_before_the_position_names_its_file_no_longer_parks_its_key() {
    let mut discarded = 0;
    for n in 1.. {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        publish(&engine, 0..1);
        engine.flush(soon()).unwrap();
        let mut poller = judging(&engine, Judgement::Park);
        let delivery = poller.next().unwrap().unwrap();
        poller.failed(delivery, "down").unwrap();
        storage.fail_operation(n);
        let saved = poller.save();
        storage.fail_operation(1 << 60);
        if saved.is_ok() {
            break;
        }
        discarded += poller.discard(LetterSelector::All).unwrap();
        poller.save().unwrap();
        // The event may have become a letter only with this save.
        poller.discard(LetterSelector::All).unwrap();
        publish(&engine, 0..1);
        let delivery = poller.next().unwrap();
        assert!(delivery.is_some(), "failed at operation {n}: the key is not parked");
        poller.succeeded(delivery.unwrap()).unwrap();
    }
    assert!(discarded > 0, "in some run the letter was written and the position was not");
}

#[test]
fn an_event_behind_a_letter_discarded_before_its_file_is_named_ends_exactly_once() {
    let mut both = 0;
    for n in 1..20 {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        publish(&engine, 0..1);
        engine.flush(soon()).unwrap();
        let mut poller = judging(&engine, Judgement::Park);
        let delivery = poller.next().unwrap().unwrap();
        poller.failed(delivery, "down").unwrap();
        drop(poller);
        publish(&engine, 0..1);
        engine.flush(soon()).unwrap();
        let mut poller = judging(&engine, Judgement::Park);
        // Reads the event and writes it behind the first letter.
        storage.fail_operation(n);
        assert!(poller.next().unwrap().is_none());
        storage.fail_operation(1 << 60);
        let discarded = poller.discard(LetterSelector::All).unwrap();
        both += u64::from(discarded == 2 && poller.report().write_failures.1 > 0);
        poller.save().unwrap();
        let mut handled = 0;
        while let Some(delivery) = poller.next().unwrap() {
            poller.succeeded(delivery).unwrap();
            handled += 1;
        }
        assert_eq!(discarded + handled, 2, "failed at operation {n}: each event ends once");
        assert_eq!(poller.report().waiting(), 0, "failed at operation {n}");
    }
    assert!(both > 0, "in some run the letter was written and the position was not");
}
