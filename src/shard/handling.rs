//! The inline handlers of one shard: runs them over a batch, and applies their error policies.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handler::{BatchEnd, OnError, Registered};
use crate::error::FailureCause;
use crate::error::HandlerError;
use crate::error::panic_text;
use crate::event::{Event, Meta, Offset, ShardId};
use crate::log::format::RECORD_HEADER_BYTES;
use crate::log::segment::{ShardLog, Waits};
use crate::log::writer::Writer;
use crate::metrics::Counters;
use crate::storage::memory::Memory;
use crate::storage::{Storage, is_exhausted};

/// The pause before notes are written again, after the storage had no room for them.
const RETRY_NOTES: Duration = Duration::from_millis(100);

/// The inline handlers of one shard.
pub(super) struct Handlers<E: Event> {
    registered: Vec<Registered<E>>,
    /// The events of the current batch and the lengths of their records; reused.
    placed: Vec<(Meta, usize)>,
    log: Arc<ShardLog>,
    failures: Failures,
}

impl<E: Event> Handlers<E> {
    pub(super) fn new(
        shard: ShardId,
        registered: Vec<Registered<E>>,
        batch_max: usize,
        log: Arc<ShardLog>,
        counters: Arc<Counters>,
        storage: Arc<dyn Storage>,
        quarantine: PathBuf,
    ) -> Self {
        let placed = Vec::with_capacity(batch_max);
        let failed_in = Arc::clone(&log);
        let failures =
            Failures { shard, log: failed_in, counters, storage, quarantine, notes: Vec::new(), retry_at: None };
        Self { registered, placed, log, failures }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.registered.is_empty()
    }

    /// The list that a batch adds its events to; `None` if there are no handlers.
    #[inline]
    pub(super) fn placed(&mut self) -> Option<&mut Vec<(Meta, usize)>> {
        if self.registered.is_empty() { None } else { Some(&mut self.placed) }
    }

    /// Runs every inline handler over this batch.
    pub(super) fn run(&mut self, writer: &Writer, queue_depth: usize) -> Result<(), FailureCause> {
        let Self { registered, placed, log, failures } = self;
        let end = BatchEnd { shard: failures.shard, events: placed.len(), queue_depth };
        let mut run = |handler: &mut _| run_handler(handler, placed, &end, (writer, log), failures);
        let outcome = registered.iter_mut().try_for_each(&mut run);
        placed.clear();
        outcome
    }

    /// Writes the notes of handler failures, if there are any. Returns `false` if the storage has no room for them now;
    /// the shard then appends nothing until there is room.
    #[inline]
    pub(super) fn write_notes(&mut self) -> Result<bool, FailureCause> {
        if self.failures.notes.is_empty() { Ok(true) } else { self.failures.write_notes() }
    }

    /// Returns `true` if notes of handler failures are not written yet.
    pub(super) fn has_notes(&self) -> bool {
        !self.failures.notes.is_empty()
    }

    /// Returns `true` if notes wait for the storage to have room.
    pub(super) fn is_waiting_for_storage(&self) -> bool {
        self.failures.is_waiting()
    }

    /// The time of the next attempt to write notes, after the storage had no room.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.failures.retry_at
    }
}

/// Runs one handler over a batch.
fn run_handler<E: Event>(
    registered: &mut Registered<E>,
    placed: &[(Meta, usize)],
    end: &BatchEnd,
    (writer, log): (&Writer, &ShardLog),
    failures: &mut Failures,
) -> Result<(), FailureCause> {
    let mut next = 0;
    while next < placed.len() {
        // One `catch_unwind` per batch, not per event; `next` is the event at which the handler stopped.
        let outcome = catch_unwind(AssertUnwindSafe(|| -> Result<(), HandlerError> {
            while let Some((meta, len)) = placed.get(next) {
                let Some(memory) = memory_of(writer, log, meta.offset) else {
                    return Err("the event's segment is gone".into());
                };
                let at = (meta.offset.0 % log.segment_bytes) as usize + RECORD_HEADER_BYTES;
                let Some(event) = memory.archived::<E>(at, len - RECORD_HEADER_BYTES) else {
                    return Err("the archive is not valid".into());
                };
                registered.handler.on_event(event, meta)?;
                next += 1;
            }
            Ok(())
        }));
        let error = match outcome {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("panic: {}", panic_text(&*panic)),
        };
        failures.apply_policy(registered, Some(&placed[next].0), error)?;
        next += 1;
    }
    let error = match catch_unwind(AssertUnwindSafe(|| registered.handler.on_batch_end(end))) {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("panic: {}", panic_text(&*panic)),
    };
    failures.apply_policy(registered, None, error)
}

/// The memory of the segment that holds `offset`.
fn memory_of(writer: &Writer, log: &ShardLog, offset: Offset) -> Option<Arc<Memory>> {
    match writer.current_memory() {
        Some((base, memory)) if offset.0 >= base => Some(Arc::clone(memory)),
        _ => log.segment(log.segment_of(offset)).map(|segment| segment.memory),
    }
}

/// Applies the policies of handlers that failed, and writes notes of the events that they quarantine.
struct Failures {
    shard: ShardId,
    log: Arc<ShardLog>,
    counters: Arc<Counters>,
    storage: Arc<dyn Storage>,
    /// The folder for notes.
    quarantine: PathBuf,
    /// Notes that are not written yet. The shard appends nothing before they are written.
    notes: Vec<u8>,
    /// The time of the next attempt to write them, after the storage had no room.
    retry_at: Option<Instant>,
}

impl Failures {
    #[cold]
    fn apply_policy<E: Event>(
        &mut self,
        registered: &Registered<E>,
        meta: Option<&Meta>,
        error: String,
    ) -> Result<(), FailureCause> {
        let offset = meta.map_or(Offset(self.log.appended.get()), |meta| meta.offset);
        tracing::warn!(
            handler = registered.name,
            shard = self.shard.0,
            offset = offset.0,
            error,
            "an inline handler failed"
        );
        match registered.on_error {
            OnError::Halt => Err(FailureCause::Handler { handler: registered.name.clone(), offset, error }),
            OnError::Quarantine => {
                self.counters.quarantined.add(1);
                let event_id = meta.map(|meta| meta.id().to_string());
                let (error, handler) = (json_string(&error), json_string(&registered.name));
                let event_id = event_id.map_or("null".to_owned(), |id| json_string(&id));
                let (offset, shard) = (offset.0, self.shard.0);
                let line = format!(
                    "{{\"error\":{error},\"event_id\":{event_id},\"handler\":{handler},\"offset\":{offset},\"shard\":{shard}}}\n"
                );
                self.notes.extend_from_slice(line.as_bytes());
                // If there is no room for the note now, the next turn tries again before it appends anything.
                self.write_notes().map(drop)
            }
        }
    }

    fn is_waiting(&self) -> bool {
        self.retry_at.is_some_and(|at| Instant::now() < at)
    }

    #[cold]
    fn write_notes(&mut self) -> Result<bool, FailureCause> {
        if self.is_waiting() {
            return Ok(false);
        }
        let action = "noting a quarantined event";
        match self.append_to_file() {
            Ok(()) => {
                self.notes.clear();
                if self.retry_at.take().is_some() {
                    self.log.wait_for_storage(Waits::Note, None);
                }
                Ok(true)
            }
            Err(error) if is_exhausted(&error) => {
                self.log.wait_for_storage(Waits::Note, Some((action, &error)));
                self.retry_at = Some(Instant::now() + RETRY_NOTES);
                Ok(false)
            }
            Err(source) => Err(FailureCause::Storage { action, error: Arc::new(source) }),
        }
    }

    fn append_to_file(&self) -> io::Result<()> {
        self.storage.create_dir(&self.quarantine)?;
        self.storage.append(&self.quarantine.join("handlers.jsonl"), &self.notes)?;
        self.storage.sync_dir(&self.quarantine)
    }
}

/// Returns `text` as a JSON string. Control characters are escaped, so that a note stays one line.
fn json_string(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    json.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            c if c.is_control() => json.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => json.push(c),
        }
    }
    json.push('"');
    json
}

#[cfg(test)]
mod tests {
    use super::json_string;

    #[test]
    fn a_json_string_escapes_quotes_backslashes_and_control_characters() {
        let text = "say \"hi\" \\ to\nM\u{fc}ller \u{1b}[0m \u{7f}\u{9b} \u{1f600}";
        let json = json_string(text);
        assert_eq!(serde_json::from_str::<String>(&json).expect("valid JSON"), text);
        assert!(!json.contains(char::is_control));
    }
}
