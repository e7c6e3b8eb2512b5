//! The inline handlers of one shard over one batch, and what becomes of their errors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Shard;
use crate::error::FailureCause;
use crate::error::HandlerError;
use crate::error::panic_text;
use crate::event::{Meta, Offset};
use crate::log::format::RECORD_HEADER_BYTES;
use crate::log::segment::Waits;
use crate::shard::handler::{BatchEnd, OnError, Registered};
use crate::state::aggregate::Aggregate;
use crate::storage::is_exhausted;

/// How long after an attempt for which something was exhausted the next is made.
const RETRY_NOTES: Duration = Duration::from_millis(100);

impl<A: Aggregate> Shard<A> {
    /// Runs every inline handler over this batch.
    pub(super) fn handle(&mut self, queue_depth: usize) -> Result<(), FailureCause> {
        let placed = std::mem::take(&mut self.work.placed);
        let end = BatchEnd { shard: self.id, events: placed.len(), queue_depth };
        let mut handlers = std::mem::take(&mut self.handlers);
        let outcome = handlers.iter_mut().try_for_each(|handler| self.run_handler(handler, &placed, &end));
        self.handlers = handlers;
        self.work.placed = placed;
        self.work.placed.clear();
        outcome
    }

    /// Writes down which events handlers failed on, if any waits for that. `false`: the storage has no room for it now, and the shard
    /// takes nothing more in until it has.
    #[inline]
    pub(super) fn write_notes(&mut self) -> Result<bool, FailureCause> {
        if self.work.notes.is_empty() { Ok(true) } else { self.try_notes() }
    }

    #[cold]
    fn try_notes(&mut self) -> Result<bool, FailureCause> {
        if self.work.notes_at.is_some_and(|at| Instant::now() < at) {
            return Ok(false);
        }
        let file = self.quarantine.join("handlers.jsonl");
        let noted = self
            .storage
            .create_dir(&self.quarantine)
            .and_then(|()| self.storage.append(&file, &self.work.notes))
            .and_then(|()| self.storage.sync_dir(&self.quarantine));
        let action = "noting a quarantined event";
        match noted {
            Ok(()) => {
                self.work.notes.clear();
                if self.work.notes_at.take().is_some() {
                    self.log.wait_for_storage(Waits::Note, None);
                }
                Ok(true)
            }
            Err(error) if is_exhausted(&error) => {
                self.log.wait_for_storage(Waits::Note, Some((action, &error)));
                self.work.notes_at = Some(Instant::now() + RETRY_NOTES);
                Ok(false)
            }
            Err(source) => Err(FailureCause::Storage { action, error: Arc::new(source) }),
        }
    }

    fn run_handler(
        &mut self,
        registered: &mut Registered<A::Event>,
        placed: &[(Meta, usize)],
        end: &BatchEnd,
    ) -> Result<(), FailureCause> {
        let mut next = 0;
        while next < placed.len() {
            // One catch per batch, not per event; `next` says where it stopped.
            let outcome = catch_unwind(AssertUnwindSafe(|| -> Result<(), HandlerError> {
                while let Some((meta, len)) = placed.get(next) {
                    let Some(memory) = self.memory_of(meta.offset) else {
                        return Err("the event's segment is gone".into());
                    };
                    let at = (meta.offset.0 % self.log.segment_bytes) as usize + RECORD_HEADER_BYTES;
                    let Some(event) = memory.archived::<A::Event>(at, len - RECORD_HEADER_BYTES) else {
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
            self.on_handler_error(registered, Some(&placed[next].0), error)?;
            next += 1;
        }
        let error = match catch_unwind(AssertUnwindSafe(|| registered.handler.on_batch_end(end))) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("panic: {}", panic_text(&*panic)),
        };
        self.on_handler_error(registered, None, error)
    }

    #[cold]
    fn on_handler_error(
        &mut self,
        registered: &Registered<A::Event>,
        meta: Option<&Meta>,
        error: String,
    ) -> Result<(), FailureCause> {
        let offset = meta.map_or(Offset(self.log.appended.get()), |meta| meta.offset);
        tracing::warn!(
            handler = registered.name,
            shard = self.id.0,
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
                let (offset, shard) = (offset.0, self.id.0);
                let line = format!(
                    "{{\"error\":{error},\"event_id\":{event_id},\"handler\":{handler},\"offset\":{offset},\"shard\":{shard}}}\n"
                );
                self.work.notes.extend_from_slice(line.as_bytes());
                // Where there is no room for it, no further turn takes an event in before there is.
                self.try_notes().map(drop)
            }
        }
    }

    fn memory_of(&self, offset: Offset) -> Option<Arc<crate::storage::memory::Memory>> {
        match self.writer.current_memory() {
            Some((base, memory)) if offset.0 >= base => Some(Arc::clone(memory)),
            _ => self.log.segment(self.log.segment_of(offset)).map(|segment| segment.memory),
        }
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
