//! The shard's side: puts states into chunks while it works, and never waits for anyone.

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

/// What a shard sends to the snapshotter, in the order of the log.
#[derive(Debug)]
pub(crate) enum Message {
    Snapshots(Chunk),
    /// A checkpoint begins: what is appended, and the sequence of the next event.
    Begin {
        start: Offset,
        sequence: Sequence,
        time: Time,
    },
    Checkpoint(Chunk),
    /// It has all keys, and knows of nothing at or beyond this.
    End {
        log_end: Offset,
        /// Whether every state could be saved.
        is_whole: bool,
    },
}

/// Whether a number is a multiple of a fixed one: for odd divisors a number is, if its product with the divisor's inverse
/// is small; the power of two is looked at by turning the product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Every {
    inverse: u64,
    twos: u32,
    limit: u64,
}

impl Every {
    /// Multiples of `n`, which is not 0.
    pub(crate) fn new(n: u64) -> Self {
        let twos = n.trailing_zeros();
        let odd = n >> twos;
        // Newton: each step doubles the bits that are right, and of any odd number the lowest three are.
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

/// How far a checkpoint has come: first keys that have outcomes and no event (one that gets its first event meanwhile has
/// its outcomes of before in no other place), then all that have events.
#[derive(Debug, Clone, Copy)]
enum Going {
    Eventless(usize),
    Keys(Walk),
}

/// Slots of the key table that one turn looks through: while there is other work (so that the turn takes at most some ten
/// microseconds longer), and while there is none; and how many between two looks at the room that is left.
const WALK_BUSY: usize = 1024;
const WALK_IDLE: usize = 8192;
const WALK_STEP: usize = 128;
/// While a checkpoint is made, the snapshotter is woken when so few empty chunks are left: not for each.
const CHUNKS_LOW: usize = 4;
/// Messages that one step may send.
const SLOTS_OF_A_STEP: usize = 4;
/// A chunk with snapshots is sent at the latest so many turns after its first one.
const TURNS_MAX: u32 = 256;
/// And in a pause once its first one is so old.
const SENT_AFTER: Duration = Duration::from_millis(5);

/// The shard's side of its snapshots.
pub(crate) struct Taker {
    every: Option<Every>,
    checkpoint_bytes: u64,
    requests: Arc<CheckpointRequests>,
    snapshotter: Arc<Signal>,
    messages: rtrb::Producer<Message>,
    /// Empty chunks: their number is fixed, and so is their memory.
    used: rtrb::Consumer<Chunk>,
    /// Being filled with snapshots.
    chunk: Option<Chunk>,
    turns: u32,
    /// When it was first seen with a snapshot in it (by the clock that never goes back), and whether that is long enough ago.
    since: Option<Nanos>,
    is_due_early: bool,
    scratch: Scratch,
    going: Option<Going>,
    is_whole: bool,
    /// Where the newest checkpoint began.
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
            going: None,
            is_whole: true,
            begun_at: begun_at.0,
        }
    }

    /// Whether a key of this version is to be saved.
    #[inline]
    pub(crate) fn is_due(&self, version: u64) -> bool {
        self.every.is_some_and(|every| every.divides(version))
    }

    /// Saves the state of one key.
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

    /// The shard has ended: who waits for a checkpoint must look again.
    pub(crate) fn end(&self) {
        self.requests.wake_all();
    }

    /// Sends what there is, however little. Whether there is nothing left to send, or nobody to send it to.
    pub(crate) fn send_last(&mut self) -> bool {
        self.send_snapshots();
        self.chunk.is_none() || self.messages.is_abandoned()
    }

    fn send(&mut self, message: Message) {
        let is_one_of_many = matches!(message, Message::Checkpoint(_));
        if self.messages.push(message).is_err() {
            unreachable!("there was room, and only we push");
        }
        if !is_one_of_many || self.used.slots() <= CHUNKS_LOW {
            self.snapshotter.notify();
        }
    }

    /// Whether there is something to do although no event comes.
    pub(crate) fn has_work(&self) -> bool {
        ((self.requests.is_requested() || self.going.is_some()) && self.may_walk())
            || (self.is_due_early && self.may_send_early())
    }

    /// How long a shard at rest may sleep before it looks whether snapshots are to be sent.
    pub(crate) fn rest(&self) -> Option<Duration> {
        self.chunk.is_some().then_some(SENT_AFTER)
    }

    /// Whether there is room for a step of a checkpoint. One chunk stays for snapshots, which do not wait.
    fn may_walk(&self) -> bool {
        let for_snapshots = usize::from(self.every.is_some() && self.chunk.is_none());
        self.used.slots() > for_snapshots && self.messages.slots() >= SLOTS_OF_A_STEP
    }

    /// Whether a chunk that is not full yet may go: the last one stays while the snapshotter has all others, or a few
    /// snapshots in each would use them up.
    fn may_send_early(&self) -> bool {
        !self.used.is_empty() && !self.messages.is_full()
    }

    /// A bounded piece of work at the end of a turn, when everything appended is published: `appended` is the end of the log
    /// and `sequence` that of the next event. Whether there was any.
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
            // Not with every pause: the thread that writes them would be woken for each, and take the core from the syncer.
            let since = *self.since.get_or_insert(now);
            self.is_due_early = now.saturating_sub(since) >= SENT_AFTER.as_nanos() as u64;
            if ((!is_busy && self.is_due_early) || self.turns >= TURNS_MAX) && self.may_send_early() {
                self.send_snapshots();
            }
        }
        let due = self.checkpoint_bytes > 0 && appended.0 - self.begun_at >= self.checkpoint_bytes;
        if self.going.is_none() && !due && !self.requests.is_requested() {
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
        // Otherwise in a later turn.
        if !self.may_walk() {
            return false;
        }
        let Ok(mut chunk) = self.used.pop() else { return false };
        let mut going = match self.going {
            Some(going) => going,
            None => {
                self.requests.begin(appended);
                self.begun_at = appended.0;
                // What was saved before belongs before it.
                self.send_snapshots();
                self.is_whole = true;
                self.send(Message::Begin { start: appended, sequence, time });
                Going::Eventless(0)
            }
        };
        let mut next = None;
        let mut left = if is_busy { WALK_BUSY } else { WALK_IDLE };
        while left > 0 && !chunk.is_full() {
            // Large states one at a time, so that one turn archives little more than a chunk.
            let count = if chunk.is_of_large_states() { 1 } else { left.min(WALK_STEP) };
            next = match going {
                Going::Eventless(from) => {
                    let some = outcomes.eventless(from, count);
                    for key in some.iter().copied().filter(|&key| keys.get(key).is_none()) {
                        let slot = Slot::<A> { key, ..Slot::default() };
                        self.is_whole &= chunk.add(&slot, outcomes.of(key), &mut self.scratch);
                    }
                    let more = some.len() == count;
                    Some(if more { Going::Eventless(from + count) } else { Going::Keys(Walk::default()) })
                }
                Going::Keys(walk) => {
                    let (slots, then) = keys.walk(walk, count);
                    for slot in slots {
                        self.is_whole &= chunk.add(slot, outcomes.of(slot.key), &mut self.scratch);
                    }
                    then.map(Going::Keys)
                }
            };
            let Some(then) = next else { break };
            going = then;
            left -= count;
        }
        self.going = next;
        self.send(Message::Checkpoint(chunk));
        if self.going.is_none() {
            self.send(Message::End { log_end: appended, is_whole: self.is_whole });
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiples_are_told_without_dividing() {
        for n in (1..300).chain([1000, 4096, 65_537, u64::MAX]) {
            let every = Every::new(n);
            let near = [0, 1, n - 1, n, n.wrapping_mul(3), n.wrapping_mul(3).wrapping_add(1), u64::MAX, u64::MAX - 1];
            for number in (0..700).chain(near) {
                assert_eq!(every.divides(number), number.is_multiple_of(n), "{number} by {n}");
            }
        }
    }

    /// As small as a state can be that is saved.
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
        let requests = Arc::new(CheckpointRequests::new(Offset(0)));
        let (messages, sent) = rtrb::RingBuffer::new(64);
        let (mut empty, used) = rtrb::RingBuffer::new(3);
        while empty.push(Chunk::new()).is_ok() {}
        let signal = Arc::new(Signal::new());
        let mut taker = Taker::new::<Small>(1, 0, Offset(0), Arc::clone(&requests), signal, messages, used);
        // Large enough that a checkpoint takes several steps.
        let (keys, outcomes) = (KeyTable::<Small>::new(50_000), Outcomes::new(0));
        requests.ask();
        for _ in 0..8 {
            taker.step(&keys, &outcomes, (Offset(16), Sequence(0), Time(0)), 0, true);
        }
        assert!(taker.going.is_some() && sent.slots() == 3, "begun, and two chunks: {} messages", sent.slots());
        assert!(!taker.has_work(), "the next step waits for a chunk");
        let slot = Slot { key: crate::event::Key(1), version: crate::event::Version(1), ..Slot::default() };
        taker.take::<Small>(&slot);
        assert_eq!(requests.skipped(), 0);
    }

    #[test]
    fn snapshots_gather_in_the_last_chunk_while_the_snapshotter_is_behind() {
        type State = crate::state::aggregate::Stateless<crate::envelope::Envelope>;
        let requests = Arc::new(CheckpointRequests::new(Offset(0)));
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
        // Each step is later by as long as a chunk waits in a pause.
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
            panic!("in a pause, the first ones go soon")
        };
        assert_eq!((first.entries, requests.skipped()), (2, 0));
        assert!(snapshots_of(&mut taker, 0).is_none() && !taker.has_work(), "the others wait for the first");
        empty.push(first).expect("there is room");
        assert!(taker.has_work());
        let Some(Message::Snapshots(second)) = snapshots_of(&mut taker, 0) else { panic!("and then they go") };
        assert_eq!(second.entries, 98);
    }
}
