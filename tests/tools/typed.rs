//! `corelane::tools::run::<E>()`: an application's own tool shows its events as JSON. The tool runs in a process of its
//! own, on stores that engines have written.

use std::path::Path;
use std::process::{Command, ExitCode, Output};
use std::time::Duration;

use corelane::consumer::{HealthPolicy, Retry};
use corelane::event::Upcaster;
use corelane::{Bounded, Event, EventLog, EventType, EventTypeId, Key, Stored, Time};
use rkyv::{Archive, Deserialize, Serialize};
use serde::Serializer;

use crate::common::{small, soon};

/// The event as it is stored. A `mood` of 1 or 2 cannot be shown.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, serde::Serialize)]
#[serde(tag = "event_type", content = "payload", rename_all = "lowercase")]
enum Move {
    Moved {
        to: (i32, i32),
        by: String,
        #[serde(serialize_with = "show_mood")]
        mood: u8,
    },
    Left,
}

fn show_mood<S: Serializer>(mood: &u8, serializer: S) -> Result<S::Ok, S::Error> {
    match mood {
        1 => Err(serde::ser::Error::custom("no word for this mood")),
        2 => panic!("a bad mood"),
        mood => serializer.serialize_u8(*mood),
    }
}

impl Event for Move {
    const TYPES: &'static [EventType] = &[EventType::new(1, "moved", 1), EventType::new(2, "left", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(if matches!(self, Self::Left) { 2 } else { 1 })
    }
    fn time(&self) -> Option<Time> {
        Some(Time::new(1_796_024_451_123_456_789))
    }
}

/// The event of a later program, which reads the older layout.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, serde::Serialize)]
enum Later {
    Moved { x: i32, y: i32 },
    Left,
}

impl Event for Later {
    const TYPES: &'static [EventType] = &[EventType::new(1, "moved", 2), EventType::new(2, "left", 2)];
    const UPCASTERS: &'static [Upcaster<Self>] = &[Upcaster::new(1, 1, |archive| {
        Ok(match Move::decode(archive)? {
            Move::Moved { to: (x, y), .. } => Self::Moved { x, y },
            Move::Left => Self::Left,
        })
    })];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(if matches!(self, Self::Left) { 2 } else { 1 })
    }
}

/// An event of another program.
#[derive(Archive, Serialize, Deserialize, Bounded, serde::Serialize)]
struct Other {
    n: u64,
}

impl Event for Other {
    const TYPES: &'static [EventType] = &[EventType::new(1, "counted", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

const TOOL: &str = "CORELANE_TEST_TOOL";
const ARGS: &str = "CORELANE_TEST_TOOL_ARGS";

#[test]
#[ignore = "the program that the other tests run"]
fn the_tool_itself() {
    let args = std::env::var(ARGS).unwrap();
    let args = std::iter::once("mytool").chain(args.split('\n'));
    let status = match std::env::var(TOOL).unwrap().as_str() {
        "move" => corelane::tools::run::<Move, _>(args),
        "later" => corelane::tools::run::<Later, _>(args),
        "other" => corelane::tools::run::<Other, _>(args),
        tool => panic!("there is no tool {tool}"),
    };
    let status = (0..=3).find(|code| ExitCode::from(*code) == status).unwrap();
    std::process::exit(status.into());
}

fn tool(name: &str, args: &[&str]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    // With two threads, the test program writes nothing on the line of the tool's first output.
    command.args(["--exact", "typed::the_tool_itself", "--ignored", "--nocapture", "--test-threads=2"]);
    command.env(TOOL, name).env(ARGS, args.join("\n")).stdin(std::process::Stdio::null()).output().unwrap()
}

/// Runs the tool and checks its status. Returns its output and its messages.
fn says(name: &str, args: &[&str], status: i32) -> (String, String) {
    let output = tool(name, args);
    let (out, said) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(status), "{args:?}: {out} {said}");
    (out, said)
}

/// Runs the tool. Returns the lines it wrote, and its messages.
fn lines(name: &str, args: &[&str], status: i32) -> (Vec<serde_json::Value>, String) {
    let (out, said) = says(name, args, status);
    let lines = out.lines().filter(|line| line.starts_with('{'));
    (lines.map(|line| serde_json::from_str(line).unwrap()).collect(), said)
}

fn moved(mood: u8) -> Move {
    Move::Moved { to: (3, -4), by: "ana\u{1b}[31m".to_owned(), mood }
}

/// Writes a store with these events of key 7. All become dead letters of the consumer `c`.
fn store(dir: &Path, events: &[Move]) {
    let engine = EventLog::<Move>::open(small(dir)).unwrap();
    let mut producer = engine.producer();
    events.iter().for_each(|event| drop(producer.publish(Key(7), event.clone()).unwrap()));
    engine.flush(soon()).unwrap();
    let once = Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(1);
    let patient = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
    let consumer = engine.consumer("c").retry(once).health(patient).start(|_, _| Err("no".into())).unwrap();
    consumer.drain(soon()).unwrap();
    consumer.stop(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_tool_for_a_type_shows_its_events_and_dead_letters_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    store(dir.path(), &[moved(0), Move::Left]);
    for order in ["log", "time"] {
        let (dumped, said) = lines("move", &["dump", path, "--order", order], 0);
        assert_eq!(said, "");
        let moved = serde_json::json!({"to": [3, -4], "by": "ana\u{1b}[31m", "mood": 0});
        assert_eq!(
            dumped.iter().map(|line| (&line["event_type"], &line["payload"])).collect::<Vec<_>>(),
            [(&"moved".into(), &moved), (&"left".into(), &serde_json::Value::Null)]
        );
        assert_eq!((&dumped[0]["user_id"], &dumped[1]["version"]), (&7.into(), &2.into()));
    }
    let (raw, _) = says("move", &["dump", path], 0);
    assert!(!raw.contains('\u{1b}'), "no event controls the terminal");
    let (left, _) = lines("move", &["dump", path, "--type", "left"], 0);
    assert_eq!(left.len(), 1);

    let (letters, _) = lines("move", &["dlq", "list", path, "--json"], 0);
    assert_eq!(letters.iter().map(|line| &line["event_type"]).collect::<Vec<_>>(), ["moved", "left"]);
    let id = letters[0]["event_id"].as_str().unwrap();
    let (shown, _) = lines("move", &["dlq", "show", path, "--consumer", "c", "--json", id], 0);
    assert_eq!(shown[0]["event"]["payload"]["to"], serde_json::json!([3, -4]));
    let (table, _) = says("move", &["inspect", path], 0);
    assert!(table.contains("moved") && table.contains("2026-11-30T07:40:51.123456789Z"), "{table}");
}

#[test]
fn an_older_event_is_shown_in_its_current_form_or_with_the_reason_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    store(dir.path(), &[moved(0), Move::Left]);
    let (dumped, said) = lines("later", &["dump", path], 1);
    assert_eq!(dumped[0]["payload"], serde_json::json!({"Moved": {"x": 3, "y": -4}}));
    assert_eq!(dumped[1]["payload"]["why"], "this program has no upcaster for schema version 1");
    assert!(!dumped[1]["payload"]["archive"].as_str().unwrap().is_empty());
    assert!(said.contains("could not be decoded and show their archives and the reasons: 1"), "{said}");
    let (letters, _) = lines("later", &["dlq", "list", path, "--json"], 0);
    let ids = letters.iter().map(|line| line["event_id"].as_str().unwrap());
    for (id, status) in ids.zip([0, 1]) {
        says("later", &["dlq", "show", path, "--consumer", "c", id], status);
    }
}

#[test]
fn an_event_that_cannot_be_shown_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    store(dir.path(), &[moved(1), moved(2), moved(3)]);
    let (dumped, _) = lines("move", &["dump", path], 1);
    assert_eq!(dumped[0]["payload"]["why"], "no word for this mood");
    assert_eq!(dumped[1]["payload"]["why"], "a panic: a bad mood");
    assert_eq!(dumped[2]["payload"]["mood"], 3);
    let (dumped, _) = lines("other", &["dump", path], 1);
    assert_eq!(dumped.len(), 3);
    assert!(dumped.iter().all(|line| line["payload"]["why"] == "this program does not declare event type 1 (moved)"));
}

#[test]
fn times_are_given_in_milliseconds_or_rfc_3339() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    store(dir.path(), &[Move::Left]);
    let count = |option: &str, time: &str| lines("move", &["dump", path, option, time], 0).0.len();
    // The event is at 1796024451123.456789 ms.
    for (option, time, events) in [
        ("--from", "1796024451123", 1),
        ("--from", "1796024451124", 0),
        ("--until", "1796024451123", 1),
        ("--until", "1796024451122", 0),
        ("--from", "2026-11-30T07:40:51.123456789Z", 1),
        ("--from", "2026-11-30T08:40:51.123456790+01:00", 0),
        ("--until", "2026-11-30T07:40:51.123456789Z", 1),
        ("--until", "2026-11-30T07:40:51.123456788Z", 0),
    ] {
        assert_eq!(count(option, time), events, "{option} {time}");
    }
    let (_, said) = says("move", &["dump", path, "--from", "2026-11-30T07:40:51"], 2);
    assert!(said.contains("the offset from UTC (Z or +00:00) is missing"), "{said}");
}
