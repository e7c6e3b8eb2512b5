//! Writes a line: the outer shape, and escapes that keep the event on one line and harmless on a terminal.

use std::io;

use crate::event::{Meta, Sequence};

/// The outer shape of a line to write.
pub(super) struct Outer<'a> {
    pub(super) event_type: &'a str,
    pub(super) user: User<'a>,
    pub(super) correlation: Option<CorrelationId<'a>>,
    pub(super) source_event_id: Option<&'a str>,
}

pub(super) enum User<'a> {
    Number(u64),
    Text(&'a str),
}

pub(super) enum CorrelationId<'a> {
    Number(u64),
    Text(&'a str),
}

impl<'a> Outer<'a> {
    pub(super) fn typed(event_type: &'a str, meta: &Meta) -> Self {
        let correlation = Some(meta.correlation.get()).filter(|&id| id != 0).map(CorrelationId::Number);
        Self { event_type, user: User::Number(meta.key.get()), correlation, source_event_id: None }
    }

    pub(super) fn write<W: io::Write>(
        &self,
        out: &mut W,
        meta: &Meta,
        payload: impl FnOnce(&mut W) -> io::Result<()>,
    ) -> io::Result<()> {
        out.write_all(br#"{"event_type":"#)?;
        write_string(out, self.event_type)?;
        write!(out, r#","timestamp":{},"user_id":"#, meta.time.as_ms())?;
        match self.user {
            User::Number(id) => write!(out, "{id}")?,
            User::Text(text) => write_string(out, text)?,
        }
        match self.correlation {
            Some(CorrelationId::Number(id)) => write!(out, r#","correlation_id":{id}"#)?,
            Some(CorrelationId::Text(text)) => {
                out.write_all(br#","correlation_id":"#)?;
                write_string(out, text)?;
            }
            None => {}
        }
        out.write_all(br#","payload":"#)?;
        payload(out)?;
        let Meta { shard, offset, sequence, version, .. } = meta;
        write!(out, r#","event_id":"{shard}-{offset}","shard":{shard},"offset":{offset}"#)?;
        if *sequence != Sequence::UNKNOWN {
            write!(out, r#","sequence":{sequence}"#)?;
        }
        write!(out, r#","version":{version}"#)?;
        if let Some(id) = self.source_event_id {
            out.write_all(br#","source_event_id":"#)?;
            write_string(out, id)?;
        }
        out.write_all(b"}\n")
    }
}

/// Writes a text as a JSON string.
pub(super) fn write_string(out: &mut impl io::Write, text: &str) -> io::Result<()> {
    out.write_all(b"\"")?;
    write_escaped(out, text, |byte| match byte {
        b'"' => Some(Escape::Text(r#"\""#)),
        b'\\' => Some(Escape::Text(r"\\")),
        b'\n' => Some(Escape::Text(r"\n")),
        b'\r' => Some(Escape::Text(r"\r")),
        b'\t' => Some(Escape::Text(r"\t")),
        0..0x20 => Some(Escape::Code),
        _ => None,
    })?;
    out.write_all(b"\"")
}

/// Writes JSON text unchanged, except for characters that would break the line or act on a terminal.
pub(super) fn write_raw(out: &mut impl io::Write, json: &str) -> io::Result<()> {
    write_escaped(out, json, |byte| match byte {
        b'\t' => None,
        // In valid JSON these occur only between tokens.
        b'\n' | b'\r' => Some(Escape::Text(" ")),
        0..0x20 => Some(Escape::Code),
        _ => None,
    })
}

enum Escape {
    Text(&'static str),
    Code,
}

/// Writes `text`, replacing the bytes that `escape` selects, DEL, and U+0080 to U+009F.
fn write_escaped(out: &mut impl io::Write, text: &str, escape: impl Fn(u8) -> Option<Escape>) -> io::Result<()> {
    let bytes = text.as_bytes();
    let mut written = 0;
    let mut at = 0;
    while at < bytes.len() {
        // In UTF-8, U+0080 to U+009F are C2 80 to C2 9F, and C2 is never a continuation byte.
        let (escaped, code, len) = match (bytes[at], bytes.get(at + 1)) {
            (0x7f, _) => (Some(Escape::Code), 0x7f, 1),
            (0xc2, Some(&low @ 0x80..=0x9f)) => (Some(Escape::Code), low, 2),
            (byte, _) => (escape(byte), byte, 1),
        };
        if let Some(escaped) = escaped {
            out.write_all(&bytes[written..at])?;
            match escaped {
                Escape::Text(text) => out.write_all(text.as_bytes())?,
                Escape::Code => write!(out, r"\u{code:04x}")?,
            }
            written = at + len;
        }
        at += len;
    }
    out.write_all(&bytes[written..])
}
