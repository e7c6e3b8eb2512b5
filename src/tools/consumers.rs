//! What `inspect` and `verify` say of consumers: how far behind each is, and what retention keeps for it.

use std::io::Write as _;

use corelane::consumer::LetterStatistics;
use corelane::consumer::outside::{self, DeadLetters};
use corelane::log::Position;
use corelane::log::scan::{ShardFiles, Store};
use corelane::{Meta, Offset, ShardId};

use super::show::{grouped, table};
use super::{Failure, Output, Verdict, warn};

/// A consumer in one shard.
#[derive(Debug, Clone, Default)]
struct Place {
    position: Offset,
    /// Events at or behind the position.
    lag_events: u64,
    lag_bytes: u64,
    /// Bytes of segments below the log's last that cannot be freed because of it.
    held_bytes: u64,
    /// Of these, what no other consumer needs.
    held_alone_bytes: u64,
}

#[derive(Debug)]
struct Consumer {
    name: String,
    places: Vec<Place>,
    requests: usize,
    letters: Option<(LetterStatistics, usize)>,
    reaches: Vec<Offset>,
    seen: Vec<Position>,
}

/// What a check of a consumer found.
#[derive(Debug)]
pub(super) struct Checked {
    /// What its files hold, in words.
    pub(super) line: String,
    /// Its position, and the furthest offset that it names, by shard.
    pub(super) positions: Vec<Offset>,
    pub(super) reaches: Vec<Offset>,
    /// The furthest that it has read, by shard.
    pub(super) seen: Vec<Position>,
}

impl Consumer {
    fn sum(&self, of: impl Fn(&Place) -> u64) -> u64 {
        self.places.iter().map(of).sum()
    }
}

/// A store's consumers, against its log as it is read.
#[derive(Debug)]
pub(super) struct Consumers {
    all: Vec<Consumer>,
    verdict: Verdict,
    /// The shard that is being read: its consumers by position, how many of these the log has passed, and where they were passed.
    shard: Option<ShardId>,
    order: Vec<usize>,
    passed: usize,
    first_behind: Vec<u64>,
    newest: u64,
}

impl Consumers {
    /// Looks at every consumer; damage to one is told, and the others are looked at.
    pub(super) fn look(store: &Store) -> Result<Self, Failure> {
        let (order, first_behind) = (Vec::new(), Vec::new());
        let verdict = Verdict::Sound;
        let mut found = Self { all: Vec::new(), verdict, shard: None, order, passed: 0, first_behind, newest: 0 };
        for name in outside::names(store)? {
            let mut problems = Vec::new();
            let consumer = look_at(store, &name, &mut |problem| problems.push(problem))?;
            for problem in problems {
                warn(&format!("consumer {name}: {problem}"));
                found.verdict = Verdict::Damaged;
            }
            found.all.extend(consumer);
        }
        Ok(found)
    }

    /// The next event of the log.
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
        order.retain(|i| !self.all[*i].places.is_empty());
        order.sort_by_key(|i| self.position(*i, shard));
        (self.shard, self.passed, self.newest) = (Some(shard), 0, 0);
        self.first_behind = vec![0; self.all.len()];
        self.order = order;
    }

    fn position(&self, consumer: usize, shard: ShardId) -> Offset {
        self.all[consumer].places[usize::from(shard.get())].position
    }

    /// The shard's log ends at `end`: what lies between it and each position.
    pub(super) fn measure_held(&mut self, store: &Store, files: &ShardFiles, end: Offset) {
        if self.shard != Some(files.shard) {
            // Without a single event.
            self.begin(files.shard);
        }
        let segment = |offset: Offset| offset.get() / store.segment_bytes();
        let bytes = |from: u64, until: u64| -> u64 {
            let held = files.segments.iter().filter(|held| (from..until).contains(&held.index));
            held.map(|held| held.file.allocated_bytes).sum()
        };
        for (rank, &i) in self.order.iter().enumerate() {
            let from = segment(self.position(i, files.shard));
            let next = self.order.iter().enumerate().filter(|(other, _)| *other != rank);
            let others = next.map(|(_, other)| segment(self.position(*other, files.shard))).min();
            let place = &mut self.all[i].places[usize::from(files.shard.get())];
            if rank < self.passed {
                place.lag_events = self.newest + 1 - self.first_behind[i];
                place.lag_bytes = end.get().saturating_sub(place.position.get());
            }
            place.held_bytes = bytes(from, segment(end));
            place.held_alone_bytes = bytes(from, segment(end).min(others.unwrap_or(u64::MAX)));
        }
    }

    /// Writes what was found.
    pub(super) fn write(&self, out: &mut Output) -> Result<Verdict, Failure> {
        if self.all.is_empty() {
            writeln!(out, "\nNo consumers.")?;
            return Ok(self.verdict);
        }
        let columns = ["consumer", "shard", "position", "lag events", "lag bytes", "held bytes", "held by it alone"];
        let mut places = table(&columns, &[0]);
        let columns =
            ["consumer", "letters", "keys", "bytes", "all so far", "handled", "discarded", "skipped", "requests"];
        let mut letters = table(&columns, &[0]);
        for consumer in &self.all {
            for (shard, place) in consumer.places.iter().enumerate() {
                places.add_row([
                    consumer.name.clone(),
                    shard.to_string(),
                    place.position.to_string(),
                    grouped(place.lag_events),
                    grouped(place.lag_bytes),
                    grouped(place.held_bytes),
                    grouped(place.held_alone_bytes),
                ]);
            }
            let mut row = vec![consumer.name.clone()];
            match &consumer.letters {
                Some((found, keys)) => row.extend([
                    grouped(found.letters as u64),
                    grouped(*keys as u64),
                    grouped(found.bytes),
                    grouped(found.parked),
                    grouped(found.handled),
                    grouped(found.discarded),
                    grouped(found.skipped),
                ]),
                None => row.extend(["DAMAGED".to_owned()].into_iter().chain(std::iter::repeat_n(String::new(), 6))),
            }
            row.push(consumer.requests.to_string());
            letters.add_row(row);
        }
        writeln!(out, "\nConsumers\n{places}\n\n{}\n\nDead letters\n{letters}", self.slowest())?;
        Ok(self.verdict)
    }

    /// Who is furthest behind, in a sentence.
    fn slowest(&self) -> String {
        let lag = |consumer: &&Consumer| (consumer.sum(|at| at.lag_bytes), consumer.sum(|at| at.lag_events));
        let Some(slowest) = self.all.iter().filter(|consumer| lag(consumer).1 > 0).max_by_key(lag) else {
            return "No consumer is behind.".to_owned();
        };
        let (bytes, events) = lag(&slowest);
        format!(
            "The slowest is {}: {} events, {} bytes behind. It holds {} bytes of segments, {} of them alone.",
            slowest.name,
            grouped(events),
            grouped(bytes),
            grouped(slowest.sum(|at| at.held_bytes)),
            grouped(slowest.sum(|at| at.held_alone_bytes))
        )
    }
}

/// Checks a consumer's files and tells `problem` what does not hold. `None`: there is no such consumer.
pub(super) fn check(store: &Store, name: &str, problem: &mut dyn FnMut(String)) -> Result<Option<Checked>, Failure> {
    let Some(consumer) = look_at(store, name, problem)? else { return Ok(None) };
    for (request, why) in outside::broken_requests(store, name)? {
        problem(format!("{request} is put aside when the consumer starts: {why}"));
    }
    let letters = consumer.letters.map_or(0, |(found, _)| found.letters);
    let line = format!("{} dead letters, {} requests", grouped(letters as u64), consumer.requests);
    let positions = consumer.places.iter().map(|place| place.position).collect();
    Ok(Some(Checked { line, positions, reaches: consumer.reaches, seen: consumer.seen }))
}

fn look_at(store: &Store, name: &str, problem: &mut dyn FnMut(String)) -> Result<Option<Consumer>, Failure> {
    let mut consumer = Consumer {
        name: name.to_owned(),
        places: Vec::new(),
        requests: 0,
        letters: None,
        reaches: Vec::new(),
        seen: Vec::new(),
    };
    match outside::registered(store, name) {
        Ok(None) => return Ok(None),
        Ok(Some(registered)) if registered.positions.len() != usize::from(store.shards()) => {
            problem(format!(
                "its checkpoint is of {} shards, the store has {}",
                registered.positions.len(),
                store.shards()
            ));
        }
        Ok(Some(registered)) => {
            consumer.requests = registered.requests;
            consumer.reaches.clone_from(&registered.reaches);
            consumer.seen.clone_from(&registered.seen);
            let places = registered.positions.iter().map(|&position| Place { position, ..Place::default() });
            consumer.places = places.collect();
            for (shard, position) in store.shard_ids().zip(&registered.positions) {
                let horizon = store.horizon(shard)?;
                if *position > horizon {
                    problem(format!(
                        "shard {shard}: its position {position} lies behind the end of the log, {horizon}"
                    ));
                }
            }
        }
        Err(error) => tell_damage(error.into(), problem)?,
    }
    match DeadLetters::open(store, name) {
        Ok(letters) => consumer.letters = Some((letters.statistics(), letters.keys().count())),
        Err(error) => tell_damage(error.into(), problem)?,
    }
    Ok(Some(consumer))
}

/// Damage is told; anything else is an error.
fn tell_damage(failure: Failure, problem: &mut dyn FnMut(String)) -> Result<(), Failure> {
    if !failure.is_damage() {
        return Err(failure);
    }
    problem(failure.to_string());
    Ok(())
}
