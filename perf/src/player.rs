//! The state of a player in the game of `examples/shared/event.rs`: 32 bytes, stored in the key's slot.

use std::convert::Infallible;

use corelane::{Aggregate, Bounded, Emit, Meta};
use rkyv::{Archive, Deserialize, Serialize};

use crate::event::{ArchivedGameEvent, GameEvent};

/// The state that a player's events produce.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, Default, PartialEq)]
pub(crate) struct Player {
    pub(crate) x: f64,
    pub(crate) y: f64,
    attacks: u32,
    damage: u32,
    pub(crate) tick: u64,
}

impl Aggregate for Player {
    type Event = GameEvent;
    type Command = Infallible;
    type Rejection = ();

    #[inline]
    fn evolve(&mut self, event: &ArchivedGameEvent, _meta: &Meta) {
        let (x, y, tick) = match event {
            ArchivedGameEvent::Moved { x, y, tick, .. } => (x, y, tick),
            ArchivedGameEvent::Attacked { damage, x, y, tick, .. } => {
                self.attacks += 1;
                self.damage = self.damage.wrapping_add(damage.to_native() as u32);
                (x, y, tick)
            }
        };
        (self.x, self.y, self.tick) = (x.to_native(), y.to_native(), tick.to_native());
    }

    fn decide(&self, command: Infallible, _emit: &mut Emit<GameEvent>) -> Result<(), ()> {
        match command {}
    }
}
