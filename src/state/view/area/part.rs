//! One shard's players, as readers see them: by cell for scans, and by number for a second look.
//!
//! One writer: the shard. Each block is read atomically, and so is each player. A cell is a chain of blocks, all full
//! but the first; the cell's version changes with the chain. The writer notes a player in the journal before the player
//! changes its block, so a reader that walks many blocks knows which players it may have missed or seen twice.

use std::ops::Range;

use crate::event::Key;
use crate::state::view::area::grid::{Circle, Grid};
use crate::state::view::grow::Grow;
use crate::state::view::parts::{Part, Progress};
use crate::sync::{AtomicU32, AtomicU64, Journal, Ordering, SeqLock};

/// A player that was within the radius, with its position.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Found {
    /// The player's key.
    pub key: Key,
    /// Its x coordinate.
    pub x: f64,
    /// Its y coordinate.
    pub y: f64,
}

/// Players per block.
pub(super) const BLOCK: usize = 16;
/// Blocks per allocation.
const BLOCKS_CHUNK: usize = 64;
/// Players per allocation.
const PLAYERS_CHUNK: usize = 1024;
/// Moves between blocks during a query; after more, the query starts over.
const JOURNAL: usize = 1024;
/// Tries of a cell, and of a shard, before a query reads all players one by one.
const TRIES: usize = 4;

#[derive(Debug)]
pub(super) struct Players {
    grid: Grid,
    cells: Box<[Cell]>,
    blocks: Grow<Box<[Block]>>,
    players: Grow<Box<[Player]>>,
    players_count: AtomicU32,
    pub(super) journal: Journal,
    pub(super) progress: Progress,
}

/// A chain of blocks.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) lock: SeqLock,
    /// The first block's number plus 1; 0 for none.
    pub(super) head: AtomicU32,
}

/// A player; `x` and `y` as bits.
#[derive(Debug)]
struct Entry {
    key: AtomicU64,
    x: AtomicU64,
    y: AtomicU64,
}

/// Up to [`BLOCK`] players of one cell.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) lock: SeqLock,
    pub(super) count: AtomicU32,
    /// The next block of the cell, as in [`Cell::head`].
    pub(super) next: AtomicU32,
    entries: [Entry; BLOCK],
    /// Only the writer reads these.
    numbers: [AtomicU32; BLOCK],
}

/// A player's current position; `x` is NaN if the player is in no area.
#[derive(Debug)]
struct Player(SeqLock, Entry);

impl Players {
    pub(super) fn new(grid: Grid) -> Self {
        let empty = || Cell { lock: SeqLock::new(), head: AtomicU32::new(0) };
        Self {
            grid,
            cells: (0..grid.cells()).map(|_| empty()).collect(),
            blocks: Grow::new(),
            players: Grow::new(),
            players_count: AtomicU32::new(0),
            journal: Journal::new(JOURNAL),
            progress: Progress::new(),
        }
    }

    pub(super) fn grid(&self) -> &Grid {
        &self.grid
    }

    #[inline]
    pub(super) fn cell(&self, cell: u32) -> &Cell {
        &self.cells[cell as usize]
    }

    /// Returns a block, and makes it first if need be. Only the writer calls this.
    #[inline]
    pub(super) fn block(&self, block: u32) -> &Block {
        let make = || (0..BLOCKS_CHUNK).map(|_| Block::new()).collect();
        &self.blocks.get_or_make(block as usize / BLOCKS_CHUNK, make)[block as usize % BLOCKS_CHUNK]
    }

    #[inline]
    fn seen_block(&self, block: u32) -> Option<&Block> {
        Some(&self.blocks.get(block as usize / BLOCKS_CHUNK)?[block as usize % BLOCKS_CHUNK])
    }

    /// Sets a player's current position. Only the writer calls this.
    #[inline]
    pub(super) fn set_player(&self, number: u32, found: Found) {
        let make = || (0..PLAYERS_CHUNK).map(|_| Player(SeqLock::new(), Entry::new())).collect();
        let chunk = self.players.get_or_make(number as usize / PLAYERS_CHUNK, make);
        let Player(lock, entry) = &chunk[number as usize % PLAYERS_CHUNK];
        lock.write(|| entry.set(found));
        if number >= self.players_count.load(Ordering::Relaxed) {
            // Release: pairs with the Acquire in `by_player`: a reader that sees the count also sees
            // the player.
            self.players_count.store(number + 1, Ordering::Release);
        }
    }

    #[inline]
    pub(super) fn player(&self, number: u32) -> Option<Found> {
        let chunk = self.players.get(number as usize / PLAYERS_CHUNK)?;
        let Player(lock, entry) = &chunk[number as usize % PLAYERS_CHUNK];
        Some(lock.read(|| entry.get()))
    }

    /// Adds the players within `circle` to `found`.
    pub(super) fn within(&self, circle: &Circle, found: &mut Vec<Found>) {
        let before = found.len();
        for _ in 0..TRIES {
            if self.by_cell(circle, found) {
                return;
            }
            found.truncate(before);
        }
        self.by_player(circle, found);
    }

    /// Scans the cells, then looks again at the players that moved meanwhile. Returns `false` if too many moved.
    pub(super) fn by_cell(&self, circle: &Circle, found: &mut Vec<Found>) -> bool {
        let before = found.len();
        let start = self.journal.start();
        let mut moved = Vec::new();
        self.grid.cover(circle, |cells| self.scan(cells, circle, found))
            && self.journal.since(start, &mut moved)
            && self.look_again(moved, circle, found, before)
    }

    fn scan(&self, cells: Range<u32>, circle: &Circle, found: &mut Vec<Found>) -> bool {
        let mut cells = self.cells[cells.start as usize..cells.end as usize].iter();
        cells.all(|cell| {
            let before = found.len();
            (0..TRIES).any(|_| {
                found.truncate(before);
                self.scan_cell(cell, circle, found)
            })
        })
    }

    /// Scans a cell. Returns `false` if the cell's chain changed meanwhile: the players found may then be of another
    /// cell.
    #[inline]
    fn scan_cell(&self, cell: &Cell, circle: &Circle, found: &mut Vec<Found>) -> bool {
        let Some(version) = cell.lock.begin() else { return false };
        let mut next = cell.head.load(Ordering::Relaxed);
        while next != 0 {
            let Some(block) = self.seen_block(next - 1) else { return false };
            next = block.scan(circle, found);
            if !cell.lock.is_unchanged(version) {
                return false;
            }
        }
        cell.lock.is_unchanged(version)
    }

    /// Removes the players that moved from `found[before..]`, and adds those that are within the circle now.
    fn look_again(&self, mut moved: Vec<u32>, circle: &Circle, found: &mut Vec<Found>, before: usize) -> bool {
        if moved.is_empty() {
            return true;
        }
        moved.sort_unstable();
        moved.dedup();
        let mut now: Vec<Found> = moved.into_iter().filter_map(|number| self.player(number)).collect();
        now.sort_unstable_by_key(|player| player.key);
        let mut at = before;
        while let Some(player) = found.get(at) {
            if now.binary_search_by_key(&player.key, |moved| moved.key).is_ok() {
                found.swap_remove(at);
            } else {
                at += 1;
            }
        }
        found.extend(now.into_iter().filter(|player| circle.holds(player.x, player.y)));
        true
    }

    /// Checks all players one by one: slow, but certain to end.
    pub(super) fn by_player(&self, circle: &Circle, found: &mut Vec<Found>) {
        // Acquire: pairs with the Release in `set_player`.
        let count = self.players_count.load(Ordering::Acquire);
        let players = (0..count).filter_map(|number| self.player(number));
        found.extend(players.filter(|player| circle.holds(player.x, player.y)));
    }
}

impl Part for Players {
    fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Block {
    fn new() -> Self {
        Self {
            lock: SeqLock::new(),
            count: AtomicU32::new(0),
            next: AtomicU32::new(0),
            entries: std::array::from_fn(|_| Entry::new()),
            numbers: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }

    /// Adds the players within the circle, and returns the next block of the chain.
    #[inline]
    fn scan(&self, circle: &Circle, found: &mut Vec<Found>) -> u32 {
        let before = found.len();
        self.lock.read(|| {
            found.truncate(before);
            let count = self.count.load(Ordering::Relaxed) as usize;
            for at in 0..count.min(BLOCK) {
                let player = self.at(at);
                if circle.holds(player.x, player.y) {
                    found.push(player);
                }
            }
            self.next.load(Ordering::Relaxed)
        })
    }

    #[inline]
    pub(super) fn at(&self, at: usize) -> Found {
        self.entries[at].get()
    }

    // Only the writer calls the functions below.

    /// Sets an entry, within [`SeqLock::write`].
    #[inline]
    pub(super) fn set(&self, at: usize, number: u32, player: Found) {
        self.numbers[at].store(number, Ordering::Relaxed);
        self.entries[at].set(player);
    }

    #[inline]
    pub(super) fn set_position(&self, at: usize, player: Found) {
        self.entries[at].set(player);
    }

    #[inline]
    pub(super) fn get(&self, at: usize) -> (u32, Found) {
        (self.numbers[at].load(Ordering::Relaxed), self.at(at))
    }
}

impl Entry {
    fn new() -> Self {
        let nowhere = || AtomicU64::new(f64::NAN.to_bits());
        Self { key: AtomicU64::new(0), x: nowhere(), y: nowhere() }
    }

    #[inline]
    fn get(&self) -> Found {
        Found {
            key: Key(self.key.load(Ordering::Relaxed)),
            x: f64::from_bits(self.x.load(Ordering::Relaxed)),
            y: f64::from_bits(self.y.load(Ordering::Relaxed)),
        }
    }

    #[inline]
    fn set(&self, player: Found) {
        self.key.store(player.key.0, Ordering::Relaxed);
        self.x.store(player.x.to_bits(), Ordering::Relaxed);
        self.y.store(player.y.to_bits(), Ordering::Relaxed);
    }
}
