//! `corelane verify` against opening: the tool reports everything that opening refuses or reports, and neither loops
//! nor panics, whatever numbers the files hold.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::bank::{Account, ArchivedMoney, Money, Order};
use crate::common::{SEGMENT, copy, small, soon, tree, until};
use corelane::consumer::{Judgement, LetterSelector, Request, outside};
use corelane::ingress::GatePolicy;
use corelane::log::scan::Store;
use corelane::{Config, Durability, Engine, Key, OpenError, Retention};

const HOUR: Duration = Duration::from_secs(3600);

fn config(dir: &Path) -> Config {
    let retention = Retention::bytes(2 * SEGMENT);
    small(dir).shards(2).spares_max(0).durability(Durability::OsCache).retention(retention).snapshot_every(20)
}

fn open(dir: &Path) -> Result<Engine<Account>, OpenError> {
    Engine::open(config(dir))
}

fn from_gate(money: &ArchivedMoney) -> Option<(u64, u64)> {
    match money {
        ArchivedMoney::Withdrawn { cents } => Some((1, cents.to_native())),
        _ => None,
    }
}

/// Creates a closed store that uses every feature and whose beginning retention has freed.
fn store(dir: &Path) {
    let engine = open(dir).unwrap();
    let mut producer = engine.producer();
    let mut gate = engine.gated("g", GatePolicy::default().gap_wait_max(HOUR), from_gate).unwrap();
    let builder = engine.consumer("c").before_durable().judge(|_, _| Judgement::Park);
    let mut poller = builder.poller().unwrap();
    for round in 0..3 {
        for n in 0..500_u64 {
            let text = "n".repeat(300 + n as usize % 9);
            producer.publish(Key(n % 7), Money::Noted { text }).unwrap();
        }
        for sequence in [5 * round, 5 * round + 1, 5 * round + 3] {
            drop(gate.offer(1, sequence, Key(1), Money::Withdrawn { cents: 0 }).unwrap());
        }
        gate.pass_time(2 * HOUR);
        gate.pump().unwrap();
        engine.flush(soon()).unwrap();
        let mut fails = 2;
        while let Some(delivery) = poller.next().unwrap() {
            match fails {
                0 => poller.succeeded(delivery).unwrap(),
                _ => poller.failed(delivery, "no").unwrap(),
            }
            fails = u32::saturating_sub(fails, 1);
        }
        poller.save().unwrap();
        gate.save(soon()).unwrap();
    }
    drop(engine.client().send(Key(900), Order::Withdraw(1)).once(7).wait());
    let freed = || engine.shard_metrics().iter().all(|shard| shard.segments_freed > 0 && shard.segments <= 2);
    until("retention frees", freed);
    drop((producer, gate, poller));
    outside::ask(&Store::open(dir).unwrap(), "c", Request::Reprocess(LetterSelector::Of(Key(123_456)))).unwrap();
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
}

/// Runs the tool for at most a minute. Returns its status and its output.
fn run(command: &[&str], dir: &Path) -> (i32, String) {
    let mut tool = Command::new(env!("CARGO_BIN_EXE_corelane"));
    let mut child =
        tool.args(command).arg(dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let drained = std::thread::spawn(move || {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut out, &mut said).unwrap();
        said
    });
    let errors = std::thread::spawn(move || {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut err, &mut said).unwrap();
        said
    });
    let end = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() > end {
            child.kill().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let said = format!("{}{}", drained.join().unwrap(), errors.join().unwrap());
    (status.unwrap_or_else(|| panic!("{command:?} did not end by itself: {said}")), said)
}

fn verify(dir: &Path) -> (i32, String) {
    run(&["verify"], dir)
}

/// Opens the store and everything in it. Returns the error or the reported damage, if there is one.
fn refused_or_reported(dir: &Path) -> Option<String> {
    let engine = match open(dir) {
        Ok(engine) => engine,
        Err(error) => return Some(error.to_string()),
    };
    for shard in &engine.recovery().shards {
        if shard.torn_tail.is_some() || shard.lost_beginning {
            return Some(format!("{shard:?}"));
        }
    }
    let stats = engine.snapshot_stats();
    if stats.unreadable > 0 {
        return Some(format!("{stats:?}"));
    }
    let consumer = engine.consumer("c").poller().map(drop);
    let gate = engine.gated("g", GatePolicy::default(), from_gate).map(drop);
    drop(engine);
    if let Err(error) = consumer {
        return Some(error.to_string());
    }
    if tree(dir).keys().any(|path| path.to_str().unwrap().contains("/refused-")) {
        return Some("a request was set aside".to_owned());
    }
    gate.err().map(|error| error.to_string())
}

/// The files to damage: the newest one of each kind.
fn files(dir: &Path) -> Vec<PathBuf> {
    let is_kept = |path: &&PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        !name.starts_with("spare-") && (path.to_str().unwrap().contains("shard-0000") || !name.ends_with(".seg"))
    };
    let mut kinds = BTreeSet::new();
    // Begins with the newest file: without its newest checkpoint, the store has lost its beginning.
    let kind = |path: &Path| path.to_str().unwrap().replace(|letter: char| letter.is_ascii_digit(), "");
    tree(dir)
        .keys()
        .rev()
        .filter(is_kept)
        .filter(|path| kinds.insert(kind(path.strip_prefix(dir).unwrap())))
        .cloned()
        .collect()
}

#[test]
fn verify_reports_everything_that_opening_refuses_or_reports() {
    let home = tempfile::tempdir().unwrap();
    let (whole, older, broken) = (home.path().join("a"), home.path().join("older"), home.path().join("b"));
    store(&whole);
    copy(&whole, &older);
    let (status, said) = verify(&whole);
    assert_eq!(status, 0, "{said}");
    // Another run, so that the copied files are older.
    store(&whole);
    let (status, said) = verify(&whole);
    assert_eq!(status, 0, "{said}");
    let (mut missed, mut refused, mut tried) = (Vec::new(), 0, 0);
    for path in files(&whole) {
        let name = path.strip_prefix(&whole).unwrap().to_owned();
        let content = std::fs::read(&path).unwrap();
        let mut changes: Vec<(String, Option<Vec<u8>>)> = vec![("deleted".into(), None)];
        for len in [0, content.len() / 2, content.len().saturating_sub(1)] {
            changes.push((format!("cut to {len}"), Some(content[..len.min(content.len())].to_vec())));
        }
        changes.push(("grown".into(), Some([&content[..], &[7; 48]].concat())));
        for step in 0..3 {
            let at = (content.len() * step / 3 + 13 * step).min(content.len().saturating_sub(1));
            let mut flipped = content.clone();
            if let Some(byte) = flipped.get_mut(at) {
                *byte ^= 1 << (step % 8);
            }
            changes.push((format!("bit flipped at {at}"), Some(flipped)));
        }
        if let Ok(before) = std::fs::read(older.join(&name)) {
            changes.push(("replaced by an older copy".into(), Some(before)));
        }
        for (what, content) in changes {
            if broken.exists() {
                std::fs::remove_dir_all(&broken).unwrap();
            }
            copy(&whole, &broken);
            match content {
                Some(content) => std::fs::write(broken.join(&name), content).unwrap(),
                None => std::fs::remove_file(broken.join(&name)).unwrap(),
            }
            let (status, said) = verify(&broken);
            assert!((0..=2).contains(&status), "{name:?} {what}: {status} {said}");
            tried += 1;
            if let Some(why) = refused_or_reported(&broken) {
                refused += 1;
                if status == 0 {
                    missed.push(format!("{} {what}: {why}", name.display()));
                }
            }
        }
    }
    assert!(missed.is_empty(), "{} of {refused}:\n{}", missed.len(), missed.join("\n"));
    assert!(refused > tried / 3, "{refused} of {tried}");
}

/// The positions and widths of a file's numbers.
fn fields(name: &str, len: usize) -> Vec<(usize, usize)> {
    let tail = len.saturating_sub(20);
    match name {
        "manifest" => vec![(16, 2), (18, 2), (24, 8), (32, 4), (36, 4), (40, 8), (48, 2), (50, 2), (52, 2)],
        "span" => vec![(12, 8), (20, 8)],
        "checkpoint" => vec![(12, 2), (16, 8), (24, 8), (32, 8), (40, 8), (48, 4), (tail, 4), (tail + 8, 8)]
            .into_iter()
            // The seen part: store, offset, last, sequence, check, shard, version.
            .chain([(56, 8), (64, 8), (72, 8), (80, 8), (88, 4), (92, 2), (94, 2), (96, 8)])
            .collect(),
        "gaps" => vec![(12, 8), (24, 8), (32, 8), (40, 8), (64, 4)],
        "witness" => vec![(12, 8), (24, 4)],
        // Kind, shard, state version, start, sequence, state size, state alignment, store, check.
        _ if name.ends_with(".snp") => {
            vec![(16, 2), (18, 2), (20, 2), (24, 8), (32, 8), (48, 4), (52, 2), (56, 8), (64, 4)]
        }
        // Shards, partitions, and for the first shard: store, offset, last, sequence, check, shard.
        "positions" => vec![(12, 2), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 4), (60, 2)],
        _ if name.ends_with(".req") => vec![(12, 2), (14, 2), (16, 8), (24, 8)],
        _ if name.ends_with(".log") => vec![(12, 4), (16, 4), (20, 4), (24, 8)]
            .into_iter()
            .chain(
                [(16, 8), (24, 8), (32, 8), (40, 2), (42, 2), (44, 2), (46, 2), (48, 4), (52, 4)]
                    .map(|(at, width)| (at + 64, width)),
            )
            .collect(),
        _ => Vec::new(),
    }
}

/// Makes the checksums valid again.
fn seal(name: &str, content: &mut [u8]) {
    let put = |content: &mut [u8], at: usize, crc: u32| content[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    if name.ends_with(".log") {
        let crc = crc32c::crc32c(&content[..56]);
        put(content, 56, crc);
        let number: u32 = name.trim_start_matches("letters-").trim_end_matches(".log").parse().unwrap();
        let len = u32::from_le_bytes(content[64..68].try_into().unwrap()) as usize;
        let seed = crc32c::crc32c_append(number, &64_u64.to_le_bytes());
        let crc = crc32c::crc32c_append(seed, &content[72..64 + len]);
        put(content, 68, crc);
        return;
    }
    if name.ends_with(".snp") {
        let crc = crc32c::crc32c(&content[..72]);
        put(content, 72, crc);
        return;
    }
    let piece_bytes = match name {
        "gaps" => 48,
        "witness" => 8,
        _ => 0,
    };
    if piece_bytes > 0 {
        let crc = crc32c::crc32c(&content[..20]);
        put(content, 20, crc);
        // Each checksum is seeded with the previous one.
        for at in (24..content.len()).step_by(piece_bytes) {
            let before = u32::from_le_bytes(content[at - 4..at].try_into().unwrap());
            let crc_at = at + piece_bytes - 4;
            let crc = crc32c::crc32c_append(before, &content[at..crc_at]);
            put(content, crc_at, crc);
        }
        return;
    }
    let at = content.len() - 4;
    let crc = crc32c::crc32c(&content[..at]);
    put(content, at, crc);
}

#[test]
fn impossible_numbers_are_reported_with_their_file_and_never_followed() {
    let home = tempfile::tempdir().unwrap();
    let (whole, broken) = (home.path().join("a"), home.path().join("b"));
    store(&whole);
    copy(&whole, &broken);
    let mut tried = 0;
    for path in files(&whole) {
        let (name, held) = (path.file_name().unwrap().to_str().unwrap(), path.strip_prefix(&whole).unwrap());
        let content = std::fs::read(&path).unwrap();
        for (at, width) in fields(name, content.len()) {
            let max = u64::MAX >> (64 - 8 * width);
            let mut now = [0; 8];
            let Some(field) = content.get(at..at + width) else { continue };
            now[..width].copy_from_slice(field);
            // If the field is an offset in the log, this value lies inside the previous record.
            let inside = u64::from_le_bytes(now).wrapping_sub(16) & max;
            for value in [0, max, 1 << 35 & max, inside] {
                let mut strange = content.clone();
                let Some(field) = strange.get_mut(at..at + width) else { continue };
                field.copy_from_slice(&value.to_le_bytes()[..width]);
                seal(name, &mut strange);
                std::fs::write(broken.join(held), &strange).unwrap();
                let what = format!("{} with {value} at {at}", held.display());
                let commands: &[&[&str]] = match name {
                    "manifest" | "span" if value == 0 || value == 1 << 35 => {
                        &[&["verify"], &["inspect"], &["dump"], &["dlq", "list"]]
                    }
                    _ if name.ends_with(".log") => &[&["verify"], &["dlq", "list"]],
                    _ => &[&["verify"]],
                };
                let mut is_reported = false;
                for command in commands {
                    let (status, said) = run(command, &broken);
                    assert!((0..=2).contains(&status), "{what}: {command:?} ended with {status}: {said}");
                    assert!(!said.contains("panicked"), "{what}: {said}");
                    is_reported |= status != 0;
                }
                tried += 1;
                // A tool cannot detect a wrong but possible number.
                let cannot_be = match (name, at) {
                    ("manifest", 16) => value != 1,
                    ("manifest", 24) | ("span", _) | ("gaps" | "witness", _) => strange != content,
                    ("checkpoint", 16) | ("positions", 32) => value == inside,
                    // Of another store, or after another event.
                    ("checkpoint", 56 | 88) | ("positions", 24 | 56) => strange != content,
                    (_, 24 | 32 | 56 | 64) if name.starts_with("checkpoint-") => strange != content,
                    _ => false,
                };
                assert!(is_reported || !cannot_be, "{what} is not reported");
            }
        }
        // Opening neither panics nor loops with the extreme numbers.
        for (at, width) in fields(name, content.len()) {
            for value in [0, u64::MAX >> (64 - 8 * width)] {
                let mut strange = content.clone();
                let Some(field) = strange.get_mut(at..at + width) else { continue };
                field.copy_from_slice(&value.to_le_bytes()[..width]);
                seal(name, &mut strange);
                let copied = home.path().join("c");
                copy(&whole, &copied);
                std::fs::write(copied.join(held), &strange).unwrap();
                drop(refused_or_reported(&copied));
                std::fs::remove_dir_all(&copied).unwrap();
            }
        }
        std::fs::write(broken.join(held), content).unwrap();
    }
    assert!(tried > 100, "{tried}");
}

#[test]
fn files_that_are_no_folders_among_consumers_and_gates_are_ignored() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("store");
    store(&dir);
    let (status, said) = verify(&dir);
    assert_eq!(status, 0, "{said}");
    for folder in ["consumers", "gates"] {
        std::fs::write(dir.join(folder).join("notes.txt"), "the operator's notes").unwrap();
        std::os::unix::fs::symlink("nowhere", dir.join(folder).join("link")).unwrap();
    }
    assert_eq!(verify(&dir), (0, said), "they are not mentioned");
    let engine = open(&dir).unwrap();
    drop(engine.consumer("c").poller().unwrap());
    drop(engine.gated("g", GatePolicy::default(), from_gate).unwrap());
    assert_eq!(engine.gaps("notes.txt").unwrap(), []);
    let error = engine.gated("notes.txt", GatePolicy::default(), from_gate).map(drop).expect_err("no folder");
    assert!(error.to_string().contains("gates/notes.txt"), "{error}");
    for folder in ["consumers", "gates"] {
        assert_eq!(std::fs::read(dir.join(folder).join("notes.txt")).unwrap(), b"the operator's notes");
    }
}

#[test]
fn a_store_with_a_placement_is_verified_without_it_and_a_key_in_two_shards_is_a_problem() {
    use std::sync::atomic::{AtomicU64, Ordering};
    // An impure placement, as no application may have.
    static MOVED: AtomicU64 = AtomicU64::new(0);
    let placement = || corelane::Placement::new("zone", 3, |key| (key.0 >> 32) + MOVED.load(Ordering::SeqCst));
    let home = tempfile::tempdir().unwrap();
    let open = || Engine::<Account>::open(small(home.path()).shards(2).placement(placement())).unwrap();
    let engine = open();
    let mut client = engine.client();
    for zone in 0..20_u64 {
        let keys: Vec<Key> = (0..4).map(|player| Key(zone << 32 | player)).collect();
        client.send_many(&keys, Order::Deposits(vec![1; 9])).once(zone).wait().unwrap();
    }
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    let (status, said) = verify(home.path());
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("keys are placed by the placement \"zone\", version 3: checked only that"), "{said}");
    assert!(said.contains("180 events in 2 shards: ok"), "{said}");
    let (status, said) = run(&["dump", "--key", "3"], home.path());
    assert_eq!((status, said.lines().count()), (0, 2), "{said}");
    let (status, said) = run(&["inspect"], home.path());
    assert!(status == 0 && said.contains("keys            by the placement \"zone\", version 3"), "{said}");
    drop((client, engine));
    // The function gives a key another shard.
    let engine = open();
    let other = (1..).find(|moved| Key(*moved).shard(2) != Key(0).shard(2)).unwrap();
    MOVED.store(other, Ordering::SeqCst);
    engine.client().send(Key(3), Order::Deposit(1)).wait().unwrap();
    engine.shutdown(soon()).unwrap();
    let (status, said) = verify(home.path());
    assert!(status != 0 && said.contains("key 3 is in shard 0 too"), "{said}");
}
