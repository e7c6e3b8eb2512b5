//! The game's rules: commands, reasons for rejecting them, events, and states.

use corelane::view::ById;
use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Key, Meta, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// The length and the width of the map.
pub(crate) const MAP: f64 = 1_000.0;
/// The greatest distance a player moves in a second.
pub(crate) const SPEED_MAX: f64 = 100.0;
const HEALTH: i64 = 100;
const DAMAGE: i64 = 10;

/// Returns the range of a skill.
pub(crate) fn reach(skill: u32) -> f64 {
    match skill {
        1 => 50.0,
        2 => 150.0,
        3 => 300.0,
        _ => 30.0,
    }
}

/// What happened to a player.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) enum Happened {
    Joined {
        x: f64,
        y: f64,
    },
    Moved {
        x: f64,
        y: f64,
    },
    Attacked {
        target: u64,
        skill: u32,
        damage: i64,
        /// The number of events of the target's shard that the decision had seen.
        seen: u64,
    },
    Hurt {
        by: u64,
        damage: i64,
    },
    Left,
}

impl Event for Happened {
    const TYPES: &'static [EventType] = &[
        EventType::new(1, "player.joined", 1),
        EventType::new(2, "player.moved", 1),
        EventType::new(3, "player.attacked", 1),
        EventType::new(4, "player.hurt", 1),
        EventType::new(5, "player.left", 1),
    ];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(match self {
            Self::Joined { .. } => 1,
            Self::Moved { .. } => 2,
            Self::Attacked { .. } => 3,
            Self::Hurt { .. } => 4,
            Self::Left => 5,
        })
    }
}

/// The write side: the state that the rules need, and no more.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq, Default)]
pub(crate) struct Player {
    pub(crate) place: Option<Place>,
    /// The time when it arrived there, in ns.
    since: u64,
    pub(crate) health: i64,
    pub(crate) score: i64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Copy, PartialEq)]
pub(crate) struct Place {
    pub(crate) x: f64,
    pub(crate) y: f64,
}

impl Place {
    pub(crate) fn distance(self, other: Self) -> f64 {
        (self.x - other.x).hypot(self.y - other.y)
    }

    fn is_on_the_map(self) -> bool {
        (0.0..=MAP).contains(&self.x) && (0.0..=MAP).contains(&self.y)
    }
}

/// The read side: the part of a player that others see.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) struct Card {
    /// `None` once the player has left the game.
    pub(crate) place: Option<Place>,
    pub(crate) health: i64,
}

/// The cards of all players; the shards publish them.
pub(crate) type Cards = ById<Player, Card>;

pub(crate) fn cards() -> Cards {
    ById::new(64, |player: &Player| Card { place: player.place, health: player.health })
}

/// A command.
pub(crate) enum Command {
    Join(Place),
    Move(Place),
    /// The target is another key, perhaps of another shard; `decide` looks it up in the view.
    Attack {
        target: Key,
        skill: u32,
        others: Cards,
    },
    /// The target's half of an attack; the client that sent the attack sends it to the target.
    Suffer {
        by: Key,
        damage: i64,
    },
    Leave,
}

/// The reason for rejecting a command.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) enum Refused {
    NotInTheGame,
    InTheGameAlready,
    OffTheMap,
    TooFast {
        distance: f64,
        /// The greatest distance possible by now.
        distance_max: f64,
    },
    NoSuchTarget {
        target: u64,
        /// The number of events of the target's shard that the decision had seen; a later one may have created the
        /// target.
        seen: u64,
    },
    OutOfReach {
        distance: f64,
        reach: f64,
    },
}

impl Aggregate for Player {
    type Event = Happened;
    type Command = Command;
    type Rejection = Refused;

    fn evolve(&mut self, event: &ArchivedHappened, meta: &Meta) {
        match event {
            ArchivedHappened::Joined { x, y } => {
                self.health = HEALTH;
                self.stand(x.to_native(), y.to_native(), meta.time);
            }
            ArchivedHappened::Moved { x, y } => self.stand(x.to_native(), y.to_native(), meta.time),
            ArchivedHappened::Attacked { damage, .. } => self.score += damage.to_native(),
            ArchivedHappened::Hurt { damage, .. } => self.health -= damage.to_native(),
            ArchivedHappened::Left => self.place = None,
        }
    }

    fn decide(&self, command: Command, emit: &mut Emit<Happened>) -> Result<(), Refused> {
        let here = match (&command, self.place) {
            (Command::Join(place), None) => return join(*place, emit),
            (Command::Join(_), Some(_)) => return Err(Refused::InTheGameAlready),
            (_, None) => return Err(Refused::NotInTheGame),
            (_, Some(here)) => here,
        };
        match command {
            Command::Join(_) => {}
            Command::Move(to) => {
                if !to.is_on_the_map() {
                    return Err(Refused::OffTheMap);
                }
                let seconds = emit.now().get().saturating_sub(self.since) as f64 / 1e9;
                let (distance, distance_max) = (here.distance(to), seconds * SPEED_MAX);
                if distance > distance_max {
                    return Err(Refused::TooFast { distance, distance_max });
                }
                emit.event(Happened::Moved { x: to.x, y: to.y });
            }
            Command::Attack { target, skill, others } => {
                // Reads the position first, so that the card is at least as new.
                let seen = seen_of(&others, target);
                let there = others.get(target).ok().flatten().and_then(|card| card.place);
                let Some(there) = there else { return Err(Refused::NoSuchTarget { target: target.get(), seen }) };
                let distance = here.distance(there);
                if distance > reach(skill) {
                    return Err(Refused::OutOfReach { distance, reach: reach(skill) });
                }
                emit.event(Happened::Attacked { target: target.get(), skill, damage: DAMAGE, seen });
            }
            Command::Suffer { by, damage } => emit.event(Happened::Hurt { by: by.get(), damage }),
            Command::Leave => emit.event(Happened::Left),
        }
        Ok(())
    }
}

fn join(place: Place, emit: &mut Emit<Happened>) -> Result<(), Refused> {
    if !place.is_on_the_map() {
        return Err(Refused::OffTheMap);
    }
    emit.event(Happened::Joined { x: place.x, y: place.y });
    Ok(())
}

impl Player {
    fn stand(&mut self, x: f64, y: f64, since: Time) {
        self.place = Some(Place { x, y });
        self.since = since.get();
    }
}

/// Returns the number of events of `key`'s shard that the view contains.
pub(crate) fn seen_of(others: &Cards, key: Key) -> u64 {
    let positions = others.positions();
    let shard = key.shard(positions.len().max(1) as u16);
    positions.iter().find(|(other, _)| *other == shard).map_or(0, |(_, position)| position.sequence.get())
}
