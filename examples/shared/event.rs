//! The event of examples, benches and measuring programs: 48 bytes archived, like the load generator's.

use corelane::{Bounded, Event, EventType, EventTypeId};
use rkyv::{Archive, Serialize};

#[derive(Archive, Serialize, Bounded, Clone, Copy, Debug)]
pub(crate) enum GameEvent {
    Moved { x: f64, y: f64, heading: f64, zone: u64, tick: u64 },
    Attacked { target: u64, damage: u64, x: f64, y: f64, tick: u64 },
}

const _: () = assert!(size_of::<rkyv::Archived<GameEvent>>() == 48);

impl Event for GameEvent {
    const TYPES: &'static [EventType] =
        &[EventType::new(1, "player_moved", 1), EventType::new(2, "player_attacked", 1)];

    #[inline]
    fn event_type(&self) -> EventTypeId {
        match self {
            Self::Moved { .. } => EventTypeId(1),
            Self::Attacked { .. } => EventTypeId(2),
        }
    }
}
