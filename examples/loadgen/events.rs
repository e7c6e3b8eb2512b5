//! The events to send, with their keys: synthetic game events, padded events, or the lines of a file.

use std::convert::Infallible;
use std::str::FromStr;

use corelane::envelope::{ArchivedEnvelope, Envelope};
use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Key, Meta};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rand_distr::{Distribution as _, Zipf};
use rkyv::{Archive, Deserialize, Serialize};

use crate::cli::{Args, KeyDist};

/// Bytes of an archived [`GameEvent`]; the limit probe's event has the same size.
const GAME_EVENT_BYTES: usize = 48;
const _: () = assert!(size_of::<rkyv::Archived<GameEvent>>() == GAME_EVENT_BYTES);
/// Bytes of an archived [`Padded`] event without its padding.
const PADDED_BYTES: usize = size_of::<rkyv::Archived<Padded>>();
/// Random draws made before the clock starts.
const DRAWS: usize = 1 << 20;
const ZIPF_EXPONENT: f64 = 0.99;
/// A tick consists of the producer's number and its count of events; this is the width of the count.
const TICK_BITS: u32 = 48;

/// An event of a game.
#[derive(Archive, Serialize, Bounded, Clone, Copy, Debug)]
pub(crate) enum GameEvent {
    Moved { x: f64, y: f64, heading: f64, zone: u64, tick: u64 },
    Attacked { target: u64, damage: u64, x: f64, y: f64, tick: u64 },
    LevelledUp { experience: u64, level: u64, points: u64, tick: u64 },
    PickedUp { item: u64, count: u64, x: f64, y: f64, tick: u64 },
}

const GAME_TYPES: &[EventType] = &[
    EventType::new(1, "player_moved", 1),
    EventType::new(2, "player_attacked", 1),
    EventType::new(3, "player_levelled_up", 1),
    EventType::new(4, "item_picked_up", 1),
];

impl Event for GameEvent {
    const TYPES: &'static [EventType] = GAME_TYPES;

    #[inline]
    fn event_type(&self) -> EventTypeId {
        match self {
            Self::Moved { .. } => EventTypeId(1),
            Self::Attacked { .. } => EventTypeId(2),
            Self::LevelledUp { .. } => EventTypeId(3),
            Self::PickedUp { .. } => EventTypeId(4),
        }
    }
}

/// The state that a player's events produce: small enough for the key's slot.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, Default, PartialEq)]
pub(crate) struct Player {
    x: f32,
    y: f32,
    level: u32,
    attacks: u32,
    items: u32,
    experience: u32,
    tick: u64,
}

impl Aggregate for Player {
    type Event = GameEvent;
    type Command = Infallible;
    type Rejection = ();

    #[inline]
    fn evolve(&mut self, event: &ArchivedGameEvent, _meta: &Meta) {
        let (tick, place) = match event {
            ArchivedGameEvent::Moved { x, y, tick, .. } => (tick, Some((x, y))),
            ArchivedGameEvent::Attacked { x, y, tick, .. } => {
                self.attacks += 1;
                (tick, Some((x, y)))
            }
            ArchivedGameEvent::LevelledUp { level, experience, tick, .. } => {
                self.level = level.to_native() as u32;
                self.experience = self.experience.wrapping_add(experience.to_native() as u32);
                (tick, None)
            }
            ArchivedGameEvent::PickedUp { count, x, y, tick, .. } => {
                self.items = self.items.wrapping_add(count.to_native() as u32);
                (tick, Some((x, y)))
            }
        };
        if let Some((x, y)) = place {
            (self.x, self.y) = (x.to_native() as f32, y.to_native() as f32);
        }
        self.tick = tick.to_native();
    }

    fn decide(&self, command: Infallible, _emit: &mut Emit<GameEvent>) -> Result<(), ()> {
        match command {}
    }
}

/// An event of any size.
#[derive(Archive, Serialize, Bounded, Clone, Debug)]
pub(crate) struct Padded {
    tick: u64,
    padding: Box<[u8]>,
}

impl Event for Padded {
    const TYPES: &'static [EventType] = &[EventType::new(1, "padded", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

/// The states that this tool's engines keep: aggregates whose events a replay can check.
pub(crate) trait Carried: Aggregate<Event: Traced> {}
impl<A: Aggregate<Event: Traced>> Carried for A {}

/// An event that a replay can check.
pub(crate) trait Traced: Event {
    /// Returns a number that identifies the event.
    fn trace(event: &Self::Archived) -> u64;

    /// Returns `true` if an event with trace `next` may follow one with `last` in a key's order.
    fn may_follow(last: u64, next: u64) -> bool;
}

fn ticks_in_order(last: u64, next: u64) -> bool {
    last >> TICK_BITS != next >> TICK_BITS || last < next
}

impl Traced for GameEvent {
    fn trace(event: &Self::Archived) -> u64 {
        match event {
            ArchivedGameEvent::Moved { tick, .. }
            | ArchivedGameEvent::Attacked { tick, .. }
            | ArchivedGameEvent::LevelledUp { tick, .. }
            | ArchivedGameEvent::PickedUp { tick, .. } => tick.to_native(),
        }
    }

    fn may_follow(last: u64, next: u64) -> bool {
        ticks_in_order(last, next)
    }
}

impl Traced for Padded {
    fn trace(event: &Self::Archived) -> u64 {
        event.tick.to_native()
    }

    fn may_follow(last: u64, next: u64) -> bool {
        ticks_in_order(last, next)
    }
}

impl Traced for Envelope {
    fn trace(event: &ArchivedEnvelope) -> u64 {
        trace_of(event.event_type(), event.timestamp_ms(), event.correlation_id(), event.payload())
    }

    fn may_follow(_last: u64, _next: u64) -> bool {
        true
    }
}

/// Returns a hash of an event's fields in the file.
pub(crate) fn trace_of(event_type: &str, timestamp_ms: Option<u64>, correlation: Option<&str>, payload: &str) -> u64 {
    let mut hash = xxhash_rust::xxh3::xxh3_64(event_type.as_bytes()).wrapping_add(timestamp_ms.unwrap_or(u64::MAX));
    for text in [correlation.unwrap_or("\0"), payload] {
        hash = xxhash_rust::xxh3::xxh3_64_with_seed(text.as_bytes(), hash);
    }
    hash
}

/// Weights of the four event types.
#[derive(Debug, Clone)]
pub(crate) struct Mix([u32; 4]);

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const NAMES: [&str; 4] = ["move", "attack", "levelup", "pickup"];
        let mut weights = [0; 4];
        for part in text.split(',') {
            let (name, weight) = part.trim().split_once(':').ok_or_else(|| format!("{part:?} is not NAME:WEIGHT"))?;
            let at = NAMES
                .iter()
                .position(|known| *known == name)
                .ok_or_else(|| format!("unknown event {name:?}; known are {}", NAMES.join(", ")))?;
            let weight: u16 =
                weight.parse().map_err(|_| format!("the weight {weight:?} is not a number in 0..=65535"))?;
            weights[at] = u32::from(weight);
        }
        if weights.iter().sum::<u32>() == 0 { Err("the weights add up to 0".to_owned()) } else { Ok(Self(weights)) }
    }
}

impl Mix {
    fn draw(&self, rng: &mut SmallRng) -> u8 {
        let mut at = rng.random_range(0..self.0.iter().sum::<u32>());
        for (kind, weight) in (0..).zip(self.0) {
            if at < weight {
                return kind;
            }
            at -= weight;
        }
        0
    }
}

/// The source of a producer's events.
pub(crate) trait Feed<E>: Send {
    /// Returns the next event with its key, or `None` at the end.
    fn next(&mut self) -> Option<(Key, E)>;
}

/// Users and event types, drawn before the clock starts and reused in turn.
struct Draws {
    table: Vec<(u32, u8)>,
    at: usize,
    /// Added to every drawn user of a uniform distribution. Changes each round, so that all users occur.
    shift: u32,
    stride: u32,
    users: u32,
    tick: u64,
}

impl Draws {
    fn new(args: &Args, producer: u16) -> Self {
        let mut rng = SmallRng::seed_from_u64(args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(producer));
        let users = args.users as u32;
        let zipf = Zipf::new(args.users as f64, ZIPF_EXPONENT).ok().filter(|_| args.key_dist == KeyDist::Zipf);
        let user = |rng: &mut SmallRng| match &zipf {
            Some(zipf) => (zipf.sample(rng) as u32).clamp(1, users) - 1,
            None => rng.random_range(0..users),
        };
        let table = (0..DRAWS).map(|_| (user(&mut rng), args.mix.draw(&mut rng))).collect();
        let stride = if zipf.is_some() { 0 } else { rng.random_range(0..users) };
        Self { table, at: 0, shift: 0, stride, users, tick: u64::from(producer) << TICK_BITS }
    }

    /// Returns the next user, event type and tick.
    #[inline]
    fn next(&mut self) -> (Key, u8, u64) {
        let (drawn, kind) = self.table[self.at];
        let user = u64::from(drawn) + u64::from(self.shift);
        let user = if user >= u64::from(self.users) { user - u64::from(self.users) } else { user };
        self.at += 1;
        if self.at == self.table.len() {
            self.at = 0;
            self.shift = ((u64::from(self.shift) + u64::from(self.stride)) % u64::from(self.users)) as u32;
        }
        self.tick += 1;
        (Key::new(user), kind, self.tick)
    }
}

/// An endless sequence of game events.
pub(crate) struct Games(Draws);

impl Games {
    pub(crate) fn new(args: &Args, producer: u16) -> Self {
        Self(Draws::new(args, producer))
    }
}

impl Feed<GameEvent> for Games {
    #[inline]
    fn next(&mut self) -> Option<(Key, GameEvent)> {
        let (key, kind, tick) = self.0.next();
        let x = (tick & 0xffff) as f64;
        let event = match kind {
            0 => GameEvent::Moved { x, y: 2.0, heading: 0.5, zone: tick >> 8, tick },
            1 => GameEvent::Attacked { target: tick ^ 1, damage: tick & 0xff, x, y: 2.0, tick },
            2 => GameEvent::LevelledUp { experience: tick, level: tick & 127, points: 3, tick },
            _ => GameEvent::PickedUp { item: tick & 0xfff, count: 1, x, y: 2.0, tick },
        };
        Some((key, event))
    }
}

/// An endless sequence of padded events.
pub(crate) struct Paddings {
    draws: Draws,
    padding: Box<[u8]>,
}

impl Paddings {
    pub(crate) fn new(args: &Args, producer: u16) -> Self {
        let mut padding = vec![0; args.payload as usize - PADDED_BYTES];
        SmallRng::seed_from_u64(args.seed).fill(&mut padding[..]);
        Self { draws: Draws::new(args, producer), padding: padding.into() }
    }
}

impl Feed<Padded> for Paddings {
    fn next(&mut self) -> Option<(Key, Padded)> {
        let (key, _, tick) = self.draws.next();
        Some((key, Padded { tick, padding: self.padding.clone() }))
    }
}

/// The lines of a file, in order.
pub(crate) struct Lines(pub(crate) std::vec::IntoIter<(Key, Envelope)>);

impl Feed<Envelope> for Lines {
    fn next(&mut self) -> Option<(Key, Envelope)> {
        self.0.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_parsed_and_nonsense_is_rejected() {
        assert_eq!("attack:3,move:1".parse::<Mix>().map(|mix| mix.0), Ok([1, 3, 0, 0]));
        for bad in ["", "move", "move:0", "jump:1", "move:-1"] {
            assert!(bad.parse::<Mix>().is_err(), "{bad:?}");
        }
    }
}
