//! Spare segment files: unusable ones are removed and do no harm.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::{Note, SEGMENT, numbers, os_cache, small, soon};
use corelane::{Config, EventLog, Key, Retention};

fn spares(store: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(store.join("shard-0000"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("spare-"))
        .collect();
    found.sort();
    found
}

/// Opens a store with these spare files and fills some segments.
fn use_with(files: &[(&str, usize)], config: impl Fn(&Path) -> Config) {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    drop(EventLog::<Note>::open(config(&store)).unwrap());
    for (name, bytes) in files {
        std::fs::write(store.join("shard-0000").join(name), vec![7; *bytes]).unwrap();
    }
    let engine = EventLog::<Note>::open(config(&store)).unwrap();
    let mut producer = engine.producer();
    for n in 0..100 {
        producer.publish(Key(n), Note::sized(n, 3000)).unwrap();
    }
    engine.shutdown(soon()).unwrap_or_else(|error| panic!("{files:?}: {error}"));
    assert_eq!(numbers(&engine), (0..100).collect::<Vec<_>>(), "{files:?}");
    assert_eq!(spares(&store), Vec::<PathBuf>::new(), "{files:?}: every spare is used or removed");
}

#[test]
fn an_empty_or_wrongly_sized_spare_is_removed() {
    let segment = SEGMENT as usize;
    for config in [|dir: &Path| os_cache(dir), |dir: &Path| small(dir)] {
        for bytes in [0, 1, 4096, segment - 1, segment, segment + 1, 3 * segment] {
            use_with(&[("spare-000000.seg", bytes)], config);
        }
        use_with(&[("spare-000000.seg", 0), ("spare-000001.seg", segment), ("spare-000002.seg", 5)], config);
    }
}

#[test]
fn a_folder_with_the_name_of_a_spare_is_left_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    drop(EventLog::<Note>::open(small(dir.path())).unwrap());
    std::fs::create_dir(dir.path().join("shard-0000/spare-000000.seg")).unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    engine.shutdown(soon()).unwrap();
    assert_eq!(spares(dir.path()).len(), 1);
}

#[test]
fn spares_beyond_the_limit_are_removed_after_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let config = |spares| {
        let retention = Retention::bytes(2 * SEGMENT);
        os_cache(dir.path()).retention(retention).spares_max(spares)
    };
    drop(EventLog::<Note>::open(config(8)).unwrap());
    for n in 0..8 {
        std::fs::write(dir.path().join(format!("shard-0000/spare-{n:06}.seg")), vec![0; SEGMENT as usize]).unwrap();
    }
    let engine = EventLog::<Note>::open(config(2)).unwrap();
    let deadline = soon().unwrap();
    while spares(dir.path()).len() > 2 {
        assert!(Instant::now() < deadline, "{:?}", spares(dir.path()));
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut producer = engine.producer();
    for n in 0..200 {
        producer.publish(Key(n), Note::sized(n, 3000)).unwrap();
    }
    engine.shutdown(soon()).unwrap();
    assert!(spares(dir.path()).len() <= 2);
    drop((producer, engine));
    let engine = EventLog::<Note>::open(config(0)).unwrap();
    let deadline = soon().unwrap();
    while !spares(dir.path()).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", spares(dir.path()));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(engine);
    EventLog::<Note>::open(config(0)).unwrap();
}
