//! Deposits money into an account and reads the balance back. Run it again: the store in `target/hello` keeps the balance.
use corelane::{Aggregate, Bounded, Config, Emit, Engine, Event, Key, Meta};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Bounded, Event)]
#[event(id = 1, name = "deposited")]
struct Deposited(u64);

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
    let (balance, version) = engine.ask(Key::new(42), |account, version| (account.0, version)).wait()?;
    eprintln!("{balance} cents after {version} deposits");
    Ok(())
}
