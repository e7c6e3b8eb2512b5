//! Consumers, for `inspect` and `verify`: how far behind each one is, and the segments that retention keeps for it.

use std::io::Write as _;

use corelane::consumer::LetterStatistics;
use corelane::consumer::outside::{self, DeadLetters};
use corelane::log::Position;
use corelane::log::scan::{ShardFiles, Store};
use corelane::{Meta, Offset, ShardId};

use super::show::{grouped, table};
use super::{Condition, Failure, Output, warn};
use crate::log::format::HEADER_BYTES;

/// A consumer's position and lag in one shard.
#[derive(Debug, Clone, Default)]
struct ShardLag {
    position: Offset,
    /// Events at or after the position.
    lag_events: u64,
    lag_bytes: u64,
    /// Bytes of segments, without the log's last, that retention cannot free because of the position.
    held_bytes: u64,
    /// The part of `held_bytes` that no other consumer needs.
    held_alone_bytes: u64,
}

#[derive(Debug)]
struct ConsumerFiles {
    name: String,
    lags: Vec<ShardLag>,
    requests: usize,
    letters: Option<(LetterStatistics, usize)>,
    reaches: Vec<Offset>,
    seen: Vec<Position>,
}

/// The result of checking a consumer.
#[derive(Debug)]
pub(super) struct CheckedConsumer {
    /// A summary of its files.
    pub(super) line: String,
    /// Its position and the greatest offset that its files name, by shard.
    pub(super) positions: Vec<Offset>,
    pub(super) reaches: Vec<Offset>,
    /// The position up to which it has read, by shard.
    pub(super) seen: Vec<Position>,
}

impl ConsumerFiles {
    fn sum(&self, of: impl Fn(&ShardLag) -> u64) -> u64 {
        self.lags.iter().map(of).sum()
    }
}

/// A store's consumers, compared with its log while the log is read.
#[derive(Debug)]
pub(super) struct Consumers {
    all: Vec<ConsumerFiles>,
    condition: Condition,
    /// The shard being read. `order` holds its consumers by position; the first `passed` of them are behind the record
    /// being read, and `first_behind` is the sequence of the first event that each of them has not handled.
    shard: Option<ShardId>,
    order: Vec<usize>,
    passed: usize,
    first_behind: Vec<u64>,
    newest: u64,
}

impl Consumers {
    /// Reads every consumer's files. Reports damage to one and continues with the others.
    pub(super) fn read(store: &Store) -> Result<Self, Failure> {
        let (order, first_behind) = (Vec::new(), Vec::new());
        let condition = Condition::Sound;
        let mut found = Self { all: Vec::new(), condition, shard: None, order, passed: 0, first_behind, newest: 0 };
        for name in outside::names(store)? {
            let mut problems = Vec::new();
            let consumer = read_one(store, &name, &mut |problem| problems.push(problem))?;
            for problem in problems {
                warn(&format!("consumer {name}: {problem}"));
                found.condition = Condition::Damaged;
            }
            found.all.extend(consumer);
        }
        Ok(found)
    }

    /// Takes note of the next event of the log.
    pub(super) fn pass(&mut self, meta: &Meta) {
        if self.shard != Some(meta.shard) {
            self.begin(meta.shard);
        }
        self.newest = meta.sequence.get();
        while let Some(&i) = self.order.get(self.passed)
            && self.position(i, meta.shard) <= meta.offset
        {
            self.first_behind[i] = self.newest;
            self.passed += 1;
        }
    }

    fn begin(&mut self, shard: ShardId) {
        let mut order: Vec<usize> = (0..self.all.len()).collect();
        order.retain(|i| !self.all[*i].lags.is_empty());
        order.sort_by_key(|i| self.position(*i, shard));
        (self.shard, self.passed, self.newest) = (Some(shard), 0, 0);
        self.first_behind = vec![0; self.all.len()];
        self.order = order;
    }

    fn position(&self, consumer: usize, shard: ShardId) -> Offset {
        self.all[consumer].lags[usize::from(shard.get())].position
    }

    /// Computes each consumer's lag and held bytes, given that the shard's log ends at `end`.
    pub(super) fn measure_held(&mut self, store: &Store, files: &ShardFiles, end: Offset) {
        if self.shard != Some(files.shard) {
            // The shard has no event.
            self.begin(files.shard);
        }
        let segment = |offset: Offset| offset.get() / store.segment_bytes();
        let bytes = |from: u64, until: u64| -> u64 {
            let segments = files.segments.iter().filter(|segment| (from..until).contains(&segment.index));
            segments.map(|segment| segment.file.allocated_bytes).sum()
        };
        for (rank, &i) in self.order.iter().enumerate() {
            let from = segment(self.position(i, files.shard));
            let next = self.order.iter().enumerate().filter(|(other, _)| *other != rank);
            let others = next.map(|(_, other)| segment(self.position(*other, files.shard))).min();
            let lag = &mut self.all[i].lags[usize::from(files.shard.get())];
            if rank < self.passed {
                lag.lag_events = self.newest + 1 - self.first_behind[i];
                lag.lag_bytes = end.get().saturating_sub(lag.position.get());
            }
            lag.held_bytes = bytes(from, segment(end));
            lag.held_alone_bytes = bytes(from, segment(end).min(others.unwrap_or(u64::MAX)));
        }
    }

    /// Writes the tables of positions and dead letters.
    pub(super) fn write(&self, out: &mut Output) -> Result<Condition, Failure> {
        if self.all.is_empty() {
            writeln!(out, "\nNo consumers.")?;
            return Ok(self.condition);
        }
        let columns = ["consumer", "shard", "position", "lag events", "lag bytes", "held bytes", "held by it alone"];
        let mut lags = table(&columns, &[0]);
        let columns =
            ["consumer", "letters", "keys", "bytes", "ever parked", "handled", "discarded", "skipped", "requests"];
        let mut letters = table(&columns, &[0]);
        for consumer in &self.all {
            for (shard, lag) in consumer.lags.iter().enumerate() {
                lags.add_row([
                    consumer.name.clone(),
                    shard.to_string(),
                    lag.position.to_string(),
                    grouped(lag.lag_events),
                    grouped(lag.lag_bytes),
                    grouped(lag.held_bytes),
                    grouped(lag.held_alone_bytes),
                ]);
            }
            let mut row = vec![consumer.name.clone()];
            match &consumer.letters {
                Some((totals, keys)) => row.extend([
                    grouped(totals.letters as u64),
                    grouped(*keys as u64),
                    grouped(totals.bytes),
                    grouped(totals.parked),
                    grouped(totals.handled),
                    grouped(totals.discarded),
                    grouped(totals.skipped),
                ]),
                None => row.extend(["DAMAGED".to_owned()].into_iter().chain(std::iter::repeat_n(String::new(), 6))),
            }
            row.push(consumer.requests.to_string());
            letters.add_row(row);
        }
        writeln!(out, "\nConsumers\n{lags}\n\n{}\n\nDead letters\n{letters}", self.slowest())?;
        Ok(self.condition)
    }

    /// Returns a sentence about the consumer that is furthest behind.
    fn slowest(&self) -> String {
        let lag_of =
            |consumer: &&ConsumerFiles| (consumer.sum(|lag| lag.lag_bytes), consumer.sum(|lag| lag.lag_events));
        let Some(slowest) = self.all.iter().filter(|consumer| lag_of(consumer).1 > 0).max_by_key(lag_of) else {
            return "No consumer is behind.".to_owned();
        };
        let (bytes, events) = lag_of(&slowest);
        format!(
            "The slowest is {}: {} events, {} bytes behind. It holds {} bytes of segments, {} of them alone.",
            slowest.name,
            grouped(events),
            grouped(bytes),
            grouped(slowest.sum(|lag| lag.held_bytes)),
            grouped(slowest.sum(|lag| lag.held_alone_bytes))
        )
    }
}

/// Checks a consumer's files and passes each fault to `problem`. Returns `None` if there is no such consumer.
pub(super) fn check(
    store: &Store,
    name: &str,
    problem: &mut dyn FnMut(String),
) -> Result<Option<CheckedConsumer>, Failure> {
    let Some(consumer) = read_one(store, name, problem)? else { return Ok(None) };
    for (request, why) in outside::broken_requests(store, name)? {
        problem(format!("{request} is unreadable, and the consumer will set it aside: {why}"));
    }
    let letters = consumer.letters.map_or(0, |(totals, _)| totals.letters);
    let line = format!("{} dead letters, {} requests", grouped(letters as u64), consumer.requests);
    let positions = consumer.lags.iter().map(|lag| lag.position).collect();
    Ok(Some(CheckedConsumer { line, positions, reaches: consumer.reaches, seen: consumer.seen }))
}

fn read_one(store: &Store, name: &str, problem: &mut dyn FnMut(String)) -> Result<Option<ConsumerFiles>, Failure> {
    let mut consumer = ConsumerFiles {
        name: name.to_owned(),
        lags: Vec::new(),
        requests: 0,
        letters: None,
        reaches: Vec::new(),
        seen: Vec::new(),
    };
    match outside::registered(store, name) {
        Ok(None) => return Ok(None),
        Ok(Some(registered)) if registered.positions.len() != usize::from(store.shards()) => {
            problem(format!(
                "its position file is for {} shards, but the store has {}",
                registered.positions.len(),
                store.shards()
            ));
        }
        Ok(Some(registered)) => {
            consumer.requests = registered.requests;
            consumer.reaches.clone_from(&registered.reaches);
            consumer.seen.clone_from(&registered.seen);
            let lags = registered.positions.iter().map(|&position| ShardLag { position, ..ShardLag::default() });
            consumer.lags = lags.collect();
            for (shard, position) in store.shard_ids().zip(&registered.positions) {
                // A new store has no segment yet, but its consumers already have the position of its first record.
                let horizon = store.horizon(shard)?.max(Offset(HEADER_BYTES as u64));
                if *position > horizon {
                    problem(format!(
                        "shard {shard}: its position {position} is beyond the end of the log at {horizon}"
                    ));
                }
            }
        }
        Err(error) => report_damage(error.into(), problem)?,
    }
    match DeadLetters::open(store, name) {
        Ok(letters) => consumer.letters = Some((letters.statistics(), letters.keys().count())),
        Err(error) => report_damage(error.into(), problem)?,
    }
    Ok(Some(consumer))
}

/// Passes damage to `problem` and returns any other failure.
fn report_damage(failure: Failure, problem: &mut dyn FnMut(String)) -> Result<(), Failure> {
    if !failure.is_damage() {
        return Err(failure);
    }
    problem(failure.to_string());
    Ok(())
}
