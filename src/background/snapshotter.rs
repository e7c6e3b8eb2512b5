//! Writes saved states to files. One per engine, so that no shard ever waits for the file system.
//!
//! A checkpoint counts once its file is complete and has its name. If anything was acknowledged as durable, by the mode
//! or by a flush, the file and the log up to the checkpoint's end must be durable first. No state can then come back
//! without its events, and retention frees no flushed event whose state a power cut could erase.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::step::{Now, Step};
use crate::config::Durability;
use crate::event::{Key, Offset, Root, Sequence, Time};
use crate::lane::requests::CheckpointRequests;
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::SyncRequests;
use crate::log::format::HEADER_BYTES;
use crate::log::segment::ShardLog;
use crate::state::snapshot::format::{Chunk, End, FILE_HEADER_BYTES, FileHeader, Kind, seal_chunk};
use crate::state::snapshot::store::{NUMBERS_END, Saved, SnapshotFile, SnapshotStore, file_name, fresh_path};
use crate::state::snapshot::taker::Message;
use crate::storage::{SideFile, Storage};
use crate::sync::{AtomicBool, Ordering, Signal, lock};

/// Requests to the snapshotter.
#[derive(Debug)]
pub(crate) struct SnapshotterRequests {
    /// Wakes the snapshotter.
    pub(crate) signal: Arc<Signal>,
    /// Set when the engine ends.
    pub(crate) ending: AtomicBool,
}

/// Length from which on a file of snapshots is complete: the next snapshots go to another file.
const FILE_BYTES: u64 = 64 << 20;
/// A checkpoint completes the current file of snapshots if the file has at least this length.
const FILE_BYTES_MIN: u64 = 8 << 20;
/// Pause between a failure and the next file.
const RETRY: Duration = Duration::from_secs(1);
/// Interval between checks of `durable` while a checkpoint waits for it.
const SYNC_CHECK: Duration = Duration::from_millis(1);

/// One shard's states on their way to files.
pub(crate) struct ShardSnapshots {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) store: Arc<SnapshotStore>,
    pub(crate) requests: Arc<CheckpointRequests>,
    pub(crate) syncer: Arc<SyncRequests>,
    pub(crate) shard_signal: Arc<Signal>,
    pub(crate) messages: rtrb::Consumer<Message>,
    /// Takes written chunks back to the shard.
    pub(crate) used: rtrb::Producer<Chunk>,
    pub(crate) state_version: u16,
    pub(crate) state: Root,
    /// `false` if states are empty, because nothing looks them up.
    pub(crate) indexed: bool,
    pub(crate) next_number: u32,
    pub(crate) snapshots: Option<OpenFile>,
    pub(crate) checkpoint: Option<OpenFile>,
    /// A complete checkpoint that waits until the log is durable up to the offset.
    pub(crate) finishing: Option<(OpenFile, Offset)>,
    /// Snapshots are skipped before this time.
    pub(crate) retry_at: Option<Instant>,
}

/// A file that is still written to.
#[derive(Debug)]
pub(crate) struct OpenFile {
    held: SnapshotFile,
    file: Box<dyn SideFile>,
}

/// The snapshotter of an engine.
pub(crate) struct Snapshotter {
    pub(crate) shards: Vec<ShardSnapshots>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) requests: Arc<SnapshotterRequests>,
    pub(crate) keeper: Arc<KeeperRequests>,
    pub(crate) durability: Durability,
}

impl Snapshotter {
    /// Handles at most one message of every shard. Ends when the engine has ended and everything that was sent is
    /// written.
    pub(crate) fn step(&mut self, now: Now) -> Step {
        let is_ending = self.requests.ending.load(Ordering::SeqCst);
        if self.serve_shards(is_ending, now) {
            return Step::Worked;
        }
        if is_ending {
            self.shards.iter().for_each(|shard| shard.requests.wake_all());
            return Step::Ended;
        }
        let is_waiting = self.shards.iter().any(|shard| shard.finishing.is_some());
        Step::Idle(is_waiting.then(|| now.monotonic + SYNC_CHECK))
    }

    /// Returns `true` if the next step may find work. Called before the thread sleeps.
    pub(crate) fn has_work(&self) -> bool {
        // While a checkpoint waits for the log, the messages after it wait too.
        let has_work = |shard: &ShardSnapshots| shard.finishing.is_none() && !shard.messages.is_empty();
        self.requests.ending.load(Ordering::SeqCst) || self.shards.iter().any(has_work)
    }

    /// Returns `true` if any shard had work.
    fn serve_shards(&mut self, is_ending: bool, now: Now) -> bool {
        let mut worked = false;
        for shard in &mut self.shards {
            worked |= shard.finish(&*self.storage, &self.keeper, self.durability, is_ending);
            if shard.finishing.is_none()
                && let Ok(message) = shard.messages.pop()
            {
                shard.handle(&*self.storage, &self.keeper, message, now);
                // A shard that found the ring full continues when it is woken.
                shard.shard_signal.notify();
                worked = true;
            }
        }
        worked
    }
}

impl ShardSnapshots {
    fn handle(&mut self, storage: &dyn Storage, keeper: &KeeperRequests, message: Message, now: Now) {
        match message {
            Message::Snapshots(mut chunk) => {
                let (entries, written) = (chunk.entries, self.write_snapshots(storage, &mut chunk, now));
                self.give_back(chunk);
                if let Err(error) = written {
                    self.requests.skip(entries);
                    let shard = self.log.shard.0;
                    tracing::warn!(shard, %error, "snapshots could not be written; the log still has their events");
                    self.snapshots = None;
                    self.retry_at = Some(now.monotonic + RETRY);
                }
            }
            Message::Begin { start, sequence, time } => {
                let path = fresh_path(&self.log.dir);
                self.checkpoint = None;
                let check = self.log.check_before(start).ok_or_else(log_is_gone);
                let created = check
                    .and_then(|check| self.create(storage, Kind::Checkpoint, path, (start, sequence, check), time));
                match created {
                    Ok(file) => self.checkpoint = Some(file),
                    Err(error) => self.fail_checkpoint(keeper, &error),
                }
            }
            Message::Checkpoint(mut chunk) => {
                if let Some(mut file) = self.checkpoint.take() {
                    match file.append(&mut chunk, false) {
                        Ok(_) => self.checkpoint = Some(file),
                        Err(error) => self.fail_checkpoint(keeper, &error),
                    }
                }
                self.give_back(chunk);
            }
            Message::End { log_end, is_whole } => match self.checkpoint.take() {
                Some(file) if is_whole => self.finishing = Some((file, log_end)),
                Some(_) => self.fail_checkpoint(keeper, &io::Error::other("a state is too large to be saved")),
                // The checkpoint has failed before.
                None => {}
            },
        }
    }

    fn write_snapshots(&mut self, storage: &dyn Storage, chunk: &mut Chunk, now: Now) -> io::Result<()> {
        if self.retry_at.is_some_and(|at| now.monotonic < at) {
            self.requests.skip(chunk.entries);
            return Ok(());
        }
        let mut file = match self.snapshots.take().filter(|file| file.held.bytes < FILE_BYTES) {
            Some(file) => file,
            None => {
                let path = self.log.dir.join(file_name(Kind::Snapshots, self.next_number));
                self.create(storage, Kind::Snapshots, path, (Offset(0), Sequence(0), 0), now.wall)?
            }
        };
        let saved = file.append(chunk, self.indexed)?;
        self.store.add(file.held.clone(), saved);
        self.snapshots = Some(file);
        Ok(())
    }

    fn create(
        &mut self,
        storage: &dyn Storage,
        kind: Kind,
        path: PathBuf,
        (start, sequence, check): (Offset, Sequence, u32),
        time: Time,
    ) -> io::Result<OpenFile> {
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
            return Err(io::Error::other("no number is left for another file of saved states"));
        }
        let file = storage.create_side(&path)?;
        file.append(&header.encode())?;
        self.next_number += 1;
        let (bytes, places) = (FILE_HEADER_BYTES as u64, Arc::default());
        let held = SnapshotFile { number, kind, path, start, last_head: Offset(0), entries: 0, bytes, places };
        Ok(OpenFile { held, file })
    }

    /// Publishes a complete checkpoint once the log is durable up to the checkpoint's end, or fails it. Returns `true`
    /// if it did either.
    fn finish(
        &mut self,
        storage: &dyn Storage,
        keeper: &KeeperRequests,
        durability: Durability,
        is_ending: bool,
    ) -> bool {
        let Some((_, log_end)) = &self.finishing else { return false };
        let log = Arc::clone(&self.log);
        let mut unsynced = lock(&log.unsynced);
        // Log and checkpoint stay in the system's cache until something is acknowledged as durable.
        let syncs = durability != Durability::OsCache || self.log.durable.get() > HEADER_BYTES as u64;
        let durable = self.log.durable.get() >= log_end.0;
        if !durable && syncs && self.log.failure().is_none() && !is_ending {
            self.syncer.flush(log_end.0);
            return false;
        }
        let Some((file, log_end)) = self.finishing.take() else { return false };
        if !durable && syncs {
            self.fail_checkpoint(keeper, &io::Error::other("the log did not become durable"));
            return true;
        }
        match self.publish(storage, file, log_end, durable, syncs) {
            Ok((start, file)) => {
                *unsynced = (!syncs).then_some((file, log_end));
                self.requests.publish(start);
                keeper.signal.notify();
            }
            Err(error) => self.fail_checkpoint(keeper, &error),
        }
        true
    }

    fn publish(
        &mut self,
        storage: &dyn Storage,
        checkpoint: OpenFile,
        log_end: Offset,
        durable: bool,
        syncs: bool,
    ) -> io::Result<(Offset, Box<dyn SideFile>)> {
        let OpenFile { mut held, file } = checkpoint;
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
        // Snapshots after a checkpoint go to another file, so that all entries of a file become useless together. A
        // short file is continued, to keep the number of files low.
        self.snapshots = self.snapshots.take().filter(|file| file.held.bytes < FILE_BYTES_MIN);
        let earliest = self.log.earliest();
        let lost = self.log.segment_of(earliest) > 0;
        let useless = self.store.take_useless(earliest, lost);
        // The open file may be one of the useless files.
        self.snapshots = self.snapshots.take().filter(|file| !useless.contains(&file.held.path));
        for path in useless {
            if let Err(error) = storage.remove(&path) {
                let path = path.display();
                tracing::warn!(%path, %error, "a useless file of saved states cannot be removed and stays");
            }
        }
        Ok((start, file))
    }

    fn fail_checkpoint(&mut self, keeper: &KeeperRequests, error: &io::Error) {
        let shard = self.log.shard.0;
        tracing::error!(shard, %error, "a checkpoint could not be written; retention waits for the next");
        self.checkpoint = None;
        self.requests.fail();
        // Retention requests another.
        keeper.signal.notify();
    }

    fn give_back(&mut self, mut chunk: Chunk) {
        chunk.clear();
        if self.used.push(chunk).is_err() {
            unreachable!("the ring has a slot for every chunk");
        }
    }
}

/// The error for a checkpoint that is older than the log: retention has freed the record that would identify its place.
/// The next checkpoint will not be too old.
fn log_is_gone() -> io::Error {
    io::Error::other("retention has freed the log that the checkpoint covers")
}

impl OpenFile {
    /// Writes a chunk. Returns the places of its entries if `indexed`.
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
