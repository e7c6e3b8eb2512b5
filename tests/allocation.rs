//! No allocation per event on the hot path. A binary of its own, because it counts every allocation of the process.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use common::soon;
use corelane::view::{Area, ById, Leaderboard, Presence, ServerStatus};
use corelane::{
    Aggregate, Bounded, Builder, Config, Durability, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Retention,
    Stateless,
};
use rkyv::{Archive, Deserialize, Serialize};

struct Counting;
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Copy)]
struct Step {
    x: f32,
    y: f32,
    n: u64,
}
impl Event for Step {
    const TYPES: &'static [EventType] = &[EventType::new(1, "step", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

/// A state that owns no memory besides itself.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Player {
    x: f32,
    y: f32,
    steps: u64,
}

impl Aggregate for Player {
    type Event = Step;
    type Command = u64;
    type Rejection = u64;

    fn evolve(&mut self, step: &ArchivedStep, _: &Meta) {
        (self.x, self.y) = ((step.n.to_native() % 100) as f32, (step.n.to_native() / 100 % 100) as f32);
        self.steps += 1;
    }

    fn decide(&self, n: u64, emit: &mut Emit<Step>) -> Result<(), u64> {
        if n % 10 == 9 {
            return Err(n);
        }
        emit.event(Step { x: 1.0, y: 2.0, n });
        Ok(())
    }
}

const USERS: u64 = 1000;

fn publish(producer: &mut corelane::Producer<Step>, batch: &mut Vec<(Key, Step)>, events: u64) {
    for n in 0..events / 2 {
        batch.push((Key(n % USERS), Step { x: 1.0, y: 2.0, n }));
        if batch.len() == 256 {
            producer.publish_batch(batch).unwrap();
        }
    }
    producer.publish_batch(batch).unwrap();
    for n in 0..events / 2 {
        producer.publish(Key(n % USERS), Step { x: 1.0, y: 2.0, n }).unwrap();
    }
}

/// Allocations while `events` events go through, one shard, histograms on.
fn allocations<A: Aggregate<Event = Step>>(
    durability: Durability,
    events: u64,
    with: impl Fn(Builder<A>) -> Builder<A>,
    more: impl Fn(&Engine<A>),
) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let keep = Retention::bytes(16 << 20);
    let config = Config::new(dir.path()).segment_bytes(4 << 20).durability(durability).retention(keep);
    let engine = with(Engine::<A>::builder(config)).open().unwrap();
    let mut producer = engine.producer();
    let mut batch = Vec::with_capacity(256);
    publish(&mut producer, &mut batch, 100_000);
    engine.flush(soon()).unwrap();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    publish(&mut producer, &mut batch, events);
    more(&engine);
    engine.flush(soon()).unwrap();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    engine.shutdown(soon()).unwrap();
    allocations
}

// One test, one after the other: it counts what the whole process allocates.
#[test]
fn nothing_is_allocated_per_event() {
    let events = common::env_number("CORELANE_ALLOCATION_EVENTS", 600_000);
    // What remains belongs to segments (some 60,000 events each) and to syncs, not to events.
    for (durability, bound) in [(Durability::OsCache, events / 1_000), (Durability::GroupCommit, events / 200)] {
        let plain = allocations::<Stateless<Step>>(durability, events, |builder| builder, |_| ());
        eprintln!("{durability:?}: {plain} allocations for {events} events");
        assert!(plain < 1_000 + bound, "{plain} allocations for {events} events");
    }
    states_snapshots_and_views_allocate_nothing_per_event(events);
}

fn states_snapshots_and_views_allocate_nothing_per_event(events: u64) {
    let with_views = |builder: Builder<Player>| {
        let place = |player: &Player| Some((f64::from(player.x), f64::from(player.y)));
        let presence =
            |player: &Player| if player.steps.is_multiple_of(2) { Presence::Online } else { Presence::Offline };
        builder
            .view(&ById::new(32, Player::clone))
            .view(&Leaderboard::new(10, |player: &Player| player.steps as i64))
            .view(&ServerStatus::new(presence))
            .view(&Area::new((0.0, 0.0, 100.0, 100.0), 10.0, place))
    };
    let with_commands = |engine: &Engine<Player>| {
        let mut client = engine.client();
        for n in 0..events / 10 {
            client.send(Key(n % USERS), n).tell().unwrap();
        }
    };
    // Snapshots besides: each hundredth event's place is noted in the index, in lists that grow by doubling, and a chunk of
    // some hundred of them is one write and one list. Checkpoints, which retention wants, list the places of all keys.
    for (durability, bound) in [(Durability::OsCache, events / 200), (Durability::GroupCommit, events / 100)] {
        let all = allocations::<Player>(durability, events, with_views, with_commands);
        eprintln!("{durability:?} with states, snapshots, views, commands: {all} allocations for {events} events");
        assert!(all < 3_000 + bound, "{all} allocations for {events} events");
    }
}
