//! Damaged or unsuitable stores are refused with a precise error, and no byte of them changes.

use std::path::{Path, PathBuf};

use crate::common::{Note, numbers, os_cache, segment_path, small, soon, tree, until};
use corelane::log::scan;
use corelane::{Bounded, ConfigError, Event, EventLog, EventType, EventTypeId, Key, OpenError};
use rkyv::{Archive, Deserialize, Serialize};

/// A cleanly closed store of three segments and two shards.
fn store() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let engine = EventLog::<Note>::open(small(&path).shards(2)).unwrap();
    let mut producer = engine.producer();
    for n in 0..100 {
        producer.publish(Key(n % 9), Note::sized(n, 2500)).unwrap();
    }
    // The third segment is prepared ahead by a thread that stops with the engine.
    until("shard 0 has three segments", || segment_path(&path, 2).exists());
    engine.shutdown(soon()).unwrap();
    drop((producer, engine));
    (dir, path)
}

/// Damages a store, opens it, and returns the error after checking that nothing changed.
fn refused_as<E: Event>(damage: impl FnOnce(&Path), shards: u16) -> OpenError {
    let (_dir, path) = store();
    damage(&path);
    let before = tree(&path);
    let error = EventLog::<E>::open(small(&path).shards(shards)).expect_err("a damaged store opened");
    let after = tree(&path);
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "{error}: files came or went");
    assert!(before == after, "{error}: bytes changed");
    error
}

fn refused(damage: impl FnOnce(&Path)) -> OpenError {
    refused_as::<Note>(damage, 2)
}

fn patch(path: &Path, patch: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    patch(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// Rewrites a segment's header and its CRC.
fn patch_header(path: &Path, change: impl FnOnce(&mut [u8])) {
    patch(path, |bytes| {
        change(bytes);
        let crc = crc32c::crc32c(&bytes[..76]);
        bytes[76..80].copy_from_slice(&crc.to_le_bytes());
    });
}

/// Rewrites a small file and its CRC.
fn patch_small(path: &Path, change: impl FnOnce(&mut [u8])) {
    patch(path, |bytes| {
        change(bytes);
        let end = bytes.len() - 4;
        let crc = crc32c::crc32c(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
    });
}

#[test]
fn a_missing_segment_is_corruption() {
    for index in 0..3 {
        let error = refused(|dir| std::fs::remove_file(segment_path(dir, index)).unwrap());
        assert!(
            matches!(&error, OpenError::Corruption(at) if at.segment == index && at.why.contains("missing")),
            "{error}"
        );
    }
}

#[test]
fn a_renamed_segment_is_refused() {
    let error = refused(|dir| std::fs::rename(segment_path(dir, 1), segment_path(dir, 9)).unwrap());
    assert!(matches!(&error, OpenError::Corruption(at) if at.segment == 1), "{error}");
    let error = refused(|dir| {
        let (a, b, c) = (segment_path(dir, 0), segment_path(dir, 1), dir.join("shard-0000/x"));
        std::fs::rename(&a, &c).unwrap();
        std::fs::rename(&b, &a).unwrap();
        std::fs::rename(&c, &b).unwrap();
    });
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    let error = refused(|dir| std::fs::rename(segment_path(dir, 1), dir.join("shard-0000/1.seg")).unwrap());
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
}

#[test]
fn a_truncated_or_grown_segment_is_corruption() {
    for len in [0, 1, 100, 4096, 40_000, 65_535, 65_537, 131_072] {
        for index in [0, 2] {
            let error = refused(|dir| {
                let file = std::fs::OpenOptions::new().write(true).open(segment_path(dir, index)).unwrap();
                file.set_len(len).unwrap();
            });
            assert!(matches!(&error, OpenError::Corruption(at) if at.segment == index), "{len}: {error}");
        }
    }
}

#[test]
fn a_segment_of_another_shard_or_size_is_foreign() {
    let error = refused(|dir| {
        std::fs::copy(dir.join("shard-0001/000000000000.seg"), segment_path(dir, 0)).unwrap();
    });
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    let error = refused(|dir| {
        patch_header(&segment_path(dir, 0), |page| page[40..48].copy_from_slice(&(1_u64 << 20).to_le_bytes()))
    });
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    let error = refused(|dir| patch(&segment_path(dir, 0), |bytes| bytes[..8].copy_from_slice(b"notaseg!")));
    assert!(matches!(error, OpenError::Corruption(_)), "{error}");
}

#[test]
fn a_segment_of_another_store_is_corruption() {
    // The same segment of another store has another salt and another first sequence.
    let (_other_dir, other) = store();
    let error = refused(|dir| {
        let n = std::fs::read(segment_path(&other, 1)).unwrap();
        std::fs::write(segment_path(dir, 1), n).unwrap();
        patch_header(&segment_path(dir, 1), |page| page[56] ^= 1);
    });
    assert!(matches!(error, OpenError::Corruption(_)), "{error}");
}

#[test]
fn a_newer_format_is_refused_by_its_version() {
    let error = refused(|dir| patch_header(&segment_path(dir, 0), |page| page[8] = 4));
    assert!(matches!(error, OpenError::UnknownFormat { found: 4, known: 3, .. }), "{error}");
    let error = refused(|dir| patch(&segment_path(dir, 0), |page| page[8..80].fill(7)));
    assert!(matches!(error, OpenError::UnknownFormat { found: 0x0707_0707, .. }), "{error}");
    let error = refused(|dir| patch_small(&dir.join("manifest"), |bytes| bytes[8] = 4));
    assert!(matches!(error, OpenError::UnknownFormat { found: 4, .. }), "{error}");
    let error = refused(|dir| patch_small(&dir.join("shard-0000/span"), |bytes| bytes[8] = 4));
    assert!(matches!(error, OpenError::UnknownFormat { found: 4, .. }), "{error}");
}

#[test]
fn an_unknown_archive_format_is_refused() {
    let error = refused(|dir| patch_header(&segment_path(dir, 0), |page| page[16] ^= 1));
    assert!(matches!(error, OpenError::ArchiveFormat { .. }), "{error}");
    let error = refused(|dir| patch_small(&dir.join("manifest"), |bytes| bytes[12] ^= 1));
    assert!(matches!(error, OpenError::ArchiveFormat { .. }), "{error}");
}

#[test]
fn a_missing_or_damaged_manifest_is_refused() {
    let error = refused(|dir| std::fs::remove_file(dir.join("manifest")).unwrap());
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    for len in [0, 10, 51] {
        let error = refused(|dir| patch(&dir.join("manifest"), |bytes| bytes.truncate(len)));
        assert!(matches!(error, OpenError::ForeignFile { .. }), "{len}: {error}");
    }
    // A type list that claims more entries than the file has, with a valid checksum.
    let error = refused(|dir| patch_small(&dir.join("manifest"), |bytes| bytes[32..36].fill(0xff)));
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    let error = refused(|dir| patch_small(&dir.join("manifest"), |bytes| bytes[54] = 0xff));
    assert!(matches!(error, OpenError::ForeignFile { .. }), "a name that is not UTF-8: {error}");
}

#[test]
fn a_missing_or_damaged_span_is_refused() {
    let error = refused(|dir| std::fs::remove_file(dir.join("shard-0000/span")).unwrap());
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    let error = refused(|dir| patch(&dir.join("shard-0000/span"), |bytes| bytes.truncate(31)));
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    let error = refused(|dir| patch_small(&dir.join("shard-0000/span"), |bytes| bytes[12] = 200));
    assert!(matches!(error, OpenError::ForeignFile { .. }), "ends before it begins: {error}");
}

#[test]
fn a_span_that_claims_more_than_memory_holds_is_an_error_at_once() {
    let span = "shard-0000/span";
    let error = refused(|dir| {
        patch_small(&dir.join(span), |bytes| bytes[20..28].copy_from_slice(&(1_u64 << 35).to_le_bytes()))
    });
    assert!(matches!(error, OpenError::Corruption(_)), "{error}");
    // A span beyond the last offset is impossible.
    let error = refused(|dir| patch_small(&dir.join(span), |bytes| bytes[20..28].fill(0xff)));
    assert!(matches!(&error, OpenError::ForeignFile { path, .. } if path.ends_with(span)), "{error}");
}

#[test]
fn a_missing_shard_folder_is_an_error() {
    let remove = |dir: &Path| std::fs::rename(dir.join("shard-0001"), dir.join("elsewhere")).unwrap();
    let error = refused(remove);
    let is_missing = |source: &std::io::Error| source.kind() == std::io::ErrorKind::NotFound;
    assert!(
        matches!(&error, OpenError::Io { path, source, .. } if path.ends_with("shard-0001") && is_missing(source)),
        "{error}"
    );
    // A tool does not take the missing folder for an empty shard either.
    let (_dir, path) = store();
    remove(&path);
    let error = scan::Store::open(&path).expect_err("a store without a shard");
    assert!(matches!(error, OpenError::Io { action: "listing", .. }), "{error}");
}

#[test]
fn a_stray_segment_file_is_refused_and_other_stray_files_are_ignored() {
    let error = refused(|dir| std::fs::write(dir.join("shard-0000/backup.seg"), b"x").unwrap());
    assert!(matches!(error, OpenError::ForeignFile { .. }), "{error}");
    let (_dir, path) = store();
    std::fs::write(path.join("notes.txt"), b"hello").unwrap();
    std::fs::write(path.join("shard-0000/notes.txt"), b"hello").unwrap();
    let engine = EventLog::<Note>::open(small(&path).shards(2)).unwrap();
    assert_eq!(engine.recovery().events(), 100);
    drop(engine);
    assert_eq!(std::fs::read(path.join("shard-0000/notes.txt")).unwrap(), b"hello");
}

#[test]
fn a_different_shard_count_or_segment_size_is_refused() {
    let error = refused_as::<Note>(|_| (), 3);
    assert!(matches!(error, OpenError::ShardCount { stored: 2, asked: 3 }), "{error}");
    let (_dir, path) = store();
    let before = tree(&path);
    let error = EventLog::<Note>::open(small(&path).shards(2).segment_bytes(128 << 10)).expect_err("another size");
    assert!(matches!(error, OpenError::SegmentBytes { stored: 65_536, asked: 131_072 }), "{error}");
    assert!(tree(&path) == before);
}

/// A name that is one byte too long.
const LONG_NAME: &str = match std::str::from_utf8(&[b'n'; 65_536]) {
    Ok(name) => name,
    Err(_) => "",
};

macro_rules! other_schema {
    ($name:ident, $($types:expr),+) => {
        #[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
        struct $name { n: u64, text: String }
        impl Event for $name {
            const TYPES: &'static [EventType] = &[$($types),+];
            fn event_type(&self) -> EventTypeId { Self::TYPES[0].id }
        }
    };
}
other_schema!(Renamed, EventType::new(1, "memo", 1));
other_schema!(Newer, EventType::new(1, "note", 2));
other_schema!(Other, EventType::new(2, "other", 1));
other_schema!(Twice, EventType::new(3, "three", 1), EventType::new(3, "drei", 1));
other_schema!(OneName, EventType::new(1, "note", 1), EventType::new(3, "same", 1), EventType::new(4, "same", 1));
other_schema!(LongName, EventType::new(1, "note", 1), EventType::new(3, LONG_NAME, 1));
other_schema!(LongestName, EventType::new(1, "note", 1), EventType::new(3, LONG_NAME.split_at(1).1, 1));
other_schema!(Moved, EventType::new(7, "note", 1));
other_schema!(More, EventType::new(1, "note", 1), EventType::new(2, "other", 1));

#[test]
fn event_types_that_the_program_cannot_read_are_refused() {
    let error = refused_as::<Renamed>(|_| (), 2);
    assert!(
        matches!(&error, OpenError::EventTypeRenamed { stored, declared, .. } if stored == "note" && declared == "memo"),
        "{error}"
    );
    let error = refused_as::<Newer>(|_| (), 2);
    assert!(matches!(&error, OpenError::UnknownEventType { schema_version: 1, name, .. } if name == "note"), "{error}");
    let error = refused_as::<Other>(|_| (), 2);
    assert!(matches!(&error, OpenError::UnknownEventType { event_type: EventTypeId(1), .. }), "{error}");
    let error = refused_as::<Twice>(|_| (), 2);
    assert!(matches!(error, OpenError::Config(_)), "{error}");
}

#[test]
fn event_types_with_ambiguous_names_are_refused() {
    let error = refused_as::<OneName>(|_| (), 2);
    assert!(
        matches!(&error, OpenError::Config(ConfigError::DuplicateEventName { name, .. }) if name == "same"),
        "{error}"
    );
    let error = refused_as::<LongName>(|_| (), 2);
    let OpenError::Config(ConfigError::EventNameTooLong { bytes, bytes_max, .. }) = error else { panic!("{error}") };
    assert_eq!((bytes, bytes_max), (65_536, 65_535));
    let error = refused_as::<Moved>(|_| (), 2);
    let OpenError::EventTypeRenumbered { stored, declared, .. } = error else { panic!("{error}") };
    assert_eq!((stored, declared), (EventTypeId(1), EventTypeId(7)));
    // A new store with them is not created either.
    let dir = tempfile::tempdir().unwrap();
    let error = EventLog::<OneName>::open(small(dir.path())).expect_err("opened");
    assert!(matches!(error, OpenError::Config(_)), "{error}");
    drop(EventLog::<LongestName>::open(small(dir.path())).unwrap());
    drop(EventLog::<LongestName>::open(small(dir.path())).unwrap());
}

#[test]
fn a_program_with_more_event_types_opens_the_store_and_extends_its_manifest() {
    let (_dir, path) = store();
    drop(EventLog::<More>::open(small(&path).shards(2)).unwrap());
    let engine = EventLog::<Note>::open(small(&path).shards(2)).unwrap();
    assert_eq!(engine.recovery().events(), 100);
}

#[test]
fn a_store_killed_during_its_creation_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("folders");
    std::fs::create_dir_all(path.join("shard-0000")).unwrap();
    drop(EventLog::<Note>::open(os_cache(&path)).unwrap());
    // A segment that is prepared and named, but not yet in a span.
    let path = dir.path().join("segment");
    drop(EventLog::<Note>::open(os_cache(&path)).unwrap());
    std::fs::write(segment_path(&path, 0), vec![0; 65_536]).unwrap();
    std::fs::remove_file(path.join("shard-0000/span")).ok();
    std::fs::write(path.join("shard-0000/fresh.tmp"), vec![1; 100]).unwrap();
    let engine = EventLog::<Note>::open(os_cache(&path)).unwrap();
    engine.producer().publish(Key(1), Note::new(5)).unwrap();
    engine.shutdown(soon()).unwrap();
    assert_eq!(numbers(&engine), [5]);
}

#[test]
fn a_segment_in_use_whose_header_lost_its_magic_is_corruption() {
    // The third segment is prepared and not yet in use.
    for index in 0..2 {
        let error = refused(|dir| {
            patch(&segment_path(dir, index), |bytes| {
                assert_eq!(&bytes[..8], b"corelseg", "segment {index} is in use");
                bytes[..8].fill(0);
            });
        });
        assert!(matches!(&error, OpenError::Corruption(at) if at.why.contains("magic")), "segment {index}: {error}");
    }
}

#[test]
fn a_segment_in_use_whose_header_page_is_gone_is_corruption() {
    // Zeroes the magic and more, the used part of the page, or all of it; also in the newest segment in use.
    for bytes in [9, 72, 76, 80, 512, 4096] {
        for index in 0..2 {
            let error = refused(|dir| patch(&segment_path(dir, index), |content| content[..bytes].fill(0)));
            assert!(
                matches!(&error, OpenError::Corruption(at) if at.segment == index && at.why.contains("magic")),
                "{bytes} bytes of segment {index}: {error}"
            );
        }
    }
}

#[test]
fn a_segment_in_use_beyond_the_span_is_refused() {
    let error = refused(|dir| {
        let span = dir.join("shard-0000/span");
        patch_small(&span, |bytes| bytes[20..28].copy_from_slice(&0_u64.to_le_bytes()));
    });
    assert!(matches!(&error, OpenError::ForeignFile { why, .. } if why.contains("beyond the span")), "{error}");
}

#[test]
fn events_whose_archive_has_another_size_are_refused_unless_every_type_has_a_new_version() {
    #[derive(rkyv::Archive, rkyv::Serialize, corelane::Bounded)]
    struct Wide<const VERSION: u16> {
        n: u64,
        text: String,
        more: [u64; 4],
    }
    impl<const VERSION: u16> Event for Wide<VERSION> {
        const TYPES: &'static [EventType] = &[EventType::new(1, "note", VERSION)];
        const UPCASTERS: &'static [corelane::event::Upcaster<Self>] = if VERSION > 1 {
            &[corelane::event::Upcaster::new(1, 1, |bytes| {
                let old = <Note as corelane::Stored>::decode(bytes)?;
                Ok(Self { n: old.n, text: old.text, more: [7; 4] })
            })]
        } else {
            &[]
        };
        fn event_type(&self) -> EventTypeId {
            EventTypeId(1)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    engine.producer().publish(Key(1), Note::new(5)).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let before = tree(dir.path());
    let refused = EventLog::<Wide<1>>::open(small(dir.path()));
    assert!(matches!(refused, Err(OpenError::ArchiveSize { event_type: EventTypeId(1), .. })), "{refused:?}");
    assert_eq!(tree(dir.path()), before, "the refused store is unchanged");
    let engine = EventLog::<Wide<2>>::open(small(dir.path())).unwrap();
    let mut reader = engine.reader(corelane::ShardId(0));
    let event = reader.next().unwrap().unwrap().event;
    assert_eq!((event.n.to_native(), event.more[3].to_native()), (5, 7));
}

#[test]
fn an_unreadable_event_layout_is_refused_even_if_a_checkpoint_covers_its_events() {
    #[derive(rkyv::Archive, rkyv::Serialize, corelane::Bounded)]
    struct Newer {
        n: u64,
        text: String,
    }
    impl Event for Newer {
        const TYPES: &'static [EventType] = &[EventType::new(1, "note", 2)];
        fn event_type(&self) -> EventTypeId {
            EventTypeId(1)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    engine.producer().publish(Key(1), Note::new(5)).unwrap();
    engine.flush(soon()).unwrap();
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let before = tree(dir.path());
    let refused = EventLog::<Newer>::open(small(dir.path()));
    assert!(matches!(refused, Err(OpenError::UnknownEventType { schema_version: 1, .. })), "{refused:?}");
    assert_eq!(tree(dir.path()), before, "the refused store is unchanged");
}
