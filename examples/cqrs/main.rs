//! Separates commands from queries: the shard that owns a player decides its commands; queries read views that the
//! shards publish.
//!
//! ```text
//! cargo run --release --example cqrs
//! ```
//!
//! Each step prints what it shows and checks it.
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
/// The first id of the other players.
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

    step("reopen: states, views and outcomes of idempotency keys are still there");
    drop(client);
    engine.shutdown(soon())?;
    drop(engine);
    let engine = views.open(&config)?;
    ensure!(queries(&engine, &views)? == before, "the views show the same as before");
    let mut client = engine.client();
    let again = client.send(BOB, Command::Suffer { by: ALICE, damage: 10 }).once("attack-1-3").wait()?;
    println!("the same hit again: version {}, repeated {}", again.version, again.repeated);
    ensure!(again.repeated);
    engine.shutdown(soon())?;
    println!("\nevery check passed");
    Ok(())
}

fn moves(client: &mut Client<Player>) -> Result<()> {
    step("move: decided with the player's state and the engine's clock");
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
    ensure!(outcome.version == Version(2), "a rejected command appends nothing");
    Ok(())
}

fn attacks(engine: &Engine<Player>, client: &mut Client<Player>, cards: &Cards) -> Result<()> {
    step("attack: the target is another key; the view tells how current its card is");
    let attack = |target, skill| Command::Attack { target, skill, others: cards.clone() };
    let refused = rejected(client.send(ALICE, attack(NOBODY, 1)).wait())?;
    ensure!(matches!(refused, Refused::NoSuchTarget { target: 404, .. }));
    client.send(BOB, Command::Join(at(204.0, 103.0))).wait()?;
    // No pause is needed: the views contain a command's events before its answer arrives.
    let refused = rejected(client.send(ALICE, attack(BOB, 1)).wait())?;
    ensure!(refused == Refused::OutOfReach { distance: 100.0, reach: reach(1) });
    ensure!(matches!(rejected(client.send(ALICE, attack(BOB, 7)).wait())?, Refused::OutOfReach { reach: 30.0, .. }));
    let hit = client.send(ALICE, attack(BOB, 2)).wait()?;
    // The event records how many events of Bob's shard the decision had seen.
    let mut stream = engine.stream(ALICE, hit.version)?;
    let record = stream.next()?.context("the attack is in the stream")?;
    let ArchivedHappened::Attacked { seen, .. } = record.event else { bail!("no attack: {:?}", record.meta) };
    let (seen, now) = (seen.to_native(), seen_of(cards, BOB));
    println!("in reach of skill 2 ({}): decided with {seen} events of Bob's shard; now there are {now}", reach(2));
    ensure!((1..=now).contains(&seen), "Bob's joining is one of them");
    drop(stream);

    step("idempotency key: Bob's half of the attack, sent twice, takes effect once");
    let id = format!("attack-{ALICE}-{}", hit.version);
    let first = client.send(BOB, Command::Suffer { by: ALICE, damage: 10 }).once(&*id).durable().wait()?;
    let second = client.send(BOB, Command::Suffer { by: ALICE, damage: 10 }).once(&*id).wait()?;
    println!(
        "{id}: version {}, repeated {}; version {}, repeated {}",
        first.version, first.repeated, second.version, second.repeated
    );
    ensure!((first.version, first.repeated) == (second.version, false) && second.repeated);
    ensure!(first.receipt().is_durable(), "the answer waits for durability");
    let health = engine.ask(BOB, |bob, _| bob.health).wait()?;
    ensure!(health == 90, "{health}");
    Ok(())
}

fn versions(engine: &Engine<Player>, client: &mut Client<Player>) -> Result<()> {
    step("expected version: of two commands based on the same version, the second is rejected");
    let mut other = engine.client();
    let version = ExpectedVersion::Exact(engine.ask(ALICE, |_, version| version).wait()?);
    thread::sleep(Duration::from_millis(50));
    client.send(ALICE, Command::Move(at(104.0, 104.0))).expect(version).wait()?;
    match other.send(ALICE, Command::Move(at(104.0, 102.0))).expect(version).wait() {
        Err(error @ CommandError::WrongVersion { .. }) => println!("{error}"),
        other => bail!("both commands were accepted: {other:?}"),
    }
    Ok(())
}

fn pipelined(client: &mut Client<Player>) -> Result<()> {
    step("pipelined: many commands in flight, each with its own answer");
    let began = Instant::now();
    let (mut tickets, mut refused) = (Vec::new(), 0);
    for n in 0..CROWD_SIZE {
        // The golden ratio spreads the places evenly; some are off the map.
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
    println!("{CROWD_SIZE} commands decided in {:.0} ms, {refused} of them rejected", seconds * 1e3);
    ensure!(client.on_their_way() == 0);
    Ok(())
}

async fn awaited(engine: &Engine<Player>, client: &mut Client<Player>) -> Result<()> {
    step("await: commands from an async task");
    let carol = Key::new(3);
    let joined = client.send(carol, Command::Join(at(1.0, 1.0))).durable().await?;
    ensure!(joined.receipt().is_durable());
    let twice = client.send(carol, Command::Join(at(1.0, 1.0))).await;
    ensure!(rejected(twice)? == Refused::InTheGameAlready);
    let place = engine.ask(carol, |carol, _| carol.place).await?;
    println!("Carol is at {place:?}");
    ensure!(place == Some(at(1.0, 1.0)));
    client.send(carol, Command::Leave).await?;
    ensure!(rejected(client.send(carol, Command::Leave).await)? == Refused::NotInTheGame);
    Ok(())
}

/// What the views show: the number of players online, the best players, and the players near Bob.
type Shown = (u64, Vec<(Key, i64)>, Vec<Key>);

fn queries(engine: &Engine<Player>, views: &Views) -> Result<Shown> {
    step("queries: one player, an area, the best players, the whole server");
    let (asked, version) = engine.state(BOB).wait()?.context("Bob is in the game")?;
    let card = views.cards.get(BOB)?.context("Bob has a card")?;
    println!("Bob, asked: version {version}, {asked:?}; his card: {card:?}");
    ensure!((card.place, card.health) == (asked.place, asked.health));
    ensure!(views.cards.get(NOBODY)?.is_none());

    let mut near: Vec<Key> = views.nearby.within(204.0, 103.0, 50.0).iter().map(|found| found.key).collect();
    near.sort();
    let everyone = (1..4).chain(CROWD..CROWD + CROWD_SIZE).map(Key::new);
    let mut checked_singly = Vec::new();
    for key in everyone {
        if let Some(card) = views.cards.get(key)?
            && card.place.is_some_and(|place| place.distance(at(204.0, 103.0)) <= 50.0)
        {
            checked_singly.push(key);
        }
    }
    println!("within 50 of Bob: {} players, the same as a scan of all cards finds", near.len());
    ensure!(near == checked_singly && near.contains(&BOB));

    let status = views.status.get();
    println!("online {} of {}, {} events", status.online, status.total, status.events);
    ensure!(
        status.events == engine.counts()?.events && status.online == status.total - 1,
        "everyone but Carol is online"
    );
    let best: Vec<_> = views.best.top(3).iter().map(|ranked| (ranked.key, ranked.score)).collect();
    println!("best: {best:?}");
    ensure!(best[0] == (ALICE, 10));
    Ok((status.online, best, near))
}

/// Returns the reason why a command was rejected. Fails for any other answer.
fn rejected(answer: Result<Outcome, CommandError<Refused>>) -> Result<Refused> {
    match answer {
        Err(CommandError::Rejected(refused)) => {
            println!("rejected: {refused:?}");
            Ok(refused)
        }
        other => bail!("not rejected: {other:?}"),
    }
}

fn at(x: f64, y: f64) -> Place {
    Place { x, y }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}

fn step(name: &str) {
    println!("\n== {name}");
}

/// Runs a future on this thread. Any executor works: an answer wakes the task that awaits it.
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
