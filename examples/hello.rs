//! Deposits money into an account and reads the balance back. Run it again: the store in `target/hello` keeps the
//! balance.
use corelane::{Aggregate, Bounded, Config, Emit, Engine, Event, EventType, EventTypeId, Key, Meta};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Bounded)]
struct Deposited(u64);
impl Event for Deposited {
    const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
struct Account(u64);
impl Aggregate for Account {
    type Event = Deposited;
    type Command = std::convert::Infallible; // No commands: events are published directly.
    type Rejection = ();
    fn evolve(&mut self, event: &ArchivedDeposited, _: &Meta) {
        self.0 += event.0.to_native();
    }
    fn decide(&self, command: Self::Command, _: &mut Emit<Deposited>) -> Result<(), ()> {
        match command {}
    }
}
fn main() -> anyhow::Result<()> {
    let engine = Engine::<Account>::open(Config::new("target/hello"))?;
    engine.producer().publish(Key::new(42), Deposited(500))?.durable().wait()?;
    Ok(engine.ask(Key::new(42), |account, version| eprintln!("{} cents after {version} deposits", account.0))?)
}
