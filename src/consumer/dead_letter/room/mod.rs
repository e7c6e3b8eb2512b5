//! Makes room for a batch's letters, or refuses the batch.

use super::answer::{WhenFull, WriteRefused};
use super::{LetterStore, Plan};
use crate::event::EventId;

/// A walk over all letters selects the oldest 1/64 of them, since finding the oldest takes such a walk.
const OLDEST_SHARE: usize = 64;

impl LetterStore {
    /// Adds letters to the plan that it discards, until the plan's new letters have room.
    pub(super) fn make_room(&mut self, plan: &mut Plan<'_>) -> Result<(), WriteRefused> {
        while !self.has_room(plan) {
            let is_in_vain = plan.ended.len() == self.index.len();
            if self.policy.when_full == WhenFull::Halt || is_in_vain {
                return Err(WriteRefused::Full);
            }
            self.discard_oldest(plan);
        }
        Ok(())
    }

    fn has_room(&self, plan: &Plan<'_>) -> bool {
        let letters = self.index.len() + plan.letters_added - plan.ended.len();
        let bytes = self.index.statistics().bytes + plan.bytes_added - plan.bytes_ended;
        // A batch without new letters is never refused: the limits may have been higher when the present letters came.
        plan.letters_added == 0 || (letters <= self.policy.letters_max && bytes <= self.policy.bytes_max)
    }

    fn discard_oldest(&mut self, plan: &mut Plan<'_>) {
        if self.oldest.is_empty() {
            self.find_oldest(plan);
        }
        let Some(name) = self.oldest.pop_front() else { return };
        let Some(bytes) = self.index.bytes_of(name) else { return };
        if plan.ended.insert(name) {
            plan.bytes_ended += bytes;
            let shard = self.index.shard_of(name).expect("its letter is waiting");
            plan.overflowed.push((name.0, EventId { shard, offset: name.1 }));
        }
    }

    fn find_oldest(&mut self, plan: &Plan<'_>) {
        let mut letters: Vec<_> = self.index.by_place().filter(|(_, name)| !plan.ended.contains(name)).collect();
        let count = (letters.len() / OLDEST_SHARE).max(OLDEST_SHARE).min(letters.len());
        if count < letters.len() {
            letters.select_nth_unstable(count);
            letters.truncate(count);
        }
        letters.sort_unstable();
        self.oldest.extend(letters.into_iter().map(|(_, name)| name));
    }
}

#[cfg(test)]
mod tests;
