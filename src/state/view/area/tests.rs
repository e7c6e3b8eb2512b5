//! Areas against a check of all players, and under a writer that never stops moving them.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use crate::event::Time;
use crate::state::view::area::*;
use crate::state::view::tests::{Player, Shards};

fn at(x: f64, y: f64) -> Player {
    Player { at: Some((x, y)), ..Player::default() }
}

fn area(bounds: (f64, f64, f64, f64), cell_size: f64) -> Area<Player> {
    Area::new(bounds, cell_size, |player: &Player| player.at)
}

fn sorted(mut found: Vec<Found>) -> Vec<(u64, f64, f64)> {
    found.sort_unstable_by_key(|found| found.key);
    found.into_iter().map(|found| (found.key.0, found.x, found.y)).collect()
}

/// Returns the players within a circle, by checking all.
fn expected(players: &HashMap<u64, (f64, f64)>, (x, y, radius): (f64, f64, f64)) -> Vec<(u64, f64, f64)> {
    let finite = players.iter().filter(|(_, at)| at.0.abs() <= 1e150 && at.1.abs() <= 1e150);
    let mut found: Vec<(u64, f64, f64)> = finite
        .map(|(key, at)| (*key, at.0, at.1))
        .filter(|(_, px, py)| (px - x) * (px - x) + (py - y) * (py - y) <= radius * radius)
        .collect();
    found.sort_unstable_by_key(|(key, ..)| *key);
    found
}

/// Queries without grid and cells.
fn by_player(area: &Area<Player>, (x, y, radius): (f64, f64, f64)) -> Vec<Found> {
    let mut found = Vec::new();
    if let Some(circle) = Circle::new(x, y, radius) {
        area.0.parts.read(|parts| parts.iter().flatten().for_each(|part| part.by_player(&circle, &mut found)));
    }
    found
}

/// Coordinates inside, on borders between cells, outside, and invalid.
fn coordinate() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => (0..=10).prop_map(f64::from),
        4 => 0.0..10.0,
        2 => -30.0..40.0,
        1 => prop::sample::select(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e151, 1e150, -1e150, -0.0]),
    ]
}

fn radius() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => (0..=8).prop_map(f64::from),
        4 => 0.0..20.0,
        1 => prop::sample::select(vec![f64::INFINITY, f64::NAN, -1.0, 1e149]),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Go(u64, f64, f64),
    Leave(u64),
    Ask(f64, f64, f64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..90u64, coordinate(), coordinate()).prop_map(|(key, x, y)| Step::Go(key, x, y)),
        // Crowds, so that cells have several blocks.
        12 => (0..90u64, 4.0..7.0, 4.0..7.0).prop_map(|(key, x, y)| Step::Go(key, x, y)),
        4 => (0..90u64).prop_map(Step::Leave),
        4 => (coordinate(), coordinate(), radius()).prop_map(|(x, y, radius)| Step::Ask(x, y, radius)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_query_finds_exactly_the_players_within(steps in prop::collection::vec(step(), 1..600), shards in 1u16..3) {
        let area = area((0.0, 0.0, 10.0, 10.0), 3.0);
        let mut writers = Shards::open(&area, shards);
        let mut players = HashMap::new();
        for step in steps {
            match step {
                Step::Go(key, x, y) => {
                    writers.change(key, &at(x, y));
                    players.insert(key, (x, y));
                }
                Step::Leave(key) => {
                    writers.change(key, &Player::default());
                    players.remove(&key);
                }
                Step::Ask(x, y, radius) => {
                    let is_circle = x.abs() <= 1e150 && y.abs() <= 1e150 && radius >= 0.0;
                    let expected = if is_circle { expected(&players, (x, y, radius)) } else { Vec::new() };
                    prop_assert_eq!(&sorted(area.within(x, y, radius)), &expected);
                    prop_assert_eq!(&sorted(by_player(&area, (x, y, radius))), &expected);
                }
            }
        }
        let all = sorted(area.within(0.0, 0.0, f64::INFINITY));
        prop_assert_eq!(all, expected(&players, (0.0, 0.0, f64::INFINITY)));
    }

    /// All places have the radius as their distance to the centre, up to rounding.
    #[test]
    fn rounding_leaves_no_player_out(
        x0 in -1e6..1e6, y0 in -1e6..1e6, cell in 0.01..50.0,
        circle in (0.0..1.0, 0.0..1.0, 0.0..0.5), angles in prop::collection::vec(0.0..std::f64::consts::TAU, 1..40),
    ) {
        let side = cell * 100.0;
        let area = area((x0, y0, x0 + side, y0 + side), cell);
        let (x, y, radius) = (x0 + side * circle.0, y0 + side * circle.1, side * circle.2);
        let mut writers = Shards::open(&area, 1);
        let mut players = HashMap::new();
        for (key, angle) in (0..).zip(angles) {
            let (sine, cosine) = match key % 4 {
                0 => ((angle as i64 % 2) as f64, ((angle as i64 + 1) % 2) as f64),
                _ => angle.sin_cos(),
            };
            let place = (x + radius * cosine, y + radius * sine);
            writers.change(key, &at(place.0, place.1));
            players.insert(key, place);
        }
        prop_assert_eq!(sorted(area.within(x, y, radius)), expected(&players, (x, y, radius)));
    }
}

/// Keys below `INSIDE` never leave the circle; keys below `COMING` come, go and disappear; the rest stay outside.
const INSIDE: u64 = 120;
const COMING: u64 = 200;
const ALL: u64 = 280;
const CENTRE: f64 = 50.0;
const RADIUS: f64 = 20.0;

/// Moves a player on the diagonal, where a torn position shows: within 14 of the centre is inside, beyond 15 outside.
fn wander(random: &mut SmallRng) -> (u64, Player) {
    let key = random.random_range(0..ALL);
    let inside = CENTRE + random.random_range(-14.0..14.0);
    let outside = if random.random() { random.random_range(-5.0..35.0) } else { random.random_range(65.0..105.0) };
    let x = match key {
        0..INSIDE => Some(inside),
        INSIDE..COMING => [Some(inside), Some(outside), None][random.random_range(0..3)],
        _ => Some(outside),
    };
    (key, Player { at: x.map(|x| (x, x)), ..Player::default() })
}

fn check(found: &[Found]) {
    let mut keys = HashSet::new();
    for player in found {
        assert!(keys.insert(player.key.0), "{} twice", player.key);
        assert_eq!(player.x, player.y, "torn");
        assert!((player.x - CENTRE).abs() <= 15.0, "{player:?} was never inside");
        assert!(player.key.0 < COMING, "{player:?} was never inside");
    }
    let missed = (0..INSIDE).find(|key| !keys.contains(key));
    assert_eq!(missed, None, "missed; {} found", found.len());
}

/// Ends the other thread, even if this one panics.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Queries while players move, until there were enough queries and moves.
fn query_while_moving(cell_size: f64) {
    let area = area((0.0, 0.0, 100.0, 100.0), cell_size);
    let mut shards = Shards::open(&area, 2);
    for key in 0..ALL {
        let x = if key < COMING { CENTRE } else { 0.0 };
        shards.change(key, &at(x, x));
    }
    let (rounds, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = SmallRng::seed_from_u64(3);
            while !is_over.load(Ordering::SeqCst) {
                for _ in 0..1_000 {
                    let (key, player) = wander(&mut random);
                    shards.change(key, &player);
                }
                shards.publish(0, Time(0));
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        });
        let _over = Over(&is_over);
        let mut found = Vec::new();
        let mut queries = 0;
        while queries < 2_000 || rounds.load(Ordering::SeqCst) < 200 {
            area.within_into(CENTRE, CENTRE, RADIUS, &mut found);
            check(&found);
            queries += 1;
        }
    });
}

#[test]
fn a_player_that_moves_between_cells_during_a_query_is_found_once() {
    query_while_moving(2.0);
}

#[test]
fn a_player_that_moves_between_blocks_of_one_cell_is_found_once() {
    query_while_moving(25.0);
}

/// Two cells have a full block each, and one player moves the only other block from cell to cell.
#[test]
fn a_reader_does_not_follow_a_block_into_another_cell() {
    const STAY: u64 = 2 * part::BLOCK as u64;
    let area = area((0.0, 0.0, 100.0, 100.0), 50.0);
    let mut shards = Shards::open(&area, 1);
    (0..=STAY).for_each(|key| shards.change(key, &at(if key % 2 == 0 { 25.0 } else { 75.0 }, 25.0)));
    let (rounds, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                (0..1_000).for_each(|_| [75.0, 25.0].iter().for_each(|x| shards.change(STAY, &at(*x, 25.0))));
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        });
        let _over = Over(&is_over);
        let mut found = Vec::new();
        let mut queries = 0;
        while queries < 2_000 || rounds.load(Ordering::SeqCst) < 200 {
            queries += 1;
            area.within_into(50.0, 25.0, 30.0, &mut found);
            found.sort_unstable_by_key(|found| found.key);
            assert!(found.iter().map(|found| found.key.0).eq(0..=STAY), "{found:?}");
        }
    });
}

#[test]
fn a_second_engine_starts_an_area_over() {
    let area = area((0.0, 0.0, 10.0, 10.0), 1.0);
    let reader = area.clone();
    let mut first = Shards::open(&area, 2);
    (0..50).for_each(|key| first.change(key, &at(5.0, 5.0)));
    assert_eq!(reader.within(5.0, 5.0, 1.0).len(), 50);
    let mut second = Shards::open(&area, 1);
    assert_eq!(reader.within(5.0, 5.0, 1.0).len(), 0);
    second.change(7, &at(5.0, 5.0));
    first.change(8, &at(5.0, 5.0));
    assert_eq!(sorted(reader.within(5.0, 5.0, 1.0)), [(7, 5.0, 5.0)]);
    assert_eq!(reader.positions().len(), 1);
}

#[test]
#[should_panic(expected = "an area from")]
fn bounds_without_an_area_are_refused() {
    let _unused = area((0.0, 0.0, 0.0, 1.0), 1.0);
}
