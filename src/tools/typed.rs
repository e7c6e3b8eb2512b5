//! Shows typed events: an archive becomes a value of the application's type, and the value becomes JSON.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use corelane::envelope;
use corelane::event::deserialize;
use corelane::log::scan::Store;
use corelane::{Event, Meta};
use rkyv::api::low::LowDeserializer;
use rkyv::rancor::Error as RkyvError;
use serde_json::value::RawValue;

use crate::error::panic_text;
use crate::event::upcaster;

/// Returns the JSON form of an archived event, or the reason why there is none.
type Decode = fn(&Store, &Meta, &[u8]) -> Result<String, String>;

/// Writes events that are not generic ones.
pub(super) struct Typed {
    /// `None` in the stock tool, which knows no types.
    decode: Option<Decode>,
    undecodable: Cell<u64>,
}

impl Typed {
    /// Writes archives as hexadecimal digits.
    pub(super) fn unknown() -> Self {
        Self { decode: None, undecodable: Cell::new(0) }
    }

    /// Writes events of type `E` as JSON.
    pub(super) fn of<E>() -> Self
    where
        E: Event<Archived: rkyv::Deserialize<E, LowDeserializer<RkyvError>>> + serde::Serialize,
    {
        Self { decode: Some(decode::<E>), undecodable: Cell::new(0) }
    }

    /// Writes an event as one line.
    pub(super) fn write(&self, store: &Store, meta: &Meta, archive: &[u8], out: &mut impl Write) -> io::Result<()> {
        let name = store.type_name(meta.event_type).unwrap_or("?");
        match self.decode.map(|decode| decode(store, meta, archive)) {
            Some(Ok(json)) => envelope::write_payload(out, meta, name, content(&json, name)),
            Some(Err(why)) => {
                self.undecodable.set(self.undecodable.get() + 1);
                envelope::write_undecodable(out, meta, name, archive, &why)
            }
            None => envelope::write_opaque(out, meta, name, archive),
        }
    }

    /// Returns a message if an event that was written could not be decoded.
    pub(super) fn complaint(&self) -> Option<String> {
        let events = self.undecodable.get();
        (events > 0)
            .then(|| format!("events that could not be decoded and show their archives and the reasons: {events}"))
    }
}

/// Decodes an event as the engine does: current layouts directly, older ones through their upcasters.
fn decode<E>(store: &Store, meta: &Meta, archive: &[u8]) -> Result<String, String>
where
    E: Event<Archived: rkyv::Deserialize<E, LowDeserializer<RkyvError>>> + serde::Serialize,
{
    let (id, version) = (meta.event_type, meta.schema_version);
    let stored = store.type_name(id).unwrap_or("?");
    let Some(declared) = E::TYPES.iter().find(|declared| declared.id == id && declared.name == stored) else {
        return Err(format!("this program does not declare event type {id} ({stored})"));
    };
    let read = || -> Result<E, RkyvError> {
        if version == declared.schema_version {
            return deserialize::<E>(E::access(archive)?);
        }
        let upcaster = upcaster::<E>(id, version).ok_or_else(|| no_upcaster(version))?;
        (upcaster.upcast)(archive)
    };
    // An upcaster, and an implementation of `Serialize`, are the application's code.
    let json = || serde_json::to_string(&read().map_err(|error| error.to_string())?).map_err(|error| error.to_string());
    catch_unwind(AssertUnwindSafe(json)).unwrap_or_else(|panic| Err(format!("a panic: {}", panic_text(&*panic))))
}

#[derive(Debug, thiserror::Error)]
#[error("this program has no upcaster for schema version {0}")]
struct NoUpcaster(u16);

fn no_upcaster(version: u16) -> RkyvError {
    <RkyvError as rkyv::rancor::Source>::new(NoUpcaster(version))
}

/// Returns the payload of a line. A serde enum with `tag = "event_type", content = "payload"` has the shape of a line
/// already: if its tag is the name of the event type, which the line has too, its content is the payload. Every other
/// form is the payload as it is.
fn content<'a>(json: &'a str, name: &str) -> &'a str {
    let Ok(fields) = serde_json::from_str::<BTreeMap<String, &'a RawValue>>(json) else { return json };
    let tag = fields.get("event_type").and_then(|tag| serde_json::from_str::<String>(tag.get()).ok());
    match (fields.get("payload"), fields.len()) {
        _ if tag.as_deref() != Some(name) => json,
        (Some(payload), 2) => payload.get(),
        (None, 1) => "null",
        _ => json,
    }
}

#[cfg(test)]
mod tests {
    use super::content;

    #[test]
    fn a_payload_is_unwrapped_only_if_nothing_is_lost() {
        for (json, payload) in [
            (r#"{"event_type":"moved","payload":{"x":1}}"#, r#"{"x":1}"#),
            (r#"{"payload":[1],"event_type":"m\u006fved"}"#, "[1]"),
            (r#"{"event_type":"moved"}"#, "null"),
            (r#"{"event_type":"other","payload":1}"#, r#"{"event_type":"other","payload":1}"#),
            (r#"{"event_type":"moved","payload":1,"more":2}"#, r#"{"event_type":"moved","payload":1,"more":2}"#),
            (r#"{"event_type":"moved","more":2}"#, r#"{"event_type":"moved","more":2}"#),
            (r#"{"event_type":1,"payload":1}"#, r#"{"event_type":1,"payload":1}"#),
            (r#"{"Moved":{"x":1}}"#, r#"{"Moved":{"x":1}}"#),
            (r#""moved""#, r#""moved""#),
            ("null", "null"),
        ] {
            assert_eq!(content(json, "moved"), payload);
        }
    }
}
