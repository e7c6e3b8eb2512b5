//! The shard's side of an area: puts players into cells, moves them and takes them out.
//!
//! Every move of a player into another block is noted in the journal before it begins, and settled there after it ends.
//! The player's current position, which a reader looks at again, is set before the first block changes.

use std::sync::Arc;

use crate::event::{Key, Meta};
use crate::state::aggregate::Aggregate;
use crate::state::view::area::part::{BLOCK, Players};
use crate::state::view::area::{Found, Inner};
use crate::state::view::key_numbers::KeyNumbers;
use crate::state::view::{Place, Position, ViewWriter};
use crate::sync::Ordering;

pub(super) struct Writer<A> {
    view: Arc<Inner<A>>,
    part: Arc<Players>,
    numbers: KeyNumbers,
    /// Indexed by the key's number.
    places: Vec<Option<Spot>>,
    free: Vec<u32>,
    blocks: u32,
}

/// The place of a player's entry.
#[derive(Debug, Clone, Copy)]
struct Spot {
    cell: u32,
    block: u32,
    at: u32,
}

impl<A: Aggregate> Writer<A> {
    pub(super) fn new(view: Arc<Inner<A>>, place: &Place, part: Arc<Players>) -> Self {
        Self {
            view,
            part,
            numbers: KeyNumbers::with_room(place.keys_expected),
            places: Vec::with_capacity(place.keys_expected),
            free: Vec::new(),
            blocks: 0,
        }
    }

    #[inline]
    fn put(&mut self, key: Key, state: &A) {
        match (self.view.position_of(state), self.numbers.find(key)) {
            (Some((x, y)), Some(number)) => self.go(number as u32, Found { key, x, y }),
            (Some((x, y)), None) => {
                let number = self.numbers.add(key) as u32;
                self.places.push(None);
                self.go(number, Found { key, x, y });
            }
            (None, Some(number)) => self.leave(number as u32, key),
            (None, None) => {}
        }
    }

    #[inline]
    fn go(&mut self, number: u32, player: Found) {
        let cell = self.part.grid().cell_of(player.x, player.y);
        match self.places[number as usize] {
            Some(spot) if spot.cell == cell => self.go_within(spot, number, player),
            spot => self.change_cell(spot, number, player, cell),
        }
    }

    /// Moves a player within its cell. No player changes its block, so there is nothing to note.
    #[inline]
    fn go_within(&mut self, spot: Spot, number: u32, player: Found) {
        let block = self.part.block(spot.block);
        let at = spot.at as usize;
        if block.at(at) != player {
            self.part.set_player(number, player);
            block.lock.write(|| block.set_position(at, player));
        }
    }

    fn change_cell(&mut self, from: Option<Spot>, number: u32, player: Found, cell: u32) {
        self.part.journal.note(number);
        self.part.set_player(number, player);
        if let Some(spot) = from {
            self.take_out(spot);
        }
        self.places[number as usize] = Some(self.put_in(cell, number, player));
        self.part.journal.settle();
    }

    /// Takes a player out of the area. This is not noted: a reader can see such a player twice only if it comes back,
    /// which is noted.
    fn leave(&mut self, number: u32, key: Key) {
        let Some(spot) = self.places[number as usize].take() else { return };
        self.part.set_player(number, Found { key, x: f64::NAN, y: f64::NAN });
        self.take_out(spot);
        self.part.journal.settle();
    }

    /// Puts a player into the first block of a cell, or into a new block before it.
    fn put_in(&mut self, cell: u32, number: u32, player: Found) -> Spot {
        let chain = self.part.cell(cell);
        let head = chain.head.load(Ordering::Relaxed);
        if head != 0 {
            let block = self.part.block(head - 1);
            let count = block.count.load(Ordering::Relaxed);
            if (count as usize) < BLOCK {
                block.lock.write(|| {
                    block.set(count as usize, number, player);
                    block.count.store(count + 1, Ordering::Relaxed);
                });
                return Spot { cell, block: head - 1, at: count };
            }
        }
        let fresh = self.free_block();
        let block = self.part.block(fresh);
        block.lock.write(|| {
            block.set(0, number, player);
            block.count.store(1, Ordering::Relaxed);
            block.next.store(head, Ordering::Relaxed);
        });
        let chain = self.part.cell(cell);
        chain.lock.write(|| chain.head.store(fresh + 1, Ordering::Relaxed));
        Spot { cell, block: fresh, at: 0 }
    }

    fn free_block(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.blocks += 1;
            self.blocks - 1
        })
    }

    /// Takes the entry at `spot` out: the last entry of the cell's first block replaces it.
    fn take_out(&mut self, spot: Spot) {
        let part = &self.part;
        let chain = part.cell(spot.cell);
        let first = chain.head.load(Ordering::Relaxed) - 1;
        let head = part.block(first);
        let last = head.count.load(Ordering::Relaxed) - 1;
        let (number, player) = head.get(last as usize);
        let is_other = (first, last) != (spot.block, spot.at);
        if is_other {
            self.places[number as usize] = Some(spot);
        }
        if first == spot.block {
            head.lock.write(|| {
                if is_other {
                    head.set(spot.at as usize, number, player);
                }
                head.count.store(last, Ordering::Relaxed);
            });
        } else {
            part.journal.note(number);
            let block = part.block(spot.block);
            block.lock.write(|| block.set(spot.at as usize, number, player));
            head.lock.write(|| head.count.store(last, Ordering::Relaxed));
        }
        if last == 0 {
            let next = head.next.load(Ordering::Relaxed);
            chain.lock.write(|| chain.head.store(next, Ordering::Relaxed));
            self.free.push(first);
        }
    }
}

impl<A: Aggregate> ViewWriter<A> for Writer<A> {
    fn load(&mut self, key: Key, state: &A) {
        self.put(key, state);
    }

    fn changed(&mut self, key: Key, state: &A, _meta: &Meta) {
        self.put(key, state);
    }

    fn publish(&mut self, at: Position) {
        self.part.progress.publish(at);
    }
}
