//! The event that all benches use, and a fixed random sequence of it.

use corelane::Key;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// The number of users in benches that do not vary it.
pub(crate) const USERS: u64 = 10_000;

#[path = "../../examples/shared/event.rs"]
mod event;

pub(crate) use event::{ArchivedGameEvent, GameEvent};

/// Returns the tick of an archived event, so that the compiler cannot drop the read.
#[inline]
pub(crate) fn tick(event: &ArchivedGameEvent) -> u64 {
    match event {
        ArchivedGameEvent::Moved { tick, .. } | ArchivedGameEvent::Attacked { tick, .. } => tick.to_native(),
    }
}

/// Returns events of random users; half are moves and half are attacks.
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
