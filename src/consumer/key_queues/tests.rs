//! The rules of the queues one by one, and all of them against a model that searches everything in every step.

use std::collections::{BTreeMap, HashMap};

use crate::consumer::key_queues::answer::NotParked;
use crate::consumer::key_queues::*;
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);
const T0: Duration = Duration::ZERO;
const A: Key = Key(1);
const B: Key = Key(2);

fn queues(policy: QueuePolicy) -> KeyQueues {
    KeyQueues::new(policy, Offset(0)).expect("valid")
}

/// Returns queues with events of these keys at offsets 0, 1, 2, …
fn with(concurrency: usize, keys: &[Key]) -> KeyQueues {
    let mut queues = queues(QueuePolicy::default().concurrency(concurrency));
    for (offset, key) in keys.iter().enumerate() {
        queues.offer(*key, Offset(offset as u64)).expect("room");
    }
    queues.read_up_to(Offset(keys.len() as u64));
    queues
}

fn run(queues: &mut KeyQueues, offset: u64) -> InFlight {
    let run = queues.next().expect("something may run");
    assert_eq!(run.offset(), Offset(offset));
    run
}

fn record(queues: &mut KeyQueues, offset: u64, kind: RecordKind) -> ToRecord {
    let record = queues.next_record().expect("something is to be recorded");
    assert_eq!((record.offset(), record.kind()), (Offset(offset), kind));
    record
}

#[test]
fn next_fresh_prefers_an_event_that_has_not_failed() {
    let mut queues = with(9, &[A, B, Key(3), Key(4)]);
    for _ in 0..2 {
        let failed = queues.next().expect("a or b");
        assert!(queues.failed(failed, Verdict::Retry { after: T0 }, T0).is_none());
    }
    queues.tick(T0);
    assert!(queues.has_fresh() && queues.ready() == 4);
    // The ready order is 2, 3, 0, 1.
    let from = |queues: &mut KeyQueues, place| queues.next_fresh(place).map(|run| run.offset().0);
    assert_eq!(from(&mut queues, 1), Some(3));
    assert_eq!(from(&mut queues, 2), Some(2), "wraps around to the front");
    assert!(!queues.has_fresh() && queues.may_run());
    assert_eq!((from(&mut queues, 1), from(&mut queues, 0), from(&mut queues, 0)), (Some(0), Some(1), None));
}

#[test]
fn a_retried_event_holds_the_position_until_it_succeeds() {
    let mut queues = queues(QueuePolicy::default().concurrency(64));
    for (key, offset) in [(A, 0), (A, 100), (B, 200)] {
        queues.offer(key, Offset(offset)).expect("room");
    }
    queues.read_up_to(Offset(300));
    let first = run(&mut queues, 0);
    let other = run(&mut queues, 200);
    assert_eq!(queues.next(), None, "A's second event waits for its first");
    queues.succeeded(other);
    let after = 100 * MS;
    assert_eq!(queues.failed(first, Verdict::Retry { after }, T0), None);
    assert_eq!((queues.next(), queues.next_due()), (None, Some(after)));
    queues.tick(after);
    let first = run(&mut queues, 0);
    assert_eq!((first.attempt(), queues.position()), (2, Offset(0)));
    queues.succeeded(first);
    assert_eq!(queues.position(), Offset(100));
}

#[test]
fn keys_run_side_by_side_and_each_in_order() {
    let mut queues = with(2, &[A, A, B, Key(3)]);
    let (a, b) = (run(&mut queues, 0), run(&mut queues, 2));
    assert_eq!(queues.next(), None, "two are in flight");
    queues.succeeded(b);
    assert_eq!(queues.position(), Offset(0), "a is not done");
    let c = run(&mut queues, 3);
    queues.succeeded(a);
    assert_eq!(queues.position(), Offset(1));
    let a = run(&mut queues, 1);
    queues.succeeded(c);
    queues.succeeded(a);
    assert_eq!(queues.position(), Offset(4));
    assert_eq!(queues.statistics().keys, 0, "a key at rest takes no memory");
}

#[test]
fn a_retry_blocks_its_key_and_no_other() {
    let mut queues = with(8, &[A, A, B]);
    let a = run(&mut queues, 0);
    assert_eq!(queues.failed(a, Verdict::Retry { after: 5 * MS }, 10 * MS), None);
    let b = run(&mut queues, 2);
    queues.succeeded(b);
    assert_eq!(
        (queues.next(), queues.state(A), queues.next_due()),
        (None, KeyState::Retrying { due: 15 * MS }, Some(15 * MS))
    );
    assert_eq!((queues.tick(15 * MS - Duration::from_nanos(1)), queues.next()), (0, None));
    assert_eq!(queues.tick(15 * MS), 1);
    let a = run(&mut queues, 0);
    assert_eq!(a.attempt(), 2);
    queues.succeeded(a);
    assert_eq!(run(&mut queues, 1).attempt(), 1, "the next event has not failed");
}

#[test]
fn a_parked_key_records_its_events_until_its_last_letter_is_gone() {
    let mut queues = with(8, &[A, A]);
    let a = run(&mut queues, 0);
    let letter = queues.failed(a, Verdict::Park, T0).expect("a record");
    assert_eq!((letter.kind(), letter.attempts(), letter.offset()), (RecordKind::Parked, 1, Offset(0)));
    assert_eq!((queues.next(), queues.next_record(), queues.position()), (None, None, Offset(0)), "not durable yet");
    queues.recorded(letter);
    assert_eq!((queues.position(), queues.state(A)), (Offset(1), KeyState::Parked { letters: 1 }));
    let behind = record(&mut queues, 1, RecordKind::ParkedBehind);
    assert_eq!(behind.attempts(), 0);
    queues.recorded(behind);
    assert_eq!((queues.position(), queues.state(A)), (Offset(2), KeyState::Parked { letters: 2 }));
    queues.offer(A, Offset(2)).expect("room");
    assert_eq!(queues.unpark(A, 1), Ok(1));
    assert_eq!(queues.next(), None);
    assert_eq!(queues.unpark(A, 1), Ok(0));
    assert_eq!(queues.next_record(), None, "an event that is not recorded yet may run");
    let a = run(&mut queues, 2);
    queues.succeeded(a);
    assert_eq!(queues.statistics().keys, 0);
    assert_eq!(queues.unpark(A, 1), Err(NotParked { key: A, letters: 0 }));
}

#[test]
fn a_letter_that_is_being_written_keeps_its_key_parked() {
    let mut queues = queues(QueuePolicy::default());
    queues.restore_parked(A, 1).expect("room");
    for offset in 0..3 {
        queues.offer(A, Offset(offset)).expect("room");
    }
    let behind = record(&mut queues, 0, RecordKind::ParkedBehind);
    assert_eq!(queues.unpark(A, 1), Ok(0));
    assert_eq!(queues.next(), None, "an earlier event is becoming a letter");
    queues.recorded(behind);
    assert_eq!(queues.state(A), KeyState::Parked { letters: 1 });
    let behind = record(&mut queues, 1, RecordKind::ParkedBehind);
    assert_eq!(queues.unpark(A, 1), Ok(0));
    queues.not_recorded(behind);
    assert_eq!(run(&mut queues, 1).attempt(), 1, "its key has no letters any more");
}

#[test]
fn a_record_that_could_not_be_written_is_returned_again() {
    let mut queues = with(8, &[A, A, B]);
    let (a, b) = (run(&mut queues, 0), run(&mut queues, 2));
    let letter = queues.failed(a, Verdict::Park, T0).expect("a record");
    let skip = queues.failed(b, Verdict::Skip, T0).expect("a record");
    queues.not_recorded(letter);
    queues.not_recorded(skip);
    assert_eq!((queues.position(), queues.state(A)), (Offset(0), KeyState::Parked { letters: 0 }));
    let letter = record(&mut queues, 0, RecordKind::Parked);
    assert_eq!(letter.attempts(), 1);
    let skip = record(&mut queues, 2, RecordKind::Skipped);
    queues.recorded(letter);
    queues.recorded(skip);
    assert_eq!(queues.position(), Offset(1));
}

#[test]
fn a_key_continues_when_its_skipped_event_is_recorded() {
    let mut queues = with(8, &[A, A]);
    let a = run(&mut queues, 0);
    let skip = queues.failed(a, Verdict::Skip, T0).expect("a record");
    assert_eq!((queues.next(), queues.position()), (None, Offset(0)));
    queues.recorded(skip);
    let a = run(&mut queues, 1);
    assert_eq!((a.attempt(), queues.position()), (1, Offset(1)));
    queues.succeeded(a);
    assert_eq!((queues.statistics().skipped, queues.statistics().succeeded), (1, 1));
}

#[test]
fn an_event_that_awaits_a_gap_runs_when_the_gap_is_filled_or_the_wait_is_over() {
    let mut queues = with(8, &[A, B]);
    let (a, b) = (run(&mut queues, 0), run(&mut queues, 1));
    assert_eq!(queues.failed(a, Verdict::AwaitGap, MS), None);
    assert_eq!(queues.failed(b, Verdict::AwaitGap, 2 * MS), None);
    assert_eq!(queues.state(A), KeyState::AwaitingGap { since: MS });
    assert!(queues.gap_filled(A) && !queues.gap_filled(A));
    let a = run(&mut queues, 0);
    assert_eq!(a.attempt(), 1, "waiting is no failure");
    assert_eq!(queues.next_due(), Some(5002 * MS));
    assert_eq!(queues.tick(5002 * MS), 1);
    let b = run(&mut queues, 1);
    assert_eq!(b.attempt(), 1, "nor is the end of the wait");
    queues.succeeded(a);
    queues.succeeded(b);
    assert_eq!(queues.position(), Offset(2));
}

#[test]
fn no_event_runs_during_a_halt_and_the_same_event_runs_after_it() {
    let mut queues = with(2, &[A, B, Key(3)]);
    let (a, b) = (run(&mut queues, 0), run(&mut queues, 1));
    assert_eq!(queues.failed(a, Verdict::Halt, T0), None);
    queues.succeeded(b);
    assert_eq!((queues.next(), queues.halted(), queues.position()), (None, Some((A, Offset(0))), Offset(0)));
    queues.resume();
    assert_eq!(run(&mut queues, 0).attempt(), 2);
}

#[test]
fn full_queues_refuse_events_until_one_ends() {
    let mut queues = queues(QueuePolicy::default().unfinished_max(2).keys_max(1));
    queues.offer(A, Offset(0)).expect("room");
    assert_eq!(queues.offer(B, Offset(1)), Err(QueueRefused::TooManyKeys));
    assert_eq!(queues.restore_parked(B, 1), Err(QueueRefused::TooManyKeys));
    queues.offer(A, Offset(1)).expect("its key has a place, and a refusal changes nothing");
    assert_eq!(queues.offer(A, Offset(2)), Err(QueueRefused::Full));
    let a = run(&mut queues, 0);
    queues.succeeded(a);
    queues.offer(A, Offset(2)).expect("room again");
}

#[test]
fn events_of_unwanted_types_move_the_position() {
    let mut queues = queues(QueuePolicy::default());
    queues.read_up_to(Offset(100));
    assert_eq!(queues.position(), Offset(100));
    queues.offer(A, Offset(200)).expect("room");
    queues.read_up_to(Offset(300));
    assert_eq!(queues.position(), Offset(200));
    assert_eq!(queues.unfinished().collect::<Vec<_>>(), [Offset(200)]);
    let a = run(&mut queues, 200);
    queues.succeeded(a);
    assert_eq!(queues.position(), Offset(300));
}

#[test]
#[should_panic(expected = "in the order of the log")]
fn offering_an_event_twice_panics() {
    with(1, &[A]).offer(A, Offset(0)).ok();
}

#[test]
#[should_panic(expected = "that is not in flight")]
fn ending_an_event_of_other_queues_panics() {
    let run = run(&mut with(1, &[A]), 0);
    let mut other = with(1, &[B]);
    let _kept = other.next();
    other.succeeded(run);
}

#[test]
fn a_policy_out_of_range_is_refused_by_name() {
    let d = QueuePolicy::default;
    let bad = [
        (d().concurrency(0), "queues_concurrency"),
        (d().unfinished_max(0), "queues_unfinished_max"),
        (d().keys_max(usize::MAX), "queues_keys_max"),
        (d().gap_wait_max(Duration::MAX), "queues_gap_wait_max_ms"),
    ];
    for (policy, expected) in bad {
        match KeyQueues::new(policy, Offset(0)) {
            Err(ConfigError::OutOfRange { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum KeyStage {
    Free,
    Out,
    Until(Duration),
    Gap(Duration),
    /// The record is due and not taken.
    Due,
    Recording,
}

/// One key in the model.
#[derive(Debug)]
struct KeyModel {
    stage: KeyStage,
    failures: u32,
    letters: u32,
    /// Unfinished events, in order.
    open: VecDeque<u64>,
    /// Ended events, in order.
    ended: Vec<u64>,
}

#[derive(Debug, Default)]
struct Model {
    keys: BTreeMap<u64, KeyModel>,
    offered: u64,
    position: u64,
    is_halted: bool,
    counts: HashMap<&'static str, u64>,
}

const CONCURRENCY: usize = 3;
const UNFINISHED_MAX: usize = 12;

impl Model {
    fn key_model(&mut self, key: Key) -> &mut KeyModel {
        let new =
            || KeyModel { stage: KeyStage::Free, failures: 0, letters: 0, open: VecDeque::new(), ended: Vec::new() };
        self.keys.entry(key.0).or_insert_with(new)
    }

    fn may_run(key_model: &KeyModel) -> bool {
        key_model.stage == KeyStage::Free && key_model.letters == 0 && !key_model.open.is_empty()
    }

    fn must_record(key_model: &KeyModel) -> bool {
        key_model.stage == KeyStage::Due
            || (key_model.stage == KeyStage::Free && key_model.letters > 0 && !key_model.open.is_empty())
    }

    fn out(&self) -> usize {
        self.keys.values().filter(|key_model| key_model.stage == KeyStage::Out).count()
    }

    fn open(&self) -> impl Iterator<Item = u64> + '_ {
        self.keys.values().flat_map(|key_model| key_model.open.iter().copied())
    }

    fn tick(&mut self, now: Duration) {
        for key_model in self.keys.values_mut() {
            if matches!(key_model.stage, KeyStage::Until(due) | KeyStage::Gap(due) if due <= now) {
                key_model.stage = KeyStage::Free;
            }
        }
    }

    fn end(&mut self, key: Key, how: &'static str, offset: u64) {
        let key_model = self.key_model(key);
        assert_eq!(key_model.open.pop_front(), Some(offset), "a key's events end in the order offered");
        key_model.ended.push(offset);
        (key_model.stage, key_model.failures) = (KeyStage::Free, 0);
        *self.counts.entry(how).or_default() += 1;
    }

    fn check(&self, queues: &KeyQueues) {
        let oldest = self.open().min().unwrap_or(self.position);
        assert_eq!(queues.position(), Offset(oldest));
        let mut open: Vec<u64> = self.open().collect();
        open.sort_unstable();
        assert_eq!(queues.unfinished().map(|offset| offset.0).collect::<Vec<_>>(), open);
        let statistics = queues.statistics();
        let count = |how| self.counts.get(how).copied().unwrap_or(0);
        assert_eq!(
            (statistics.succeeded, statistics.parked, statistics.skipped),
            (count("ok"), count("park"), count("skip"))
        );
        assert_eq!(
            statistics.unfinished as u64 + statistics.succeeded + statistics.parked + statistics.skipped,
            self.offered
        );
        assert_eq!(statistics.running, self.out());
        let keys = self.keys.values().filter(|key_model| key_model.letters > 0 || !key_model.open.is_empty()).count();
        assert_eq!(statistics.keys, keys, "keys at rest take no memory");
        for (key, key_model) in &self.keys {
            let expected = match (key_model.stage, key_model.letters) {
                (KeyStage::Until(due), _) => KeyState::Retrying { due },
                (KeyStage::Gap(due), _) => KeyState::AwaitingGap { since: due - 50 * MS },
                (_, letters @ 1..) => KeyState::Parked { letters },
                // The model does not know whether the event is skipped or parked.
                (KeyStage::Due | KeyStage::Recording, 0) => continue,
                _ => KeyState::Live,
            };
            assert_eq!(queues.state(Key(*key)), expected);
        }
    }
}

/// The queues, the model, and the events and records in flight.
struct Rig {
    queues: KeyQueues,
    model: Model,
    runs: Vec<InFlight>,
    records: Vec<ToRecord>,
    now: Duration,
    next_offset: u64,
}

impl Rig {
    fn new() -> Self {
        let policy = QueuePolicy::default()
            .concurrency(CONCURRENCY)
            .unfinished_max(UNFINISHED_MAX)
            .keys_max(5)
            .gap_wait_max(50 * MS);
        let model = Model::default();
        Self { queues: queues(policy), model, runs: Vec::new(), records: Vec::new(), now: T0, next_offset: 0 }
    }

    fn offer(&mut self, key: Key, step: u64) {
        let offset = self.next_offset + step;
        let has_place = self.model.key_model(key).letters > 0 || !self.model.key_model(key).open.is_empty();
        let places =
            self.model.keys.values().filter(|key_model| key_model.letters > 0 || !key_model.open.is_empty()).count();
        let expected = if self.model.open().count() >= UNFINISHED_MAX {
            Err(QueueRefused::Full)
        } else if !has_place && places >= 5 {
            Err(QueueRefused::TooManyKeys)
        } else {
            Ok(())
        };
        assert_eq!(self.queues.offer(key, Offset(offset)), expected);
        if expected.is_ok() {
            self.model.key_model(key).open.push_back(offset);
            self.model.offered += 1;
            (self.model.position, self.next_offset) = (offset, offset + 1);
        }
    }

    fn take_run(&mut self) {
        let can = self.model.out() < CONCURRENCY && !self.model.is_halted;
        let Some(run) = self.queues.next() else {
            assert!(!can || !self.model.keys.values().any(Model::may_run), "an event may run and was not returned");
            return;
        };
        let key_model = self.model.key_model(run.key());
        assert!(can && Model::may_run(key_model), "{run:?} was returned and may not run");
        assert_eq!((key_model.open.front(), key_model.failures + 1), (Some(&run.offset().0), run.attempt()));
        key_model.stage = KeyStage::Out;
        self.runs.push(run);
    }

    fn take_record(&mut self) {
        let Some(record) = self.queues.next_record() else {
            assert!(!self.model.keys.values().any(Model::must_record), "a record is due and was not returned");
            return;
        };
        let key_model = self.model.key_model(record.key());
        assert!(Model::must_record(key_model), "{record:?} was returned and must not be recorded");
        assert_eq!(key_model.open.front(), Some(&record.offset().0));
        assert_eq!(record.kind() == RecordKind::ParkedBehind, key_model.letters > 0);
        key_model.stage = KeyStage::Recording;
        self.records.push(record);
    }

    fn complete(&mut self, which: usize, fate: u8, after: u64) {
        if self.runs.is_empty() {
            return;
        }
        let run = self.runs.swap_remove(which % self.runs.len());
        let (key, offset, attempt) = (run.key(), run.offset().0, run.attempt());
        let verdict = match fate {
            0..40 => {
                self.queues.succeeded(run);
                return self.model.end(key, "ok", offset);
            }
            40..60 => Verdict::Retry { after: MS * after as u32 },
            60..70 => Verdict::AwaitGap,
            70..85 => Verdict::Park,
            85..97 => Verdict::Skip,
            _ => Verdict::Halt,
        };
        let record = self.queues.failed(run, verdict, self.now);
        self.model.is_halted |= verdict == Verdict::Halt;
        let key_model = self.model.key_model(key);
        key_model.failures = if verdict == Verdict::AwaitGap { key_model.failures } else { attempt };
        key_model.stage = match verdict {
            Verdict::Retry { after } => KeyStage::Until(self.now + after),
            Verdict::AwaitGap => KeyStage::Gap(self.now + 50 * MS),
            Verdict::Park | Verdict::Skip => KeyStage::Recording,
            Verdict::Halt => KeyStage::Free,
        };
        assert_eq!(record.is_some(), key_model.stage == KeyStage::Recording);
        self.records.extend(record);
    }

    fn record(&mut self, which: usize, is_written: bool) {
        if self.records.is_empty() {
            return;
        }
        let record = self.records.swap_remove(which % self.records.len());
        let (key, offset, kind) = (record.key(), record.offset().0, record.kind());
        if is_written {
            self.queues.recorded(record);
            self.model.end(key, if kind == RecordKind::Skipped { "skip" } else { "park" }, offset);
            self.model.key_model(key).letters += u32::from(kind != RecordKind::Skipped);
        } else {
            self.queues.not_recorded(record);
            self.model.key_model(key).stage =
                if kind == RecordKind::ParkedBehind { KeyStage::Free } else { KeyStage::Due };
        }
    }

    fn unpark(&mut self, key: Key, letters: u32) {
        let key_model = self.model.key_model(key);
        if key_model.letters < letters {
            assert_eq!(self.queues.unpark(key, letters), Err(NotParked { key, letters: key_model.letters }));
            return;
        }
        key_model.letters -= letters;
        assert_eq!(self.queues.unpark(key, letters), Ok(key_model.letters));
    }

    fn step(&mut self, op: u8, key: u64, a: u64, fate: u8) {
        match op {
            0..30 => self.offer(Key(key), a % 3),
            30..55 => self.take_run(),
            55..75 => self.complete(a as usize, fate, a),
            75..80 => self.take_record(),
            80..85 => self.record(a as usize, fate < 70),
            85..90 => self.unpark(Key(key), (a % 3) as u32),
            90..93 => {
                let is_waiting = matches!(self.model.key_model(Key(key)).stage, KeyStage::Gap(_));
                assert_eq!(self.queues.gap_filled(Key(key)), is_waiting);
                if is_waiting {
                    self.model.key_model(Key(key)).stage = KeyStage::Free;
                }
            }
            93..95 => {
                self.next_offset += a % 5;
                self.model.position = self.next_offset;
                self.queues.read_up_to(Offset(self.next_offset));
            }
            95..96 => {
                self.queues.resume();
                self.model.is_halted = false;
            }
            _ => {
                self.now += MS * (a % 40) as u32;
                self.model.tick(self.now);
                self.queues.tick(self.now);
                assert!(self.queues.next_due().is_none_or(|due| due > self.now));
            }
        }
        self.model.check(&self.queues);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn the_queues_agree_with_a_model(
        steps in prop::collection::vec((0..100_u8, 0..7_u64, 0..60_u64, 0..100_u8), 1..600),
    ) {
        let mut rig = Rig::new();
        for (op, key, a, fate) in steps {
            rig.step(op, key, a, fate);
        }
        // From here on every call succeeds, so every event must end.
        rig.queues.resume();
        rig.model.is_halted = false;
        for _ in 0..1000 {
            rig.take_run();
            rig.complete(0, 0, 0);
            rig.take_record();
            rig.record(0, true);
            rig.step(99, 0, 39, 0);
        }
        prop_assert_eq!(rig.model.open().count(), 0, "{:?}", rig.model);
        prop_assert_eq!(rig.queues.position(), Offset(rig.model.position));
        for key_model in rig.model.keys.values() {
            prop_assert!(key_model.ended.is_sorted_by(|a, b| a < b), "events end once and in order");
        }
        let ended: usize = rig.model.keys.values().map(|key_model| key_model.ended.len()).sum();
        prop_assert_eq!(ended as u64, rig.model.offered);
    }
}
