//! Events that end by a record: parked keys and skipped events. The caller writes the records.
//!
//! While a key has letters, its later events are recorded behind them, one at a time and in order.

use crate::event::Key;

use crate::consumer::key_queues::KeyQueues;
use crate::consumer::key_queues::answer::{NotParked, QueueRefused, RecordKind, ToRecord};
use crate::consumer::key_queues::keys::Stage;

impl KeyQueues {
    /// Returns the next event to record: its key is parked, or recording it failed before.
    pub(crate) fn next_record(&mut self) -> Option<ToRecord> {
        let queue = self.to_record.pop_front()?;
        let state = self.keys.queue_mut(queue);
        let Stage::Recording { is_out: false, is_skip } = state.stage else {
            unreachable!("every key in `to_record` waits for a record")
        };
        state.stage = Stage::Recording { is_out: true, is_skip };
        let kind = match (is_skip, state.failures) {
            (true, _) => RecordKind::Skipped,
            // Without a failed attempt, the event is recorded only because its key was already parked.
            (false, 0) => RecordKind::ParkedBehind,
            (false, _) => RecordKind::Parked,
        };
        let offset = self.events.offset(self.events.first(state.tail));
        Some(ToRecord { queue, key: state.key, offset, attempts: state.failures, kind })
    }

    /// Returns `true` if [`KeyQueues::next_record`] has an event.
    #[must_use]
    pub(crate) fn has_records(&self) -> bool {
        !self.to_record.is_empty()
    }

    /// Ends an event whose record is durable.
    ///
    /// # Panics
    /// If the record is not from these queues.
    pub(crate) fn recorded(&mut self, record: ToRecord) {
        let is_skip = self.check_record(&record);
        if is_skip {
            self.statistics.skipped += 1;
        } else {
            self.statistics.parked += 1;
            let state = self.keys.queue_mut(record.queue);
            state.letters = state.letters.saturating_add(1);
        }
        self.end_first(record.queue);
    }

    /// Takes back a record that could not be written. [`KeyQueues::next_record`] returns it again.
    ///
    /// # Panics
    /// If the record is not from these queues.
    pub(crate) fn not_recorded(&mut self, record: ToRecord) {
        let is_skip = self.check_record(&record);
        let ToRecord { queue, kind, .. } = record;
        if kind == RecordKind::ParkedBehind {
            // The letters before it may be gone by now.
            return self.enqueue_first(queue);
        }
        self.keys.queue_mut(queue).stage = Stage::Recording { is_out: false, is_skip };
        self.to_record.push_back(queue);
    }

    /// Returns `true` if the record is of a skipped event.
    fn check_record(&self, record: &ToRecord) -> bool {
        let state = self.keys.queue(record.queue);
        match state.stage {
            Stage::Recording { is_out: true, is_skip }
                if state.key == record.key && self.events.offset(self.events.first(state.tail)) == record.offset =>
            {
                is_skip
            }
            _ => panic!("a record of key {} that is not being written", record.key),
        }
    }

    /// Notes dead letters that a key had before the start. Call it before the key's events are offered.
    ///
    /// # Errors
    /// If `keys_max` keys have unfinished events or are parked.
    ///
    /// # Panics
    /// If the key has unfinished events.
    pub(crate) fn restore_parked(&mut self, key: Key, letters: u32) -> Result<(), QueueRefused> {
        if letters == 0 {
            return Ok(());
        }
        let queue = match self.keys.find(key) {
            Some(queue) => queue,
            None if self.keys.len() >= self.policy.keys_max => return Err(QueueRefused::TooManyKeys),
            None => self.keys.add(key, Stage::Parked),
        };
        let state = self.keys.queue_mut(queue);
        assert_eq!(state.stage, Stage::Parked, "parked keys are restored before events are offered");
        state.letters = state.letters.saturating_add(letters);
        Ok(())
    }

    /// Notes that the key's oldest `letters` dead letters were handled or discarded. After the last one, the key is
    /// live again and its waiting events run. Returns the number of letters left.
    ///
    /// # Errors
    /// If the key has fewer letters.
    pub(crate) fn unpark(&mut self, key: Key, letters: u32) -> Result<u32, NotParked> {
        let found = self.keys.find(key);
        let known = found.map_or(0, |queue| self.keys.queue(queue).letters);
        let left = known.checked_sub(letters).ok_or(NotParked { key, letters: known })?;
        let Some(queue) = found else { return Ok(left) };
        let state = self.keys.queue_mut(queue);
        state.letters = left;
        if letters > 0 && left == 0 {
            match state.stage {
                Stage::Parked => self.keys.remove(queue),
                Stage::Recording { is_out: false, .. } => {
                    self.to_record.retain(|other| *other != queue);
                    self.enqueue_first(queue);
                }
                // The record being written becomes a letter, and the key stays parked for it.
                _ => {}
            }
        }
        Ok(left)
    }
}
