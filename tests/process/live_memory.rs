//! Live feeds allocate nothing per event, and little while they wait.

use crate::common::{Note, os_cache, soon};
use crate::counting::{thread_allocations, thread_bytes};
use corelane::log::LiveFrom;
use corelane::{Deadline, EventLog, Key};

const EVENTS: u64 = 50_000;

#[test]
fn a_feed_allocates_nothing_per_event() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).shards(2)).unwrap();
    let mut producer = engine.producer();
    (0..EVENTS).for_each(|n| drop(producer.publish(Key::new(n % 100), Note::new(n)).unwrap()));
    engine.flush(soon()).unwrap();
    let feed = || engine.live().from(LiveFrom::Beginning).start().unwrap();
    let in_place = || {
        let (mut feed, mut sum) = (feed(), 0);
        for _ in 0..EVENTS {
            sum += feed.next_until(Deadline::NEVER).unwrap().unwrap().event.n.to_native();
        }
        sum
    };
    // Each event is dropped before the next batch is found.
    let owned = || {
        let mut feed = feed();
        feed.into_iter().take(EVENTS as usize).map(|event| event.unwrap().event().n.to_native()).sum::<u64>()
    };
    for read in [&in_place as &dyn Fn() -> u64, &owned] {
        let before = thread_allocations();
        assert_eq!(read(), EVENTS * (EVENTS - 1) / 2);
        let allocations = thread_allocations() - before;
        assert!(allocations < 50, "{allocations} allocations for a feed and {EVENTS} events");
    }
}

#[test]
fn a_waiting_feed_takes_at_most_half_a_kibibyte_per_shard() {
    const FEEDS: usize = 1_000;
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).shards(2)).unwrap();
    engine.producer().publish(Key::new(1), Note::new(1)).unwrap();
    engine.flush(soon()).unwrap();
    let mut feeds = Vec::with_capacity(FEEDS);
    let before = thread_bytes();
    feeds.resize_with(FEEDS, || engine.live().start().unwrap());
    let each = (thread_bytes() - before) / FEEDS as i64 + size_of_val(&feeds[0]) as i64;
    assert!(each <= 2 * 512, "{each} bytes");
}
