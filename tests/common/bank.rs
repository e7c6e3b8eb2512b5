//! A bank account: the smallest aggregate that has rules.

use corelane::{Aggregate, Emit, Event, EventType, EventTypeId, Meta};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq)]
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

#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
pub(crate) struct Account {
    pub(crate) cents: u64,
    pub(crate) notes: u64,
    /// Tells one order of events from another.
    pub(crate) hash: u64,
}

#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(crate) enum Refused {
    NotEnough { missing: u64 },
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Order {
    Deposit(u64),
    Withdraw(u64),
    /// Two events: nothing may ever be seen of one alone.
    Exchange {
        out: u64,
        back: u64,
    },
    Notes {
        count: usize,
        bytes: usize,
    },
    Nothing,
    Panic,
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
            Order::Nothing => {}
            Order::Panic => panic!("asked for"),
        }
        Ok(())
    }
}
