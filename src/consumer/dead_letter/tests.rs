//! The letters against a plain model, and their state after cuts, bit flips, failed operations and power cuts.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::answer::LetterKind;
use super::format::{ENTRY_BYTES, FILE_HEADER_BYTES, Totals};
use super::*;
use crate::event::{Correlation, EventTypeId, Version};
use crate::log::format::tests::assert_golden;
use crate::storage::Files;
use crate::testing::{FaultyStorage, Unsynced};

const DIR: &str = "/store/consumers/mail";

fn open(disk: &FaultyStorage) -> Result<LetterStore, OpenError> {
    open_with(disk, DeadLetterPolicy::default())
}

/// Opens letters that must reach to `known`.
fn open_known(disk: &FaultyStorage, known: FileEnd) -> Result<LetterStore, OpenError> {
    LetterStore::open(Arc::new(disk.clone()), Path::new(DIR), DeadLetterPolicy::default(), known, 2)
}

pub(super) fn open_with(disk: &FaultyStorage, policy: DeadLetterPolicy) -> Result<LetterStore, OpenError> {
    LetterStore::open(Arc::new(disk.clone()), Path::new(DIR), policy, FileEnd::default(), 2)
}

fn opened(disk: &FaultyStorage) -> LetterStore {
    open(disk).expect("opens")
}

/// A key's shard is its last bit.
pub(super) fn id(key: u64, offset: u64) -> EventId {
    EventId { shard: ShardId(key as u16 & 1), offset: Offset(offset) }
}

pub(super) fn letter(key: u64, offset: u64, error: &str) -> DeadLetter {
    DeadLetter {
        id: id(key, offset),
        key: Key(key),
        event_type: EventTypeId(3),
        schema_version: 2,
        version: Version(offset + 1),
        time: Time(1_000 + offset),
        correlation: Correlation(7),
        why: LetterKind::Failed,
        attempts: 5,
        error: error.to_owned(),
        first_failed: Time(2_000 + offset),
        last_failed: Time(3_000 + offset),
    }
}

pub(super) fn archive(offset: u64) -> Vec<u8> {
    (0..offset % 37).map(|byte| (byte + offset) as u8).collect()
}

/// An entry to write, with owned contents.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Park(u64, u64),
    Skip(u64, u64),
    Again(u64, u64, u32),
    Handle(u64, u64),
    Discard(u64, u64),
}

fn entry<'a>(op: &Op, letter: &'a DeadLetter, archive: &'a [u8]) -> Entry<'a> {
    let (id, key, time) = (letter.id, letter.key, Time(9_000));
    match *op {
        Op::Park(..) => Entry::Parked { letter, archive },
        Op::Skip(..) => Entry::Skipped { letter, archive },
        Op::Again(_, _, attempts) => Entry::FailedAgain { id, key, attempts, error: "again", time },
        Op::Handle(..) => Entry::Handled { id, key, time },
        Op::Discard(..) => Entry::Discarded { id, key, time },
    }
}

/// Writes one batch.
pub(super) fn write(letters: &mut LetterStore, ops: &[Op]) -> Result<Written, WriteRefused> {
    let of = |op: &Op| match *op {
        Op::Park(key, offset) | Op::Skip(key, offset) => (letter(key, offset, "no answer"), archive(offset)),
        Op::Again(key, offset, _) | Op::Handle(key, offset) | Op::Discard(key, offset) => {
            (letter(key, offset, ""), Vec::new())
        }
    };
    let owned: Vec<_> = ops.iter().map(of).collect();
    let entries: Vec<Entry<'_>> =
        ops.iter().zip(&owned).map(|(op, (letter, archive))| entry(op, letter, archive)).collect();
    letters.write(&entries)
}

/// The letters by key and offset, the events that have an entry, and the counts.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    letters: BTreeMap<(u64, u64), DeadLetter>,
    known: BTreeSet<(u64, u64)>,
    totals: Totals,
}

impl Model {
    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Park(key, offset) if self.known.insert((key, offset)) => {
                self.letters.insert((key, offset), letter(key, offset, "no answer"));
                self.totals.parked += 1;
            }
            Op::Skip(key, offset) if self.known.insert((key, offset)) => self.totals.skipped += 1,
            Op::Again(key, offset, attempts) => {
                if let Some(letter) = self.letters.get_mut(&(key, offset)) {
                    (letter.attempts, letter.error, letter.last_failed) = (attempts, "again".into(), Time(9_000));
                }
            }
            Op::Handle(key, offset) if self.letters.remove(&(key, offset)).is_some() => self.totals.handled += 1,
            Op::Discard(key, offset) if self.letters.remove(&(key, offset)).is_some() => self.totals.discarded += 1,
            _ => {}
        }
    }

    fn with(&self, ops: &[Op]) -> Self {
        let mut model = self.clone();
        ops.iter().for_each(|op| model.apply(op));
        model
    }

    /// Returns the state of the letters as a model.
    fn of(letters: &LetterStore, known: &Self) -> Self {
        let listed = letters.list(None, usize::MAX).expect("read");
        let known = known.known.iter().copied().filter(|&(key, offset)| letters.index.knows(id(key, offset)));
        Self {
            letters: listed.into_iter().map(|letter| ((letter.key.0, letter.id.offset.0), letter)).collect(),
            known: known.collect(),
            totals: letters.index.totals(),
        }
    }

    fn check(&self, letters: &LetterStore) {
        assert_eq!(&Self::of(letters, self), self);
        assert_eq!(letters.len(), self.letters.len());
        let mut keys: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (key, offset) in self.letters.keys() {
            keys.entry(*key).or_default().push(*offset);
        }
        let expected: Vec<_> =
            keys.iter().map(|(&key, of)| (Key(key), ShardId(key as u16 & 1), of.len() as u32)).collect();
        assert_eq!(letters.keys().collect::<Vec<_>>(), expected);
        for (&key, offsets) in &keys {
            assert_eq!(letters.letters_of(Key(key)), offsets.len() as u32);
            assert_eq!(letters.oldest_of(Key(key)), Some(id(key, offsets[0])));
        }
        for (&(key, offset), letter) in &self.letters {
            let (shown, bytes) = letters.show(Key(key), id(key, offset)).expect("read").expect("there");
            assert_eq!((&shown, &bytes[..]), (letter, &archive(offset)[..]));
            assert_eq!(bytes.as_ptr() as usize % 16, 0);
        }
    }
}

fn file(number: u32) -> PathBuf {
    path(Path::new(DIR), number)
}

/// Returns a disk with these files.
fn disk_of(files: &BTreeMap<PathBuf, Vec<u8>>) -> FaultyStorage {
    FaultyStorage::with_files(files.clone())
}

fn assert_damaged(found: Result<LetterStore, OpenError>, what: &str) {
    assert!(matches!(found, Err(OpenError::DamagedFile { .. })), "{what}: {found:?}");
}

/// Batches in which letters end in every way.
fn script() -> Vec<Vec<Op>> {
    vec![
        vec![Op::Park(1, 10)],
        vec![Op::Park(1, 20), Op::Park(2, 30), Op::Skip(3, 40)],
        vec![Op::Again(1, 10, 6), Op::Handle(2, 30)],
        vec![Op::Park(2, 50), Op::Discard(1, 10), Op::Again(1, 20, 7)],
        vec![Op::Handle(1, 20)],
        vec![Op::Park(5, 60), Op::Skip(5, 70)],
    ]
}

#[test]
fn no_file_is_created_before_the_first_letter() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    write(&mut letters, &[]).expect("nothing");
    write(&mut letters, &[Op::Handle(1, 1)]).expect("says nothing new");
    assert!(disk.files().is_empty() && letters.len() == 0);
}

fn op() -> impl Strategy<Value = Op> {
    let at = (1..5_u64, 0..25_u64);
    prop_oneof![
        4 => at.clone().prop_map(|(key, offset)| Op::Park(key, offset)),
        1 => at.clone().prop_map(|(key, offset)| Op::Skip(key, offset)),
        2 => (at.clone(), 1..9_u32).prop_map(|((key, offset), attempts)| Op::Again(key, offset, attempts)),
        2 => at.clone().prop_map(|(key, offset)| Op::Handle(key, offset)),
        1 => at.prop_map(|(key, offset)| Op::Discard(key, offset)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn letters_agree_with_a_model_before_and_after_reopening(
        batches in prop::collection::vec((prop::collection::vec(op(), 1..4), 0..8_u8), 1..24),
    ) {
        let disk = FaultyStorage::new();
        let mut letters = opened(&disk);
        let mut model = Model::default();
        for (mut batch, then) in batches {
            // A batch does not both begin and end a letter, and no event has two keys.
            batch.dedup_by_key(|op| match *op {
                Op::Park(_, at) | Op::Skip(_, at) | Op::Again(_, at, _) | Op::Handle(_, at) | Op::Discard(_, at) => at,
            });
            let mut seen = BTreeSet::new();
            batch.retain_mut(|op| {
                let (Op::Park(key, at) | Op::Skip(key, at) | Op::Again(key, at, _) | Op::Handle(key, at)
                    | Op::Discard(key, at)) = op;
                *at = *at * 8 + *key;
                seen.insert(*at)
            });
            write(&mut letters, &batch).expect("written");
            model = model.with(&batch);
            match then {
                0 | 1 => letters.compact().unwrap_or_else(|error| panic!("{error}")),
                2 => letters = opened(&disk),
                3 => {
                    disk.crash(Unsynced::Lost);
                    letters = opened(&disk);
                }
                _ => model.check(&opened(&disk)),
            }
            model.check(&letters);
        }
    }
}

#[test]
fn a_file_torn_in_its_last_batch_keeps_all_earlier_batches() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    let mut model = Model::default();
    let (tail, before) = script().into_iter().fold((Vec::new(), 0), |(_, _), batch| {
        let before = disk.files().get(&file(1)).map_or(0, Vec::len);
        write(&mut letters, &batch).expect("written");
        (batch, before)
    });
    for batch in &script()[..5] {
        model = model.with(batch);
    }
    let files = disk.files();
    for len in before..files[&file(1)].len() {
        let mut cut = files.clone();
        cut.get_mut(&file(1)).expect("it is").truncate(len);
        let disk = disk_of(&cut);
        assert_damaged(open_known(&disk, letters.durable()), "a durable batch is gone");
        let mut letters = opened(&disk);
        model.check(&letters);
        write(&mut letters, &tail).expect("written");
        model.with(&tail).check(&letters);
        model.with(&tail).check(&opened(&disk));
        assert_eq!(disk.files()[&file(1)].len(), len, "nothing is written behind a torn batch");
        assert!(disk.files().contains_key(&file(2)));
    }
}

#[test]
fn a_torn_first_write_leaves_no_letters_and_no_error() {
    let disk = FaultyStorage::new();
    write(&mut opened(&disk), &[Op::Park(1, 10), Op::Park(1, 36)]).expect("written");
    let whole = disk.files()[&file(1)].clone();
    for len in 0..whole.len() {
        let disk = disk_of(&BTreeMap::from([(file(1), whole[..len].to_vec())]));
        let mut letters = opened(&disk);
        assert_eq!(letters.len(), 0, "{len} bytes");
        write(&mut letters, &[Op::Park(1, 10)]).expect("written");
        assert_eq!(opened(&disk).len(), 1);
    }
}

#[test]
fn a_flipped_bit_before_a_later_batch_is_refused() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    let mut begun = Vec::new();
    for batch in &script() {
        begun.push(disk.files().get(&file(1)).map_or(0, Vec::len));
        write(&mut letters, batch).expect("written");
    }
    let files = disk.files();
    for at in 0..begun[5] {
        for bit in [0, 5] {
            let mut flipped = files.clone();
            flipped.get_mut(&file(1)).expect("it is")[at] ^= 1 << bit;
            assert_damaged(open(&disk_of(&flipped)), &format!("byte {at}"));
        }
    }
    // The next run names the end of the file, so its last batch is covered too.
    write(&mut opened(&disk), &[Op::Park(9, 900)]).expect("written");
    let files = disk.files();
    for at in 0..files[&file(1)].len() {
        let mut flipped = files.clone();
        flipped.get_mut(&file(1)).expect("it is")[at] ^= 4;
        assert_damaged(open(&disk_of(&flipped)), &format!("byte {at} of the first of two"));
    }
    let mut shorter = files.clone();
    shorter.get_mut(&file(1)).expect("it is").truncate(begun[5]);
    assert_damaged(open(&disk_of(&shorter)), "a file cut at a batch");
    let mut missing = files;
    missing.remove(&file(1));
    assert!(matches!(open(&disk_of(&missing)), Err(OpenError::Io { .. })), "a named file is missing");
}

#[test]
fn a_flipped_bit_in_a_compacted_file_is_refused() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    for batch in &script() {
        write(&mut letters, batch).expect("written");
    }
    letters.compact().expect("compacted");
    let files = disk.files();
    assert_eq!(files.keys().collect::<Vec<_>>(), [&file(2)]);
    for at in 0..files[&file(2)].len() {
        let mut flipped = files.clone();
        flipped.get_mut(&file(2)).expect("it is")[at] ^= 1;
        assert_damaged(open(&disk_of(&flipped)), &format!("byte {at}"));
        let mut cut = files.clone();
        cut.get_mut(&file(2)).expect("it is").truncate(at);
        assert_damaged(open(&disk_of(&cut)), &format!("cut at {at}"));
    }
}

#[test]
fn damage_after_opening_is_reported_when_it_is_read() {
    let store = tempfile::tempdir().expect("a folder");
    let files: Arc<dyn Storage> = Arc::new(Files::open(store.path()).expect("opened"));
    let dir = store.path().join("consumers/mail");
    let mut letters =
        LetterStore::open(files, &dir, DeadLetterPolicy::default(), FileEnd::default(), 2).expect("opens");
    write(&mut letters, &[Op::Park(1, 36)]).expect("written");
    let path = path(&dir, 1);
    let mut bytes = std::fs::read(&path).expect("read");
    *bytes.last_mut().expect("some") ^= 1;
    std::fs::write(&path, bytes).expect("written");
    let shown = letters.show(Key(1), id(1, 36));
    assert!(matches!(shown, Err(LettersError::Damaged { at: 64, .. })), "{shown:?}");
    assert!(matches!(letters.compact(), Err(LettersError::Damaged { .. })), "and not copied as if it were valid");
}

#[test]
fn an_unknown_version_is_refused_and_left_unchanged() {
    let disk = FaultyStorage::new();
    write(&mut opened(&disk), &[Op::Park(1, 10)]).expect("written");
    let mut files = disk.files();
    files.get_mut(&file(1)).expect("it is")[8] = 4;
    // First without the matching checksum: damaged.
    assert_damaged_or_dropped(&files);
    let head = &mut files.get_mut(&file(1)).expect("it is")[..FILE_HEADER_BYTES];
    let crc = crate::log::seal::crc32c(0, &head[..56]);
    head[56..60].copy_from_slice(&crc.to_le_bytes());
    let disk = disk_of(&files);
    let found = open(&disk);
    assert!(matches!(found, Err(OpenError::UnknownFormat { found: 4, known: 3, .. })), "{found:?}");
    assert_eq!(disk.files(), files);
}

/// A flipped bit in the version is damage, not another version.
fn assert_damaged_or_dropped(files: &BTreeMap<PathBuf, Vec<u8>>) {
    match open(&disk_of(files)) {
        Ok(letters) => assert_eq!(letters.len(), 0),
        Err(error) => assert!(matches!(error, OpenError::DamagedFile { .. }), "{error:?}"),
    }
}

/// Runs the script with compactions in between, until a write fails if `stop`. Returns the model of the acknowledged
/// batches, and the batches refused since the last acknowledged one.
fn run(letters: &mut LetterStore, stop: bool) -> (Model, Vec<Vec<Op>>) {
    let (mut model, mut refused) = (Model::default(), Vec::new());
    for (i, batch) in script().iter().enumerate() {
        if i == 3 || i == 5 {
            let before = Model::of(letters, &model);
            if letters.compact().is_err() && stop {
                return (model, refused);
            }
            assert_eq!(Model::of(letters, &model), before, "a compaction changes nothing, whether it fails or not");
        }
        match write(letters, batch) {
            Ok(_) => {
                model = model.with(batch);
                refused.clear();
            }
            Err(WriteRefused::Io { .. }) => refused.push(batch.clone()),
            Err(other) => panic!("{other:?}"),
        }
        model.check(letters);
        if stop && !refused.is_empty() {
            break;
        }
    }
    (model, refused)
}

/// Checks that the acknowledged batches are there, with at most the newest refused batch as a whole, and that the files
/// reach to `durable`.
fn check_after(disk: &FaultyStorage, model: &Model, refused: &[Vec<Op>], durable: FileEnd, what: &str) {
    let letters = open_known(disk, durable).unwrap_or_else(|error| panic!("{what}: {error}"));
    let whole = refused.last().map(|batch| model.with(batch));
    let all_known = refused.last().map_or_else(|| model.clone(), |batch| model.with(batch));
    let found = Model::of(&letters, &all_known);
    assert!(&found == model || Some(&found) == whole.as_ref(), "{what}: {found:#?}\nand not {model:#?}");
    found.check(&letters);
    let mut letters = letters;
    let next = [Op::Park(8, 800), Op::Skip(8, 801)];
    write(&mut letters, &next).unwrap_or_else(|error| panic!("{what}: {error}"));
    letters.compact().unwrap_or_else(|error| panic!("{what}: {error}"));
    found.with(&next).check(&opened(disk));
}

/// Injects a fault at the n-th operation of its kind.
type Fault = fn(&FaultyStorage, u64);

#[test]
fn a_failure_at_any_operation_loses_no_acknowledged_batch_and_splits_none() {
    let faults: [(&str, Fault); 2] = [("operation", FaultyStorage::fail_operation), ("sync", FaultyStorage::fail_sync)];
    let mut failed = 0;
    for (name, fault) in faults {
        for (n, stop) in (1..60).flat_map(|n| [(n, true), (n, false)]) {
            let disk = FaultyStorage::new();
            let mut letters = opened(&disk);
            fault(&disk, n);
            let (model, refused) = run(&mut letters, stop);
            let durable = letters.durable();
            failed += refused.len();
            disk.fail_operation(1 << 60);
            disk.fail_sync(1 << 60);
            drop(letters);
            let what = format!("{name} {n}, stopped {stop}");
            check_after(
                &FaultyStorage::with_files(disk.files()),
                &model,
                &refused,
                durable,
                &format!("{what}, killed"),
            );
            for unsynced in [Unsynced::Lost, Unsynced::Random(n), Unsynced::Random(n * 7919)] {
                check_after(&disk.after_crash(unsynced), &model, &refused, durable, &format!("{what}, {unsynced:?}"));
            }
        }
    }
    assert!(failed > 10, "the faults reach the writes: {failed}");
}

#[test]
fn a_failing_operation_while_opening_is_an_error_and_changes_nothing() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    let (model, _) = run(&mut letters, false);
    write(&mut opened(&disk), &[Op::Park(7, 700)]).expect("written");
    let files = disk.files();
    let mut errors = 0;
    for n in 1..12 {
        for fault in [FaultyStorage::fail_operation as Fault, FaultyStorage::fail_sync] {
            let disk = disk_of(&files);
            fault(&disk, n);
            match open(&disk) {
                Ok(letters) => model.with(&[Op::Park(7, 700)]).check(&letters),
                Err(OpenError::Io { .. }) => errors += 1,
                Err(other) => panic!("{other}"),
            }
            assert_eq!(disk.files(), files);
        }
    }
    assert!(errors > 4, "{errors}");
}

#[test]
fn a_refused_batch_has_no_effect_once_a_later_one_is_written() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    write(&mut letters, &[Op::Park(1, 10)]).expect("written");
    disk.fail_sync(1);
    assert!(write(&mut letters, &[Op::Handle(1, 10)]).is_err());
    assert_eq!((letters.len(), letters.statistics().handled), (1, 0));
    write(&mut letters, &[Op::Park(2, 30)]).expect("written to another file");
    let letters = opened(&disk);
    assert_eq!((letters.len(), letters.statistics().handled), (2, 0));
}

#[test]
fn files_are_compacted_when_most_bytes_are_obsolete() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    let big = vec![7; 64 << 10];
    for offset in 0..40 {
        let letter = letter(1, offset, "");
        letters.write(&[Entry::Parked { letter: &letter, archive: &big }]).expect("written");
    }
    assert!(!letters.compact_if_due().expect("read"), "nothing is obsolete");
    for offset in 0..30 {
        write(&mut letters, &[Op::Handle(1, offset)]).expect("written");
    }
    assert!(letters.compact_if_due().expect("compacted"));
    let bytes: usize = disk.files().values().map(Vec::len).sum();
    assert!(bytes < 11 * big.len(), "{bytes}");
    assert!(!letters.compact_if_due().expect("read"), "it is not due again");
    let again = opened(&disk);
    assert_eq!((again.len(), again.statistics().handled), (10, 30));
    assert!(again.index.knows(id(1, 3)), "ended, and above the saved position");
}

#[test]
fn many_short_runs_do_not_leave_many_files() {
    let disk = FaultyStorage::new();
    for offset in 0..200 {
        let mut letters = opened(&disk);
        write(&mut letters, &[Op::Park(1, offset)]).expect("written");
        letters.compact_if_due().expect("compacted");
    }
    assert!(disk.files().len() <= 65, "{}", disk.files().len());
    assert_eq!(opened(&disk).len(), 200);
}

#[test]
fn below_the_saved_position_only_letters_are_remembered() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    write(&mut letters, &[Op::Park(2, 10), Op::Skip(2, 20), Op::Skip(2, 30), Op::Skip(3, 10)]).expect("written");
    letters.forget_below(ShardId(0), Offset(30));
    let known = |letters: &LetterStore| [id(2, 10), id(2, 20), id(2, 30), id(3, 10)].map(|id| letters.index.knows(id));
    assert_eq!(known(&letters), [false, false, true, true], "the other shard's stay");
    letters.compact().expect("compacted");
    let mut letters = opened(&disk);
    assert_eq!(known(&letters), [true, false, true, true], "a letter is known from the files");
    assert_eq!((letters.len(), letters.statistics().skipped), (1, 3));
    letters.forget_below(ShardId(0), Offset(30));
    write(&mut letters, &[Op::Park(2, 10)]).expect("written");
    assert_eq!((letters.len(), letters.statistics().parked), (1, 1), "a letter that waits is not written twice");
}

#[test]
fn the_pages_of_a_list_make_up_the_list() {
    let mut letters = opened(&FaultyStorage::new());
    for offset in 0..20 {
        write(&mut letters, &[Op::Park(offset % 3, offset)]).expect("written");
    }
    let whole = letters.list(None, usize::MAX).expect("read");
    assert!(whole.is_sorted_by_key(|letter| (letter.key, letter.id.offset)));
    let mut pages: Vec<DeadLetter> = Vec::new();
    loop {
        let after = pages.last().map(|letter| (letter.key, letter.id.offset));
        let page = letters.list(after, 7).expect("read");
        if page.is_empty() {
            break;
        }
        pages.extend(page);
    }
    assert_eq!(pages, whole);
    assert!(letters.show(Key(1), EventId { shard: ShardId(9), offset: Offset(1) }).expect("read").is_none());
}

#[test]
fn a_long_error_is_cut_between_characters() {
    let mut letters = opened(&FaultyStorage::new());
    let error = format!("x{}", "ä".repeat(1000));
    let letter = letter(1, 1, &error);
    letters.write(&[Entry::Parked { letter: &letter, archive: b"archive" }]).expect("written");
    let (shown, archive) = letters.show(Key(1), id(1, 1)).expect("read").expect("there");
    assert_eq!(shown.error, format!("x{}", "ä".repeat(511)), "1,023 bytes");
    assert_eq!(&archive[..], b"archive");
}

#[test]
fn a_read_only_reader_sees_whole_batches_and_changes_nothing() {
    let store = tempfile::tempdir().expect("a folder");
    let files: Arc<dyn Storage> = Arc::new(Files::open(store.path()).expect("opened"));
    let dir = store.path().join("consumers/mail");
    assert_eq!(open_outside(&files, &dir, FileEnd::default(), 2).expect("no folder, no letters").len(), 0);
    let mut letters =
        LetterStore::open(Arc::clone(&files), &dir, DeadLetterPolicy::default(), FileEnd::default(), 2).expect("opens");
    let mut model = Model::default();
    for batch in &script() {
        write(&mut letters, batch).expect("written");
        model = model.with(batch);
    }
    let path = path(&dir, 1);
    let whole = std::fs::read(&path).expect("read");
    let seen = |what: &str| {
        let letters =
            open_outside(&files, &dir, FileEnd::default(), 2).unwrap_or_else(|error| panic!("{what}: {error}"));
        let found = letters.list_with_archives(None, usize::MAX).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(found.iter().all(|(letter, bytes)| bytes[..] == archive(letter.id.offset.0)[..]));
        found.into_iter().map(|(letter, _)| letter).collect::<Vec<_>>()
    };
    assert_eq!(seen("whole"), model.letters.into_values().collect::<Vec<_>>());
    std::fs::write(&path, &whole[..whole.len() - ENTRY_BYTES]).expect("written");
    assert_eq!(seen("being written").len(), 1, "the last batch is not whole");
    assert_eq!(std::fs::read(&path).expect("read").len(), whole.len() - ENTRY_BYTES);
}

#[test]
fn a_policy_out_of_range_is_refused_by_name() {
    let d = DeadLetterPolicy::default;
    for (policy, expected) in [(d().letters_max(0), "dead_letters_max"), (d().bytes_max(0), "dead_letters_bytes_max")] {
        match open_with(&FaultyStorage::new(), policy) {
            Err(OpenError::Config(crate::ConfigError::OutOfRange { name, .. })) => assert_eq!(name, expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_bytes_of_letter_files_match_the_golden_files() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    for batch in &script() {
        write(&mut letters, batch).expect("written");
    }
    assert_golden("letters.bin", &disk.files()[&file(1)]);
    letters.compact().expect("compacted");
    write(&mut letters, &[Op::Park(1, 100)]).expect("written");
    assert_golden("letters-complete.bin", &disk.files()[&file(2)]);
    write(&mut opened(&disk), &[Op::Park(1, 101)]).expect("written");
    assert_golden("letters-next.bin", &disk.files()[&file(3)]);
}

#[test]
fn a_power_cut_that_keeps_some_sectors_of_the_last_batch_loses_only_that_batch() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    let mut model = Model::default();
    write(&mut letters, &[Op::Park(1, 10)]).expect("written");
    let before = disk.files()[&file(1)].len();
    model.apply(&Op::Park(1, 10));
    let batch: Vec<Op> = (20..40).map(|offset| Op::Park(2, offset)).collect();
    write(&mut letters, &batch).expect("written");
    let files = disk.files();
    let lost = |sector: usize| (sector * 512).max(before)..((sector + 1) * 512).min(files[&file(1)].len());
    for sector in before / 512..files[&file(1)].len().div_ceil(512) {
        let mut torn = files.clone();
        torn.get_mut(&file(1)).expect("it is")[lost(sector)].fill(0);
        let disk = disk_of(&torn);
        model.check(&opened(&disk));
    }
}

#[test]
fn after_a_compaction_the_durable_end_is_in_the_new_file() {
    let disk = FaultyStorage::new();
    let mut letters = opened(&disk);
    for batch in &script() {
        write(&mut letters, batch).expect("written");
    }
    letters.compact().expect("compacted");
    let durable = letters.durable();
    assert_eq!(durable, opened(&disk).durable());
    // Puts the earlier files back, or removes the new one.
    let mut files = disk.files();
    files.remove(&file(2));
    assert_damaged(open_known(&disk_of(&files), durable), "the new one is gone");
    assert_eq!(durable, FileEnd { number: 2, bytes: disk.files()[&file(2)].len() as u64 });
}

#[test]
fn a_batch_found_by_opening_after_a_failed_sync_survives_a_power_cut() {
    // The failed batch begins a file, or follows a durable batch.
    for durable_batches in 0..2 {
        let disk = FaultyStorage::new();
        let mut letters = opened(&disk);
        let mut model = Model::default();
        for offset in 0..durable_batches {
            write(&mut letters, &[Op::Park(1, offset)]).expect("written");
            model.apply(&Op::Park(1, offset));
        }
        let known = letters.durable();
        disk.fail_sync(1);
        write(&mut letters, &[Op::Park(1, 10)]).expect_err("the sync fails");
        drop(letters);
        model.apply(&Op::Park(1, 10));
        let mut letters = open_known(&disk, known).expect("opens");
        model.check(&letters);
        let found = letters.durable();
        let lost = disk.after_crash(Unsynced::Lost);
        model.check(&open_known(&lost, found).expect("the batch that was found is there"));
        // A file that continues it names its end.
        write(&mut letters, &[Op::Park(1, 20)]).expect("written");
        model.apply(&Op::Park(1, 20));
        let lost = disk.after_crash(Unsynced::Lost);
        model.check(&open_known(&lost, letters.durable()).expect("so is the batch behind it"));
    }
}
