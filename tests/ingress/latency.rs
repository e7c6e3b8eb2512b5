//! Long latencies: recorded up to an hour, and counted as beyond range above that.

use std::time::Duration;

use crate::common::{Note, small, soon};
use corelane::metrics::{Metrics, Stage};
use corelane::{Durability, EventLog, Key};

const DUE: [Stage; 4] = [Stage::RingDue, Stage::AppendedDue, Stage::HandledDue, Stage::DurableDue];

/// The metrics of an engine with one event that was published `late` after it was due.
fn published(late: Duration) -> Metrics {
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path()).latency(true).durability(Durability::GroupCommit);
    let engine = EventLog::<Note>::open(config).unwrap();
    engine.producer().publish_due(Key(1), Note::new(1), late).unwrap();
    engine.shutdown(soon()).unwrap();
    engine.metrics(soon())
}

#[test]
fn lateness_is_recorded_from_nanoseconds_to_an_hour() {
    for ms in [1, 2_147, 2_148, 4_294, 4_295, 50_000, 600_000, 3_600_000] {
        let late = Duration::from_millis(ms);
        let metrics = published(late);
        for stage in DUE {
            let histogram = metrics.histogram(stage);
            assert_eq!((histogram.len(), metrics.beyond_range(stage)), (1, 0), "{stage:?}");
            let (least, most) = (late.as_nanos() as u64, (late + Duration::from_secs(60)).as_nanos() as u64);
            assert!(
                (least..=most * 1001 / 1000).contains(&histogram.max()),
                "{stage:?}: {late:?} as {}",
                histogram.max()
            );
        }
        // The stages that start at `publish` do not include the lateness.
        assert!(metrics.histogram(Stage::Appended).max() < 60_000_000_000);
    }
}

#[test]
fn latencies_beyond_the_range_are_counted() {
    for late in [Duration::from_secs(2 * 3600), Duration::from_secs(365 * 86_400), Duration::MAX] {
        let metrics = published(late);
        for stage in DUE {
            assert_eq!((metrics.histogram(stage).len(), metrics.beyond_range(stage)), (1, 1), "{stage:?}");
        }
        assert_eq!(metrics.beyond_range(Stage::Appended), 0);
        assert!(metrics.prometheus().contains("corelane_durable_due_seconds_beyond_range_total 1\n"));
        assert!(metrics.prometheus().contains("corelane_durable_seconds_beyond_range_total 0\n"));
    }
}

#[test]
fn events_published_at_one_moment_keep_their_own_lateness() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).latency(true).durability(Durability::GroupCommit)).unwrap();
    let mut producer = engine.producer();
    for i in 0..50 {
        producer.publish(Key(1), Note::new(i)).unwrap();
        producer.publish_due(Key(1), Note::new(i), Duration::from_secs(50)).unwrap();
    }
    engine.shutdown(soon()).unwrap();
    let metrics = engine.metrics(soon());
    for stage in DUE {
        let histogram = metrics.histogram(stage);
        assert_eq!(histogram.len(), 50, "{stage:?}");
        assert!(histogram.min() >= 50_000_000_000 / 1001 * 1000, "{stage:?}: {}", histogram.min());
    }
}
