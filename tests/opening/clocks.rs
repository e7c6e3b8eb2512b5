//! Wall clocks that jump forwards and backwards: retention and reading by time stay correct. `src/background/age.rs`
//! has the arithmetic.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::{Note, Said, open_on, read_shard, small, soon, until};
use corelane::consumer::Start;
use corelane::testing::FaultyStorage;
use corelane::{EventLog, Key, Retention, Time};

const DIR: &str = "/store";
/// 2090-01-01, in nanoseconds.
const YEAR_2090: u64 = 3_786_912_000_000_000_000;
const CREATED_AT: usize = 64;
const CRC_AT: usize = 76;

/// A closed store of several segments, and their number.
fn store() -> (FaultyStorage, u64) {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small(DIR)).unwrap();
    fill(&engine, 600);
    let last = read_shard(&engine, 0).last().unwrap().offset / crate::common::SEGMENT;
    engine.shutdown(soon()).unwrap();
    (storage, last + 1)
}

fn fill(engine: &EventLog<Note>, events: u64) {
    let mut producer = engine.producer();
    (0..events).for_each(|n| drop(producer.publish(Key(n % 5), Note::sized(n, 1000)).unwrap()));
    engine.flush(soon()).unwrap();
}

/// The same store with `created` as the time at which these segments were begun.
fn begun_at(storage: &FaultyStorage, segments: std::ops::Range<u64>, created: u64) -> FaultyStorage {
    let mut files = storage.files();
    for index in segments {
        let segment = files.get_mut(&crate::common::segment_path(Path::new(DIR), index)).unwrap();
        segment[CREATED_AT..CREATED_AT + 8].copy_from_slice(&created.to_le_bytes());
        let crc = crc32c::crc32c(&segment[..CRC_AT]);
        segment[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }
    FaultyStorage::with_files(files)
}

fn aged(age_max: Duration) -> corelane::Config {
    small(DIR).retention(Retention::default().age(age_max))
}

#[test]
fn segments_begun_in_the_future_are_freed_when_later_ones_are_old_enough() {
    let (storage, segments) = store();
    assert!(segments > 6, "{segments}");
    let storage = begun_at(&storage, 0..segments - 2, YEAR_2090);
    let engine = open_on(&storage, aged(Duration::from_millis(1))).unwrap();
    until("all but the newest segment are freed", || engine.shard_metrics()[0].segments_freed >= segments - 1);
}

#[test]
fn segments_begun_while_the_clock_was_slow_are_not_freed_early() {
    let (storage, segments) = store();
    // All segments are some seconds old; by their stored times the first ones are a day or half a century old.
    let yesterday = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - Duration::from_secs(86_400);
    for wrong in [0, yesterday.as_nanos() as u64] {
        let storage = begun_at(&storage, 1..4, wrong);
        let engine = open_on(&storage, aged(Duration::from_secs(3600))).unwrap();
        // The thread that prepares new segments frees old ones first.
        for _ in 0..4 {
            fill(&engine, 200);
            engine.checkpoint(soon()).unwrap();
        }
        assert_eq!(engine.shard_metrics()[0].segments_freed, 0, "{wrong}");
        assert_eq!(read_shard(&engine, 0).len(), 600 + 4 * 200);
        assert!(
            read_shard(&engine, 0).last().unwrap().offset / crate::common::SEGMENT > segments + 6,
            "the thread has prepared new segments"
        );
    }
}

#[test]
fn reading_by_time_misses_no_event_where_times_do_not_rise() {
    let times = [10, 20, YEAR_2090, 15, 30, 0, 40, 25, 50];
    let engine = EventLog::<Said>::builder(small(DIR)).faulty_storage(&FaultyStorage::new()).open().unwrap();
    let mut producer = engine.producer();
    times.into_iter().for_each(|at| drop(producer.publish(Key(1), Said { at }).unwrap()));
    engine.flush(soon()).unwrap();
    for from in [0, 1, 11, 20, 21, 30, 41, 60] {
        // A consumer begins at the first event that is not earlier than `from`, and reads everything after it.
        let mut poller = engine.consumer(&format!("from-{from}")).start_at(Start::Time(Time(from))).poller().unwrap();
        let mut got = Vec::new();
        while let Some(delivery) = poller.next().unwrap() {
            got.push(poller.event(&delivery).unwrap().0.at.to_native());
            poller.succeeded(delivery).unwrap();
        }
        let first = times.iter().position(|at| *at >= from).unwrap();
        assert_eq!(got, times[first..], "from {from}");
        for end in [from, 25, 41, YEAR_2090, u64::MAX] {
            let mut between = engine.events_between(Time(from), Time(end));
            let mut got = Vec::new();
            while let Some(record) = between.next().unwrap() {
                got.push(record.event.at.to_native());
            }
            let wanted: Vec<u64> = times.into_iter().filter(|at| (from..end.max(from)).contains(at)).collect();
            assert_eq!(got, wanted, "from {from} to {end}");
        }
    }
}
