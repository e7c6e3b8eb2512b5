//! What ends by a record: parked keys and skipped events. Here nothing runs; the records are the caller's to write.
//!
//! While a key has letters, what comes of it is recorded behind them, one event at a time and in order.

use crate::event::Key;

use crate::consumer::key_queues::KeyQueues;
use crate::consumer::key_queues::answer::{NotParked, QueueRefused, RecordKind, ToRecord};
use crate::consumer::key_queues::keys::Stage;

impl KeyQueues {
    /// The next event that is to be recorded because its key is parked, or because recording it failed before.
    pub fn next_record(&mut self) -> Option<ToRecord> {
        let lane = self.to_record.pop_front()?;
        let state = self.keys.lane_mut(lane);
        let Stage::Recording { is_out: false, is_skip } = state.stage else { unreachable!("in the list of records") };
        state.stage = Stage::Recording { is_out: true, is_skip };
        let kind = match (is_skip, state.failures) {
            (true, _) => RecordKind::Skipped,
            // Only what ran can have failed.
            (false, 0) => RecordKind::ParkedBehind,
            (false, _) => RecordKind::Parked,
        };
        let offset = self.events.offset(self.events.first(state.tail));
        Some(ToRecord { lane, key: state.key, offset, attempts: state.failures, kind })
    }

    /// Whether [`KeyQueues::next_record`] has something.
    #[must_use]
    pub fn has_records(&self) -> bool {
        !self.to_record.is_empty()
    }

    /// The record is durable: its event ends.
    ///
    /// # Panics
    /// When the record is not of these lanes.
    pub fn recorded(&mut self, record: ToRecord) {
        let is_skip = self.check_record(&record);
        if is_skip {
            self.statistics.skipped += 1;
        } else {
            self.statistics.parked += 1;
            let state = self.keys.lane_mut(record.lane);
            state.letters = state.letters.saturating_add(1);
        }
        self.end_first(record.lane);
    }

    /// The record could not be written. It comes again from [`KeyQueues::next_record`].
    ///
    /// # Panics
    /// When the record is not of these lanes.
    pub fn not_recorded(&mut self, record: ToRecord) {
        let is_skip = self.check_record(&record);
        let ToRecord { lane, kind, .. } = record;
        if kind == RecordKind::ParkedBehind {
            // The letters before it may be gone by now.
            return self.line_up(lane);
        }
        self.keys.lane_mut(lane).stage = Stage::Recording { is_out: false, is_skip };
        self.to_record.push_back(lane);
    }

    /// Whether the record that comes back is of a skipped event.
    fn check_record(&self, record: &ToRecord) -> bool {
        let state = self.keys.lane(record.lane);
        match state.stage {
            Stage::Recording { is_out: true, is_skip }
                if state.key == record.key && self.events.offset(self.events.first(state.tail)) == record.offset =>
            {
                is_skip
            }
            _ => panic!("a record of key {} that is not out", record.key),
        }
    }

    /// A key had dead letters before the start. To be told before its events are offered.
    ///
    /// # Errors
    /// When `keys_max` keys have a place.
    ///
    /// # Panics
    /// When the key has unfinished events.
    pub fn restore_parked(&mut self, key: Key, letters: u32) -> Result<(), QueueRefused> {
        if letters == 0 {
            return Ok(());
        }
        let lane = match self.keys.find(key) {
            Some(lane) => lane,
            None if self.keys.len() >= self.policy.keys_max => return Err(QueueRefused::TooManyKeys),
            None => self.keys.add(key, Stage::Parked),
        };
        let state = self.keys.lane_mut(lane);
        assert_eq!(state.stage, Stage::Parked, "parked keys are restored before events are offered");
        state.letters = state.letters.saturating_add(letters);
        Ok(())
    }

    /// So many of the key's oldest dead letters were handled or discarded. With the last one the key is live again: the
    /// events behind run. Returns how many letters are left.
    ///
    /// # Errors
    /// When it has fewer.
    pub fn unpark(&mut self, key: Key, letters: u32) -> Result<u32, NotParked> {
        let found = self.keys.find(key);
        let known = found.map_or(0, |lane| self.keys.lane(lane).letters);
        let left = known.checked_sub(letters).ok_or(NotParked { key, letters: known })?;
        let Some(lane) = found else { return Ok(left) };
        let state = self.keys.lane_mut(lane);
        state.letters = left;
        if letters > 0 && left == 0 {
            match state.stage {
                Stage::Parked => self.keys.remove(lane),
                Stage::Recording { is_out: false, .. } => {
                    self.to_record.retain(|other| *other != lane);
                    self.line_up(lane);
                }
                // The record that is out becomes a letter, and the key stays parked for it.
                _ => {}
            }
        }
        Ok(left)
    }
}
