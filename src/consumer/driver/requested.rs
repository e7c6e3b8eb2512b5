//! Carries out the requests that other processes leave as files in the consumer's folder.

use std::sync::Arc;
use std::time::Duration;

use super::records::{RecordContext, Records};
use crate::consumer::requests::{Request, Requests};
use crate::event::{Event, Key};

/// The requests being carried out.
#[derive(Debug)]
pub(super) struct RequestRunner {
    consumer: Arc<str>,
    requests: Requests,
}

impl RequestRunner {
    pub(super) fn new(consumer: &Arc<str>) -> Self {
        Self { consumer: Arc::clone(consumer), requests: Requests::default() }
    }

    /// Returns the time at which the folder is read next.
    pub(super) fn due(&self) -> Duration {
        self.requests.look_at
    }

    /// Takes up new requests, if it is time to read the folder, and continues the earlier ones. Returns the number
    /// begun or ended.
    pub(super) fn carry_out<E: Event>(
        &mut self,
        now: Duration,
        records: &mut Records,
        context: &mut RecordContext<'_, E>,
    ) -> usize {
        if now < self.requests.look_at {
            return 0;
        }
        let begun = self.requests.look(context.saver.storage(), context.saver.dir(), &self.consumer, now);
        let mut work = begun;
        let mut all = std::mem::take(&mut self.requests.taken);
        let first_new = all.len() - begun;
        for (i, taken) in all.iter_mut().enumerate() {
            match taken.request {
                Some(Request::Reprocess(selector)) if i >= first_new => {
                    taken.keys = records.keys_of(selector);
                    records.reprocess(selector);
                }
                Some(Request::Discard(selector)) if i >= first_new => taken.keys = records.keys_of(selector),
                _ => {}
            }
            if let Some(Request::Discard(_)) = taken.request {
                self.discard(&mut taken.keys, records, context);
            }
        }
        all.retain_mut(|taken| {
            // A request ends with its last letter: a crash before that must find the request again.
            while taken.keys.pop_if(|key| is_done(taken.request, *key, records)).is_some() {}
            let is_ended = taken.keys.is_empty()
                && self.requests.end(context.saver.storage(), context.saver.dir(), &self.consumer, taken);
            work += usize::from(is_ended);
            !is_ended
        });
        self.requests.taken = all;
        work
    }

    /// Discards the letters of these keys. Keys with a letter in flight stay in `keys`.
    fn discard<E: Event>(&self, keys: &mut Vec<Key>, records: &mut Records, context: &mut RecordContext<'_, E>) {
        if let Err(error) = records.discard_of(keys, context) {
            tracing::error!(
                consumer = &*self.consumer,
                error = crate::error::with_sources(&error),
                "dead letters cannot be discarded; retrying"
            );
            return;
        }
        keys.retain(|key| records.has_in_flight(*key));
    }
}

fn is_done(request: Option<Request>, key: Key, records: &Records) -> bool {
    match request {
        Some(Request::Reprocess(_)) => !records.is_reprocessed(key),
        // `discard` removes the keys that are done.
        Some(Request::Discard(_)) | None => false,
    }
}
