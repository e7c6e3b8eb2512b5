//! The top level of a line of input: the text of each known field, which may occur at most once.

use std::borrow::Cow;
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::{JsonError, TIMESTAMP_MS_MAX, not_json};
use super::user_id::UserId;

const FIELDS: [&str; 11] = [
    "event_type",
    "timestamp",
    "user_id",
    "correlation_id",
    "payload",
    "event_id",
    "shard",
    "offset",
    "sequence",
    "version",
    "source_event_id",
];
pub(super) const EVENT_TYPE: usize = 0;
pub(super) const TIMESTAMP: usize = 1;
pub(super) const USER_ID: usize = 2;
pub(super) const CORRELATION_ID: usize = 3;
pub(super) const PAYLOAD: usize = 4;
pub(super) const EVENT_ID: usize = 5;
pub(super) const SHARD: usize = 6;
pub(super) const OFFSET: usize = 7;
pub(super) const SOURCE_EVENT_ID: usize = 10;

/// The top level of a line: the text of each known field, in the order of [`FIELDS`].
pub(super) struct Slots<'a> {
    values: [Option<&'a RawValue>; FIELDS.len()],
    // Returned only after the whole line has been parsed, because invalid JSON is the more basic error.
    problem: Option<JsonError>,
}

impl<'a> Slots<'a> {
    pub(super) fn parse(line: &'a str) -> Result<Self, JsonError> {
        let slots: Slots<'a> = serde_json::from_str(line).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => JsonError::NotAnObject,
            _ => not_json(&error),
        })?;
        match slots.problem {
            Some(problem) => Err(problem),
            None => Ok(slots),
        }
    }

    pub(super) fn get(&self, field: usize) -> Option<&'a RawValue> {
        self.values[field]
    }

    pub(super) fn timestamp_ms(&self) -> Result<Option<u64>, JsonError> {
        let Some(raw) = present(self.get(TIMESTAMP)) else { return Ok(None) };
        match raw.get().parse() {
            Ok(ms) if ms <= TIMESTAMP_MS_MAX => Ok(Some(ms)),
            _ => Err(JsonError::Timestamp { found: raw.get().to_owned() }),
        }
    }

    pub(super) fn user_id(&self) -> Result<UserId, JsonError> {
        let raw = required("user_id", self.get(USER_ID))?;
        if raw.get().starts_with('"') {
            return Ok(UserId::Text(string("user_id", raw)?.into_owned()));
        }
        raw.get().parse().map(UserId::Number).map_err(|_| JsonError::WrongType {
            field: "user_id",
            expected: "a string or a non-negative integer below 2^64",
        })
    }

    pub(super) fn source_event_id(&self) -> Result<Option<String>, JsonError> {
        let source = optional_string("source_event_id", self.get(SOURCE_EVENT_ID))?;
        let id = optional_string("event_id", self.get(EVENT_ID))?;
        let place = self.get(SHARD).zip(self.get(OFFSET)).map(|(shard, offset)| format!("{shard}-{offset}"));
        Ok(source.or_else(|| id.filter(|id| place.as_ref() != Some(id))))
    }
}

impl<'de: 'a, 'a> serde::Deserialize<'de> for Slots<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Top;
        impl<'de> Visitor<'de> for Top {
            type Value = Slots<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Slots<'de>, A::Error> {
                let mut slots = Slots { values: [None; FIELDS.len()], problem: None };
                while let Some(name) = map.next_key::<FieldName>()? {
                    let problem = match name {
                        FieldName::Known(field) => {
                            let before = slots.values[field].replace(map.next_value()?);
                            before.map(|_| JsonError::DuplicateField { field: FIELDS[field] })
                        }
                        FieldName::Unknown(field) => {
                            map.next_value::<IgnoredAny>()?;
                            Some(JsonError::UnknownField { field })
                        }
                    };
                    slots.problem = slots.problem.or(problem);
                }
                Ok(slots)
            }
        }
        deserializer.deserialize_map(Top)
    }
}

enum FieldName {
    Known(usize),
    Unknown(String),
}

impl<'de> serde::Deserialize<'de> for FieldName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = FieldName;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field name")
            }

            fn visit_str<R>(self, name: &str) -> Result<FieldName, R> {
                Ok(match FIELDS.iter().position(|field| *field == name) {
                    Some(field) => FieldName::Known(field),
                    None => FieldName::Unknown(name.to_owned()),
                })
            }
        }
        deserializer.deserialize_identifier(Name)
    }
}

/// Treats `null` as absent.
fn present(raw: Option<&RawValue>) -> Option<&RawValue> {
    raw.filter(|raw| raw.get() != "null")
}

pub(super) fn required<'a>(field: &'static str, raw: Option<&'a RawValue>) -> Result<&'a RawValue, JsonError> {
    raw.ok_or(JsonError::MissingField { field })
}

pub(super) fn string<'a>(field: &'static str, raw: &'a RawValue) -> Result<Cow<'a, str>, JsonError> {
    // A string without escapes is borrowed; one with escapes is decoded into a new string.
    let text = raw.get();
    if let Some(inner) = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'))
        && !inner.contains('\\')
    {
        return Ok(Cow::Borrowed(inner));
    }
    let expected = if text.starts_with('"') { "a string of valid Unicode" } else { "a string" };
    serde_json::from_str(text).map(Cow::Owned).map_err(|_| JsonError::WrongType { field, expected })
}

pub(super) fn optional_string(field: &'static str, raw: Option<&RawValue>) -> Result<Option<String>, JsonError> {
    present(raw).map(|raw| string(field, raw).map(Cow::into_owned)).transpose()
}
