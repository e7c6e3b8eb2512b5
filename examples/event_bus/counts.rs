//! The analytics service's database: counts by type, and the position up to which events are counted.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Result;
use corelane::consumer::{Batch, Sink};
use corelane::envelope::Envelope;
use corelane::log::Position;
use corelane::{HandlerError, ShardId};
use rusqlite::{Connection, OptionalExtension as _};

pub(crate) struct Counts(Connection);

impl Counts {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let database = Connection::open(path)?;
        // A power cut may lose the newest transactions, but only whole: counts and position stay consistent.
        database.pragma_update(None, "journal_mode", "wal")?;
        database.pragma_update(None, "synchronous", "normal")?;
        database.execute_batch(
            "create table if not exists counts (event_type text primary key, events integer not null) without rowid;
             create table if not exists positions (shard integer primary key, position blob not null);",
        )?;
        Ok(Self(database))
    }

    pub(crate) fn by_type(&self) -> Result<BTreeMap<String, u64>> {
        let mut select = self.0.prepare("select event_type, events from counts")?;
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

impl Sink<Envelope> for Counts {
    fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
        let select = "select position from positions where shard = ?1";
        let position: Option<Vec<u8>> = self.0.query_row(select, [shard.0], |row| row.get(0)).optional()?;
        Ok(position.map(|bytes| Position::from_bytes(&bytes)).transpose()?)
    }

    fn apply(&mut self, batch: &mut Batch<'_, Envelope>) -> Result<(), HandlerError> {
        let mut counts = HashMap::<String, u64>::new();
        while let Some(record) = batch.next()? {
            let event_type = record.event.event_type();
            match counts.get_mut(event_type) {
                Some(events) => *events += 1,
                None => drop(counts.insert(event_type.to_owned(), 1)),
            }
        }
        // One transaction for counts and position, so that every event counts once.
        let transaction = self.0.transaction()?;
        for (event_type, events) in counts {
            let add = "insert into counts values (?1, ?2) on conflict do update set events = events + excluded.events";
            transaction.prepare_cached(add)?.execute((event_type, events))?;
        }
        let set_position =
            "insert into positions values (?1, ?2) on conflict do update set position = excluded.position";
        transaction.prepare_cached(set_position)?.execute((batch.shard().0, batch.end().to_bytes()))?;
        transaction.commit()?;
        Ok(())
    }
}
