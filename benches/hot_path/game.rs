//! The event all benches use, and the same random sequence of them every time.

use corelane::Key;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// Users of events whose number of users is not the point.
pub(crate) const USERS: u64 = 10_000;

#[path = "../../examples/shared/event.rs"]
mod event;

pub(crate) use event::{ArchivedGameEvent, GameEvent};

/// The tick of an archived event: reads it, so that reading is not left out.
#[inline]
pub(crate) fn tick(event: &ArchivedGameEvent) -> u64 {
    match event {
        ArchivedGameEvent::Moved { tick, .. } | ArchivedGameEvent::Attacked { tick, .. } => tick.to_native(),
    }
}

/// Users at random, half of them moving and half attacking.
pub(crate) fn events(count: usize) -> Vec<(Key, GameEvent)> {
    let mut random = SmallRng::seed_from_u64(0x5eed);
    let event = |tick: u64| {
        let (user, x) = (random.random_range(0..USERS), tick as f64);
        let event = if random.random() {
            GameEvent::Moved { x, y: 2.0, heading: 0.5, zone: tick >> 8, tick }
        } else {
            GameEvent::Attacked { target: user ^ 1, damage: tick & 0xff, x, y: 2.0, tick }
        };
        (Key::new(user), event)
    };
    (0..count as u64).map(event).collect()
}
