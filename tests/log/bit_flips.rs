//! Every flipped bit is noticed: after a clean shutdown the store is refused with a typed error, or opens with every
//! event (if the bit lies in the last mark or in unused space).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::common::{Note, PAGE, SEGMENT, env_number, numbers, open_on, read_shard, small, soon};
use corelane::testing::FaultyStorage;
use corelane::{Durability, Key, OpenError};

/// `CORELANE_FLIPS=1` flips every bit of the segment. The default is a sample.
#[test]
fn every_flipped_bit_of_a_segment_is_refused_or_harmless() {
    let storage = FaultyStorage::new();
    let config = || small("/s").durability(Durability::GroupCommit).spares_max(0);
    let engine = open_on(&storage, config()).unwrap();
    let mut producer = engine.producer();
    for n in 0..300 {
        producer.publish(Key(n % 7), Note::sized(n, (n % 90) as usize)).unwrap();
    }
    engine.flush(soon()).unwrap();
    let last = read_shard(&engine, 0).last().unwrap().clone();
    let events_end = last.offset as usize + 48;
    engine.shutdown(soon()).unwrap();
    drop((producer, engine));
    let files = storage.files();
    let segment = PathBuf::from("/s/shard-0000/000000000000.seg");
    let expected: Vec<u64> = (0..300).collect();

    // A harmless bit starts and stops a whole engine, so the sample has fewer of those.
    let (every, every_unused) = if env_number("CORELANE_FLIPS", 0) == 1 { (1, 1) } else { (83, 4099) };
    let used = (0..events_end * 8).step_by(every);
    let unused = (events_end * 8..SEGMENT as usize * 8).step_by(every_unused);
    let final_mark = (events_end * 8..(events_end + 192) * 8).step_by(every.min(41));
    let (mut refused, mut opened) = (0, 0);
    for bit in used.chain(unused).chain(final_mark) {
        let at = bit / 8;
        let mut damaged = files.clone();
        damaged.get_mut(&segment).unwrap()[at] ^= 1 << (bit % 8);
        let disk = FaultyStorage::with_files(damaged);
        let outcome = catch_unwind(AssertUnwindSafe(|| open_on(&disk, config()).map(|engine| numbers(&engine))));
        match outcome.unwrap_or_else(|_| panic!("bit {bit}: a panic")) {
            Ok(found) => {
                opened += 1;
                assert_eq!(found, expected, "bit {bit}: opened with other events");
                assert!(at >= events_end, "bit {bit} at {at}: damage to an event or the header went unnoticed");
            }
            Err(OpenError::Corruption(damage)) => {
                refused += 1;
                assert!(damage.offset.0 <= at as u64, "bit {bit}: {damage}");
                assert_eq!(disk.files()[&segment].len(), SEGMENT as usize);
                assert!(at >= PAGE || damage.offset.0 == 0, "bit {bit}: {damage}");
            }
            Err(error) => panic!("bit {bit}: {error}"),
        }
    }
    eprintln!("{refused} flips refused, {opened} harmless");
    assert!(refused > 0 && opened > 0);
}

/// Flips every bit of the manifest and of the span.
#[test]
fn every_flipped_bit_of_the_manifest_and_the_span_is_refused() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let files = storage.files();
    for name in ["/s/manifest", "/s/shard-0000/span"] {
        let path = PathBuf::from(name);
        for bit in 0..files[&path].len() * 8 {
            let mut damaged = files.clone();
            damaged.get_mut(&path).unwrap()[bit / 8] ^= 1 << (bit % 8);
            let disk = FaultyStorage::with_files(damaged.clone());
            let error = open_on(&disk, small("/s")).expect_err("a damaged file");
            assert!(matches!(error, OpenError::ForeignFile { .. }), "{name} bit {bit}: {error}");
            assert_eq!(disk.files(), damaged, "{name} bit {bit}: no byte changed");
        }
    }
}
