//! The driver: what a consumer does next, as plain data driven from outside. It owns no thread, waits for nothing, and is told
//! the time.
//!
//! One writer: whoever owns it. Per shard a [`Desk`] reads the log into lanes; here their events are given out as [`Job`]s and
//! come back with an outcome. Failures become retries, dead letters or skips; those that end by a record end when the record is durable
//! (`records.rs`); how far all of it is done is saved (`saving.rs`), and from that a restart goes on.

mod asked;
mod desk;
pub(super) mod execute;
mod records;
mod saving;

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::dead_letter::answer::DeadLetter;
use super::dead_letter::{FileEnd, Letters as LetterStore};
use super::error::ConsumerError;
use super::health::{Admission, CallPermit, Health, HealthChange, HealthStatus};
use super::requests::Requests;
use super::retry::{AfterFailure, JitterRng};
use super::settings::{Exhausted, Judgement, Settings};
use super::watches::Watches;
use crate::clock::wall_now;
use crate::consumer::key_queues::answer::{InFlight, ToRecord, Verdict};
use crate::error::ReadError;
use crate::error::panic_text;
use crate::event::{Event, EventId, Key, Offset, Time};
use crate::storage::Storage;
use crate::sync::Keeping;
pub(super) use desk::{Desk, Place};
pub(super) use execute::{Failed, Job, What};
pub use records::Letters;
use records::{Reprocessing, Tried, Unwritten};
use saving::Saving;
pub(super) use saving::start_position;

/// Why a consumer runs nothing until it is told to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum HaltCause {
    /// A failed attempt was judged so, or its attempts were used up.
    Event {
        /// Which event; it is first in line.
        id: EventId,
        /// Whose.
        key: Key,
        /// What the handler said.
        error: String,
    },
    /// There is no room for more dead letters.
    DeadLettersFull,
    /// A sink could not take a batch in, and its attempts are used up.
    Batch {
        /// What the sink said.
        error: String,
    },
}

/// How an event ended that a caller waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// It was handled (or its type is none of this consumer's).
    Yes,
    /// It is recorded as a dead letter, or as left out.
    Recorded,
    /// The consumer has passed it, and how it ended is not known: the consumer began or was set behind it, or has saved its position
    /// since and forgotten the records before that.
    Unknown,
}

/// A waiter for a key's unfinished events.
struct Waiting {
    desk: usize,
    key: Key,
    offset: Offset,
    keeping: Keeping<Handled>,
}

/// An event that failed.
struct Failing {
    /// When it failed for the first time.
    since: Time,
    /// How many calls had gone well until then.
    successes: u64,
}

/// A consumer's side of things.
pub(crate) struct Driver<E: Event> {
    settings: Settings,
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    desks: Vec<Desk<E>>,
    next_desk: usize,
    /// Jobs that are out.
    running: usize,
    health: Health,
    /// Nothing runs before this: the service is not well.
    admitted_at: Duration,
    rng: JitterRng,
    letters: LetterStore,
    /// Events that failed and wait for a retry.
    failing: HashMap<EventId, Failing>,
    /// Calls that went well, letters' included; and as many as there were when a letter failed last.
    successes: u64,
    successes_at_letter: u64,
    unwritten: VecDeque<Unwritten>,
    tried: VecDeque<Tried>,
    /// After a write that failed, the next is tried then.
    write_at: Duration,
    /// The log is not durable as far as events that are to be recorded; it is looked at again then.
    durable_at: Duration,
    /// While there is other work, nothing is written before this.
    gather_until: Duration,
    reprocessing: Reprocessing,
    requests: Requests,
    is_paused: bool,
    halted: Option<HaltCause>,
    /// [`Driver::run_in_place`] is called: only what cannot run there is given out as jobs.
    is_in_place: bool,
    saving: Saving,
    waiting: Vec<Waiting>,
    watches: Arc<Watches>,
}

impl<E: Event> std::fmt::Debug for Driver<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("name", &self.settings.name).finish_non_exhaustive()
    }
}

impl<E: Event> Driver<E> {
    /// A driver that goes on from what is saved in `dir`; `places` are the shards' logs, each with the hold that keeps what is
    /// not done; its `letters` must reach that far.
    pub(crate) fn open(
        settings: Settings,
        storage: Arc<dyn Storage>,
        dir: PathBuf,
        places: Vec<Place>,
        letters: FileEnd,
    ) -> Result<Self, ConsumerError> {
        let (policy, saved_letters) = (settings.letters.clone(), letters);
        let letters = LetterStore::open(Arc::clone(&storage), &dir, policy, letters, places.len())?;
        let mut desks = Vec::with_capacity(places.len());
        for place in places {
            desks.push(Desk::open(place, &settings, &letters)?);
        }
        for (key, shard, count) in letters.keys() {
            desks[usize::from(shard.0)].restore_parked(key, count)?;
        }
        Ok(Self {
            health: Health::new(&settings.name, settings.health.clone())?,
            rng: JitterRng::seeded(settings.jitter_seed),
            saving: Saving::new(settings.checkpoint_every, saved_letters),
            settings,
            storage,
            dir,
            desks,
            next_desk: 0,
            running: 0,
            admitted_at: Duration::ZERO,
            letters,
            failing: HashMap::new(),
            successes: 0,
            successes_at_letter: 0,
            unwritten: VecDeque::new(),
            tried: VecDeque::new(),
            write_at: Duration::ZERO,
            durable_at: Duration::ZERO,
            gather_until: Duration::ZERO,
            reprocessing: Reprocessing::default(),
            requests: Requests::default(),
            is_paused: false,
            halted: None,
            is_in_place: false,
            waiting: Vec::new(),
            watches: Arc::default(),
        })
    }

    /// A bounded piece of everything that is not a handler's: writes records, takes up requests, moves keys whose time has come, reads,
    /// tells who waits, saves. `is_idle` says that nothing else was to be done since the last one. Returns the work done.
    pub(crate) fn step(&mut self, now: Duration, is_idle: bool) -> Result<usize, ConsumerError> {
        let mut work = self.write_records(now, is_idle);
        work += self.carry_out_requests(now);
        let is_in_place = self.is_in_place && self.health.is_healthy();
        for desk in &mut self.desks {
            work += desk.lanes.tick(now);
            if self.halted.is_none() && !self.is_paused {
                work += desk.offer(&self.settings, &self.letters, is_in_place)?;
            }
        }
        // Before records are forgotten because the checkpoint is past them.
        self.tell_waiting();
        work += usize::from(self.save_if_due(now));
        Ok(work)
    }

    /// The next event that may run now, with leave from the service's health.
    pub(crate) fn next_job(&mut self, now: Duration) -> Result<Option<Job>, ConsumerError> {
        // Letters that are handled make room for others, so they may run where there is none.
        let is_full = self.halted == Some(HaltCause::DeadLettersFull);
        let is_halted = self.halted.is_some() && !is_full;
        if self.running >= self.settings.concurrency || is_halted || self.is_paused || now < self.admitted_at {
            return Ok(None);
        }
        // Letters first: they are older than anything else of their keys.
        if let Some((desk, letter)) = self.next_letter()? {
            return match self.admit(now) {
                Some(pass) => Ok(Some(self.job(desk, letter, pass))),
                None => {
                    self.reprocessing.put_back(letter);
                    Ok(None)
                }
            };
        }
        if is_full {
            return Ok(None);
        }
        let count = self.desks.len();
        let desks = || (0..count).map(|i| (self.next_desk + i) % count);
        let any = || desks().find(|desk| self.desks[*desk].lanes.may_run());
        let is_healthy = self.health.is_healthy();
        let desk =
            if is_healthy { any() } else { desks().find(|desk| self.desks[*desk].lanes.has_fresh()).or_else(any) };
        let Some(desk) = desk else { return Ok(None) };
        let Some(pass) = self.admit(now) else { return Ok(None) };
        self.next_desk = desk + 1;
        let lanes = &mut self.desks[desk].lanes;
        let run = if is_healthy {
            lanes.next()
        } else {
            // Any of them, for those that stand first may be the very ones at fault.
            lanes.next_fresh((self.rng.next_fraction() * lanes.ready() as f64) as usize)
        };
        let run = run.expect("one may run");
        Ok(Some(self.job(desk, What::Event(run), pass)))
    }

    fn job(&mut self, desk: usize, what: What, pass: CallPermit) -> Job {
        self.running += 1;
        Job::new(desk, what, pass, self.desks[desk].effects_from)
    }

    fn admit(&mut self, now: Duration) -> Option<CallPermit> {
        match self.health.admit(now) {
            Admission::Go(pass) => Some(pass),
            Admission::Wait { until } => {
                // A probe that is out may come back earlier; then this is looked at again.
                self.admitted_at = until;
                None
            }
        }
    }

    /// A job comes back.
    pub(crate) fn done(&mut self, job: Job, outcome: Result<(), Failed>, now: Duration) -> Result<(), ConsumerError> {
        self.running -= 1;
        let outcome = match outcome {
            // Not the event's failure, nor the service's: the consumer ends, and its position stays before it.
            Err(Failed::Unreadable(error)) => return Err(error.into()),
            outcome => outcome,
        };
        let attempt = job.attempt();
        let Job { desk, what, pass, .. } = job;
        let judgement = outcome.as_ref().err().map(|failed| self.judgement(failed, attempt));
        self.successes += u64::from(judgement.is_none());
        if !judgement.is_some_and(Judgement::is_of_service) {
            self.noticed(now, |health| health.succeeded(pass, now));
        } else if self.is_news(desk, &what) {
            self.noticed(now, |health| health.failed(pass, now));
        } else {
            self.noticed(now, |health| {
                health.told_nothing(pass, now);
                None
            });
        }
        let verdict = judgement.map(|judgement| self.verdict(judgement, attempt));
        match (what, outcome.err().zip(verdict)) {
            (What::Event(run), None) => {
                self.failing.remove(&self.desks[desk].id(run.offset()));
                self.desks[desk].lanes.succeeded(run);
                Ok(())
            }
            (What::Event(run), Some((failed, verdict))) => self.failed(desk, run, &failed, verdict, now),
            (What::Letter { letter, .. }, failed) => {
                self.letter_done(&letter, failed.map(|(failed, _)| failed));
                Ok(())
            }
        }
    }

    /// Whether a failure tells something about the service. If others went well since the same event failed first, it is the
    /// event's own: a few that always fail must not hold up all others.
    fn is_news(&mut self, desk: usize, what: &What) -> bool {
        match what {
            What::Event(run) => {
                let failing = self.failing.get(&self.desks[desk].id(run.offset()));
                failing.is_none_or(|failing| failing.successes == self.successes)
            }
            What::Letter { .. } => std::mem::replace(&mut self.successes_at_letter, self.successes) == self.successes,
        }
    }

    fn noticed(&mut self, now: Duration, report: impl FnOnce(&mut Health) -> Option<HealthChange>) {
        let change = report(&mut self.health);
        self.admitted_at = match self.health.status() {
            HealthStatus::Healthy => now,
            HealthStatus::Unhealthy { probe_at } => probe_at,
            HealthStatus::Probing { give_up_at } => give_up_at,
        };
        HealthChange::note(change, &self.settings.name);
    }

    /// An event failed: what becomes of it.
    fn failed(
        &mut self,
        desk: usize,
        run: InFlight,
        failed: &Failed,
        verdict: Verdict,
        now: Duration,
    ) -> Result<(), ConsumerError> {
        let (id, key) = (self.desks[desk].id(run.offset()), run.key());
        let wall = wall_now();
        let failing = Failing { since: wall, successes: self.successes };
        let first_failed = self.failing.entry(id).or_insert(failing).since;
        match verdict {
            Verdict::Park | Verdict::Skip => {
                self.failing.remove(&id);
            }
            Verdict::AwaitGap if run.attempt() == 1 => {
                self.failing.remove(&id);
            }
            Verdict::Halt => self.halt(HaltCause::Event { id, key, error: failed.to_string() }),
            Verdict::Retry { .. } | Verdict::AwaitGap => {}
        }
        if let Some(record) = self.desks[desk].lanes.failed(run, verdict, now) {
            match self.letter(desk, &record, Some(failed), (first_failed, wall)) {
                Ok(letter) => self.unwritten.push_back(Unwritten { desk, record, letter }),
                Err(error) => {
                    // It was told all the same, and is tried again.
                    self.desks[desk].lanes.not_recorded(record);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    fn halt(&mut self, cause: HaltCause) {
        tracing::error!(consumer = &*self.settings.name, ?cause, "a consumer halts until it is told to go on");
        self.halted.get_or_insert(cause);
    }

    fn judgement(&self, failed: &Failed, attempt: u32) -> Judgement {
        match (failed, &self.settings.judge) {
            (Failed::Undecodable | Failed::Unreadable(_), _) => Judgement::Park,
            (Failed::Handler(error), Some(judge)) => {
                let judged = catch_unwind(AssertUnwindSafe(|| judge(error, attempt)));
                judged.unwrap_or_else(|panic| {
                    let panic = panic_text(&*panic);
                    tracing::error!(consumer = &*self.settings.name, %error, panic, "the judge panicked; the policy decides");
                    Judgement::ByPolicy
                })
            }
            (Failed::Handler(_) | Failed::Panic(_), _) => Judgement::ByPolicy,
        }
    }

    fn verdict(&mut self, judgement: Judgement, attempt: u32) -> Verdict {
        match judgement {
            Judgement::RetryIn(after) => Verdict::Retry { after },
            Judgement::AwaitGap => Verdict::AwaitGap,
            Judgement::Park => Verdict::Park,
            Judgement::Skip => Verdict::Skip,
            Judgement::Halt => Verdict::Halt,
            Judgement::ByPolicy => match self.settings.retry.after(attempt, &mut self.rng) {
                AfterFailure::RetryIn(after) => Verdict::Retry { after },
                AfterFailure::GiveUp => match self.settings.exhausted {
                    Exhausted::Park => Verdict::Park,
                    Exhausted::Skip => Verdict::Skip,
                    Exhausted::Halt => Verdict::Halt,
                },
            },
        }
    }

    /// Runs events where they lie, as they are read: those of keys at rest, while the service is well and until `budget` are
    /// handled or `is_called` says that somebody wants something. What fails goes into the lanes. Returns how many were handled.
    pub(crate) fn run_in_place(
        &mut self,
        budget: usize,
        mut now: impl FnMut() -> Duration,
        mut is_called: impl FnMut() -> bool,
        handler: &mut execute::Handler<'_, E>,
    ) -> Result<usize, ConsumerError> {
        let mut work = 0;
        self.is_in_place = true;
        if self.halted.is_some() || self.is_paused || !self.health.is_healthy() || self.running > 0 {
            return Ok(0);
        }
        for at in 0..self.desks.len() {
            let desk = &mut self.desks[at];
            let (handled, failed) =
                desk.run_in_place(budget, &self.settings, &self.letters, &mut is_called, handler)?;
            work += handled as usize;
            let now = now();
            self.successes += handled;
            self.health.succeeded_while_healthy(handled, now);
            if let Some((run, failed)) = failed {
                let pass = self.admit(now).expect("the service was well a moment ago, and only a failure changes that");
                let job = self.job(at, What::Event(run), pass);
                self.done(job, Err(failed), now)?;
                work += 1;
            }
        }
        Ok(work)
    }

    /// When [`Driver::step`] or [`Driver::next_job`] may have something to do although nothing comes in.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        let lanes = self.desks.iter().filter_map(|desk| desk.lanes.next_due()).min();
        let runnable = self.reprocessing.is_waiting() || self.desks.iter().any(|desk| desk.lanes.may_run());
        let admitted = (runnable && !self.health.is_healthy()).then_some(self.admitted_at);
        let records = self.write_due();
        let requests = Some(self.requests.look_at);
        [lanes, admitted, records, self.save_due(), requests].into_iter().flatten().min()
    }

    /// Whether it would read on, if a log did.
    pub(crate) fn may_read(&self) -> bool {
        self.halted.is_none() && !self.is_paused
    }

    /// Whether a log has something that may be read now.
    pub(crate) fn has_unread(&self) -> bool {
        self.may_read() && self.desks.iter().any(|desk| desk.may_read(&self.settings) && desk.has_unread())
    }

    pub(crate) fn desks(&self) -> &[Desk<E>] {
        &self.desks
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn letters(&self) -> &LetterStore {
        &self.letters
    }

    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    pub(crate) fn halted(&self) -> Option<&HaltCause> {
        self.halted.as_ref()
    }

    pub(crate) fn running(&self) -> usize {
        self.running
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// No event is given out any more, until [`Driver::resume`]. Whether that was so already.
    pub(crate) fn pause(&mut self) -> bool {
        std::mem::replace(&mut self.is_paused, true)
    }

    /// Goes on after a pause or a halt.
    pub(crate) fn resume(&mut self) {
        self.is_paused = false;
        self.halted = None;
        self.desks.iter_mut().for_each(|desk| desk.lanes.resume());
    }

    /// What was missing before the key's first event is there.
    pub(crate) fn gap_filled(&mut self, key: Key) -> bool {
        let shards = self.desks.len() as u16;
        self.desks[usize::from(key.shard(shards).0)].lanes.gap_filled(key)
    }

    /// The events whose end a caller will ask for.
    pub(crate) fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    /// Promises to say when the key's events up to `offset` are done, and how the event there ended.
    pub(crate) fn wait_for(&mut self, key: Key, offset: Offset, keeping: Keeping<Handled>) {
        let desk = usize::from(key.shard(self.desks.len() as u16).0);
        self.waiting.push(Waiting { desk, key, offset, keeping });
    }

    pub(super) fn tell_waiting(&mut self) {
        let (desks, letters) = (&self.desks, &self.letters);
        let mut i = 0;
        while let Some(Waiting { desk, key, offset, .. }) = self.waiting.get(i) {
            let desk = &desks[*desk];
            if !desk.is_done(*key, *offset) {
                i += 1;
                continue;
            }
            let id = desk.id(*offset);
            let handled = if letters.has(*key, id) {
                Handled::Recorded
            } else if *offset < desk.known_from || letters.may_have_forgotten(id) {
                Handled::Unknown
            } else {
                Handled::Yes
            };
            self.waiting.swap_remove(i).keeping.keep(handled);
        }
    }

    /// Whether everything that may be seen now is done.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.running == 0
            && self.unwritten.is_empty()
            && self.tried.is_empty()
            && self.desks.iter().all(Desk::is_caught_up)
    }

    fn letter(
        &mut self,
        desk: usize,
        record: &ToRecord,
        failed: Option<&Failed>,
        (first_failed, last_failed): (Time, Time),
    ) -> Result<DeadLetter, ReadError> {
        self.desks[desk].letter(record, failed, first_failed, last_failed)
    }
}
