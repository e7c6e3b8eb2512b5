//! `corelane dlq`: it lists and shows dead letters, and requests reprocessing and discarding without changing anything
//! else.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{copy, small, soon, tree, until};
use corelane::consumer::{Consumer, ConsumerError, HealthPolicy, LetterSelector, Poller, Request, Retry, outside};
use corelane::envelope::{ArchivedEnvelope, Envelope};
use corelane::log::scan::Store;
use corelane::{EventLog, HandlerError, Key, Meta, OpenError};

/// The keys and payloads that a handler saw, in order.
type Seen = Arc<Mutex<Vec<(u64, String)>>>;

struct Game {
    dir: PathBuf,
    engine: EventLog<Envelope>,
    seen: Seen,
    is_well: Arc<AtomicBool>,
}

impl Game {
    fn open(dir: &Path) -> Self {
        let engine = EventLog::open(small(dir)).unwrap();
        Self { dir: dir.to_owned(), engine, seen: Seen::default(), is_well: Arc::default() }
    }

    /// Publishes two events of each of these keys, and two of the user "ana".
    fn publish(&self, keys: impl Iterator<Item = u64> + Clone) {
        let mut producer = self.engine.producer();
        for n in 0..2 {
            for key in keys.clone() {
                let event = Envelope::new("hit", key, &n.to_string()).unwrap();
                drop(producer.publish(event.key(), event).unwrap());
            }
            let event = Envelope::new("talk", "ana", &format!(r#"{{"n":{n}}}"#)).unwrap();
            drop(producer.publish(event.key(), event).unwrap());
        }
        self.engine.flush(soon()).unwrap();
    }

    /// Starts a consumer whose handler fails unless `is_well` is set.
    fn start(&self, name: &str) -> Consumer<Envelope> {
        let (seen, is_well) = (Arc::clone(&self.seen), Arc::clone(&self.is_well));
        let handler = move |event: &ArchivedEnvelope, meta: &Meta| -> Result<(), HandlerError> {
            if !is_well.load(Ordering::SeqCst) {
                return Err("the service is \u{1b}[31mdown".into());
            }
            seen.lock().unwrap().push((meta.key.get(), event.payload().to_owned()));
            Ok(())
        };
        self.engine.consumer(name).retry(once()).health(patient()).start(handler).unwrap()
    }

    /// A consumer for which every event is a dead letter.
    fn parked(dir: &Path) -> (Self, Consumer<Envelope>) {
        let game = Self::open(dir);
        game.publish(1..4);
        let consumer = game.start("c");
        consumer.drain(soon()).unwrap();
        assert_eq!(consumer.report().letters.letters, 8);
        consumer.save().unwrap();
        (game, consumer)
    }

    fn seen_of(&self, key: Key) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|(of, _)| *of == key.get()).map(|(_, payload)| payload.clone()).collect()
    }

    fn requests(&self) -> usize {
        outside::registered(&Store::open(&self.dir).unwrap(), "c").unwrap().unwrap().requests
    }
}

fn once() -> Retry {
    Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(1)
}

fn patient() -> HealthPolicy {
    HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100)
}

fn run(args: &[&str], dir: &Path, rest: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command.args(args).arg(dir).args(rest).stdin(std::process::Stdio::null()).output().unwrap()
}

/// Runs the tool and checks its status. Returns its output.
fn says(args: &[&str], dir: &Path, rest: &[&str], status: i32) -> String {
    let output = run(args, dir, rest);
    let both = format!("{}{}", String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(status), "{args:?} {rest:?}: {both}");
    assert!(both.chars().all(|c| c == '\n' || !c.is_control()), "control characters are escaped: {both:?}");
    both
}

fn lines(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn letters_are_listed_and_shown_beside_a_running_engine_and_no_byte_changes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (_game, consumer) = Game::parked(dir);
    let before = tree(&dir.join("consumers"));

    let table = says(&["dlq", "list"], dir, &[], 0);
    for part in ["Consumer c", "hit", "talk", "failed", "behind", "8 letters of 4 keys", "8 became letters"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let all = lines(&says(&["dlq", "list"], dir, &["--json"], 0));
    assert_eq!(all.len(), 8);
    let known = consumer.dead_letters(None, 100).unwrap();
    for (line, letter) in all.iter().zip(&known) {
        assert_eq!(line["event_id"], letter.id.to_string());
        assert_eq!((&line["key"], &line["attempts"]), (&letter.key.get().into(), &letter.attempts.into()));
        assert_eq!(line["error"], letter.error);
        assert_eq!(line["consumer"], "c");
    }
    let of_one = lines(&says(&["dlq", "list"], dir, &["--json", "--consumer", "c", "--key", "2"], 0));
    assert_eq!(of_one.iter().map(|line| &line["key"]).collect::<Vec<_>>(), [2, 2]);
    let of_ana = lines(&says(&["dlq", "list"], dir, &["--json", "--user", "ana"], 0));
    assert_eq!(of_ana.iter().map(|line| &line["event_type"]).collect::<Vec<_>>(), ["talk", "talk"]);
    assert_eq!(lines(&says(&["dlq", "list"], dir, &["--json", "--user", "bob"], 0)).len(), 0);
    assert_eq!(lines(&says(&["dlq", "list"], dir, &["--json", "--limit", "3"], 0)).len(), 3);
    assert!(says(&["dlq", "list"], dir, &["--limit", "3"], 0).contains("… and 5 more"));

    let id = of_ana[1]["event_id"].as_str().unwrap();
    let shown = says(&["dlq", "show"], dir, &["--consumer", "c", id], 0);
    let wanted = ["talk", r#""user_id":"ana""#, r#""payload":{"n":1}"#, "why             behind"];
    for part in wanted.into_iter().chain([id]) {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let shown = lines(&says(&["dlq", "show"], dir, &["--json", "--consumer", "c", id], 0));
    assert_eq!((&shown[0]["event"]["payload"]["n"], &shown[0]["event"]["sequence"]), (&1.into(), &().into()));

    assert_eq!(tree(&dir.join("consumers")), before);
    drop(consumer);
}

#[test]
fn a_payload_is_shown_unchanged_whatever_its_fields_are_called() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let game = Game::open(dir);
    let payload = r#"{"n":1,"sequence":0}"#;
    let event = Envelope::new("hit", 7, payload).unwrap();
    drop(game.engine.producer().publish(event.key(), event).unwrap());
    game.engine.flush(soon()).unwrap();
    let consumer = game.start("c");
    consumer.drain(soon()).unwrap();
    let id = consumer.dead_letters(None, 1).unwrap()[0].id.to_string();
    let shown = says(&["dlq", "show"], dir, &["--consumer", "c", &id], 0);
    assert!(shown.contains(payload), "{shown}");
    let shown = lines(&says(&["dlq", "show"], dir, &["--json", "--consumer", "c", &id], 0));
    assert_eq!(shown[0]["event"]["payload"], serde_json::from_str::<serde_json::Value>(payload).unwrap());
}

#[test]
fn events_of_other_types_are_shown_as_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let engine = EventLog::<crate::common::Note>::open(small(dir)).unwrap();
    drop(engine.producer().publish(Key::new(1), crate::common::Note::new(0x11_2233)).unwrap());
    engine.flush(soon()).unwrap();
    let consumer = engine.consumer("c").retry(once()).health(patient()).start(|_, _| Err("no".into())).unwrap();
    consumer.drain(soon()).unwrap();
    let id = consumer.dead_letters(None, 1).unwrap()[0].id.to_string();
    let shown = says(&["dlq", "show"], dir, &["--consumer", "c", &id], 0);
    assert!(shown.contains("note (id 1, schema version 1)") && shown.contains("332211"), "{shown}");
}

#[test]
fn a_running_consumer_reprocesses_letters_in_the_order_of_each_key() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    let ask = ["dlq", "reprocess"];
    // The service is still down: the first letter of the key fails again, which ends the request.
    let said = says(&ask, dir.path(), &["--consumer", "c", "--key", "1"], 0);
    assert!(said.contains("2 letters of 1 keys") && said.contains("within about a second"), "{said}");
    until("the letter was retried", || consumer.dead_letters(None, 1).unwrap()[0].attempts == 2);
    until("the request is done", || game.requests() == 0);
    assert_eq!(consumer.report().letters.letters, 8);

    game.is_well.store(true, Ordering::SeqCst);
    says(&ask, dir.path(), &["--consumer", "c", "--user", "ana"], 0);
    until("the letters of ana are handled", || consumer.report().letters.letters == 6);
    assert_eq!(game.seen_of(Key::of("ana")), [r#"{"n":0}"#, r#"{"n":1}"#]);
    says(&ask, dir.path(), &["--consumer", "c", "--all"], 0);
    until("every letter is handled", || consumer.report().letters.letters == 0);
    for key in 1..4 {
        assert_eq!(game.seen_of(Key::new(key)), ["0", "1"]);
    }
    until("the requests are done", || game.requests() == 0);
    let said = says(&ask, dir.path(), &["--consumer", "c", "--all"], 0);
    assert!(said.contains("no such dead letters") && game.requests() == 0, "{said}");
}

#[test]
fn a_request_waits_for_the_next_start_of_the_consumer() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    consumer.stop(soon()).unwrap();
    game.engine.shutdown(soon()).unwrap();
    drop(game);
    let said = says(&["dlq", "reprocess"], dir.path(), &["--consumer", "c", "--key", "2"], 0);
    assert!(said.contains("No engine has the store open"), "{said}");
    let said = says(&["dlq", "discard"], dir.path(), &["--consumer", "c", "--key", "3", "--yes"], 0);
    assert!(said.contains("1 earlier requests"), "{said}");

    let game = Game::open(dir.path());
    game.is_well.store(true, Ordering::SeqCst);
    game.publish(3..4);
    let consumer = game.start("c");
    until("both requests are done", || game.requests() == 0);
    consumer.drain(soon()).unwrap();
    assert_eq!(game.seen_of(Key::new(2)), ["0", "1"]);
    assert_eq!(game.seen_of(Key::new(3)), ["0", "1"], "only the new events");
    let letters = consumer.report().letters;
    assert_eq!((letters.handled, letters.discarded), (2, 2));
}

#[test]
fn letters_are_discarded_after_confirmation() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    assert!(says(&["dlq", "discard"], dir.path(), &["--consumer", "c", "--all"], 2).contains("--yes"));
    assert_eq!(game.requests(), 0);
    says(&["dlq", "discard"], dir.path(), &["--consumer", "c", "--key", "1", "--yes"], 0);
    until("the letters of the key are discarded", || consumer.report().letters.discarded == 2);
    says(&["dlq", "discard"], dir.path(), &["--consumer", "c", "--all", "--yes"], 0);
    until("every letter is discarded", || consumer.report().letters.letters == 0);
    game.is_well.store(true, Ordering::SeqCst);
    game.publish(1..4);
    consumer.drain(soon()).unwrap();
    assert_eq!(game.seen_of(Key::new(1)), ["0", "1"], "the key is unparked");
}

#[test]
fn a_request_survives_a_crash_during_reprocessing() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    consumer.stop(soon()).unwrap();
    let (handled, crashed) = (Arc::new(AtomicU64::new(0)), dir.path().join("crashed"));
    let (count, from, to) = (Arc::clone(&handled), dir.path().to_owned(), crashed.clone());
    outside::ask(&Store::open(dir.path()).unwrap(), "c", Request::Reprocess(LetterSelector::All)).unwrap();
    let builder = game.engine.consumer("c").retry(once()).health(patient());
    let consumer = builder.start(move |_, _| {
        // The state after a crash at this point: the first two letters are handled and perhaps recorded, the third is
        // not.
        if count.fetch_add(1, Ordering::SeqCst) == 2 {
            copy(&from, &to);
        }
        Ok(())
    });
    let consumer = consumer.unwrap();
    until("every letter is handled", || consumer.report().letters.letters == 0);
    until("the request is done", || game.requests() == 0);
    assert_eq!(handled.load(Ordering::SeqCst), 8);

    let recorded = outside::DeadLetters::open(&Store::open(&crashed).unwrap(), "c").unwrap().statistics().handled;
    assert!(recorded <= 2, "{recorded}");
    let game = Game::open(&crashed);
    assert_eq!(game.requests(), 1);
    game.is_well.store(true, Ordering::SeqCst);
    let consumer = game.start("c");
    until("the other letters are handled", || consumer.report().letters.letters == 0);
    assert_eq!(consumer.report().letters.handled, 8);
    assert_eq!(game.seen.lock().unwrap().len() as u64, 8 - recorded);
}

#[test]
fn a_discard_retries_a_key_whose_letter_is_being_handled() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    consumer.stop(soon()).unwrap();
    let now = Arc::new(AtomicU64::new(0));
    let mut poller = poller(&game, &now);
    assert_eq!(poller.reprocess(LetterSelector::Of(Key::new(1))), 1);
    let delivery = poller.next().unwrap().unwrap();
    outside::ask(&Store::open(dir.path()).unwrap(), "c", Request::Discard(LetterSelector::All)).unwrap();
    now.store(1000, Ordering::SeqCst);
    assert!(poller.next().unwrap().is_none());
    assert_eq!((poller.report().letters.letters, game.requests()), (2, 1), "except for the letter in flight");
    poller.failed(delivery, "no").unwrap();
    now.store(1999, Ordering::SeqCst);
    assert!(poller.next().unwrap().is_none());
    assert_eq!(poller.report().letters.letters, 2);
    now.store(2000, Ordering::SeqCst);
    assert!(poller.next().unwrap().is_none());
    assert_eq!((poller.report().letters.letters, game.requests()), (0, 0));
}

/// A poller with a clock in ms that the test sets.
fn poller(game: &Game, now: &Arc<AtomicU64>) -> Poller<Envelope> {
    let clock = Arc::clone(now);
    let poller = game.engine.consumer("c").retry(once()).health(patient()).poller().unwrap();
    let mut poller = poller.clock(move || Duration::from_millis(clock.load(Ordering::SeqCst)));
    assert!(poller.next().unwrap().is_none());
    poller
}

#[test]
fn a_poller_checks_for_requests_once_a_second_and_sets_invalid_ones_aside() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    consumer.stop(soon()).unwrap();
    let now = Arc::new(AtomicU64::new(0));
    let mut poller = poller(&game, &now);
    let folder = dir.path().join("consumers/c");
    outside::ask(&Store::open(dir.path()).unwrap(), "c", Request::Reprocess(LetterSelector::Of(Key::new(2)))).unwrap();
    let requests = |folder: &Path| -> Vec<PathBuf> {
        let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "req")).collect()
    };
    let whole = std::fs::read(&requests(&folder)[0]).unwrap();
    now.store(999, Ordering::SeqCst);
    assert!(poller.next().unwrap().is_none());
    now.store(1000, Ordering::SeqCst);
    for n in 0..2 {
        // Records are written some milliseconds apart.
        now.store(1000 + 5 * n, Ordering::SeqCst);
        let delivery = poller.next().unwrap().unwrap();
        assert_eq!(poller.event(&delivery).unwrap().1.key, Key::new(2));
        poller.succeeded(delivery).unwrap();
    }
    assert!(poller.next().unwrap().is_none());
    now.store(2000, Ordering::SeqCst);
    assert!(poller.next().unwrap().is_none());
    assert_eq!((poller.report().letters.handled, game.requests()), (2, 0));
    // A request torn at any length changes nothing.
    for len in 0..whole.len() {
        std::fs::write(folder.join(format!("request-{len:03}.req")), &whole[..len]).unwrap();
    }
    now.store(3000, Ordering::SeqCst);
    assert!(poller.next().unwrap().is_none());
    assert_eq!((poller.report().letters.letters, game.requests()), (6, 0));
    assert_eq!(requests(&folder).len(), whole.len(), "the invalid requests are set aside");
    drop(poller);
    // The consumer can be removed in spite of these files.
    game.engine.remove_consumer("c").unwrap();
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn wrong_usage_exits_with_status_2_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (_game, consumer) = Game::parked(dir.path());
    let before = tree(&dir.path().join("consumers"));
    let wrong: &[(&[&str], &[&str])] = &[
        (&["dlq", "list"], &["--consumer", "nobody"]),
        (&["dlq", "list"], &["--consumer", "../c"]),
        (&["dlq", "list"], &["--key", "1", "--user", "x"]),
        (&["dlq", "show"], &["--consumer", "c", "0-17"]),
        (&["dlq", "show"], &["--consumer", "c", "elsewhere"]),
        (&["dlq", "show"], &["0-17"]),
        (&["dlq", "reprocess"], &["--consumer", "c"]),
        (&["dlq", "reprocess"], &["--all"]),
        (&["dlq", "reprocess"], &["--consumer", "c", "--all", "--key", "1"]),
        (&["dlq", "reprocess"], &["--consumer", "nobody", "--all"]),
        (&["dlq", "reprocess"], &["--consumer", "../consumers/c", "--all"]),
        (&["dlq", "discard"], &["--consumer", "c", "--yes"]),
    ];
    for (args, rest) in wrong {
        says(args, dir.path(), rest, 2);
    }
    says(&["dlq", "list"], Path::new("/nowhere"), &[], 2);
    assert_eq!(tree(&dir.path().join("consumers")), before);
    drop(consumer);
}

#[test]
fn damage_in_a_consumers_files_is_reported_and_hides_no_other_consumer() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    consumer.stop(soon()).unwrap();
    let other = game.start("other");
    other.drain(soon()).unwrap();
    other.stop(soon()).unwrap();
    game.engine.shutdown(soon()).unwrap();
    drop(game);
    assert!(says(&["verify"], dir.path(), &[], 0).contains("consumer c: 8 dead letters, 0 requests: ok"));

    let letters = dir.path().join("consumers/c/letters-000001.log");
    let whole = std::fs::read(&letters).unwrap();
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    std::fs::write(&letters, &damaged).unwrap();
    let before = tree(dir.path());
    let said = says(&["dlq", "list"], dir.path(), &[], 1);
    assert!(said.contains("letters-000001.log") && said.contains("Consumer other\n"), "{said}");
    says(&["dlq", "reprocess"], dir.path(), &["--consumer", "c", "--all"], 1);
    says(&["dlq", "show"], dir.path(), &["--consumer", "c", "0-4096"], 1);
    assert!(says(&["verify"], dir.path(), &[], 1).contains("letters-000001.log"));
    let said = says(&["inspect"], dir.path(), &[], 1);
    assert!(said.contains("DAMAGED") && said.contains("letters-000001.log") && said.contains("other"), "{said}");
    assert_eq!(tree(dir.path()), before);

    std::fs::write(&letters, &whole).unwrap();
    let position_file = dir.path().join("consumers/c/checkpoint");
    let mut bytes = std::fs::read(&position_file).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&position_file, bytes).unwrap();
    assert!(says(&["verify"], dir.path(), &[], 1).contains("checkpoint"));
    assert!(says(&["inspect"], dir.path(), &[], 1).contains("checkpoint"));
    assert_eq!(lines(&says(&["dlq", "list"], dir.path(), &["--json", "--consumer", "c"], 0)).len(), 8);
}

#[test]
fn missing_letters_are_reported_as_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (game, consumer) = Game::parked(dir.path());
    consumer.stop(soon()).unwrap();
    game.engine.shutdown(soon()).unwrap();
    drop(game);
    let folder = dir.path().join("consumers/c");
    let (letters, position_file) = (folder.join("letters-000001.log"), folder.join("checkpoint"));
    let whole = std::fs::read(&letters).unwrap();
    let assert_reported = |what: &str, file: &str| {
        let before = tree(dir.path());
        for tool in ["verify", "inspect"] {
            let said = says(&[tool], dir.path(), &[], 1);
            assert!(said.contains(file), "{what}: {said}");
        }
        assert_eq!(tree(dir.path()), before, "{what}");
    };
    let assert_refused = |what: &str| {
        let game = Game::open(dir.path());
        let refused = game.engine.consumer("c").poller();
        let Err(ConsumerError::Files(OpenError::DamagedFile { path, .. })) = &refused else {
            panic!("{what}: {refused:?}");
        };
        assert_eq!(path, &letters, "{what}");
        assert!(!game.engine.consumers()[0].is_running, "{what}: the consumer does not run");
    };
    // Without its last entry the last batch looks cut short, and a lone header looks like a new file.
    for (what, len) in [("the last batch", whole.len() - 8), ("all but the header", 64), ("all", 0)] {
        std::fs::write(&letters, &whole[..len]).unwrap();
        assert_reported(what, "letters-000001.log");
        assert_refused(what);
    }
    std::fs::remove_file(&letters).unwrap();
    assert_reported("the file", "letters-000001.log");
    assert_refused("the file");

    std::fs::write(&letters, &whole).unwrap();
    let saved = std::fs::read(&position_file).unwrap();
    std::fs::remove_file(&position_file).unwrap();
    assert_reported("the position", "checkpoint");
    let refused = EventLog::<Envelope>::open(small(dir.path()));
    assert!(matches!(&refused, Err(OpenError::DamagedFile { path, .. }) if *path == position_file), "{refused:?}");

    std::fs::write(&position_file, saved).unwrap();
    assert!(says(&["verify"], dir.path(), &[], 0).contains("consumer c: 8 dead letters, 0 requests: ok"));
    let game = Game::open(dir.path());
    game.is_well.store(true, Ordering::SeqCst);
    let consumer = game.start("c");
    assert_eq!(consumer.report().letters.letters, 8, "a refused start changes nothing");
    // A removed consumer is not reported as missing.
    consumer.stop(soon()).unwrap();
    game.engine.remove_consumer("c").unwrap();
    game.engine.shutdown(soon()).unwrap();
    drop(game);
    assert!(!says(&["verify"], dir.path(), &[], 0).contains("consumer c"));
}

#[test]
fn inspect_shows_the_slowest_consumer_and_the_segments_that_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let game = Game::open(dir.path());
    assert!(says(&["inspect"], dir.path(), &[], 0).contains("No consumers."));
    let slow = game.engine.consumer("slow").poller().unwrap();
    drop(slow);
    game.is_well.store(true, Ordering::SeqCst);
    let fast = game.start("fast");
    assert!(says(&["inspect"], dir.path(), &[], 0).contains("No consumer is behind."));
    // Fills several segments of 64 KiB.
    let mut producer = game.engine.producer();
    let text = format!("\"{}\"", "x".repeat(8000));
    for n in 0..30_u64 {
        drop(producer.publish(Key::new(n), Envelope::new("long", n, &text).unwrap()).unwrap());
    }
    game.engine.flush(soon()).unwrap();
    fast.drain(soon()).unwrap();
    fast.save().unwrap();
    // A segment holds seven events. The fifth segment is the active one and exists anyway.
    let held = 4 * crate::common::SEGMENT;
    let shown = held.to_string();
    let shown = format!("{},{}", &shown[..shown.len() - 3], &shown[shown.len() - 3..]);
    let assert_shown = || {
        let said = says(&["inspect"], dir.path(), &[], 0);
        let sentence = said.lines().find(|line| line.starts_with("The slowest is slow: 30 events, ")).unwrap();
        let held = format!("It holds {shown} bytes of segments, {shown} of them alone.");
        assert!(sentence.contains(&held), "{said}");
    };
    assert_shown();
    fast.stop(soon()).unwrap();
    game.engine.remove_consumer("fast").unwrap();
    assert_shown();
    game.engine.remove_consumer("slow").unwrap();
    assert!(says(&["inspect"], dir.path(), &[], 0).contains("No consumers."));
}
