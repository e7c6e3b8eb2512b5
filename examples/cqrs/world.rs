//! The game's rules: what players may want, when they are refused, and what becomes of them.

use corelane::view::ById;
use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Key, Meta, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// The map is so long and so wide.
pub(crate) const MAP: f64 = 1_000.0;
/// How far one comes in a second.
pub(crate) const SPEED_MAX: f64 = 100.0;
const HEALTH: i64 = 100;
const DAMAGE: i64 = 10;

/// How far a skill reaches.
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
        /// How many events of the target's shard were known when it was decided.
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

/// The side that decides: everything that its rules need, and no more.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq, Default)]
pub(crate) struct Player {
    pub(crate) place: Option<Place>,
    /// Since when it is there.
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

/// The side that is asked: what others see of a player.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) struct Card {
    /// `None`: not in the game any more.
    pub(crate) place: Option<Place>,
    pub(crate) health: i64,
}

/// Cards of all players, published by the shards.
pub(crate) type Cards = ById<Player, Card>;

pub(crate) fn cards() -> Cards {
    ById::new(64, |player: &Player| Card { place: player.place, health: player.health })
}

/// What somebody wants.
pub(crate) enum Command {
    Join(Place),
    Move(Place),
    /// The target is another key, perhaps of another shard: it is looked up in the view when the command is decided on.
    Attack {
        target: Key,
        skill: u32,
        others: Cards,
    },
    /// The other half of an attack, given to the target by whoever carries attacks through.
    Suffer {
        by: Key,
        damage: i64,
    },
    Leave,
}

/// Why not.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) enum Refused {
    NotInTheGame,
    InTheGameAlready,
    OffTheMap,
    TooFast {
        distance: f64,
        /// How far one could have come by now.
        distance_max: f64,
    },
    NoSuchTarget {
        target: u64,
        /// Of so many events of the target's shard; a later one may have made it.
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
                // The position first: what is looked up after it is at least as new.
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

/// How many events of `key`'s shard the view shows.
pub(crate) fn seen_of(others: &Cards, key: Key) -> u64 {
    let positions = others.positions();
    let shard = key.shard(positions.len().max(1) as u16);
    positions.iter().find(|(other, _)| *other == shard).map_or(0, |(_, position)| position.sequence.get())
}
