//! Reading and writing lines: round trips, refused lines, and characters that no line may contain.

use super::*;
use crate::event::{Offset, Scratch, Sequence, ShardId, Version};
use proptest::prelude::*;
use rkyv::util::AlignedVec;

fn meta(event: &Envelope) -> Meta {
    Meta {
        shard: ShardId(3),
        offset: Offset(4096),
        sequence: Sequence(7),
        key: event.key(),
        version: Version(2),
        time: event.time().unwrap_or(Time::unix_ms(5)),
        event_type: EventTypeId(1),
        schema_version: 1,
        correlation: event.correlation(),
        previous: None,
    }
}

fn archive(event: &Envelope) -> AlignedVec<16> {
    let mut bytes = AlignedVec::new();
    bytes.resize(1 << 16, 0);
    let len = event.encode(&mut bytes, &mut Scratch::new(1 << 16)).expect("fits");
    bytes.resize(len, 0);
    bytes
}

fn written(event: &Envelope) -> String {
    let bytes = archive(event);
    let mut out = Vec::new();
    write_envelope(&mut out, &meta(event), ArchivedEnvelope::access(&bytes).expect("valid")).expect("a Vec takes all");
    String::from_utf8(out).expect("JSON is UTF-8")
}

#[test]
fn a_line_is_written_as_it_was_read_followed_by_its_position() {
    let line = r#"{"event_type":"player.move","timestamp":1280526901009,"user_id":3997542709,"correlation_id":"sc2-da41","payload":{"x":133.96,"e":1e3,"s":"é\u0041"}}"#;
    let event = Envelope::from_json(line).expect("a good line");
    assert_eq!(event.key(), Key::new(3_997_542_709));
    assert_eq!(event.time(), Some(Time::unix_ms(1_280_526_901_009)));
    assert_eq!(event.correlation(), Correlation::of("sc2-da41"));
    let place = r#","event_id":"3-4096","shard":3,"offset":4096,"sequence":7,"version":2}"#;
    assert_eq!(written(&event), format!("{}{place}\n", &line[..line.len() - 1]));
}

#[test]
fn a_dump_of_a_loaded_dump_is_identical() {
    for line in [
        r#"{"event_type":"a","user_id":"alice","payload":null}"#,
        r#"{"payload":[],"event_id":"uuid-1","user_id":"alice","event_type":"a","timestamp":null,"correlation_id":null}"#,
    ] {
        let once = written(&Envelope::from_json(line).expect("a good line"));
        let again = written(&Envelope::from_json(&once).expect("a dump reads back"));
        assert_eq!(once, again);
    }
    let kept =
        Envelope::from_json(r#"{"event_type":"a","event_id":"uuid-1","user_id":1,"payload":1}"#).expect("a good line");
    assert_eq!(kept.source_event_id(), Some("uuid-1"));
    assert!(written(&kept).ends_with("\"source_event_id\":\"uuid-1\"}\n"));
}

#[test]
fn an_error_names_the_fault_of_a_line() {
    let missing = |field| JsonError::MissingField { field };
    let cases = [
        (r#"{"user_id":1,"payload":1}"#, missing("event_type")),
        (r#"{"event_type":"a","payload":1}"#, missing("user_id")),
        (r#"{"event_type":"a","user_id":1}"#, missing("payload")),
        (
            r#"{"event_type":7,"user_id":1,"payload":1}"#,
            JsonError::WrongType { field: "event_type", expected: "a string" },
        ),
        (
            r#"{"event_type":"a","user_id":-1,"payload":1}"#,
            JsonError::WrongType { field: "user_id", expected: "a string or a non-negative integer below 2^64" },
        ),
        (
            r#"{"event_type":"a","user_id":1,"correlation_id":[],"payload":1}"#,
            JsonError::WrongType { field: "correlation_id", expected: "a string" },
        ),
        (
            r#"{"event_type":"\ud800","user_id":1,"payload":1}"#,
            JsonError::WrongType { field: "event_type", expected: "a string of valid Unicode" },
        ),
        (
            r#"{"event_type":"a","user_id":1,"payload":1,"colour":2}"#,
            JsonError::UnknownField { field: "colour".into() },
        ),
        (r#"{"event_type":"a","user_id":1,"user_id":2,"payload":1}"#, JsonError::DuplicateField { field: "user_id" }),
        ("[]", JsonError::NotAnObject),
        ("7", JsonError::NotAnObject),
    ];
    for (line, error) in cases {
        assert_eq!(Envelope::from_json(line), Err(error), "{line}");
    }
    for found in ["-1", "1.5", "1e3", "\"1\"", "18446744073710", "99999999999999999999"] {
        let line = format!(r#"{{"event_type":"a","timestamp":{found},"user_id":1,"payload":1}}"#);
        assert_eq!(Envelope::from_json(&line), Err(JsonError::Timestamp { found: found.into() }));
    }
    for line in ["", "{", "{\"event_type\":\"a\",\"colour\":", "nonsense", "{} {}"] {
        assert!(matches!(Envelope::from_json(line), Err(JsonError::NotJson { .. })), "{line}");
    }
    assert!(Envelope::new("a", 1, "{").is_err());
}

#[test]
fn a_written_line_has_no_control_character_and_no_second_line() {
    let payload = "{\n\"del\":\"\u{7f}\",\r\"c1\":\"\u{9b}31m\u{80}\u{9f}\",\"ok\":\"\u{a0}é\"}";
    let event = Envelope::new("a\u{1b}[2J\u{85}\"\\\n", "u\u{7f}\u{9d}", payload).expect("JSON");
    let line = written(&event);
    assert!(!line.trim_end_matches('\n').chars().any(char::is_control), "{line:?}");
    let again = Envelope::from_json(&line).expect("still JSON");
    assert_eq!(again.event_type(), event.event_type());
    assert_eq!(again.user_id(), event.user_id());
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    assert_eq!(value(again.payload()), value(payload));
}

#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "event_type", content = "payload", deny_unknown_fields)]
enum Typed {
    #[serde(rename = "player.levelup")]
    LevelledUp {
        new_level: u32,
    },
    Left,
}

#[test]
fn typed_events_have_the_same_outer_shape() {
    let line =
        r#"{"timestamp":9,"payload":{"new_level":7},"user_id":42,"correlation_id":"m","event_type":"player.levelup"}"#;
    let incoming = from_json::<Typed>(line).expect("a good line");
    assert_eq!(incoming.event, Typed::LevelledUp { new_level: 7 });
    assert_eq!(
        (incoming.key(), incoming.time, incoming.correlation),
        (Key::new(42), Some(Time::unix_ms(9)), Correlation::of("m"))
    );
    for event in [incoming.event, Typed::Left] {
        let meta = Meta {
            key: Key::new(42),
            correlation: Correlation::of("m"),
            ..meta(&Envelope::new("a", 1, "1").expect("JSON"))
        };
        let mut out = Vec::new();
        to_json(&mut out, &meta, &event).expect("a Vec takes all");
        let again = from_json::<Typed>(std::str::from_utf8(&out).expect("UTF-8")).expect("reads back");
        assert_eq!((again.event, again.correlation, again.user_id), (event, meta.correlation, UserId::Number(42)));
    }
    let wrong = r#"{"event_type":"player.levelup","user_id":1,"payload":{"new_level":"x"}}"#;
    assert!(matches!(from_json::<Typed>(wrong), Err(JsonError::Payload { .. })));
    let bare = r#"{"event_type":"player.levelup","user_id":1}"#;
    assert_eq!(from_json::<Typed>(bare), Err(JsonError::MissingField { field: "payload" }));
    assert!(from_json::<Typed>(r#"{"event_type":"Left","user_id":1}"#).is_ok());
    assert!(to_json(&mut Vec::new(), &meta(&Envelope::new("a", 1, "1").expect("JSON")), &7).is_err());
}

#[test]
fn an_event_of_an_unknown_type_is_written_as_its_archive() {
    let mut out = Vec::new();
    let archive: Vec<u8> = (0..=255).collect();
    write_opaque(&mut out, &meta(&Envelope::new("a", 1, "1").expect("JSON")), "moved", &archive)
        .expect("a Vec takes all");
    let value: serde_json::Value = serde_json::from_slice(&out).expect("JSON");
    let hex = value["payload"]["archive"].as_str().expect("a string");
    assert_eq!((hex.len(), &hex[..8], &hex[508..]), (512, "00010203", "feff"));
}

fn user() -> impl Strategy<Value = UserId> {
    prop_oneof![any::<u64>().prop_map(UserId::Number), any::<String>().prop_map(UserId::Text)]
}

fn payload() -> impl Strategy<Value = String> {
    let text = any::<String>().prop_map(|text| serde_json::to_string(&text).expect("a string is JSON"));
    prop_oneof![text, Just("-0.00e-7".to_owned()), Just("[ 1 ,\t{} ]".to_owned()), Just("null".to_owned())]
}

proptest! {
    #[test]
    fn any_envelope_survives_archive_and_line(
        event_type in any::<String>(),
        user_id in user(),
        timestamp_ms in 0..=TIMESTAMP_MS_MAX,
        correlation_id in any::<Option<String>>(),
        payload in payload(),
    ) {
        let mut event = Envelope::new(event_type, 0, &payload).expect("JSON").at_ms(timestamp_ms).expect("in range");
        event.user_id = user_id;
        event.correlation_id = correlation_id;
        let bytes = archive(&event);
        let archived = ArchivedEnvelope::access(&bytes).expect("valid");
        prop_assert_eq!(&crate::event::deserialize::<Envelope>(archived).expect("valid"), &event);
        let line = written(&event);
        prop_assert!(!line.trim_end_matches('\n').chars().any(|c| c.is_control() && c != '\t'));
        let again = Envelope::from_json(&line).expect("a dump reads back");
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
        prop_assert_eq!(value(again.payload()), value(&payload));
        event.payload = again.payload.clone();
        prop_assert_eq!(again, event);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in ".{0,64}") {
        let _seen = Envelope::from_json(&text).is_ok();
        let _seen = ArchivedEnvelope::access(&archive(&Envelope::new(text, 1, "1").expect("JSON"))[16..]).is_ok();
    }
}

#[test]
fn json_of_any_depth_is_kept_as_text_or_refused_without_a_stack_overflow() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        for depth in [100, 10_000, 1_000_000] {
            let payload = format!("{}1{}", open.repeat(depth), close.repeat(depth));
            // Kept as text, which is not parsed recursively.
            let event = Envelope::new("deep", 1, &payload).expect("JSON");
            assert_eq!(event.payload(), payload);
            let line = format!(r#"{{"event_type":"deep","timestamp":1,"user_id":1,"payload":{payload}}}"#);
            assert_eq!(Envelope::from_json(&line).expect("JSON").payload(), payload);
            assert!(Envelope::from_json(&payload).is_err(), "not an event");
            assert!(Envelope::new("deep", 1, &payload[..payload.len() / 2]).is_err(), "truncated");
            // Read as a typed value, which is refused if it nests too deeply.
            let read = from_json::<serde_json::Value>(&line);
            assert_eq!(read.is_ok(), depth <= 100, "{depth}");
        }
    }
}
