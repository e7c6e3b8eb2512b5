//! The events of one call of a sink.

use crate::consumer::settings::Filter;
use crate::error::ReadError;
use crate::event::{Event, Offset, ShardId};
use crate::log::position::Position;
use crate::log::reader::{Reader, Record};

/// A batch of events for the sink: events of one shard, in order.
#[derive(Debug)]
pub struct Batch<'a, E: Event> {
    pub(super) reader: &'a mut Reader<E>,
    pub(super) begun: Position,
    pub(super) filter: &'a Filter,
    pub(super) left: usize,
    /// The batch ends before a second event at or after this offset.
    pub(super) until: Offset,
    /// The batch ends after this number of events of other types.
    pub(super) unwanted_left: usize,
    pub(super) events: u64,
    /// `true` if the log could not be read further.
    pub(super) is_cut: bool,
}

impl<E: Event> Batch<'_, E> {
    /// Returns the next event of the batch. A batch ends before an offset at which the log cannot be read: the sink
    /// takes in the events before it, and then ends with that error.
    ///
    /// # Errors
    /// The same as for [`Reader::next`], if that offset comes first: there is nothing to take in. The position and
    /// [`Batch::end`] stay.
    #[expect(clippy::should_implement_trait, reason = "lends from the log, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_, E>>, ReadError> {
        if self.left == 0 {
            return Ok(None);
        }
        let (filter, unwanted_left) = (self.filter, &mut self.unwanted_left);
        let ahead = self.reader.ahead(|header| {
            let is_wanted = filter.wants(header.event_type);
            let is_end = is_wanted || *unwanted_left == 0;
            *unwanted_left -= usize::from(!is_end);
            is_end
        });
        let is_over = self.events > 0 && self.reader.offset() >= self.until;
        let record = match ahead {
            Ok(Some(ahead)) if filter.wants(ahead.header.event_type) && !is_over => self.reader.take(&ahead),
            Ok(_) => {
                self.left = 0;
                return Ok(None);
            }
            Err(error) => Err(error),
        };
        match record {
            Ok(record) => {
                self.left -= 1;
                self.events += 1;
                Ok(Some(record))
            }
            Err(error) => {
                self.is_cut = true;
                if self.events > 0 { Ok(None) } else { Err(error) }
            }
        }
    }

    /// Returns the shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.reader.shard()
    }

    /// Returns the position after the events taken from the batch so far. After the last event, it is the position to
    /// keep with the data.
    #[must_use]
    pub fn end(&self) -> Position {
        self.reader.position_after(&self.begun)
    }
}
