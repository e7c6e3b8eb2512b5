//! The entry point for applications: says what a feed wants and where it begins.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use super::feed::Live;
use super::shard::{FollowedShard, Wanted};
use crate::error::{LiveError, PositionError, ReadError, WaitError};
use crate::event::{Event, EventId, Key, Router, ShardId, Time, TypeFilter};
use crate::log::position::Position;
use crate::log::reader::{Reader, Sight};
use crate::log::segment::ShardLog;
use crate::storage::Lock;

/// The place where a [`Live`] feed begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LiveFrom {
    /// With the events appended after [`LiveBuilder::start`] was called.
    #[default]
    Latest,
    /// With the earliest event that the log holds.
    Beginning,
    /// With each shard's first event at or after this time. Times may fall, so events with earlier times may follow that
    /// event. Reads the headers of all events before it.
    Time(Time),
    /// With this event. Says nothing about other shards. Reads the headers of at most one segment.
    At(EventId),
    /// With the event after this one: for readers that come back with the id of the last event they have seen. Says
    /// nothing about other shards. Reads the headers of at most one segment.
    After(EventId),
    /// At a position of [`Reader::position`], which is verified. Says nothing about other shards. Reads the headers of
    /// at most one segment.
    Position(Position),
}

impl LiveFrom {
    /// Returns the shard that this is about, or `None` if it is about all shards.
    fn shard(&self) -> Option<ShardId> {
        match self {
            Self::Latest | Self::Beginning | Self::Time(_) => None,
            Self::At(id) | Self::After(id) => Some(id.shard),
            Self::Position(position) => Some(position.shard()),
        }
    }

    /// Returns a reader of `log` at this place.
    fn reader<E: Event>(&self, log: &Arc<ShardLog>, lock: &Arc<dyn Lock>) -> Result<Reader<E>, ReadError> {
        let (log_of_reader, lock_of_reader) = (Arc::clone(log), Arc::clone(lock));
        match *self {
            Self::Latest => Reader::latest(log_of_reader, lock_of_reader),
            Self::Beginning => Ok(Reader::earliest(log_of_reader, lock_of_reader)),
            Self::Time(time) => {
                let mut reader = Reader::earliest(log_of_reader, lock_of_reader);
                reader.seek_held(|header| header.time >= time)?;
                Ok(reader)
            }
            Self::At(id) => Reader::at(log_of_reader, id.offset, lock_of_reader),
            Self::After(id) => {
                let mut reader = Reader::at(log_of_reader, id.offset, lock_of_reader)?;
                match reader.ahead(|_| true)? {
                    Some(ahead) if reader.offset() == id.offset => reader.pass(&ahead),
                    _ => return Err(ReadError::NotARecord { shard: id.shard, offset: id.offset }),
                }
                Ok(reader)
            }
            Self::Position(position) => position.reader(log, lock),
        }
    }
}

/// Sets up a live feed. Every setting has a default: all events, from the latest on, as soon as they are appended.
#[must_use = "the feed begins when it is started"]
pub struct LiveBuilder<E: Event> {
    logs: Vec<Arc<ShardLog>>,
    router: Router,
    lock: Arc<dyn Lock>,
    /// `false` if events become durable only by `flush`.
    syncs: bool,
    key: Option<Key>,
    types: Option<Vec<String>>,
    from: Vec<LiveFrom>,
    sight: Sight,
    lag_max: u64,
    event: PhantomData<fn() -> E>,
}

impl<E: Event> fmt::Debug for LiveBuilder<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("LiveBuilder");
        shown.field("key", &self.key).field("types", &self.types).field("from", &self.from).finish_non_exhaustive()
    }
}

impl<E: Event> LiveBuilder<E> {
    /// Creates a builder for a feed of these logs, all shards of one store.
    pub(crate) fn new(logs: Vec<Arc<ShardLog>>, router: Router, lock: Arc<dyn Lock>, syncs: bool) -> Self {
        Self {
            logs,
            router,
            lock,
            syncs,
            key: None,
            types: None,
            from: Vec::new(),
            sight: Sight::Appended,
            lag_max: u64::MAX,
            event: PhantomData,
        }
    }

    /// Returns only the events of this key. The feed reads only the shard of the key, but there the header of every
    /// event: following one key costs about as much as following the whole shard.
    pub fn key(mut self, key: Key) -> Self {
        self.key = Some(key);
        self
    }

    /// Returns only events of these types, given by their names in [`Event::TYPES`]; at least one. Default: all types.
    pub fn types<T: AsRef<str>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.types = Some(names.into_iter().map(|name| name.as_ref().to_owned()).collect());
        self
    }

    /// Sets where the feed begins. May be called several times; for each shard, the last call that is about it counts.
    /// Default: [`LiveFrom::Latest`].
    pub fn from(mut self, from: LiveFrom) -> Self {
        self.from.push(from);
        self
    }

    /// Returns events only once they are durable. After a power cut, a feed that sees events earlier may have seen
    /// events that the log lost. Default: as soon as they are appended.
    pub fn durable(mut self) -> Self {
        self.sight = Sight::Durable;
        self
    }

    /// Skips all unread events of a shard when there are more than `events`, wanted or not, durable or not: the feed
    /// returns [`LiveError::Lagged`] and continues with events appended from then on. Checked at the beginning, and after
    /// every 256 events read. Default: no limit; the feed falls behind until retention has freed what it would read next.
    pub fn lag_max(mut self, events: u64) -> Self {
        self.lag_max = events;
        self
    }

    /// Starts the feed. It registers nothing; dropping it ends it.
    ///
    /// # Errors
    /// `UnknownType` and `NoTypes`. `Wait(NeverDurable)` for durable events in `OsCache` mode. `Read` if a place cannot
    /// be read: `BeyondRetention` if it has been freed, `NotARecord` if no event is there, `Position` if a position is
    /// from another history of the store, or a place is in a shard that the feed does not read.
    pub fn start(self) -> Result<Live<E>, LiveError> {
        if self.sight == Sight::Durable && !self.syncs {
            return Err(WaitError::NeverDurable.into());
        }
        let types = self.types.as_ref().map_or(Ok(TypeFilter::all()), |names| TypeFilter::named::<E>(names))?;
        let logs: Vec<_> = match self.key {
            Some(key) => self.logs.iter().filter(|log| log.shard == self.router.shard(key)).collect(),
            None => self.logs.iter().collect(),
        };
        for shard in self.from.iter().filter_map(LiveFrom::shard) {
            if logs.iter().all(|log| log.shard != shard) {
                let other = PositionError::OtherShard { shard: logs[0].shard, position: shard };
                return Err(ReadError::from(other).into());
            }
        }
        let mut followed = Vec::with_capacity(logs.len());
        for log in logs {
            let is_about = |from: &&LiveFrom| from.shard().is_none_or(|shard| shard == log.shard);
            let from = self.from.iter().rev().find(is_about).copied().unwrap_or_default();
            let reader = from.reader::<E>(log, &self.lock)?.with_sight(self.sight);
            followed.push(FollowedShard::new(reader));
        }
        Ok(Live::new(followed, Wanted { key: self.key, types, lag_max: self.lag_max }))
    }
}
