//! Dead letters of a consumer that seeks back, restarts, or has no room for more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Note, open_on, small, soon};
use corelane::consumer::{
    ConsumerError, DeadLetterPolicy, Delivery, HaltCause, HealthPolicy, Judgement, LetterSelector, Poller, Start,
    WhenFull,
};
use corelane::testing::FaultyStorage;
use corelane::{EventLog, Key, OpenError};

struct Driven {
    poller: Poller<Note>,
    now_ms: Arc<AtomicU64>,
}

impl Driven {
    fn new(engine: &EventLog<Note>, policy: DeadLetterPolicy) -> Self {
        let now_ms = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&now_ms);
        let builder = engine.consumer("c").concurrency(2).dead_letters(policy).judge(|error, _| {
            match error.to_string().as_str() {
                "skip" => Judgement::Skip,
                _ => Judgement::Park,
            }
        });
        let builder = builder.health(HealthPolicy::default().consecutive_max(1000).failure_percent_max(100));
        let poller = builder.poller().unwrap().clock(move || Duration::from_millis(clock.load(Ordering::SeqCst)));
        Self { poller, now_ms }
    }

    fn next(&mut self) -> Option<(u64, Delivery)> {
        self.now_ms.fetch_add(1, Ordering::SeqCst);
        let delivery = self.poller.next().unwrap()?;
        let n = self.poller.event(&delivery).unwrap().0.n.to_native();
        Some((n, delivery))
    }

    /// Handles every delivery except those that `fails` names. Returns the numbers of the handled events.
    fn take(&mut self, fails: impl Fn(u64) -> Option<&'static str>) -> Vec<u64> {
        let mut taken = Vec::new();
        while let Some((n, delivery)) = self.next() {
            match fails(n) {
                Some(how) => self.poller.failed(delivery, how).unwrap(),
                None => {
                    taken.push(n);
                    self.poller.succeeded(delivery).unwrap();
                }
            }
        }
        taken
    }

    fn letters(&self) -> usize {
        self.poller.report().letters.letters
    }
}

fn publish(engine: &EventLog<Note>, numbers: impl IntoIterator<Item = u64>) {
    let mut producer = engine.producer();
    for n in numbers {
        producer.publish(Key(n / 10), Note::new(n)).unwrap();
    }
    engine.flush(soon()).unwrap();
}

fn policy() -> DeadLetterPolicy {
    DeadLetterPolicy::default()
}

#[test]
fn a_consumer_that_seeks_back_keeps_its_letters_without_duplicates() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut consumer = Driven::new(&engine, policy());
    publish(&engine, [10, 11, 12, 20]);
    assert_eq!(consumer.take(|n| (n == 11).then_some("park")), [10, 20]);
    assert_eq!(consumer.letters(), 2);
    consumer.poller.save().unwrap();
    consumer.poller.seek(Start::Beginning).unwrap();
    assert_eq!(
        consumer.take(|_| None),
        [20],
        "the event before the letters is behind the same fault, and becomes a letter"
    );
    assert_eq!(consumer.letters(), 3);
    consumer.poller.reprocess(LetterSelector::All);
    assert_eq!(consumer.take(|_| None), [10, 11, 12], "in order");
    publish(&engine, [13]);
    assert_eq!(consumer.take(|_| None), [13], "with the last letter its key is unparked");
}

#[test]
fn letters_reprocessed_before_older_events_are_read_again_wait_for_them() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut consumer = Driven::new(&engine, policy());
    publish(&engine, [10, 11]);
    consumer.take(|n| (n == 11).then_some("park"));
    consumer.poller.save().unwrap();
    consumer.poller.seek(Start::Beginning).unwrap();
    consumer.poller.reprocess(LetterSelector::All);
    assert_eq!(consumer.take(|_| None), [10, 11]);
}

#[test]
fn a_rebuild_handles_recorded_events_again_even_after_a_restart_in_the_middle() {
    for restarts in [false, true] {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        let mut consumer = Driven::new(&engine, policy());
        publish(&engine, [10, 11, 20, 30, 40]);
        consumer.take(|n| match n {
            10 | 40 => Some("park"),
            20 => Some("skip"),
            _ => None,
        });
        consumer.poller.reprocess(LetterSelector::Of(Key(1)));
        assert_eq!(consumer.take(|_| None), [10, 11]);
        assert_eq!(consumer.poller.discard(LetterSelector::Of(Key(4))).unwrap(), 1);
        consumer.poller.save().unwrap();
        let counts = consumer.poller.report().letters;
        consumer.poller.seek(Start::Beginning).unwrap();
        if restarts {
            drop(consumer);
            consumer = Driven::new(&engine, policy());
        }
        let mut taken = consumer.take(|_| None);
        taken.sort_unstable();
        assert_eq!(taken, [10, 11, 20, 30, 40], "restarts: {restarts}");
        assert_eq!(consumer.poller.report().letters, counts, "the outcomes of the letters stay counted");
    }
}

#[test]
fn a_letter_discarded_before_it_is_read_again_does_not_come_again() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut consumer = Driven::new(&engine, policy());
    publish(&engine, [10, 20]);
    consumer.take(|n| (n == 10).then_some("park"));
    consumer.poller.save().unwrap();
    consumer.poller.seek(Start::Beginning).unwrap();
    assert_eq!(consumer.poller.discard(LetterSelector::All).unwrap(), 1);
    assert_eq!(consumer.take(|_| None), [20]);
}

#[test]
fn a_letter_that_makes_room_while_it_is_handled_frees_its_key_once() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut consumer = Driven::new(&engine, policy().letters_max(2).when_full(WhenFull::DiscardOldest));
    publish(&engine, [10, 11]);
    consumer.take(|n| (n == 10).then_some("park"));
    assert_eq!(consumer.letters(), 2);
    consumer.poller.reprocess(LetterSelector::Of(Key(1)));
    let (n, oldest) = consumer.next().unwrap();
    assert_eq!(n, 10);
    publish(&engine, [20, 12]);
    let (n, other) = consumer.next().unwrap();
    assert_eq!(n, 20);
    consumer.poller.failed(other, "park").unwrap();
    assert!(consumer.next().is_none());
    assert_eq!(consumer.poller.report().letters.overflowed, 2, "10 and 11 made room for 20 and 12");
    consumer.poller.succeeded(oldest).unwrap();
    // 12 is a letter, so later events of its key wait.
    publish(&engine, [13]);
    let (n, younger) = consumer.next().unwrap();
    assert_eq!((n, consumer.next().map(|(n, _)| n)), (12, None));
    consumer.poller.succeeded(younger).unwrap();
    assert_eq!(consumer.take(|_| None), [13]);
}

#[test]
fn letters_are_handled_while_there_is_no_room_for_more() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut consumer = Driven::new(&engine, policy().letters_max(2));
    publish(&engine, [10, 20, 30, 40]);
    assert_eq!(consumer.take(|_| Some("park")), [0; 0]);
    assert_eq!(consumer.poller.report().halted, Some(HaltCause::DeadLettersFull));
    let letters = consumer.letters();
    assert!(letters <= 2, "{letters}");
    assert_eq!(consumer.poller.reprocess(LetterSelector::All), letters);
    assert_eq!(consumer.take(|_| None), [10, 20][..letters]);
    consumer.poller.resume();
    let mut taken = consumer.take(|_| None);
    let end = soon().unwrap();
    while consumer.letters() > 0 || consumer.poller.report().waiting() > 0 {
        assert!(Instant::now() < end, "{:?}", consumer.poller.report());
        consumer.poller.resume();
        consumer.poller.reprocess(LetterSelector::All);
        taken.extend(consumer.take(|_| None));
    }
    assert_eq!(taken.len() + letters, 4);
}

#[test]
fn a_position_is_saved_although_the_outcome_of_a_letter_cannot_be_written() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    publish(&engine, [10, 20]);
    let mut driven = Driven::new(&engine, policy());
    assert_eq!(driven.take(|n| (n == 10).then_some("park")), [20]);
    drop(driven);
    // The next run cannot create its file of letters.
    storage.refuse_side_files(true);
    let mut driven = Driven::new(&engine, policy());
    assert_eq!(driven.poller.reprocess(LetterSelector::All), 1);
    publish(&engine, [21, 30]);
    let mut taken = driven.take(|_| None);
    taken.sort_unstable();
    assert_eq!((taken, driven.letters()), (vec![10, 21, 30], 1));
    assert!(driven.poller.save().is_err(), "the letter's outcome is not saved");
    let unsaved = engine.consumers()[0].lag_bytes;
    assert_eq!(unsaved, 0, "the position is saved");
    drop(driven);
    storage.refuse_side_files(false);
    let mut driven = Driven::new(&engine, policy());
    assert_eq!((driven.take(|_| None), driven.letters()), (vec![], 1), "at least once: the letter still waits");
}

#[test]
fn the_next_position_covers_the_outcomes_of_letters_although_nothing_else_was_handled() {
    for is_discarded in [true, false] {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        publish(&engine, [10, 11, 20]);
        let mut driven = Driven::new(&engine, DeadLetterPolicy::default());
        driven.take(|n| (n == 10).then_some("no"));
        assert_eq!(driven.letters(), 2, "11 waits behind 10");
        driven.poller.save().unwrap();
        let files = storage.files();
        let named = |name: &str| files.keys().find(|path| path.ends_with(name)).unwrap().clone();
        let (checkpoint, letters) = (named("checkpoint"), named("letters-000001.log"));

        if is_discarded {
            assert_eq!(driven.poller.discard(LetterSelector::All).unwrap(), 2);
        } else {
            assert_eq!(driven.poller.reprocess(LetterSelector::All), 1);
            assert_eq!(driven.take(|_| None), [10, 11]);
        }
        // Lets the interval between two saves pass.
        for _ in 0..3 {
            driven.now_ms.fetch_add(2000, Ordering::SeqCst);
            assert!(driven.next().is_none());
        }
        let after = storage.files();
        assert!(after[&letters].len() > files[&letters].len(), "the outcome of each letter is written to the letters");
        assert!(after[&checkpoint] != files[&checkpoint], "the position covers them");
        drop((driven, engine));
        // After a kill, the earlier file of letters replaces the current one.
        let mut replaced = after;
        replaced.insert(letters.clone(), files[&letters].clone());
        let engine = open_on(&FaultyStorage::with_files(replaced), small("/s")).unwrap();
        let refused = engine.consumer("c").poller();
        let Err(ConsumerError::Files(OpenError::DamagedFile { path, .. })) = &refused else { panic!("{refused:?}") };
        assert_eq!(*path, letters);
    }
}
