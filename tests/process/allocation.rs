//! The hot path allocates nothing per event.

use crate::common::own_process::is_own_process;
use crate::common::{env_number, soon};
use crate::counting;
use corelane::view::{Area, ById, Leaderboard, Presence, ServerStatus};
use corelane::{
    Aggregate, Bounded, Builder, Config, Durability, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Retention,
    Stateless,
};
use rkyv::{Archive, Deserialize, Serialize};

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

/// A state without owned memory.
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

/// The allocations while one shard processes `events` events, with histograms.
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
    let before = counting::allocations();
    publish(&mut producer, &mut batch, events);
    more(&engine);
    engine.flush(soon()).unwrap();
    let allocations = counting::allocations() - before;
    engine.shutdown(soon()).unwrap();
    allocations
}

/// One test for all cases, because it counts the allocations of the whole process. `CORELANE_ALLOCATION_EVENTS` sets
/// the events of a case; with one allocation per event, each case exceeds its bound many times.
#[test]
fn nothing_is_allocated_per_event() {
    if !is_own_process("allocation::nothing_is_allocated_per_event") {
        return;
    }
    let events = env_number("CORELANE_ALLOCATION_EVENTS", 600_000);
    // The remaining allocations belong to segments (about 60,000 events each) and to syncs, not to events.
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
    // Snapshots allocate as well: the index notes every hundredth event in lists that grow by doubling, and a chunk of
    // about a hundred snapshots is one write and one list. Checkpoints, which retention requests, list all keys.
    for (durability, bound) in [(Durability::OsCache, events / 200), (Durability::GroupCommit, events / 100)] {
        let all = allocations::<Player>(durability, events, with_views, with_commands);
        eprintln!("{durability:?} with states, snapshots, views, commands: {all} allocations for {events} events");
        assert!(all < 3_000 + bound, "{all} allocations for {events} events");
    }
}
