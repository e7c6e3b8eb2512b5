//! The game's events, and how often each occurs.

use corelane::{Bounded, Event, EventType, EventTypeId, Key};
use rkyv::{Archive, Serialize};

#[derive(Archive, Serialize, Bounded, Clone, Copy, Debug)]
pub(crate) enum GameEvent {
    Moved { x: f64, y: f64 },
    Killed { victim: u64 },
    Bought { item: u64, price: u64 },
    LevelledUp { level: u64 },
}

pub(crate) const MOVED: &str = "player.moved";
pub(crate) const KILLED: &str = "player.killed";
pub(crate) const BOUGHT: &str = "item.bought";
pub(crate) const LEVELLED_UP: &str = "player.levelled_up";

impl Event for GameEvent {
    const TYPES: &'static [EventType] = &[
        EventType::new(1, MOVED, 1),
        EventType::new(2, KILLED, 1),
        EventType::new(3, BOUGHT, 1),
        EventType::new(4, LEVELLED_UP, 1),
    ];

    #[inline]
    fn event_type(&self) -> EventTypeId {
        EventTypeId(match self {
            Self::Moved { .. } => 1,
            Self::Killed { .. } => 2,
            Self::Bought { .. } => 3,
            Self::LevelledUp { .. } => 4,
        })
    }
}

/// The number of players.
const KEYS: u64 = 10_000;

/// Generates events: players move, and rarely do something else.
#[derive(Default)]
pub(crate) struct Traffic {
    pub(crate) events: u64,
    of_type: [u64; 4],
}

impl Traffic {
    #[inline]
    pub(crate) fn next(&mut self) -> (Key, GameEvent) {
        let n = self.events;
        let key = Key::new(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % KEYS);
        let event = match n % 20_000 {
            0 => GameEvent::LevelledUp { level: n / 20_000 },
            at if at % 2_000 == 1 => GameEvent::Killed { victim: n % KEYS },
            at if at % 2_000 == 2 => GameEvent::Bought { item: n % 100, price: 5 },
            _ => GameEvent::Moved { x: n as f64, y: 1.0 },
        };
        self.count(&event);
        (key, event)
    }

    /// Counts an event that was published separately.
    pub(crate) fn count(&mut self, event: &GameEvent) {
        self.events += 1;
        self.of_type[usize::from(event.event_type().get()) - 1] += 1;
    }

    /// Returns the number of events of these types.
    pub(crate) fn of(&self, types: &[&str]) -> u64 {
        GameEvent::TYPES.iter().zip(self.of_type).filter(|(kind, _)| types.contains(&kind.name)).map(|(_, n)| n).sum()
    }
}
