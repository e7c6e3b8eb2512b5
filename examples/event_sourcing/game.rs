//! The game: a player's events, and the state they produce.

use std::convert::Infallible;

use corelane::event::Correlation;
use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// An event of a player. The game computes with three kinds; it keeps all others under their number.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) enum GameEvent {
    LevelledUp {
        new_level: i64,
        source: Source,
    },
    Killed {
        source: Source,
    },
    PickedUp {
        item: String,
        quantity: i64,
        source: Source,
    },
    /// An event of another kind in [`KINDS`], by number.
    Other {
        kind: u16,
        source: Source,
    },
    /// An event of a kind without a number. Once the kind gets a number, new events are [`GameEvent::Other`]; stored
    /// ones stay.
    Unlisted {
        name: String,
        source: Source,
    },
}

/// The part common to all events, as the source sent it.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq, Default)]
pub(crate) struct Source {
    /// `None` stands for the time of publishing.
    pub(crate) timestamp_ms: Option<u64>,
    pub(crate) match_id: String,
    pub(crate) position: Option<Place>,
    /// The whole payload as JSON: the game may compute with more of it later.
    pub(crate) payload: String,
}

/// A place on the map.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Copy, PartialEq)]
pub(crate) struct Place {
    pub(crate) x: f64,
    pub(crate) y: f64,
}

pub(crate) const LEVEL_UP: EventTypeId = EventTypeId(1);
pub(crate) const KILL: EventTypeId = EventTypeId(2);
pub(crate) const PICKUP: EventTypeId = EventTypeId(3);
pub(crate) const MOVE: EventTypeId = EventTypeId(4);
pub(crate) const UNLISTED: EventTypeId = EventTypeId(999);

/// Numbers and names never change; new kinds go to the end.
const KINDS: &[EventType] = &[
    EventType::new(1, "player.levelup", 1),
    EventType::new(2, "player.kill", 1),
    EventType::new(3, "item.pickup", 1),
    EventType::new(4, "player.move", 1),
    EventType::new(5, "unit.train", 1),
    EventType::new(6, "ability.use", 1),
    EventType::new(7, "player.attack", 1),
    EventType::new(8, "player.order", 1),
    EventType::new(9, "unit.born", 1),
    EventType::new(10, "unit.morph", 1),
    EventType::new(11, "building.place", 1),
    EventType::new(12, "player.damage", 1),
    EventType::new(13, "player.stats", 1),
    EventType::new(14, "unit.died", 1),
    EventType::new(15, "player.heal", 1),
    EventType::new(16, "unit.init", 1),
    EventType::new(17, "unit.done", 1),
    EventType::new(18, "player.hit", 1),
    EventType::new(19, "tech.research", 1),
    EventType::new(20, "player.chat", 1),
    EventType::new(21, "player.spawn", 1),
    EventType::new(22, "neutral.kill", 1),
    EventType::new(23, "player.assist", 1),
    EventType::new(24, "player.ping", 1),
    EventType::new(25, "match.leave", 1),
    EventType::new(26, "charge.empty", 1),
    EventType::new(27, "point.capture", 1),
    EventType::new(28, "flag.event", 1),
    EventType::new(29, "object.build", 1),
    EventType::new(30, "player.role", 1),
    EventType::new(31, "object.destroy", 1),
    EventType::new(32, "medic.death", 1),
    EventType::new(33, "upgrade.grant", 1),
    EventType::new(34, "medic.death_ex", 1),
    EventType::new(35, "player.domination", 1),
    EventType::new(36, "resource.trade", 1),
    EventType::new(37, "item.destroy", 1),
    EventType::new(38, "medic.first_heal", 1),
    EventType::new(39, "item.purchase", 1),
    EventType::new(40, "charge.ready", 1),
    EventType::new(41, "charge.deployed", 1),
    EventType::new(42, "skill.levelup", 1),
    EventType::new(43, "charge.ended", 1),
    EventType::new(44, "player.revenge", 1),
    EventType::new(45, "point.block", 1),
    EventType::new(46, "ward.place", 1),
    EventType::new(47, "player.extinguish", 1),
    EventType::new(48, "player.team", 1),
    EventType::new(49, "object.detonate", 1),
    EventType::new(50, "player.suicide", 1),
    EventType::new(51, "object.carry", 1),
    EventType::new(52, "object.drop", 1),
    EventType::new(53, "match.join", 1),
    EventType::new(54, "charge.advantage_lost", 1),
    EventType::new(55, "player.connect", 1),
    EventType::new(56, "building.destroy", 1),
    EventType::new(57, "ward.kill", 1),
    EventType::new(58, "monster.kill", 1),
    EventType::new(59, "item.undo", 1),
    EventType::new(60, "player.special_kill", 1),
    EventType::new(61, "item.sell", 1),
    EventType::new(999, "unlisted", 1),
];

impl Event for GameEvent {
    const TYPES: &'static [EventType] = KINDS;

    fn event_type(&self) -> EventTypeId {
        match self {
            Self::LevelledUp { .. } => LEVEL_UP,
            Self::Killed { .. } => KILL,
            Self::PickedUp { .. } => PICKUP,
            Self::Other { kind, .. } => EventTypeId(*kind),
            Self::Unlisted { .. } => UNLISTED,
        }
    }

    fn time(&self) -> Option<Time> {
        self.source().timestamp_ms.map(Time::unix_ms)
    }

    fn correlation(&self) -> Correlation {
        match self.source().match_id.as_str() {
            "" => Correlation(0),
            id => Correlation::of(id),
        }
    }
}

impl GameEvent {
    fn source(&self) -> &Source {
        match self {
            Self::LevelledUp { source, .. }
            | Self::Killed { source }
            | Self::PickedUp { source, .. }
            | Self::Other { source, .. }
            | Self::Unlisted { source, .. } => source,
        }
    }
}

impl ArchivedGameEvent {
    fn source(&self) -> &ArchivedSource {
        match self {
            Self::LevelledUp { source, .. }
            | Self::Killed { source }
            | Self::PickedUp { source, .. }
            | Self::Other { source, .. }
            | Self::Unlisted { source, .. } => source,
        }
    }
}

/// Returns the name of a kind.
pub(crate) fn name_of(kind: EventTypeId) -> &'static str {
    KINDS.iter().find(|known| known.id == kind).map_or("", |known| known.name)
}

/// Returns the number of a kind, if it has one.
pub(crate) fn kind_of(name: &str) -> Option<EventTypeId> {
    KINDS.iter().find(|known| known.name == name && known.id != UNLISTED).map(|known| known.id)
}

/// Experience per kill. A rule of this program, stored in no event: a change must increment
/// [`Aggregate::STATE_VERSION`], so that all states are rebuilt from the log.
const EXPERIENCE_PER_KILL: i64 = 100;

/// The state of a player, computed from events only.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) struct Player {
    pub(crate) level: i64,
    pub(crate) experience: i64,
    pub(crate) kills: i64,
    /// Sorted by name.
    pub(crate) inventory: Vec<Item>,
    pub(crate) position: Option<Place>,
    pub(crate) last_update_ms: u64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) struct Item {
    pub(crate) name: String,
    pub(crate) quantity: i64,
}

impl Default for Player {
    fn default() -> Self {
        Self { level: 1, experience: 0, kills: 0, inventory: Vec::new(), position: None, last_update_ms: 0 }
    }
}

impl Player {
    /// Returns the number of items that the player carries.
    pub(crate) fn carried(&self) -> i64 {
        self.inventory.iter().map(|item| item.quantity).sum()
    }

    fn take(&mut self, name: &str, quantity: i64) {
        match self.inventory.binary_search_by(|item| item.name.as_str().cmp(name)) {
            Ok(at) => self.inventory[at].quantity += quantity,
            Err(at) => self.inventory.insert(at, Item { name: name.to_owned(), quantity }),
        }
    }
}

impl Aggregate for Player {
    type Event = GameEvent;
    /// No commands: the events happened elsewhere. (The example `cqrs` shows commands.)
    type Command = Infallible;
    type Rejection = ();

    fn evolve(&mut self, event: &ArchivedGameEvent, meta: &Meta) {
        match event {
            ArchivedGameEvent::LevelledUp { new_level, .. } => self.level = new_level.to_native(),
            ArchivedGameEvent::Killed { .. } => {
                self.kills += 1;
                self.experience += EXPERIENCE_PER_KILL;
            }
            ArchivedGameEvent::PickedUp { item, quantity, .. } => self.take(item, quantity.to_native()),
            ArchivedGameEvent::Other { .. } | ArchivedGameEvent::Unlisted { .. } => {}
        }
        if let Some(place) = event.source().position.as_ref() {
            self.position = Some(Place { x: place.x.to_native(), y: place.y.to_native() });
        }
        self.last_update_ms = meta.time.as_ms();
    }

    fn decide(&self, command: Infallible, _emit: &mut Emit<GameEvent>) -> Result<(), ()> {
        match command {}
    }
}
