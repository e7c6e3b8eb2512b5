//! Carries out what was asked from outside: the files of `requests.rs`.

use std::sync::Arc;
use std::time::Duration;

use super::super::requests::Request;
use super::Driver;
use crate::event::{Event, Key};

impl<E: Event> Driver<E> {
    /// Takes up what is asked, if it is time to look, and goes on with what was taken up. Returns how many were begun or ended.
    pub(super) fn carry_out_requests(&mut self, now: Duration) -> usize {
        if now < self.requests.look_at {
            return 0;
        }
        let name = Arc::clone(&self.settings.name);
        let begun = self.requests.look(&*self.storage, &self.dir, &name, now);
        let mut work = begun;
        let mut all = std::mem::take(&mut self.requests.taken);
        let first_new = all.len() - begun;
        for (i, taken) in all.iter_mut().enumerate() {
            match taken.request {
                Some(Request::Reprocess(which)) if i >= first_new => {
                    taken.keys = self.keys_of(which);
                    self.reprocess(which);
                }
                Some(Request::Discard(which)) if i >= first_new => taken.keys = self.keys_of(which),
                _ => {}
            }
            if let Some(Request::Discard(_)) = taken.request {
                self.discard_asked(&mut taken.keys);
            }
        }
        all.retain_mut(|taken| {
            // Only when its last letter has been dealt with: a crash before that must find it.
            while taken.keys.pop_if(|key| self.has_dealt_with(taken.request, *key)).is_some() {}
            let is_ended = taken.keys.is_empty() && self.requests.end(&*self.storage, &self.dir, &name, taken);
            work += usize::from(is_ended);
            !is_ended
        });
        self.requests.taken = all;
        work
    }

    /// Takes away the letters of these keys, but for keys of which one is being handled at this moment: they are left in `keys`.
    fn discard_asked(&mut self, keys: &mut Vec<Key>) {
        if let Err(error) = self.discard_of(keys) {
            tracing::error!(consumer = &*self.settings.name, %error, "dead letters cannot be discarded; that is tried again");
            return;
        }
        keys.retain(|key| self.is_out(*key));
    }

    fn has_dealt_with(&self, request: Option<Request>, key: Key) -> bool {
        match request {
            Some(Request::Reprocess(_)) => !self.is_reprocessed(key),
            // What is done is out of the list already.
            Some(Request::Discard(_)) | None => false,
        }
    }
}
