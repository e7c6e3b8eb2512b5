//! One shard's log, assigned to a consumer, with the consumer's saved progress.

use std::sync::Arc;

use super::position_file::Progress;
use super::settings::Start;
use crate::error::ReadError;
use crate::event::{Event, Offset};
use crate::lane::requests::SyncRequests;
use crate::log::holds::Hold;
use crate::log::position::Position;
use crate::log::reader::Reader;
use crate::log::segment::ShardLog;
use crate::storage::Lock;

/// A shard's log for one consumer, and the consumer's progress in it.
#[derive(Debug)]
pub(crate) struct AssignedShard {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) syncer: Arc<SyncRequests>,
    pub(crate) lock: Arc<dyn Lock>,
    pub(crate) hold: Arc<Hold>,
    pub(crate) progress: Progress,
}

/// Returns the position in a shard's log that `start` stands for.
pub(crate) fn start_position<E: Event>(
    log: &Arc<ShardLog>,
    lock: &Arc<dyn Lock>,
    start: Start,
) -> Result<Position, ReadError> {
    let mut reader = match start {
        Start::Latest => {
            let end = Offset(log.appended.get());
            Reader::<E>::at(Arc::clone(log), end, Arc::clone(lock))?
        }
        Start::Beginning | Start::Time(_) => Reader::earliest(Arc::clone(log), Arc::clone(lock)),
    };
    if let Start::Time(time) = start {
        reader.seek(|header| header.time >= time)?;
    }
    reader.position()
}
