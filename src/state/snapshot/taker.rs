//! The shard's side of snapshots and checkpoints: copies states into chunks between its turns, and never waits.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Nanos;
use crate::event::{Offset, Scratch, Sequence, Time};
use crate::lane::requests::CheckpointRequests;
use crate::state::aggregate::Aggregate;
use crate::state::keys::{KeyTable, Slot, Walk};
use crate::state::outcomes::Outcomes;
use crate::state::snapshot::format::Chunk;
use crate::sync::Signal;

/// A message from a shard to the snapshotter, in the order of the log.
#[derive(Debug)]
pub(crate) enum Message {
    Snapshots(Chunk),
    /// A checkpoint begins: the end of the log, and the sequence of the next event.
    Begin {
        start: Offset,
        sequence: Sequence,
        time: Time,
    },
    Checkpoint(Chunk),
    /// The checkpoint has all keys, and no state of an event at or beyond `log_end`.
    End {
        log_end: Offset,
        /// `true` if every state could be saved.
        is_whole: bool,
    },
}

/// Tests for multiples of a fixed number without dividing. A number is a multiple of an odd divisor if its product with
/// the divisor's inverse is small; rotating the product tests for the power of two as well.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Every {
    inverse: u64,
    twos: u32,
    limit: u64,
}

impl Every {
    /// Prepares the test for multiples of `n`, which is not 0.
    pub(crate) fn new(n: u64) -> Self {
        let twos = n.trailing_zeros();
        let odd = n >> twos;
        // Newton's method: each step doubles the number of correct bits, and an odd number is its own inverse in the
        // lowest three.
        let mut inverse = odd;
        for _ in 0..5 {
            inverse = inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse)));
        }
        Self { inverse, twos, limit: u64::MAX / n }
    }

    #[inline]
    pub(crate) fn divides(self, number: u64) -> bool {
        number.wrapping_mul(self.inverse).rotate_right(self.twos) <= self.limit
    }
}

/// The progress of a checkpoint. Keys that have outcomes and no event come first: such a key may get its first event
/// during the walk over the key table and be missed there. Then come all keys with events.
#[derive(Debug, Clone, Copy)]
enum CheckpointWalk {
    Eventless(usize),
    Keys(Walk),
}

/// Slots of the key table that a busy turn walks over: the turn then takes about ten microseconds longer.
const WALK_BUSY: usize = 1024;
/// Slots of the key table that a turn without other work walks over.
const WALK_IDLE: usize = 8192;
/// Slots between two checks of the room left in the chunk.
const WALK_STEP: usize = 128;
/// During a checkpoint, the snapshotter is woken when this many empty chunks are left, not for every chunk.
const CHUNKS_LOW: usize = 4;
/// Messages that one step may send.
const SLOTS_OF_A_STEP: usize = 4;
/// A busy shard sends a chunk of snapshots at most this many turns after the chunk's first snapshot.
const TURNS_MAX: u32 = 256;
/// An idle shard sends a chunk of snapshots when its first snapshot is this old.
const SENT_AFTER: Duration = Duration::from_millis(5);

/// Takes a shard's snapshots and checkpoints.
pub(crate) struct Taker {
    every: Option<Every>,
    checkpoint_bytes: u64,
    requests: Arc<CheckpointRequests>,
    snapshotter: Arc<Signal>,
    messages: rtrb::Producer<Message>,
    /// Empty chunks. Their number is fixed, and so is their memory.
    used: rtrb::Consumer<Chunk>,
    /// The chunk being filled with snapshots.
    chunk: Option<Chunk>,
    turns: u32,
    /// The monotonic time at which a step first saw a snapshot in `chunk`.
    since: Option<Nanos>,
    /// `true` if `since` is at least [`SENT_AFTER`] ago.
    is_due_early: bool,
    scratch: Scratch,
    walk: Option<CheckpointWalk>,
    is_whole: bool,
    /// The log's end when the newest checkpoint began.
    begun_at: u64,
}

impl Taker {
    pub(crate) fn new<A: Aggregate>(
        snapshot_every: u64,
        checkpoint_bytes: u64,
        begun_at: Offset,
        requests: Arc<CheckpointRequests>,
        snapshotter: Arc<Signal>,
        messages: rtrb::Producer<Message>,
        used: rtrb::Consumer<Chunk>,
    ) -> Self {
        Self {
            every: (snapshot_every > 0 && size_of::<A>() > 0).then(|| Every::new(snapshot_every)),
            checkpoint_bytes,
            requests,
            snapshotter,
            messages,
            used,
            chunk: None,
            turns: 0,
            since: None,
            is_due_early: false,
            scratch: Scratch::new(1 << 20),
            walk: None,
            is_whole: true,
            begun_at: begun_at.0,
        }
    }

    /// Returns `true` if a key of this version needs a snapshot.
    #[inline]
    pub(crate) fn is_due(&self, version: u64) -> bool {
        self.every.is_some_and(|every| every.divides(version))
    }

    /// Takes a snapshot of one key, or counts it as skipped if there is no room.
    #[cold]
    pub(crate) fn take<A: Aggregate>(&mut self, slot: &Slot<A>) {
        if self.chunk.as_ref().is_some_and(Chunk::is_full) {
            self.send_snapshots();
        }
        if self.chunk.is_none() {
            self.chunk = self.used.pop().ok();
        }
        let scratch = &mut self.scratch;
        if !self.chunk.as_mut().is_some_and(|chunk| !chunk.is_full() && chunk.add(slot, [].iter(), scratch)) {
            self.requests.skip(1);
        }
    }

    fn send_snapshots(&mut self) {
        (self.turns, self.since, self.is_due_early) = (0, None, false);
        if !self.messages.is_full()
            && let Some(chunk) = self.chunk.take()
        {
            self.send(Message::Snapshots(chunk));
        }
    }

    /// Wakes the waiters for a checkpoint, because the shard has ended.
    pub(crate) fn end(&self) {
        self.requests.wake_all();
    }

    /// Sends the current chunk, however full. Returns `true` if nothing is left to send, or the snapshotter has ended.
    pub(crate) fn send_last(&mut self) -> bool {
        self.send_snapshots();
        self.chunk.is_none() || self.messages.is_abandoned()
    }

    fn send(&mut self, message: Message) {
        let is_one_of_many = matches!(message, Message::Checkpoint(_));
        if self.messages.push(message).is_err() {
            unreachable!("there was room, and only the shard pushes");
        }
        if !is_one_of_many || self.used.slots() <= CHUNKS_LOW {
            self.snapshotter.notify();
        }
    }

    /// Returns `true` if a step has work to do even without new events.
    pub(crate) fn has_work(&self) -> bool {
        ((self.requests.is_requested() || self.walk.is_some()) && self.may_walk())
            || (self.is_due_early && self.may_send_early())
    }

    /// Returns the time that an idle shard may sleep before it must send snapshots.
    pub(crate) fn rest(&self) -> Option<Duration> {
        self.chunk.is_some().then_some(SENT_AFTER)
    }

    /// Returns `true` if there is room for a step of a checkpoint. One chunk stays reserved for snapshots, which cannot
    /// wait.
    fn may_walk(&self) -> bool {
        let for_snapshots = usize::from(self.every.is_some() && self.chunk.is_none());
        self.used.slots() > for_snapshots && self.messages.slots() >= SLOTS_OF_A_STEP
    }

    /// Returns `true` if a chunk may be sent before it is full. The last chunk stays until the snapshotter returns
    /// another: otherwise a few snapshots in each chunk would use up all chunks.
    fn may_send_early(&self) -> bool {
        !self.used.is_empty() && !self.messages.is_full()
    }

    /// Does a bounded piece of work at the end of a turn, when everything appended is published. `appended` is the end
    /// of the log and `sequence` that of the next event. Returns `true` if it did checkpoint work.
    #[inline]
    pub(crate) fn step<A: Aggregate>(
        &mut self,
        keys: &KeyTable<A>,
        outcomes: &Outcomes<A::Rejection>,
        (appended, sequence, time): (Offset, Sequence, Time),
        now: Nanos,
        is_busy: bool,
    ) -> bool {
        if self.chunk.is_some() {
            self.turns += 1;
            // Not in every pause: each send wakes the snapshotter, which takes a core from the syncer.
            let since = *self.since.get_or_insert(now);
            self.is_due_early = now.saturating_sub(since) >= SENT_AFTER.as_nanos() as u64;
            if ((!is_busy && self.is_due_early) || self.turns >= TURNS_MAX) && self.may_send_early() {
                self.send_snapshots();
            }
        }
        let due = self.checkpoint_bytes > 0 && appended.0 - self.begun_at >= self.checkpoint_bytes;
        if self.walk.is_none() && !due && !self.requests.is_requested() {
            return false;
        }
        self.checkpoint(keys, outcomes, (appended, sequence, time), is_busy)
    }

    #[cold]
    fn checkpoint<A: Aggregate>(
        &mut self,
        keys: &KeyTable<A>,
        outcomes: &Outcomes<A::Rejection>,
        (appended, sequence, time): (Offset, Sequence, Time),
        is_busy: bool,
    ) -> bool {
        // Without room, a later turn continues.
        if !self.may_walk() {
            return false;
        }
        let Ok(mut chunk) = self.used.pop() else { return false };
        let mut walk = match self.walk {
            Some(walk) => walk,
            None => {
                self.requests.begin(appended);
                self.begun_at = appended.0;
                // Snapshots taken earlier are sent before the checkpoint begins.
                self.send_snapshots();
                self.is_whole = true;
                self.send(Message::Begin { start: appended, sequence, time });
                CheckpointWalk::Eventless(0)
            }
        };
        let mut next = None;
        let mut left = if is_busy { WALK_BUSY } else { WALK_IDLE };
        while left > 0 && !chunk.is_full() {
            // One large state at a time, so that a turn archives little more than a chunk.
            let count = if chunk.is_of_large_states() { 1 } else { left.min(WALK_STEP) };
            next = match walk {
                CheckpointWalk::Eventless(from) => {
                    let some = outcomes.eventless(from, count);
                    for key in some.iter().copied().filter(|&key| keys.get(key).is_none()) {
                        let slot = Slot::<A> { key, ..Slot::default() };
                        self.is_whole &= chunk.add(&slot, outcomes.of(key), &mut self.scratch);
                    }
                    let more = some.len() == count;
                    Some(if more {
                        CheckpointWalk::Eventless(from + count)
                    } else {
                        CheckpointWalk::Keys(Walk::default())
                    })
                }
                CheckpointWalk::Keys(at) => {
                    let (slots, then) = keys.walk(at, count);
                    for slot in slots {
                        self.is_whole &= chunk.add(slot, outcomes.of(slot.key), &mut self.scratch);
                    }
                    then.map(CheckpointWalk::Keys)
                }
            };
            let Some(then) = next else { break };
            walk = then;
            left -= count;
        }
        self.walk = next;
        self.send(Message::Checkpoint(chunk));
        if self.walk.is_none() {
            self.send(Message::End { log_end: appended, is_whole: self.is_whole });
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiples_are_found_without_dividing() {
        for n in (1..300).chain([1000, 4096, 65_537, u64::MAX]) {
            let every = Every::new(n);
            let near = [0, 1, n - 1, n, n.wrapping_mul(3), n.wrapping_mul(3).wrapping_add(1), u64::MAX, u64::MAX - 1];
            for number in (0..700).chain(near) {
                assert_eq!(every.divides(number), number.is_multiple_of(n), "{number} by {n}");
            }
        }
    }

    /// The smallest state that is saved: an empty one is not.
    #[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, corelane::Bounded, Clone, Default)]
    struct Small(u64);

    impl Aggregate for Small {
        type Event = crate::envelope::Envelope;
        type Command = ();
        type Rejection = ();

        fn evolve(&mut self, _event: &crate::envelope::ArchivedEnvelope, _meta: &crate::event::Meta) {}

        fn decide(&self, _command: (), _emit: &mut crate::state::aggregate::Emit<Self::Event>) -> Result<(), ()> {
            Ok(())
        }
    }

    #[test]
    fn a_checkpoint_leaves_a_chunk_for_snapshots() {
        let requests = Arc::new(CheckpointRequests::new(Offset(0), &Arc::default()));
        let (messages, sent) = rtrb::RingBuffer::new(64);
        let (mut empty, used) = rtrb::RingBuffer::new(3);
        while empty.push(Chunk::new()).is_ok() {}
        let signal = Arc::new(Signal::new());
        let mut taker = Taker::new::<Small>(1, 0, Offset(0), Arc::clone(&requests), signal, messages, used);
        // The table is so large that a checkpoint takes several steps.
        let (keys, outcomes) = (KeyTable::<Small>::new(50_000), Outcomes::new(0));
        requests.ask();
        for _ in 0..8 {
            taker.step(&keys, &outcomes, (Offset(16), Sequence(0), Time(0)), 0, true);
        }
        assert!(taker.walk.is_some() && sent.slots() == 3, "a beginning and two chunks, not {} messages", sent.slots());
        assert!(!taker.has_work(), "the next step waits for a chunk");
        let slot = Slot { key: crate::event::Key(1), version: crate::event::Version(1), ..Slot::default() };
        taker.take::<Small>(&slot);
        assert_eq!(requests.skipped(), 0);
    }

    #[test]
    fn snapshots_collect_in_the_last_chunk_while_the_snapshotter_is_behind() {
        type State = crate::state::aggregate::Stateless<crate::envelope::Envelope>;
        let requests = Arc::new(CheckpointRequests::new(Offset(0), &Arc::default()));
        let (messages, mut sent) = rtrb::RingBuffer::new(4);
        let (mut empty, used) = rtrb::RingBuffer::new(2);
        while empty.push(Chunk::new()).is_ok() {}
        let signal = Arc::new(Signal::new());
        let mut taker = Taker::new::<State>(1, 0, Offset(0), Arc::clone(&requests), signal, messages, used);
        let (mut keys, outcomes) = (KeyTable::<State>::new(1), Outcomes::new(0));
        let key = crate::event::Key(1);
        keys.slot(key, crate::event::KeyHash::of(key), crate::state::keys::Seen::default()).version =
            crate::event::Version(1);
        let mut now = 0;
        // Each step comes later than the one before, by the time that a chunk waits in a pause.
        let mut step = |taker: &mut Taker| {
            now += SENT_AFTER.as_nanos() as u64;
            taker.step(&keys, &outcomes, (Offset(0), Sequence(0), Time(0)), now, false);
        };
        let mut snapshots_of = |taker: &mut Taker, count: usize| {
            for _ in 0..count {
                taker.take(keys.get(key).expect("it was set"));
                step(taker);
            }
            step(taker);
            sent.pop().ok()
        };
        let Some(Message::Snapshots(first)) = snapshots_of(&mut taker, 100) else {
            panic!("the first chunk was not sent in a pause")
        };
        assert_eq!((first.entries, requests.skipped()), (2, 0));
        assert!(
            snapshots_of(&mut taker, 0).is_none() && !taker.has_work(),
            "the second chunk was sent before the first returned"
        );
        empty.push(first).expect("there is room");
        assert!(taker.has_work());
        let Some(Message::Snapshots(second)) = snapshots_of(&mut taker, 0) else {
            panic!("the second chunk was not sent")
        };
        assert_eq!(second.entries, 98);
    }
}
