//! The generic JSON event, and functions that read and write events as JSON lines.
//!
//! Every line has one outer shape: `event_type`, `timestamp` (ms since 1970), `user_id` (a number or a text),
//! `correlation_id`, `payload`. A written line adds the position of the event: `event_id`, `shard`, `offset`,
//! `sequence` (if known), `version`. Such a line can be read again. [`Envelope`] carries any payload as its original
//! JSON text; [`from_json`] and [`to_json`] do the same for events that are Rust enums.
//!
//! Invariant: a written event is exactly one line, without control characters that a terminal would interpret.
//!
//! ```
//! use corelane::envelope::Envelope;
//!
//! let line = r#"{"event_type":"player.move","timestamp":1280526901009,"user_id":42,"payload":{"x":133.96}}"#;
//! let event = Envelope::from_json(line)?;
//! assert_eq!(event.payload(), r#"{"x":133.96}"#);
//! # Ok::<(), corelane::envelope::JsonError>(())
//! ```

mod error;
mod slots;
mod user_id;
mod write;

use std::io;

use rkyv::rancor::Error as RkyvError;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

pub use error::JsonError;
pub use user_id::{ArchivedUserId, UserId, UserIdResolver};

use error::{TIMESTAMP_MS_MAX, not_json, without_place};
use slots::{CORRELATION_ID, EVENT_TYPE, PAYLOAD, Slots, optional_string, required, string};
use write::{CorrelationId, Outer, User, write_raw, write_string};

use crate::event::{Correlation, Encode, Event, EventType, EventTypeId, Key, Meta, Time};

/// An event of any kind. The payload is its original JSON text, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, corelane::Bounded)]
#[rkyv(derive(Debug))]
pub struct Envelope {
    event_type: String,
    timestamp_ms: Option<u64>,
    user_id: UserId,
    correlation_id: Option<String>,
    source_event_id: Option<String>,
    payload: String,
}

impl Event for Envelope {
    const TYPES: &'static [EventType] = &[EventType::new(1, "envelope", 1)];

    fn event_type(&self) -> EventTypeId {
        Self::TYPES[0].id
    }

    fn time(&self) -> Option<Time> {
        self.timestamp_ms.map(Time::unix_ms)
    }

    fn correlation(&self) -> Correlation {
        self.correlation_id.as_deref().map_or(Correlation(0), Correlation::of)
    }
}

impl Envelope {
    /// Creates an event without a timestamp or a correlation id.
    ///
    /// # Errors
    /// Returns [`JsonError::NotJson`] if `payload` is not exactly one JSON value.
    pub fn new(event_type: impl Into<String>, user_id: impl Into<UserId>, payload: &str) -> Result<Self, JsonError> {
        let payload: &RawValue = serde_json::from_str(payload).map_err(|error| not_json(&error))?;
        Ok(Self {
            event_type: event_type.into(),
            timestamp_ms: None,
            user_id: user_id.into(),
            correlation_id: None,
            source_event_id: None,
            payload: payload.get().to_owned(),
        })
    }

    /// Sets the event's own time, in ms since 1970.
    ///
    /// # Errors
    /// Returns [`JsonError::Timestamp`] for times after the year 2554.
    pub fn at_ms(mut self, timestamp_ms: u64) -> Result<Self, JsonError> {
        if timestamp_ms > TIMESTAMP_MS_MAX {
            return Err(JsonError::Timestamp { found: timestamp_ms.to_string() });
        }
        self.timestamp_ms = Some(timestamp_ms);
        Ok(self)
    }

    /// Ties the event to other events of the same cause.
    #[must_use]
    pub fn correlated(mut self, correlation_id: impl Into<String>) -> Self {
        self.correlation_id = Some(correlation_id.into());
        self
    }

    /// Reads one line.
    ///
    /// An `event_id` is kept as the id given by the source; the event itself gets a new id from the position of its
    /// record. The fields that a dump adds (`shard`, `offset`, `sequence`, `version`, `source_event_id`) are accepted.
    /// An `event_id` that only repeats `shard` and `offset` is not a source's id, so loading a dump and dumping it
    /// again gives the same lines. `null` in an optional field means that the field is absent.
    ///
    /// # Errors
    /// Returns the first error in the line.
    pub fn from_json(line: &str) -> Result<Self, JsonError> {
        let slots = Slots::parse(line)?;
        Ok(Self {
            event_type: string("event_type", required("event_type", slots.get(EVENT_TYPE))?)?.into_owned(),
            timestamp_ms: slots.timestamp_ms()?,
            user_id: slots.user_id()?,
            correlation_id: optional_string("correlation_id", slots.get(CORRELATION_ID))?,
            source_event_id: slots.source_event_id()?,
            payload: required("payload", slots.get(PAYLOAD))?.get().to_owned(),
        })
    }

    /// Returns the event type, as named by the source.
    #[must_use]
    pub fn event_type(&self) -> &str {
        &self.event_type
    }

    /// Returns the event's own time, in ms since 1970.
    #[must_use]
    pub fn timestamp_ms(&self) -> Option<u64> {
        self.timestamp_ms
    }

    /// Returns the id of the user that the event belongs to.
    #[must_use]
    pub fn user_id(&self) -> &UserId {
        &self.user_id
    }

    /// Returns the key to publish the event under.
    #[must_use]
    pub fn key(&self) -> Key {
        self.user_id.key()
    }

    /// Returns the correlation id.
    #[must_use]
    pub fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    /// Returns the id that the source gave the event.
    #[must_use]
    pub fn source_event_id(&self) -> Option<&str> {
        self.source_event_id.as_deref()
    }

    /// Returns the payload as its original JSON text.
    #[must_use]
    pub fn payload(&self) -> &str {
        &self.payload
    }
}

impl ArchivedEnvelope {
    /// Reads an archive in place, after validating every byte. `bytes` must begin at a multiple of 16.
    ///
    /// # Errors
    /// Returns the validator's error.
    pub fn access(bytes: &[u8]) -> Result<&Self, RkyvError> {
        <Envelope as Encode>::access(bytes)
    }

    /// Returns the event type, as named by the source.
    #[must_use]
    pub fn event_type(&self) -> &str {
        &self.event_type
    }

    /// Returns the event's own time, in ms since 1970.
    #[must_use]
    pub fn timestamp_ms(&self) -> Option<u64> {
        self.timestamp_ms.as_ref().map(|ms| ms.to_native())
    }

    /// Returns the id of the user that the event belongs to.
    #[must_use]
    pub fn user_id(&self) -> &ArchivedUserId {
        &self.user_id
    }

    /// Returns the correlation id.
    #[must_use]
    pub fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    /// Returns the id that the source gave the event.
    #[must_use]
    pub fn source_event_id(&self) -> Option<&str> {
        self.source_event_id.as_deref()
    }

    /// Returns the payload as its original JSON text.
    #[must_use]
    pub fn payload(&self) -> &str {
        &self.payload
    }
}

/// A typed event read from JSON, with the fields of the outer shape.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Incoming<E> {
    /// The event.
    pub event: E,
    /// The id of the user that the event belongs to.
    pub user_id: UserId,
    /// The event's own time.
    pub time: Option<Time>,
    /// The correlation: the hash of a text, or a number as written by [`to_json`]; 0 means none.
    pub correlation: Correlation,
    /// The id that the source gave the event.
    pub source_event_id: Option<String>,
}

impl<E> Incoming<E> {
    /// Returns the key to publish the event under.
    #[must_use]
    pub fn key(&self) -> Key {
        self.user_id.key()
    }
}

/// Reads one line whose event is a Rust enum with `#[serde(tag = "event_type", content = "payload")]`.
///
/// The outer shape is that of [`Envelope::from_json`]. A variant without content needs no `payload`.
///
/// # Errors
/// Returns the first error in the line.
///
/// ```
/// use corelane::Key;
/// use corelane::envelope::from_json;
///
/// #[derive(Debug, PartialEq, serde::Deserialize)]
/// #[serde(tag = "event_type", content = "payload")]
/// enum GameEvent {
///     #[serde(rename = "player.levelup")]
///     LevelledUp { new_level: u32 },
/// }
///
/// let line = r#"{"event_type":"player.levelup","user_id":42,"payload":{"new_level":7}}"#;
/// let incoming = from_json::<GameEvent>(line)?;
/// assert_eq!((incoming.key(), incoming.event), (Key::new(42), GameEvent::LevelledUp { new_level: 7 }));
/// # Ok::<(), corelane::envelope::JsonError>(())
/// ```
pub fn from_json<E: DeserializeOwned>(line: &str) -> Result<Incoming<E>, JsonError> {
    let slots = Slots::parse(line)?;
    let event_type = required("event_type", slots.get(EVENT_TYPE))?;
    string("event_type", event_type)?;
    // Only these two fields, because the type may deny unknown fields. The tag comes first: serde then parses the
    // payload straight into the variant.
    let event = match slots.get(PAYLOAD) {
        Some(payload) => format!(r#"{{"event_type":{event_type},"payload":{payload}}}"#),
        None => format!(r#"{{"event_type":{event_type}}}"#),
    };
    let event = serde_json::from_str(&event).map_err(|error| match slots.get(PAYLOAD) {
        // Without line and column, which would refer to the text built above.
        Some(_) => JsonError::Payload { why: without_place(&error) },
        None => JsonError::MissingField { field: "payload" },
    })?;
    let correlation = match slots.get(CORRELATION_ID) {
        Some(raw) if raw.get().starts_with(|c: char| c.is_ascii_digit()) => {
            Correlation(raw.get().parse().map_err(|_| JsonError::WrongType {
                field: "correlation_id",
                expected: "a string or a non-negative integer",
            })?)
        }
        raw => optional_string("correlation_id", raw)?.map_or(Correlation(0), |text| Correlation::of(&text)),
    };
    Ok(Incoming {
        event,
        user_id: slots.user_id()?,
        time: slots.timestamp_ms()?.map(Time::unix_ms),
        correlation,
        source_event_id: slots.source_event_id()?,
    })
}

/// Writes an [`Envelope`] as one line.
///
/// # Errors
/// Returns the error of `out`.
pub fn write_envelope(out: &mut impl io::Write, meta: &Meta, event: &ArchivedEnvelope) -> io::Result<()> {
    let user = match event.user_id() {
        ArchivedUserId::Number(id) => User::Number(id.to_native()),
        ArchivedUserId::Text(text) => User::Text(text),
    };
    let correlation = event.correlation_id().map(CorrelationId::Text);
    let line = Outer { event_type: event.event_type(), user, correlation, source_event_id: event.source_event_id() };
    line.write(out, meta, |out| write_raw(out, event.payload()))
}

/// Writes an event of a serde enum (see [`from_json`]) as one line. Key and correlation are written as numbers, because
/// the log stores them as numbers for typed events.
///
/// # Errors
/// Returns the error of `out`, or `InvalidData` if the type does not serialise to `event_type` and `payload`.
pub fn to_json<E: serde::Serialize>(out: &mut impl io::Write, meta: &Meta, event: &E) -> io::Result<()> {
    let invalid = |error: JsonError| io::Error::new(io::ErrorKind::InvalidData, error);
    let text = serde_json::to_string(event).map_err(|error| invalid(not_json(&error)))?;
    let slots = Slots::parse(&text).map_err(invalid)?;
    let event_type =
        required("event_type", slots.get(EVENT_TYPE)).and_then(|raw| string("event_type", raw)).map_err(invalid)?;
    let payload = slots.get(PAYLOAD).map_or("null", RawValue::get);
    Outer::typed(&event_type, meta).write(out, meta, |out| write_raw(out, payload))
}

/// Writes an event of an unknown Rust type, with its archive as hexadecimal digits in `payload.archive`.
///
/// # Errors
/// Returns the error of `out`.
pub fn write_opaque(out: &mut impl io::Write, meta: &Meta, type_name: &str, archive: &[u8]) -> io::Result<()> {
    write_archive(out, meta, type_name, archive, None)
}

/// Writes an event that could not be decoded, as [`write_opaque`] does, with the reason in `payload.why`.
#[cfg(feature = "cli")]
pub(crate) fn write_undecodable(
    out: &mut impl io::Write,
    meta: &Meta,
    type_name: &str,
    archive: &[u8],
    why: &str,
) -> io::Result<()> {
    write_archive(out, meta, type_name, archive, Some(why))
}

fn write_archive(
    out: &mut impl io::Write,
    meta: &Meta,
    type_name: &str,
    archive: &[u8],
    why: Option<&str>,
) -> io::Result<()> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    Outer::typed(type_name, meta).write(out, meta, |out| {
        out.write_all(br#"{"archive":""#)?;
        for chunk in archive.chunks(64) {
            let mut hex = [0; 128];
            for (pair, byte) in hex.chunks_exact_mut(2).zip(chunk) {
                pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
            }
            out.write_all(&hex[..2 * chunk.len()])?;
        }
        out.write_all(b"\"")?;
        if let Some(why) = why {
            out.write_all(br#","why":"#)?;
            write_string(out, why)?;
        }
        out.write_all(b"}")
    })
}

/// Writes a typed event whose payload is already JSON.
#[cfg(feature = "cli")]
pub(crate) fn write_payload(out: &mut impl io::Write, meta: &Meta, type_name: &str, payload: &str) -> io::Result<()> {
    Outer::typed(type_name, meta).write(out, meta, |out| write_raw(out, payload))
}

#[cfg(test)]
mod tests;
