//! `#[derive(Event)]`: the types it declares, and the older layouts that it reads.
use corelane::event::{Correlation, Upcaster, deserialize};
use corelane::{Bounded, Config, Deadline, Event, EventLog, EventType, EventTypeId, Key, ShardId, Stored, Time};
use rkyv::{Archive, Deserialize, Serialize};

mod first {
    use super::*;

    #[derive(Archive, Serialize, Deserialize, Bounded, Event, Clone)]
    pub(super) enum GameEvent {
        #[event(id = 1, name = "player_moved")]
        Moved { x: i32, y: i32 },
        #[event(id = 2, name = "player_said")]
        Said(String, u32),
        #[event(id = 700, name = "player_left")]
        Left,
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Event, Clone, Debug, PartialEq)]
enum GameEvent {
    #[event(id = 1, name = "player_moved", version = 2, upcast(1 = GameEvent::moved_from_v1))]
    Moved { x: f64, y: f64, running: bool },
    #[event(id = 2, name = "player_said", version = 2, same(1 = first::GameEvent))]
    Said(String, u32),
    #[event(id = 700, name = "player_left", version = 2, same(1 = first::GameEvent))]
    Left,
    #[event(id = 3, name = "player_fought")]
    Fought { with: u64 },
}

impl GameEvent {
    fn moved_from_v1(archive: &[u8]) -> Result<Self, rkyv::rancor::Error> {
        match first::GameEvent::decode(archive)? {
            first::GameEvent::Moved { x, y } => Ok(Self::Moved { x: x.into(), y: y.into(), running: false }),
            first::GameEvent::Said(..) | first::GameEvent::Left => Err(Upcaster::<Self>::another_variant()),
        }
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Event, Clone)]
#[event(id = 9, name = "order", time = Order::placed_at, correlation = Order::cart)]
struct Order {
    placed_ms: u64,
    cart: u64,
}

impl Order {
    fn placed_at(&self) -> Option<Time> {
        Some(Time::unix_ms(self.placed_ms))
    }

    fn cart(&self) -> Correlation {
        Correlation(self.cart)
    }
}

#[test]
fn variants_are_the_declared_types_and_a_value_says_which_it_is() {
    let declared = [("player_moved", 1, 2), ("player_said", 2, 2), ("player_left", 700, 2), ("player_fought", 3, 1)];
    assert_eq!(GameEvent::TYPES, declared.map(|(name, id, version)| EventType::new(id, name, version)));
    assert_eq!(GameEvent::Left.event_type(), EventTypeId(700));
    assert_eq!(GameEvent::Fought { with: 7 }.event_type(), EventTypeId(3));
    let versions: Vec<_> = GameEvent::UPCASTERS.iter().map(|read| (read.event_type.0, read.schema_version)).collect();
    assert_eq!(versions, [(1, 1), (2, 1), (700, 1)]);
}

#[test]
fn a_struct_is_its_only_type_with_its_own_time_and_correlation() {
    let order = Order { placed_ms: 5, cart: 8 };
    assert_eq!(Order::TYPES, [EventType::new(9, "order", 1)]);
    assert_eq!((order.event_type(), order.time()), (EventTypeId(9), Some(Time::unix_ms(5))));
    assert_eq!(order.correlation(), Correlation(8));
}

#[test]
fn events_of_the_older_layout_are_read_as_current_ones() {
    let dir = tempfile::tempdir().unwrap();
    let log = EventLog::<first::GameEvent>::open(Config::new(dir.path())).unwrap();
    let mut producer = log.producer();
    for event in
        [first::GameEvent::Moved { x: 1, y: -2 }, first::GameEvent::Said("hello".to_owned(), 3), first::GameEvent::Left]
    {
        producer.publish(Key::new(1), event).unwrap();
    }
    drop(producer);
    log.shutdown(Deadline::NEVER).unwrap();
    drop(log);

    let log = EventLog::<GameEvent>::open(Config::new(dir.path())).unwrap();
    log.producer().publish(Key::new(1), GameEvent::Fought { with: 2 }).unwrap();
    log.flush(Deadline::NEVER).unwrap();
    let mut reader = log.reader(ShardId(0));
    let mut events = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        events.push(deserialize::<GameEvent>(record.event).unwrap());
    }
    let expected = [
        GameEvent::Moved { x: 1.0, y: -2.0, running: false },
        GameEvent::Said("hello".to_owned(), 3),
        GameEvent::Left,
        GameEvent::Fought { with: 2 },
    ];
    assert_eq!(events, expected);
}

#[test]
fn an_upcaster_that_meets_another_variant_returns_an_error() {
    let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&first::GameEvent::Left).unwrap();
    let said = GameEvent::UPCASTERS.iter().find(|read| read.event_type == EventTypeId(2)).unwrap();
    assert!((said.upcast)(&bytes).is_err());
}
