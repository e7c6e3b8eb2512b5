//! The driver: decides what a consumer does next. It owns no thread, waits for nothing, and takes the time as an
//! argument.
//!
//! One writer: its owner. A [`ShardFollower`] per shard reads the log into key queues. The driver hands out the queues'
//! events as [`Job`]s, and takes each job back with its outcome. Its parts, each with its own state:
//!
//! | part | owns |
//! |---|---|
//! | [`AdmissionControl`] | the service's health, jitter and failing events; decides whether the handler may be called, and what follows a failure |
//! | [`Records`] | dead letters, skips, reprocessing |
//! | [`PositionSaver`] | the position file, from which a restart continues |
//! | [`HandledWaiters`] | callers that wait for an event |
//! | [`Suspension`] | pauses and halts |
//! | [`RequestRunner`] | requests left in the consumer's folder |

mod admission;
mod follower;
pub(super) mod job;
mod records;
mod reprocessing;
mod requested;
mod saving;
mod suspension;
mod waiters;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::assigned_shard::AssignedShard;
use super::dead_letter::answer::WriteRefused;
use super::dead_letter::selector::LetterSelector;
use super::dead_letter::{FileEnd, LetterStore};
use super::error::ConsumerError;
use super::health::{CallPermit, Health};
use super::key_queues::answer::{InFlight, Verdict};
use super::outcome::{HaltCause, Handled};
use super::settings::{Settings, Start};
use super::watches::Watches;
use crate::clock::wall_now;
use crate::error::ReadError;
use crate::event::{Event, Key, Offset, Router};
use crate::log::reader::Reader;
use crate::storage::Storage;
use crate::sync::Keeping;
use admission::AdmissionControl;
pub(super) use follower::ShardFollower;
use job::{Failed, Handler, Job, Work};
use records::{RecordContext, Records};
use requested::RequestRunner;
use saving::PositionSaver;
use suspension::Suspension;
use waiters::HandledWaiters;

/// The state of one consumer.
pub(crate) struct Driver<E: Event> {
    settings: Arc<Settings>,
    followers: Vec<ShardFollower<E>>,
    router: Router,
    /// The shard whose event is handed out next, if it has one.
    next_shard: usize,
    /// Jobs in flight.
    running: usize,
    /// `true` if the owner calls [`Driver::run_in_place`]: only events that cannot run in place become jobs.
    is_in_place: bool,
    admission: AdmissionControl,
    records: Records,
    saver: PositionSaver,
    waiters: HandledWaiters,
    suspension: Suspension,
    requests: RequestRunner,
    /// Changes of the position that wait until no job is in flight. Meanwhile no job is handed out.
    seeks: Vec<(Start, Keeping<Result<(), ConsumerError>>)>,
}

impl<E: Event> std::fmt::Debug for Driver<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("name", &self.settings.name).finish_non_exhaustive()
    }
}

impl<E: Event> Driver<E> {
    /// Returns a driver that continues from the progress of `shards`. The dead letters in `dir` must reach to
    /// `letters`.
    pub(crate) fn open(
        settings: Settings,
        storage: Arc<dyn Storage>,
        dir: PathBuf,
        shards: Vec<AssignedShard>,
        letters: FileEnd,
        router: Router,
    ) -> Result<Self, ConsumerError> {
        let (settings, saved_letters) = (Arc::new(settings), letters);
        let name = &settings.name;
        let letters = LetterStore::open(Arc::clone(&storage), &dir, settings.letters.clone(), letters, shards.len())?;
        let mut followers = Vec::with_capacity(shards.len());
        for shard in shards {
            followers.push(ShardFollower::open(shard, &settings, &letters)?);
        }
        for (key, shard, count) in letters.keys() {
            followers[usize::from(shard.0)].restore_parked(key, count)?;
        }
        Ok(Self {
            admission: AdmissionControl::new(Arc::clone(&settings))?,
            records: Records::new(name, dir.clone(), letters),
            saver: PositionSaver::new(name, storage, dir, settings.save_every, saved_letters),
            waiters: HandledWaiters::default(),
            suspension: Suspension::none(name),
            requests: RequestRunner::new(name),
            settings,
            followers,
            router,
            next_shard: 0,
            running: 0,
            is_in_place: false,
            seeks: Vec::new(),
        })
    }

    /// Splits the records from the other parts that writing them involves.
    fn records(&mut self) -> (&mut Records, RecordContext<'_, E>) {
        let Self { records, followers, saver, waiters, suspension, .. } = self;
        (records, RecordContext { followers, saver, waiters, suspension })
    }

    /// Does a bounded piece of all work except calling handlers: writes records, carries out requests, wakes keys whose
    /// time has come, reads the log, answers waiters, and saves. `is_idle` says that the previous step found nothing to
    /// do. Returns the work done.
    pub(crate) fn step(&mut self, now: Duration, is_idle: bool) -> Result<usize, ConsumerError> {
        let sought = self.carry_out_seeks();
        let Self { requests, records, followers, saver, waiters, suspension, .. } = self;
        let mut context = RecordContext { followers, saver, waiters, suspension };
        let mut work = sought + records.write(now, is_idle, &mut context);
        work += requests.carry_out(now, records, &mut context);
        work += self.read(now)?;
        work += usize::from(self.save_if_due(now));
        Ok(work)
    }

    /// Does the part of [`Driver::step`] that writes no file: wakes keys whose time has come, reads the log, and answers
    /// waiters. Returns the work done.
    pub(crate) fn read(&mut self, now: Duration) -> Result<usize, ConsumerError> {
        let mut work = 0;
        let is_in_place = self.is_in_place && self.admission.is_healthy();
        for follower in &mut self.followers {
            work += follower.queues.tick(now);
            if !self.suspension.is_active() {
                work += follower.offer(&self.settings, self.records.letters(), is_in_place)?;
            }
        }
        // Answer waiters before a save, which forgets the records below the position.
        self.answer_waiters();
        Ok(work)
    }

    /// Returns the next event that may be handled now, with a permit from the service's health.
    pub(crate) fn next_job(&mut self, now: Duration) -> Result<Option<Job>, ConsumerError> {
        // Letters that are handled make room for others, so they may run although there is no room.
        let is_full = self.suspension.is_full();
        let is_halted = self.suspension.is_halted() && !is_full;
        let may_run = self.running < self.settings.concurrency && !is_halted && !self.suspension.is_paused();
        if !may_run || !self.seeks.is_empty() || !self.admission.may_admit(now) {
            return Ok(None);
        }
        // Letters first: they are older than all other events of their keys.
        if let Some((shard, letter)) = self.records.next_letter(&self.followers, &self.suspension)? {
            return match self.admission.admit(now) {
                Some(permit) => Ok(Some(self.job(shard, letter, permit))),
                None => {
                    self.records.put_back(&letter);
                    Ok(None)
                }
            };
        }
        if is_full {
            return Ok(None);
        }
        let count = self.followers.len();
        let shards = || (0..count).map(|i| (self.next_shard + i) % count);
        let any = || shards().find(|shard| self.followers[*shard].queues.may_run());
        let is_healthy = self.admission.is_healthy();
        let shard = if is_healthy {
            any()
        } else {
            shards().find(|shard| self.followers[*shard].queues.has_fresh()).or_else(any)
        };
        let Some(shard) = shard else { return Ok(None) };
        let Some(permit) = self.admission.admit(now) else { return Ok(None) };
        self.next_shard = shard + 1;
        let queues = &mut self.followers[shard].queues;
        let event = if is_healthy {
            queues.next()
        } else {
            // Choose at random: the first events may be the very ones at fault.
            queues.next_fresh(self.admission.draw(queues.ready()))
        };
        let event = event.expect("an event may run");
        Ok(Some(self.job(shard, Work::Event(event), permit)))
    }

    fn job(&mut self, shard: usize, work: Work, permit: CallPermit) -> Job {
        self.running += 1;
        Job::new(shard, work, permit, self.followers[shard].effects_from)
    }

    /// Takes a job back with its outcome.
    pub(crate) fn done(&mut self, job: Job, outcome: Result<(), Failed>, now: Duration) -> Result<(), ConsumerError> {
        self.running -= 1;
        let failed = match outcome {
            Ok(()) => None,
            // Neither the event nor the service failed: the consumer ends, and its position stays before the event.
            Err(Failed::Unreadable(error)) => return Err(error.into()),
            Err(failed) => Some(failed),
        };
        let attempt = job.attempt();
        let Job { shard, work, permit, .. } = job;
        let event = match &work {
            Work::Event(event) => Some(self.followers[shard].id(event.offset())),
            Work::Letter { .. } => None,
        };
        let verdict = self.admission.judge(permit, event, failed.as_ref(), attempt, now);
        match (work, failed.zip(verdict)) {
            (Work::Event(event), None) => {
                let follower = &mut self.followers[shard];
                self.admission.succeeded(follower.id(event.offset()));
                follower.queues.succeeded(event);
                Ok(())
            }
            (Work::Event(event), Some((failed, verdict))) => self.failed(shard, event, &failed, verdict, now),
            (Work::Letter { letter, .. }, failed) => {
                self.records.letter_done(&letter, failed.map(|(failed, _)| failed));
                Ok(())
            }
        }
    }

    /// Carries out the verdict on an event that failed.
    fn failed(
        &mut self,
        shard: usize,
        event: InFlight,
        failed: &Failed,
        verdict: Verdict,
        now: Duration,
    ) -> Result<(), ConsumerError> {
        let follower = &mut self.followers[shard];
        let (id, key) = (follower.id(event.offset()), event.key());
        let wall = wall_now();
        let first_failed = self.admission.failed(id, event.attempt(), verdict, wall);
        if verdict == Verdict::Halt {
            self.suspension.halt(HaltCause::Event { id, key, error: failed.to_string() });
        }
        if let Some(record) = follower.queues.failed(event, verdict, now) {
            match follower.letter(&record, Some(failed), first_failed, wall) {
                Ok(letter) => self.records.add(shard, record, letter),
                Err(error) => {
                    // The verdict stands; recording it is tried again.
                    follower.queues.not_recorded(record);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Handles events in place as they are read, if their keys have no unfinished events and the service is healthy.
    /// Stops after `budget` events, or when `is_called` returns `true`. Events that fail go to the key queues. Returns
    /// the number of events handled.
    pub(crate) fn run_in_place(
        &mut self,
        budget: usize,
        mut now: impl FnMut() -> Duration,
        mut is_called: impl FnMut() -> bool,
        handler: &mut Handler<'_, E>,
    ) -> Result<usize, ConsumerError> {
        let mut work = 0;
        self.is_in_place = true;
        let is_held = self.suspension.is_active() || !self.seeks.is_empty();
        if is_held || !self.admission.is_healthy() || self.running > 0 {
            return Ok(0);
        }
        for shard in 0..self.followers.len() {
            let follower = &mut self.followers[shard];
            let (handled, failed) =
                follower.run_in_place(budget, &self.settings, self.records.letters(), &mut is_called, handler)?;
            work += handled as usize;
            let now = now();
            self.admission.succeeded_in_place(handled, now);
            if let Some((event, failed)) = failed {
                let permit = self.admission.admit(now).expect("a healthy service stays healthy until a failure");
                let job = self.job(shard, Work::Event(event), permit);
                self.done(job, Err(failed), now)?;
                work += 1;
            }
        }
        Ok(work)
    }

    /// Returns the time at which [`Driver::step`] or [`Driver::next_job`] may have something to do without new events.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        let queues = self.followers.iter().filter_map(|follower| follower.queues.next_due()).min();
        let is_runnable =
            self.records.has_letters_to_handle() || self.followers.iter().any(|follower| follower.queues.may_run());
        // Only letters are handled while there is no room for more.
        let is_suspended = self.suspension.is_paused() || (self.suspension.is_halted() && !self.suspension.is_full());
        // A job in flight that uses the last place, or that a seek waits for, comes back first.
        let has_place = self.running < self.settings.concurrency && self.seeks.is_empty();
        let admitted = self.admission.due().filter(|_| is_runnable && has_place && !is_suspended);
        let records = self.records.due(&self.followers, &self.suspension);
        let save = self.saver.due(&self.followers, self.records.letters().durable());
        [queues, admitted, records, save, Some(self.requests.due())].into_iter().flatten().min()
    }

    /// Returns `true` if the next [`Driver::step`] or [`Driver::next_job`] may wait for the disk: files are due, or the
    /// next event is in an older segment. The newest segment is in memory, since the shard writes it.
    #[cfg(feature = "tokio")]
    pub(crate) fn may_block(&self, now: Duration) -> bool {
        !self.seeks.is_empty()
            || self.requests.due() <= now
            || self.records.has_letters_to_handle()
            || self.records.due(&self.followers, &self.suspension).is_some_and(|due| due <= now)
            || self.saver.is_due(now, &self.followers, self.records.letters().durable())
            || (self.may_read() && self.followers.iter().any(ShardFollower::is_in_older_segment))
    }

    /// Returns `false` while the consumer is paused or halted.
    pub(crate) fn may_read(&self) -> bool {
        !self.suspension.is_active()
    }

    /// Returns `true` if a log has an event that may be read now.
    pub(crate) fn has_unread(&self) -> bool {
        let has_unread = |follower: &ShardFollower<E>| follower.has_room(&self.settings) && follower.has_unread();
        self.may_read() && self.followers.iter().any(has_unread)
    }

    pub(crate) fn followers(&self) -> &[ShardFollower<E>] {
        &self.followers
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn letters(&self) -> &LetterStore {
        self.records.letters()
    }

    pub(crate) fn health(&self) -> &Health {
        self.admission.health()
    }

    pub(crate) fn halted(&self) -> Option<&HaltCause> {
        self.suspension.halted()
    }

    pub(crate) fn running(&self) -> usize {
        self.running
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.suspension.is_paused()
    }

    /// Returns the numbers of failed position saves and of failed record writes.
    pub(crate) fn write_failures(&self) -> (u64, u64) {
        (self.saver.failures(), self.records.failures())
    }

    /// Stops handing out events until [`Driver::resume`]. Returns `true` if it was paused before.
    pub(crate) fn pause(&mut self) -> bool {
        self.suspension.pause()
    }

    /// Ends a pause or a halt.
    pub(crate) fn resume(&mut self) {
        self.suspension.end();
        self.followers.iter_mut().for_each(|follower| follower.queues.resume());
    }

    /// Lets the key's first event run, if it waits for a gap to be filled. Returns `true` if it did.
    pub(crate) fn gap_filled(&mut self, key: Key) -> bool {
        self.followers[self.router.index(key)].queues.gap_filled(key)
    }

    /// Returns the events that callers will ask about.
    pub(crate) fn watches(&self) -> &Arc<Watches> {
        self.waiters.watches()
    }

    /// Keeps the promise when the key's events up to `offset` are done. The promise's value says how the event at
    /// `offset` ended.
    pub(crate) fn wait_for(&mut self, key: Key, offset: Offset, keeping: Keeping<Handled>) {
        let shard = self.router.index(key);
        self.waiters.add(shard, key, offset, keeping);
    }

    /// Keeps the promise once the driver has caught up: when it finds that every visible event is done.
    pub(crate) fn wait_for_all(&mut self, keeping: Keeping<()>) {
        self.waiters.add_for_all(keeping);
    }

    fn answer_waiters(&mut self) {
        self.waiters.answer(&self.followers, self.records.letters());
    }

    /// Keeps the promises of [`Driver::wait_for_all`] if every event that is visible now is done. Call it after the
    /// report was renewed: a caller looks there next.
    pub(crate) fn answer_if_caught_up(&mut self) {
        if self.waiters.awaits_all() && self.is_caught_up() {
            self.waiters.answer_for_all();
        }
    }

    /// Returns `true` if every event that is visible now is done.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.running == 0 && self.records.is_empty() && self.followers.iter().all(ShardFollower::is_caught_up)
    }

    /// Starts handling letters again; see [`super::Consumer::reprocess`].
    pub(crate) fn reprocess(&mut self, selector: LetterSelector) -> usize {
        self.records.reprocess(selector)
    }

    /// Discards letters; see [`super::Consumer::discard`].
    pub(crate) fn discard(&mut self, selector: LetterSelector) -> Result<u64, ConsumerError> {
        let (records, mut context) = self.records();
        records.discard(selector, &mut context)
    }

    /// Writes the outcomes of letters, if there are any.
    pub(crate) fn write_outcomes(&mut self, now: Duration) {
        let (records, mut context) = self.records();
        records.write_outcomes(now, &mut context);
    }

    fn save_if_due(&mut self, now: Duration) -> bool {
        let is_due = self.saver.is_due(now, &self.followers, self.records.letters().durable());
        if is_due {
            let saved = self.save_position();
            self.saver.attempted(now, saved);
        }
        is_due
    }

    fn save_position(&mut self) -> Result<(), ConsumerError> {
        let (records, mut context) = self.records();
        records.save_position(&mut context)
    }

    /// Saves the position, the records of parked and skipped events, and the outcomes of letters. Durable when it
    /// returns.
    pub(crate) fn save(&mut self) -> Result<(), ConsumerError> {
        let (records, mut context) = self.records();
        let written = records.write_all(&mut context);
        // The position does not pass events that are not recorded.
        records.save_position(&mut context)?;
        written
    }

    /// Sets the consumer to another position as soon as no job is in flight, unless the promise is dropped before. Until
    /// then no job is handed out. Ends a halt.
    pub(crate) fn seek_when_idle(&mut self, start: Start, keeping: Keeping<Result<(), ConsumerError>>) {
        self.seeks.push((start, keeping));
    }

    /// Answers the waiters that need nothing more, and carries out changes of the position if no job is in flight.
    #[cfg(feature = "tokio")]
    pub(crate) fn answer_handles(&mut self) {
        self.carry_out_seeks();
        self.answer_waiters();
    }

    /// Carries out waiting changes of the position. Returns their number.
    fn carry_out_seeks(&mut self) -> usize {
        self.seeks.retain(|(_, keeping)| !keeping.is_abandoned());
        if self.seeks.is_empty() || self.running > 0 {
            return 0;
        }
        let seeks = std::mem::take(&mut self.seeks);
        let count = seeks.len();
        for (start, keeping) in seeks {
            let sought = self.seek(start);
            if !self.suspension.is_paused() {
                self.resume();
            }
            keeping.keep(sought);
        }
        count
    }

    /// Sets the consumer to another position. No job may be in flight. Side effects of events below the old position do
    /// not run again, and dead letters stay.
    pub(crate) fn seek(&mut self, start: Start) -> Result<(), ConsumerError> {
        assert_eq!(self.running, 0, "a consumer is set to another position while no job is in flight");
        self.answer_waiters();
        let (records, mut context) = self.records();
        let written = match records.write_all(&mut context) {
            full @ (Ok(()) | Err(ConsumerError::Records(WriteRefused::Full))) => full,
            Err(error) => return Err(error),
        };
        // From here on the position says which events have ended, not the records. If the position is set back, those
        // events come again.
        records.save_position(&mut context)?;
        records.forget_ended()?;
        // Retention frees nothing from here on, so the readers' positions stay valid.
        self.followers.iter().for_each(ShardFollower::hold_everything);
        let readers = match self.readers_at(start, written) {
            Ok(readers) => readers,
            Err(error) => {
                // The position does not change.
                self.followers.iter().for_each(|follower| follower.hold_from(follower.queues.position()));
                return Err(error);
            }
        };
        // Events that are not recorded yet are read from the log again.
        self.records.forget_unwritten();
        self.admission.forget_failures();
        for (follower, reader) in self.followers.iter_mut().zip(readers) {
            // The saved position counts until the new one is saved.
            follower.hold_from(follower.queues.position().min(reader.offset()));
            follower.set_to(reader, &self.settings, self.records.letters());
        }
        for (key, shard, count) in self.records.letters().keys() {
            self.followers[usize::from(shard.0)].restore_parked(key, count)?;
        }
        self.save_position()
    }

    /// Returns readers at `start`. If `written` is an error, some events could not be recorded, and the new position
    /// must not leave them behind.
    fn readers_at(&self, start: Start, written: Result<(), ConsumerError>) -> Result<Vec<Reader<E>>, ConsumerError> {
        let readers: Result<Vec<_>, ReadError> =
            self.followers.iter().map(|follower| follower.reader_at(start)).collect();
        let readers = readers?;
        match written {
            Err(full) if self.records.judged().any(|(shard, offset)| offset < readers[shard].offset()) => Err(full),
            _ => Ok(readers),
        }
    }
}
