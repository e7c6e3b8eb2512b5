//! The rules of the game. A published event is a fact and meets no rule, so the server publishes moves only.
use corelane::{Aggregate, Bounded, Emit, Event, Meta};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Bounded, Event, serde::Serialize)]
pub(crate) enum GameEvent {
    #[event(id = 1, name = "player.moved")]
    Moved(f64, f64),
    #[event(id = 2, name = "player.paid")]
    Paid(i64),
}

#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default, serde::Serialize)]
pub(crate) struct Player {
    position: (f64, f64),
    coins: i64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, serde::Serialize)]
pub(crate) struct OutOfRange(i64);

impl Aggregate for Player {
    type Event = GameEvent;
    type Command = i64; // Coins for the player, or from the player if negative.
    type Rejection = OutOfRange;

    fn evolve(&mut self, event: &ArchivedGameEvent, _meta: &Meta) {
        match event {
            ArchivedGameEvent::Moved(x, y) => self.position = (x.to_native(), y.to_native()),
            ArchivedGameEvent::Paid(coins) => self.coins += coins.to_native(),
        }
    }

    fn decide(&self, coins: i64, emit: &mut Emit<GameEvent>) -> Result<(), OutOfRange> {
        let Some(0..) = self.coins.checked_add(coins) else { return Err(OutOfRange(self.coins)) };
        emit.event(GameEvent::Paid(coins));
        Ok(())
    }
}
