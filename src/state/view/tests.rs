//! Views against plain models, and under threads that read while the writer writes.

use std::collections::HashMap;
use std::convert::Infallible;
use std::thread;

use corelane::Bounded;
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rkyv::{Archive, Deserialize, Serialize};

use crate::event::{Correlation, Event, EventType, EventTypeId, Offset, Router, Time, Version};
use crate::state::aggregate::Emit;
use crate::state::view::*;

/// A state whose fields feed the views.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default, Debug, PartialEq)]
pub(super) struct Player {
    pub(super) at: Option<(f64, f64)>,
    pub(super) number: i64,
    pub(super) text: String,
}

#[derive(Archive, Serialize, Bounded)]
pub(super) struct Nothing;

impl Event for Nothing {
    const TYPES: &'static [EventType] = &[EventType::new(1, "nothing", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

impl Aggregate for Player {
    type Event = Nothing;
    type Command = Infallible;
    type Rejection = ();
    fn evolve(&mut self, _event: &ArchivedNothing, _meta: &Meta) {}
    fn decide(&self, command: Infallible, _emit: &mut Emit<Nothing>) -> Result<(), ()> {
        match command {}
    }
}

/// Some meta data: views use keys and states only.
pub(super) fn meta(key: Key) -> Meta {
    Meta {
        shard: ShardId(0),
        offset: Offset(0),
        sequence: Sequence(0),
        key,
        version: Version(1),
        time: Time(0),
        event_type: EventTypeId(1),
        schema_version: 1,
        correlation: Correlation(0),
        previous: None,
    }
}

/// The shards of an engine, as a view sees them.
pub(super) struct Shards(Vec<Box<dyn ViewWriter<Player>>>);

impl Shards {
    pub(super) fn open(view: &dyn View<Player>, shards: u16) -> Self {
        Self((0..shards).map(|shard| view.writer(&Place::new(ShardId(shard), Router::new(shards, None), 0))).collect())
    }

    pub(super) fn change(&mut self, key: u64, player: &Player) {
        let key = Key(key);
        let shard = key.shard(self.0.len() as u16);
        self.0[usize::from(shard.0)].changed(key, player, &meta(key));
    }

    pub(super) fn publish(&mut self, sequence: u64, time: Time) {
        for shard in &mut self.0 {
            shard.publish(Position { sequence: Sequence(sequence), time });
        }
    }
}

fn numbered(number: i64) -> Player {
    Player { number, ..Player::default() }
}

#[test]
fn by_id_is_a_map_that_grows() {
    const BYTES_MAX: usize = 64;
    let view = ById::new(BYTES_MAX, |player: &Player| (player.number, player.text.clone()));
    let mut shards = Shards::open(&view, 2);
    let mut expected = HashMap::new();
    let mut random = SmallRng::seed_from_u64(1);
    for step in 0..30_000 {
        let key = random.random_range(0..9_000);
        // Up to 8 bytes are part of the 16 that every value has.
        let text = "x".repeat(random.random_range(0..56));
        let player = Player { number: step, text, ..Player::default() };
        shards.change(key, &player);
        expected.insert(key, player);
    }
    assert!(expected.len() > 8_000, "both shards have several levels");
    let mut too_large = 0;
    for key in 0..9_000 {
        let found = view.get(Key(key));
        match expected.get(&key) {
            Some(player) if player.text.len() > BYTES_MAX - 16 => {
                too_large += 1;
                assert_eq!(found, Err(Unreadable::TooLarge { key: Key(key), bytes_max: BYTES_MAX }));
            }
            expected => assert_eq!(found, Ok(expected.map(|player| (player.number, player.text.clone())))),
        }
    }
    assert!(too_large > 100, "some values did not fit");
}

#[test]
fn by_id_is_never_torn_and_never_behind_its_position() {
    const KEYS: u64 = 3_000;
    let view = ById::new(128, |player: &Player| (player.number, player.text.clone()));
    let mut shards = Shards::open(&view, 1);
    let reader = view.clone();
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for number in 0..200_000_u64 {
                let text = format!("{number}").repeat(number as usize % 10);
                shards.change(number % KEYS, &Player { number: number as i64, text, ..Player::default() });
                shards.publish(number + 1, Time(number + 1));
            }
        });
        while !writer.is_finished() {
            let Some((_, position)) = reader.positions().pop() else { continue };
            let Some(newest) = position.sequence.0.checked_sub(1) else { continue };
            assert_eq!(position.time.0, position.sequence.0, "a position is whole");
            let value = reader.get(Key(newest % KEYS));
            let Ok(Some((number, text))) = value else { panic!("{position:?}: {value:?}") };
            assert!(number as u64 >= newest, "{number} is older than {position:?}");
            assert_eq!(text, format!("{number}").repeat(number as usize % 10), "torn");
        }
    });
}

/// Returns the first `n` after sorting everything.
fn sorted(scores: &HashMap<u64, i64>, n: usize) -> Vec<(u64, i64)> {
    let mut all: Vec<(u64, i64)> = scores.iter().map(|(key, score)| (*key, *score)).collect();
    all.sort_unstable_by_key(|(key, score)| (std::cmp::Reverse(*score), *key));
    all.truncate(n);
    all
}

fn top(view: &Leaderboard<Player>, n: usize) -> Vec<(u64, i64)> {
    view.top(n).into_iter().map(|ranked| (ranked.key.0, ranked.score)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_leaderboard_equals_sorting_all_scores(seed: u64, places in 1usize..40, keys in 1u64..900, shards in 1u16..4) {
        let view = Leaderboard::new(places, |player: &Player| player.number);
        let mut writers = Shards::open(&view, shards);
        let mut scores = HashMap::new();
        let mut random = SmallRng::seed_from_u64(seed);
        for key in 0..keys {
            let score = random.random_range(-50..50);
            writers.change(key, &numbered(score));
            scores.insert(key, score);
        }
        writers.publish(0, Time(0));
        for step in 0..2_000 {
            // The best fall most often, which empties the list.
            let best = view.top(places);
            let (key, score) = match random.random_range(0..10) {
                0 => (random.random_range(0..keys), random.random_range(-50..50)),
                1 => (random.random_range(0..keys), *[i64::MIN, i64::MAX, 0].get(step % 3).unwrap_or(&0)),
                _ => (best[random.random_range(0..best.len())].key.0, random.random_range(-90..-50)),
            };
            writers.change(key, &numbered(score));
            scores.insert(key, score);
            writers.publish(step as u64, Time(0));
            prop_assert_eq!(top(&view, places), sorted(&scores, places), "step {}", step);
        }
        prop_assert_eq!(top(&view, 2), sorted(&scores, places.min(2)));
    }
}

#[test]
fn a_loaded_leaderboard_is_shown_at_the_first_publish() {
    let view = Leaderboard::new(10, |player: &Player| player.number);
    let mut writer = view.writer(&Place::new(ShardId(0), Router::new(1, None), 5_000));
    let scores: HashMap<u64, i64> = (0..5_000).map(|key| (key, (key as i64 * 7_919) % 1_000)).collect();
    for (key, score) in &scores {
        writer.load(Key(*key), &numbered(*score));
    }
    assert_eq!(view.top(10), [], "nothing is shown before it is published");
    writer.publish(Position::default());
    assert_eq!(top(&view, 10), sorted(&scores, 10));
}

#[test]
fn a_leaderboard_shows_whole_batches() {
    const KEYS: u64 = 8;
    let view = Leaderboard::new(KEYS as usize, |player: &Player| player.number);
    let mut shards = Shards::open(&view, 1);
    let reader = view.clone();
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for round in 0..50_000 {
                (0..KEYS).for_each(|key| shards.change(key, &numbered(round % 1_000)));
                shards.publish(round as u64, Time(0));
            }
        });
        while !writer.is_finished() {
            let best = top(&reader, KEYS as usize);
            let Some((_, score)) = best.first() else { continue };
            assert_eq!(best, (0..KEYS).map(|key| (key, *score)).collect::<Vec<_>>());
        }
    });
}

fn presence(player: &Player) -> Presence {
    if player.number > 0 { Presence::Online } else { Presence::Offline }
}

#[test]
fn the_status_counts_each_key_once() {
    let view = ServerStatus::new(presence);
    let mut shards = Shards::open(&view, 2);
    for number in [1, 1, 0, 0, 1] {
        (0..10).for_each(|key| shards.change(key, &numbered(number)));
    }
    (0..3).for_each(|key| shards.change(key, &numbered(0)));
    assert_eq!(view.get(), Status::default(), "nothing is shown before it is published");
    shards.publish(20, Time(5));
    let status = view.get();
    assert_eq!((status.online, status.total, status.events, status.time), (7, 10, 40, Time(5)));
}

#[test]
fn the_load_is_averaged_over_the_last_whole_seconds() {
    const SECOND: u64 = 1_000_000_000;
    let view = ServerStatus::new(presence);
    let mut shards = Shards::open(&view, 1);
    let mut change = |count: u64, second: u64| {
        (0..count).for_each(|key| shards.change(key, &numbered(1)));
        shards.publish(0, Time(second * SECOND));
    };
    (100..110).for_each(|second| change(second, second));
    assert_eq!(view.get().events_per_s, (104..109).sum::<u64>() as f64 / 5.0, "the second 109 is not over");
    change(7, 50);
    assert_eq!(view.get_at(Time(110 * SECOND)).events_per_s, 107.0 + 7.0 / 5.0, "time that goes back counts as now");
    assert_eq!(view.get_at(Time(114 * SECOND)).events_per_s, 116.0 / 5.0);
    assert_eq!(view.get_at(Time(115 * SECOND)).events_per_s, 0.0);
    change(1, 1_000);
    assert_eq!(view.get().events_per_s, 0.0, "events from before the pause no longer count");
}

#[test]
fn a_status_is_exact_at_its_position() {
    let view = ServerStatus::new(presence);
    let mut shards = Shards::open(&view, 1);
    let reader = view.clone();
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for key in 0..200_000 {
                shards.change(key, &numbered(1));
                shards.publish(key + 1, Time(key + 1));
            }
        });
        while !writer.is_finished() {
            let status = reader.get();
            assert_eq!((status.online, status.total, status.time.0), (status.events, status.events, status.events));
        }
    });
}

#[test]
fn a_second_engine_starts_a_view_over() {
    let by_id = ById::new(64, |player: &Player| player.number);
    let board = Leaderboard::new(5, |player: &Player| player.number);
    let status = ServerStatus::new(presence);
    let views: [&dyn View<Player>; 3] = [&by_id, &board, &status];
    let show = |shards: &mut Shards, keys: std::ops::Range<u64>| {
        keys.for_each(|key| shards.change(key, &numbered(1)));
        shards.publish(1, Time(1));
    };
    let mut first = views.map(|view| Shards::open(view, 3));
    first.iter_mut().for_each(|shards| show(shards, 0..100));
    let reader = by_id.clone();
    let mut second = views.map(|view| Shards::open(view, 2));
    assert_eq!((reader.get(Key(7)), board.top(5).len(), status.get()), (Ok(None), 0, Status::default()));
    second.iter_mut().for_each(|shards| show(shards, 100..103));
    // The first engine is still stopping: no reader sees its writes.
    first.iter_mut().for_each(|shards| show(shards, 0..100));
    assert_eq!((reader.get(Key(7)), reader.get(Key(100))), (Ok(None), Ok(Some(1))));
    assert_eq!((top(&board, 5), status.get().total), (vec![(100, 1), (101, 1), (102, 1)], 3));
    assert_eq!(by_id.positions().len(), 2);
    second = views.map(|view| Shards::open(view, 2));
    second.iter_mut().for_each(|shards| show(shards, 103..104));
    assert_eq!((reader.get(Key(100)), top(&board, 5), status.get().total), (Ok(None), vec![(103, 1)], 1));
    let _third = by_id.writer(&Place::new(ShardId(0), Router::new(3, None), 0));
    assert_eq!(by_id.positions().len(), 1, "parts of another shard count are gone at once");
}

#[test]
fn handles_are_clone_send_and_sync() {
    fn check<T: Clone + Send + Sync + std::fmt::Debug>(_: &T) {}
    check(&ById::new(8, |player: &Player| player.number));
    check(&Area::new((0.0, 0.0, 1.0, 1.0), 1.0, |player: &Player| player.at));
    check(&Leaderboard::new(1, |player: &Player| player.number));
    check(&ServerStatus::new(presence));
}

#[test]
fn by_id_shows_no_key_before_its_value() {
    const KEYS: u64 = 100_000;
    let view = ById::new(64, |player: &Player| (player.number, player.text.clone()));
    let mut shards = Shards::open(&view, 1);
    let reader = view.clone();
    thread::scope(|scope| {
        scope.spawn(move || {
            for key in 0..KEYS {
                shards.change(key, &numbered(key as i64));
            }
        });
        for key in 0..KEYS {
            loop {
                match reader.get(Key(key)) {
                    Ok(None) => std::hint::spin_loop(),
                    Ok(Some((number, _))) => break assert_eq!(number, key as i64),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
}
