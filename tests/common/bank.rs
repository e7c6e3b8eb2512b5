//! A bank account: a small aggregate with rules.

use std::collections::HashMap;

use corelane::event::deserialize;
use corelane::state::States;
use corelane::{Aggregate, Bounded, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, ShardId};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) enum Money {
    Deposited { cents: u64 },
    Withdrawn { cents: u64 },
    Noted { text: String },
}

impl Event for Money {
    const TYPES: &'static [EventType] =
        &[EventType::new(1, "deposited", 1), EventType::new(2, "withdrawn", 1), EventType::new(3, "noted", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(match self {
            Money::Deposited { .. } => 1,
            Money::Withdrawn { .. } => 2,
            Money::Noted { .. } => 3,
        })
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
pub(crate) struct Account {
    pub(crate) cents: u64,
    pub(crate) notes: u64,
    /// Depends on the order of the events.
    pub(crate) hash: u64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) enum Refused {
    NotEnough { missing: u64 },
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Order {
    Deposit(u64),
    Withdraw(u64),
    /// Two events, which are never visible one without the other.
    Exchange {
        out: u64,
        back: u64,
    },
    Notes {
        count: usize,
        bytes: usize,
    },
    /// One event per amount.
    Deposits(Vec<u64>),
    /// One event per length, with a text of that length.
    NotesOf(Vec<usize>),
    Nothing,
    Panic,
    /// The first key pays this amount to every other key.
    Pay(u64),
    /// Events for the command's keys, then one for this key.
    Foreign(u64),
}

/// The same rules on owned values, independent of the aggregate, for models and folds.
impl Account {
    pub(crate) fn apply(&mut self, event: &Money, version: u64) {
        let n = match event {
            Money::Deposited { cents } => {
                self.cents += cents;
                2 * cents
            }
            Money::Withdrawn { cents } => {
                self.cents -= cents;
                2 * cents + 1
            }
            Money::Noted { text } => {
                self.notes += 1;
                text.len() as u64
            }
        };
        let mixed = self.hash ^ n ^ (version << 32);
        self.hash = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    }

    pub(crate) fn would(&self, order: &Order) -> Result<Vec<Money>, Refused> {
        let out = match order {
            Order::Withdraw(out) | Order::Exchange { out, .. } => *out,
            _ => 0,
        };
        if let Some(missing) = out.checked_sub(self.cents).filter(|missing| *missing > 0) {
            return Err(Refused::NotEnough { missing });
        }
        let note = |bytes: usize| Money::Noted { text: "n".repeat(bytes) };
        Ok(match order {
            Order::Deposit(cents) => vec![Money::Deposited { cents: *cents }],
            Order::Withdraw(cents) => vec![Money::Withdrawn { cents: *cents }],
            Order::Exchange { out, back } => {
                vec![Money::Withdrawn { cents: *out }, Money::Deposited { cents: *back }]
            }
            Order::Notes { count, bytes } => vec![note(*bytes); *count],
            Order::Deposits(all) => all.iter().map(|&cents| Money::Deposited { cents }).collect(),
            Order::NotesOf(all) => all.iter().map(|&bytes| note(bytes)).collect(),
            Order::Nothing | Order::Panic | Order::Pay(_) | Order::Foreign(_) => Vec::new(),
        })
    }

    /// The decision on a command for several keys with these states: the events, and the index of each one's key.
    pub(crate) fn would_many(states: &[Account], order: &Order) -> Result<Vec<(usize, Money)>, Refused> {
        if let Order::Pay(cents) = order {
            let out = cents * (states.len() as u64 - 1);
            if let Some(missing) = out.checked_sub(states[0].cents).filter(|missing| *missing > 0) {
                return Err(Refused::NotEnough { missing });
            }
            let paid = |at| [(0, Money::Withdrawn { cents: *cents }), (at, Money::Deposited { cents: *cents })];
            return Ok((1..states.len()).flat_map(paid).collect());
        }
        // Other orders take the keys in turn.
        let events = states[0].would(order)?;
        Ok(events.into_iter().enumerate().map(|(i, event)| (i % states.len(), event)).collect())
    }
}

/// An event in a shard's log.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Logged {
    pub(crate) key: u64,
    pub(crate) version: u64,
    pub(crate) offset: u64,
    pub(crate) money: Money,
}

/// Reads one shard's whole log. Checks that each key has versions 1, 2, 3, …
pub(crate) fn logged(engine: &Engine<Account>, shard: u16) -> Vec<Logged> {
    let mut reader = engine.reader(ShardId(shard));
    let (mut all, mut versions) = (Vec::new(), HashMap::new());
    while let Some(record) = reader.next().expect("the log reads") {
        let (key, version) = (record.meta.key.0, record.meta.version.0);
        assert_eq!(record.meta.sequence.0, all.len() as u64, "sequences have no holes");
        assert_eq!(version, versions.get(&key).unwrap_or(&0) + 1, "versions of key {key}");
        versions.insert(key, version);
        let money = deserialize::<Money>(record.event).expect("an archive of this type");
        all.push(Logged { key, version, offset: record.meta.offset.0, money });
    }
    all
}

/// Folds the events into states.
pub(crate) fn folded<'a>(events: impl IntoIterator<Item = &'a Logged>) -> HashMap<u64, (Account, u64)> {
    let mut states: HashMap<u64, (Account, u64)> = HashMap::new();
    for event in events {
        let (state, version) = states.entry(event.key).or_default();
        state.apply(&event.money, event.version);
        *version = event.version;
    }
    states
}

impl Aggregate for Account {
    type Event = Money;
    type Command = Order;
    type Rejection = Refused;

    fn evolve(&mut self, event: &ArchivedMoney, meta: &Meta) {
        let n = match event {
            ArchivedMoney::Deposited { cents } => {
                self.cents += cents.to_native();
                cents.to_native() * 2
            }
            ArchivedMoney::Withdrawn { cents } => {
                self.cents -= cents.to_native();
                cents.to_native() * 2 + 1
            }
            ArchivedMoney::Noted { text } => {
                self.notes += 1;
                text.len() as u64
            }
        };
        self.hash = (self.hash ^ n ^ meta.version.get() << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    }

    fn decide(&self, order: Order, emit: &mut Emit<Money>) -> Result<(), Refused> {
        match order {
            Order::Deposit(cents) => emit.event(Money::Deposited { cents }),
            Order::Withdraw(cents) | Order::Exchange { out: cents, .. } if cents > self.cents => {
                return Err(Refused::NotEnough { missing: cents - self.cents });
            }
            Order::Withdraw(cents) => emit.event(Money::Withdrawn { cents }),
            Order::Exchange { out, back } => {
                emit.event(Money::Withdrawn { cents: out });
                emit.event(Money::Deposited { cents: back });
            }
            Order::Notes { count, bytes } => {
                (0..count).for_each(|_| emit.event(Money::Noted { text: "n".repeat(bytes) }));
            }
            Order::Deposits(all) => all.into_iter().for_each(|cents| emit.event(Money::Deposited { cents })),
            Order::NotesOf(all) => {
                all.into_iter().for_each(|bytes| emit.event(Money::Noted { text: "n".repeat(bytes) }));
            }
            Order::Nothing => {}
            Order::Panic => panic!("asked for"),
            Order::Pay(_) => {}
            Order::Foreign(key) => {
                emit.event(Money::Deposited { cents: 1 });
                emit.event_for(Key(key), Money::Deposited { cents: 1 });
            }
        }
        Ok(())
    }

    fn decide_many(states: &States<'_, Self>, order: Order, emit: &mut Emit<Money>) -> Result<(), Refused> {
        let keys: Vec<Key> = states.keys().collect();
        let (first, others) = (keys[0], &keys[1..]);
        assert_eq!((emit.key(), Some(emit.version())), (first, states.version(first)));
        match order {
            Order::Pay(cents) => {
                let out = cents * others.len() as u64;
                if out > states[first].cents {
                    return Err(Refused::NotEnough { missing: out - states[first].cents });
                }
                for other in others {
                    emit.event(Money::Withdrawn { cents });
                    emit.event_for(*other, Money::Deposited { cents });
                }
            }
            Order::Panic => {
                emit.event_for(first, Money::Deposited { cents: 1 });
                emit.event_for(keys[keys.len() - 1], Money::Deposited { cents: 1 });
                panic!("asked for");
            }
            Order::Foreign(key) => {
                keys.iter().for_each(|key| emit.event_for(*key, Money::Deposited { cents: 1 }));
                emit.event_for(Key(key), Money::Deposited { cents: 1 });
            }
            // Other orders take the keys in turn.
            order => {
                let events = states[first].would(&order)?;
                events.into_iter().enumerate().for_each(|(i, event)| emit.event_for(keys[i % keys.len()], event));
            }
        }
        Ok(())
    }
}
