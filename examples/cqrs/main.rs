//! Commands and queries, apart: commands are decided by the shard that owns the player, queries read what it has published.
//!
//! ```text
//! cargo run --release --example cqrs
//! ```
//!
//! Each step prints what it shows, and fails if it does not hold.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod world;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use corelane::command::ExpectedVersion;
use corelane::view::{Area, Leaderboard, Presence, ServerStatus};
use corelane::{Client, CommandError, Config, Engine, Key, Outcome, Version};

use crate::world::{ArchivedHappened, Cards, Command, MAP, Place, Player, Refused, cards, reach, seen_of};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ALICE: Key = Key::new(1);
const BOB: Key = Key::new(2);
const NOBODY: Key = Key::new(404);
/// Others, from this id on.
const CROWD: u64 = 1_000;
const CROWD_SIZE: u64 = 20_000;

/// The read side.
struct Views {
    cards: Cards,
    nearby: Area<Player>,
    best: Leaderboard<Player>,
    status: ServerStatus<Player>,
}

impl Views {
    fn new() -> Self {
        let presence = |player: &Player| if player.place.is_some() { Presence::Online } else { Presence::Offline };
        Self {
            cards: cards(),
            nearby: Area::new((0.0, 0.0, MAP, MAP), 10.0, |player: &Player| {
                player.place.map(|place| (place.x, place.y))
            }),
            best: Leaderboard::new(10, |player: &Player| player.score),
            status: ServerStatus::new(presence),
        }
    }

    fn open(&self, config: &Config) -> Result<Engine<Player>> {
        let builder = Engine::<Player>::builder(config.clone());
        Ok(builder.view(&self.cards).view(&self.nearby).view(&self.best).view(&self.status).open()?)
    }
}

fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = Config::new(dir.path()).shards(2).segment_bytes(16 << 20);
    let views = Views::new();
    let engine = views.open(&config)?;
    let mut client = engine.client();

    moves(&mut client)?;
    attacks(&engine, &mut client, &views.cards)?;
    versions(&engine, &mut client)?;
    pipelined(&mut client)?;
    block_on(awaited(&engine, &mut client))?;
    let before = queries(&engine, &views)?;

    step("open again: states, views and answers under idempotency keys are there");
    drop(client);
    engine.shutdown(soon())?;
    drop(engine);
    let engine = views.open(&config)?;
    ensure!(queries(&engine, &views)? == before, "what the views show is what they showed");
    let mut client = engine.client();
    let again = client.send(BOB, Command::Suffer { by: ALICE, damage: 10 }).once("attack-1-3").wait()?;
    println!("the hit sent once more: version {}, repeated {}", again.version, again.repeated);
    ensure!(again.repeated);
    engine.shutdown(soon())?;
    println!("\nall of it held");
    Ok(())
}

fn moves(client: &mut Client<Player>) -> Result<()> {
    step("move: by the player's state and the engine's clock");
    let refused = rejected(client.send(ALICE, Command::Move(at(10.0, 10.0))).wait())?;
    ensure!(refused == Refused::NotInTheGame);
    let outcome = client.send(ALICE, Command::Join(at(100.0, 100.0))).wait()?;
    ensure!((outcome.version, outcome.events) == (Version(1), 1));
    let refused = rejected(client.send(ALICE, Command::Move(at(900.0, 100.0))).wait())?;
    ensure!(matches!(refused, Refused::TooFast { distance: 800.0, .. }));
    let refused = rejected(client.send(ALICE, Command::Move(at(100.0, -0.1))).wait())?;
    ensure!(refused == Refused::OffTheMap);
    thread::sleep(Duration::from_millis(50));
    let outcome = client.send(ALICE, Command::Move(at(104.0, 103.0))).wait()?;
    println!("five steps after 50 ms: version {}", outcome.version);
    ensure!(outcome.version == Version(2), "a refusal appends nothing");
    Ok(())
}

fn attacks(engine: &Engine<Player>, client: &mut Client<Player>, cards: &Cards) -> Result<()> {
    step("attack: the target is another key; what is known of it is as old as the view says");
    let attack = |target, skill| Command::Attack { target, skill, others: cards.clone() };
    let refused = rejected(client.send(ALICE, attack(NOBODY, 1)).wait())?;
    ensure!(matches!(refused, Refused::NoSuchTarget { target: 404, .. }));
    client.send(BOB, Command::Join(at(204.0, 103.0))).wait()?;
    // No pause: whoever has an answer finds what it did in the views.
    let refused = rejected(client.send(ALICE, attack(BOB, 1)).wait())?;
    ensure!(refused == Refused::OutOfReach { distance: 100.0, reach: reach(1) });
    ensure!(matches!(rejected(client.send(ALICE, attack(BOB, 7)).wait())?, Refused::OutOfReach { reach: 30.0, .. }));
    let hit = client.send(ALICE, attack(BOB, 2)).wait()?;
    // The event has kept how much of Bob's shard was known.
    let mut stream = engine.stream(ALICE, hit.version)?;
    let record = stream.next()?.context("the attack is in the stream")?;
    let ArchivedHappened::Attacked { seen, .. } = record.event else { bail!("no attack: {:?}", record.meta) };
    let (seen, now) = (seen.to_native(), seen_of(cards, BOB));
    println!("in reach of skill 2 ({}): decided with {seen} events of Bob's shard; by now there are {now}", reach(2));
    ensure!((1..=now).contains(&seen), "Bob's joining was among them");
    drop(stream);

    step("idempotency key: the other half of the attack is Bob's; sent twice, done once");
    let id = format!("attack-{ALICE}-{}", hit.version);
    let first = client.send(BOB, Command::Suffer { by: ALICE, damage: 10 }).once(&*id).durable().wait()?;
    let second = client.send(BOB, Command::Suffer { by: ALICE, damage: 10 }).once(&*id).wait()?;
    println!(
        "{id}: version {}, repeated {}; version {}, repeated {}",
        first.version, first.repeated, second.version, second.repeated
    );
    ensure!((first.version, first.repeated) == (second.version, false) && second.repeated);
    ensure!(first.receipt().is_durable(), "answered when it was durable");
    let health = engine.ask(BOB, |bob, _| bob.health)?;
    ensure!(health == 90, "{health}");
    Ok(())
}

fn versions(engine: &Engine<Player>, client: &mut Client<Player>) -> Result<()> {
    step("expected version: of two that saw the same, one is told");
    let mut other = engine.client();
    let version = ExpectedVersion::Exact(engine.ask(ALICE, |_, version| version)?);
    thread::sleep(Duration::from_millis(50));
    client.send(ALICE, Command::Move(at(104.0, 104.0))).expect(version).wait()?;
    match other.send(ALICE, Command::Move(at(104.0, 102.0))).expect(version).wait() {
        Err(error @ CommandError::WrongVersion { .. }) => println!("{error}"),
        other => bail!("both were carried out: {other:?}"),
    }
    Ok(())
}

fn pipelined(client: &mut Client<Player>) -> Result<()> {
    step("pipelined: many on their way, each with its own answer");
    let began = Instant::now();
    let (mut tickets, mut refused) = (Vec::new(), 0);
    for n in 0..CROWD_SIZE {
        // Spread by the golden ratio; some of it beyond the map.
        let place = at((n as f64 * 0.618_033_988_749).fract() * MAP * 1.1, n as f64 / CROWD_SIZE as f64 * MAP);
        let ticket = client.send(Key::new(CROWD + n), Command::Join(place)).ticket();
        tickets.push((place, ticket.map_err(|refused| refused.reason())?));
        if tickets.len() < 1_000 && n + 1 < CROWD_SIZE {
            continue;
        }
        for (place, ticket) in tickets.drain(..) {
            match client.answer(ticket).wait() {
                Ok(outcome) => ensure!(outcome.version == Version(1) && place.x <= MAP),
                Err(CommandError::Rejected(Refused::OffTheMap)) if place.x > MAP => refused += 1,
                Err(other) => return Err(other.into()),
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    println!("{CROWD_SIZE} commands decided in {:.0} ms, {refused} of them refused", seconds * 1e3);
    ensure!(client.on_their_way() == 0);
    Ok(())
}

async fn awaited(engine: &Engine<Player>, client: &mut Client<Player>) -> Result<()> {
    step("await: the same from a task");
    let carol = Key::new(3);
    let joined = client.send(carol, Command::Join(at(1.0, 1.0))).durable().await?;
    ensure!(joined.receipt().is_durable());
    let twice = client.send(carol, Command::Join(at(1.0, 1.0))).await;
    ensure!(rejected(twice)? == Refused::InTheGameAlready);
    let place = engine.ask_async(carol, |carol, _| carol.place).await?;
    println!("Carol is at {place:?}");
    ensure!(place == Some(at(1.0, 1.0)));
    client.send(carol, Command::Leave).await?;
    ensure!(rejected(client.send(carol, Command::Leave).await)? == Refused::NotInTheGame);
    Ok(())
}

/// What all views show: how many are online, the best of them, who is near Bob.
type Shown = (u64, Vec<(Key, i64)>, Vec<Key>);

fn queries(engine: &Engine<Player>, views: &Views) -> Result<Shown> {
    step("queries: by player, by area, of the server, the best");
    let (asked, version) = engine.state(BOB)?.context("Bob is in the game")?;
    let card = views.cards.get(BOB)?.context("Bob has a card")?;
    println!("Bob, asked: version {version}, {asked:?}; his card: {card:?}");
    ensure!((card.place, card.health) == (asked.place, asked.health));
    ensure!(views.cards.get(NOBODY)?.is_none());

    let mut near: Vec<Key> = views.nearby.within(204.0, 103.0, 50.0).iter().map(|found| found.key).collect();
    near.sort();
    let everybody = (1..4).chain(CROWD..CROWD + CROWD_SIZE).map(Key::new);
    let mut by_hand = Vec::new();
    for key in everybody {
        if let Some(card) = views.cards.get(key)?
            && card.place.is_some_and(|place| place.distance(at(204.0, 103.0)) <= 50.0)
        {
            by_hand.push(key);
        }
    }
    println!("within 50 of Bob: {} players, as many as one finds by looking at all", near.len());
    ensure!(near == by_hand && near.contains(&BOB));

    let status = views.status.get();
    println!("online {} of {}, {} events", status.online, status.total, status.events);
    ensure!(status.events == engine.counts()?.events && status.online == status.total - 1, "all but Carol");
    let best: Vec<_> = views.best.top(3).iter().map(|ranked| (ranked.key, ranked.score)).collect();
    println!("best: {best:?}");
    ensure!(best[0] == (ALICE, 10));
    Ok((status.online, best, near))
}

/// What a command was refused for; anything else is an error here.
fn rejected(answer: Result<Outcome, CommandError<Refused>>) -> Result<Refused> {
    match answer {
        Err(CommandError::Rejected(refused)) => {
            println!("refused: {refused:?}");
            Ok(refused)
        }
        other => bail!("not refused: {other:?}"),
    }
}

fn at(x: f64, y: f64) -> Place {
    Place { x, y }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}

fn step(what: &str) {
    println!("\n== {what}");
}

/// Runs a future on this thread. Any executor will do: answers wake whatever task waits for them.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        thread::park();
    }
}
