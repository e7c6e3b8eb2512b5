//! Reads events from a file of JSON lines, gzipped or not.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use corelane::Key;
use corelane::envelope::{Envelope, UserId};
use flate2::read::MultiGzDecoder;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::facts::hex;
use crate::game::{GameEvent, KILL, LEVEL_UP, PICKUP, Place, Source, kind_of};

/// Passes every event of a file to `show`, in order. Returns the SHA-256 of the file's text.
pub(crate) fn read(path: &Path, mut show: impl FnMut(Key, GameEvent) -> Result<()>) -> Result<String> {
    let mut file = BufReader::new(File::open(path)?);
    let is_gzip = file.fill_buf()?.starts_with(&[0x1f, 0x8b]);
    let mut text: Box<dyn BufRead> =
        if is_gzip { Box::new(BufReader::with_capacity(1 << 18, MultiGzDecoder::new(file))) } else { Box::new(file) };
    let (mut digest, mut line) = (Sha256::new(), String::new());
    for n in 1_u64.. {
        line.clear();
        if text.read_line(&mut line)? == 0 {
            break;
        }
        digest.update(line.as_bytes());
        let (key, event) = event(&line).with_context(|| format!("line {n}"))?;
        show(key, event)?;
    }
    Ok(hex(digest))
}

/// The fields of a payload that the game uses.
#[derive(serde::Deserialize)]
struct Payload<'p> {
    #[serde(borrow)]
    new_level: Option<&'p RawValue>,
    #[serde(borrow)]
    item: Option<&'p RawValue>,
    #[serde(borrow)]
    quantity: Option<&'p RawValue>,
    #[serde(borrow)]
    location: Option<&'p RawValue>,
    #[serde(borrow)]
    x: Option<&'p RawValue>,
    #[serde(borrow)]
    y: Option<&'p RawValue>,
}

fn event(line: &str) -> Result<(Key, GameEvent)> {
    let line = Envelope::from_json(line)?;
    let UserId::Number(_) = line.user_id() else { bail!("the user id is not a number, which the facts need") };
    let payload: Payload<'_> = serde_json::from_str(line.payload())?;
    let source = Source {
        timestamp_ms: Some(line.timestamp_ms().context("no timestamp")?),
        match_id: line.correlation_id().unwrap_or_default().to_owned(),
        position: payload.position()?,
        payload: line.payload().to_owned(),
    };
    let event = match kind_of(line.event_type()) {
        Some(LEVEL_UP) => GameEvent::LevelledUp {
            new_level: integer(payload.new_level)?.context("a level-up without new_level")?,
            source,
        },
        Some(KILL) => GameEvent::Killed { source },
        Some(PICKUP) => GameEvent::PickedUp {
            item: payload.item.map(|item| item.get().trim_matches('"').to_owned()).unwrap_or_default(),
            quantity: integer(payload.quantity)?.unwrap_or(1),
            source,
        },
        Some(kind) => GameEvent::Other { kind: kind.get(), source },
        None => GameEvent::Unlisted { name: line.event_type().to_owned(), source },
    };
    Ok((line.key(), event))
}

impl Payload<'_> {
    /// Returns `location.x` and `location.y`, or else `x` and `y`.
    fn position(&self) -> Result<Option<Place>> {
        let place =
            |x: Option<&RawValue>, y: Option<&RawValue>| Ok(number(x)?.zip(number(y)?).map(|(x, y)| Place { x, y }));
        if let Some(location) = self.location.filter(|location| location.get().starts_with('{')) {
            let location: Payload<'_> = serde_json::from_str(location.get())?;
            if let Some(position) = place(location.x, location.y)? {
                return Ok(Some(position));
            }
        }
        place(self.x, self.y)
    }
}

fn integer(raw: Option<&RawValue>) -> Result<Option<i64>> {
    raw.map(|raw| raw.get().parse().map_err(|_| anyhow!("{raw} is not an integer"))).transpose()
}

/// Parses the nearest `f64`, whose shortest decimal form is the text of the file.
fn number(raw: Option<&RawValue>) -> Result<Option<f64>> {
    raw.map(|raw| raw.get().parse().map_err(|_| anyhow!("{raw} is not a number"))).transpose()
}
