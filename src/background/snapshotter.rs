//! The thread that writes saved states to files. One per engine, so that no shard ever waits for the file system.
//!
//! A checkpoint counts once its file is whole and has its name. Where something was acknowledged as durable, by the mode or by a flush,
//! it is also durable then, and the log is durable as far as the checkpoint knows of it: no state comes back whose events do not, and
//! retention takes no event from a flush whose state a power cut could take.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Durability;
use crate::event::{Key, Offset, Root, Sequence, Time};
use crate::lane::requests::CheckpointRequests;
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::SyncRequests;
use crate::log::format::HEADER_BYTES;
use crate::log::segment::ShardLog;
use crate::state::snapshot::format::{Chunk, End, FILE_HEADER_BYTES, FileHeader, Kind, seal_chunk};
use crate::state::snapshot::store::{Held, NUMBERS_END, Saved, SnapshotStore, file_name, fresh_path};
use crate::state::snapshot::taker::Message;
use crate::storage::{SideFile, Storage};
use crate::sync::{AtomicBool, Idle, Ordering, Signal, lock};

/// Requests to the snapshotter.
#[derive(Debug)]
pub(crate) struct SnapshotterRequests {
    /// Wakes it.
    pub(crate) signal: Arc<Signal>,
    /// The engine ends.
    pub(crate) ending: AtomicBool,
}

/// A file of snapshots is followed by the next one when it is this long.
const FILE_BYTES: u64 = 64 << 20;
/// A checkpoint ends a file of snapshots that is this long.
const FILE_BYTES_MIN: u64 = 8 << 20;
/// How long after a failure the next file is begun.
const RETRY: Duration = Duration::from_secs(1);

/// What the snapshotter has of one shard.
pub(crate) struct Sources {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) store: Arc<SnapshotStore>,
    pub(crate) requests: Arc<CheckpointRequests>,
    pub(crate) syncer: Arc<SyncRequests>,
    pub(crate) shard_signal: Arc<Signal>,
    pub(crate) messages: rtrb::Consumer<Message>,
    pub(crate) used: rtrb::Producer<Chunk>,
    pub(crate) state_version: u16,
    pub(crate) state: Root,
    /// Whether states are looked up: those of nothing need not be.
    pub(crate) indexed: bool,
    pub(crate) next_number: u32,
    pub(crate) snapshots: Option<Writing>,
    pub(crate) checkpoint: Option<Writing>,
    pub(crate) finishing: Option<(Writing, Offset)>,
    pub(crate) retry_at: Option<Instant>,
}

/// A file that is being written.
#[derive(Debug)]
pub(crate) struct Writing {
    held: Held,
    file: Box<dyn SideFile>,
}

/// The snapshotter of an engine.
pub(crate) struct Snapshotter {
    pub(crate) shards: Vec<Sources>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) requests: Arc<SnapshotterRequests>,
    pub(crate) keeper: Arc<KeeperRequests>,
    pub(crate) durability: Durability,
}

impl Snapshotter {
    /// Runs until the engine ends and everything that was sent is written.
    pub(crate) fn run(mut self) {
        // Nobody waits for it, so it never spins: the core is for those who are waited for.
        let mut idle = Idle::sleepy();
        loop {
            let ending = self.requests.ending.load(Ordering::SeqCst);
            if self.step(ending) {
                continue;
            }
            if ending {
                break;
            }
            // A checkpoint that waits for the log to be durable is looked at again and again.
            let waiting = self.shards.iter().any(|shard| shard.finishing.is_some());
            let deadline = waiting.then(|| Instant::now() + Duration::from_millis(1));
            let (shards, requests) = (&self.shards, &self.requests);
            idle.step(&requests.signal, deadline, || {
                // Behind a checkpoint that waits for the log, messages wait too.
                let has_work = |shard: &Sources| shard.finishing.is_none() && !shard.messages.is_empty();
                requests.ending.load(Ordering::SeqCst) || shards.iter().any(has_work)
            });
        }
        for shard in &self.shards {
            shard.requests.wake_all();
        }
    }

    /// A bounded piece of work for every shard. Whether there was any.
    pub(crate) fn step(&mut self, ending: bool) -> bool {
        let mut worked = false;
        for shard in &mut self.shards {
            worked |= shard.finish(&*self.storage, &self.keeper, self.durability, ending);
            if shard.finishing.is_none()
                && let Ok(message) = shard.messages.pop()
            {
                shard.take(&*self.storage, &self.keeper, message);
                // A shard that found the ring full goes on when it is woken.
                shard.shard_signal.notify();
                worked = true;
            }
        }
        worked
    }
}

impl Sources {
    fn take(&mut self, storage: &dyn Storage, keeper: &KeeperRequests, message: Message) {
        match message {
            Message::Snapshots(mut chunk) => {
                let (entries, written) = (chunk.entries, self.snapshots(storage, &mut chunk));
                self.give_back(chunk);
                if let Err(error) = written {
                    self.requests.skip(entries);
                    tracing::warn!(shard = self.log.shard.0, %error, "snapshots could not be written; what they saved stays in the log");
                    self.snapshots = None;
                    self.retry_at = Some(Instant::now() + RETRY);
                }
            }
            Message::Begin { start, sequence, time } => {
                let path = fresh_path(&self.log.dir);
                self.checkpoint = None;
                let begun = self.log.check_before(start).ok_or_else(log_is_gone);
                match begun
                    .and_then(|check| self.begin(storage, Kind::Checkpoint, path, (start, sequence, check), time))
                {
                    Ok(writing) => self.checkpoint = Some(writing),
                    Err(error) => self.failed(keeper, &error),
                }
            }
            Message::Checkpoint(mut chunk) => {
                if let Some(mut writing) = self.checkpoint.take() {
                    match writing.append(&mut chunk, false) {
                        Ok(_) => self.checkpoint = Some(writing),
                        Err(error) => self.failed(keeper, &error),
                    }
                }
                self.give_back(chunk);
            }
            Message::End { log_end, is_whole } => match self.checkpoint.take() {
                Some(writing) if is_whole => self.finishing = Some((writing, log_end)),
                Some(_) => self.failed(keeper, &io::Error::other("a state is too large to be saved")),
                // It has failed before.
                None => {}
            },
        }
    }

    fn snapshots(&mut self, storage: &dyn Storage, chunk: &mut Chunk) -> io::Result<()> {
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            self.requests.skip(chunk.entries);
            return Ok(());
        }
        let mut writing = match self.snapshots.take().filter(|writing| writing.held.bytes < FILE_BYTES) {
            Some(writing) => writing,
            None => {
                let path = self.log.dir.join(file_name(Kind::Snapshots, self.next_number));
                self.begin(storage, Kind::Snapshots, path, (Offset(0), Sequence(0), 0), crate::clock::wall_now())?
            }
        };
        let saved = writing.append(chunk, self.indexed)?;
        self.store.add(writing.held.clone(), saved);
        self.snapshots = Some(writing);
        Ok(())
    }

    fn begin(
        &mut self,
        storage: &dyn Storage,
        kind: Kind,
        path: PathBuf,
        (start, sequence, check): (Offset, Sequence, u32),
        time: Time,
    ) -> io::Result<Writing> {
        let header = FileHeader {
            kind,
            store: self.log.store,
            shard: self.log.shard,
            state_version: self.state_version,
            state: self.state,
            start,
            sequence,
            check,
            time,
        };
        let number = self.next_number;
        if number == NUMBERS_END {
            return Err(io::Error::other("no further file of saved states can be numbered"));
        }
        let file = storage.create_side(&path)?;
        file.append(&header.encode())?;
        self.next_number += 1;
        let (bytes, places) = (FILE_HEADER_BYTES as u64, Arc::default());
        let held = Held { number, kind, path, start, last_head: Offset(0), entries: 0, bytes, places };
        Ok(Writing { held, file })
    }

    /// Publishes a checkpoint once the log is durable as far as it knows. Whether it did.
    fn finish(&mut self, storage: &dyn Storage, keeper: &KeeperRequests, durability: Durability, ending: bool) -> bool {
        let Some((_, log_end)) = &self.finishing else { return false };
        let log = Arc::clone(&self.log);
        let mut unsynced = lock(&log.unsynced);
        // Left to the system's cache, log and checkpoint stay there as long as nobody was told that anything is durable.
        let syncs = durability != Durability::OsCache || self.log.durable.get() > HEADER_BYTES as u64;
        let durable = self.log.durable.get() >= log_end.0;
        if !durable && syncs && self.log.failure().is_none() && !ending {
            self.syncer.flush(log_end.0);
            return false;
        }
        let Some((writing, log_end)) = self.finishing.take() else { return false };
        if !durable && syncs {
            self.failed(keeper, &io::Error::other("the log did not become durable"));
            return true;
        }
        match self.publish(storage, writing, log_end, durable, syncs) {
            Ok((start, file)) => {
                *unsynced = (!syncs).then_some((file, log_end));
                self.requests.publish(start);
                keeper.signal.notify();
            }
            Err(error) => self.failed(keeper, &error),
        }
        true
    }

    fn publish(
        &mut self,
        storage: &dyn Storage,
        writing: Writing,
        log_end: Offset,
        durable: bool,
        syncs: bool,
    ) -> io::Result<(Offset, Box<dyn SideFile>)> {
        let Writing { mut held, file } = writing;
        let check = self.log.check_before(log_end).ok_or_else(log_is_gone)?;
        let end = End { entries: held.entries, log_end, check, durable, boot: storage.boot_id() }.encode();
        file.append(&end)?;
        held.bytes += end.len() as u64;
        if syncs {
            file.sync()?;
        }
        let path = self.log.dir.join(file_name(Kind::Checkpoint, held.number));
        storage.rename(&held.path, &path)?;
        if syncs {
            storage.sync_dir(&self.log.dir)?;
        }
        held.path = path;
        let start = held.start;
        self.store.add(held, []);
        // Another file of snapshots from here on, so that whole files become useless together; not so early that there would be
        // very many.
        self.snapshots = self.snapshots.take().filter(|writing| writing.held.bytes < FILE_BYTES_MIN);
        let earliest = self.log.earliest();
        let lost = self.log.segment_of(earliest) > 0;
        let useless = self.store.take_useless(earliest, lost);
        // The one being written may be among them.
        self.snapshots = self.snapshots.take().filter(|writing| !useless.contains(&writing.held.path));
        for path in useless {
            if let Err(error) = storage.remove(&path) {
                tracing::warn!(path = %path.display(), %error, "saved states that nobody needs stay behind");
            }
        }
        Ok((start, file))
    }

    fn failed(&mut self, keeper: &KeeperRequests, error: &io::Error) {
        tracing::error!(shard = self.log.shard.0, %error, "a checkpoint could not be written; retention waits for the next");
        self.checkpoint = None;
        self.requests.fail();
        // Retention asks again.
        keeper.signal.notify();
    }

    fn give_back(&mut self, mut chunk: Chunk) {
        chunk.clear();
        if self.used.push(chunk).is_err() {
            unreachable!("there is a place for every chunk");
        }
    }
}

/// Retention has freed what a checkpoint would be known by: this one is behind the log, and the next is not.
fn log_is_gone() -> io::Error {
    io::Error::other("the log was freed meanwhile")
}

impl Writing {
    /// Writes a chunk; says where its entries lie.
    fn append(&mut self, chunk: &mut Chunk, indexed: bool) -> io::Result<Vec<(Key, Saved)>> {
        let (number, base) = (self.held.number, self.held.bytes);
        let mut saved = Vec::with_capacity(if indexed { chunk.entries as usize } else { 0 });
        let mut last_head = self.held.last_head;
        seal_chunk(chunk.filled(), |at, entry| {
            last_head = last_head.max(entry.head);
            if indexed && entry.version.0 > 0 {
                saved.extend(Saved::new(entry, number, base + at as u64).map(|saved| (entry.key, saved)));
            }
        });
        self.file.append(chunk.filled())?;
        self.held.bytes += chunk.filled().len() as u64;
        self.held.entries += chunk.entries;
        self.held.last_head = last_head;
        Ok(saved)
    }
}
