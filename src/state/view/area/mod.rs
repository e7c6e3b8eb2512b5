//! By area: who is near a place, asked from any thread.
//!
//! One writer per part: its shard. [`grid`] says which cell a position is in, [`part`] holds the players of the cells as
//! readers see them, [`writer`] moves them.

mod grid;
mod part;
mod writer;

use std::fmt;
use std::sync::Arc;

use crate::event::ShardId;
use crate::state::aggregate::Aggregate;
use crate::state::view::parts::Parts;
use crate::state::view::{Place, Position, View, ViewWriter};

use crate::state::view::area::grid::{Circle, Grid, is_somewhere};
pub use part::Found;
use part::Players;

/// Players by where they are.
///
/// What a query promises, however much moves meanwhile: a player that is within the radius during the whole query is
/// found exactly once; who is found was within it, at the place that is given, at some moment of the query. "Within" is
/// `dx * dx + dy * dy <= radius * radius`, computed in `f64`.
///
/// A position outside the bounds is a position like any other, only slower to search: cells at the edges hold all that
/// lies beyond them. One that is not a number, infinite or beyond ±1e150 is in no area. Handles are cheap to clone.
pub struct Area<A>(Arc<Inner<A>>);

type PositionOf<A> = dyn Fn(&A) -> Option<(f64, f64)> + Send + Sync;

struct Inner<A> {
    position_of: Box<PositionOf<A>>,
    grid: Grid,
    parts: Parts<Players>,
}

impl<A: Aggregate> Area<A> {
    /// A view of the positions that `position_of` finds in the states; `None`: the player is nowhere.
    ///
    /// `bounds` is (x0, y0, x1, y1). A good `cell_size` is about a fifth of the usual radius, with some ten players per
    /// cell. Memory per shard: 16 bytes per cell, 32 per player, and 464 per 16 players of a cell or part of them.
    ///
    /// `position_of` runs on the shard's thread for every event: it must be quick.
    ///
    /// # Panics
    /// When `bounds` or `cell_size` are no numbers or make no area, or make more than 2²² cells.
    #[must_use]
    pub fn new(
        bounds: (f64, f64, f64, f64),
        cell_size: f64,
        position_of: impl Fn(&A) -> Option<(f64, f64)> + Send + Sync + 'static,
    ) -> Self {
        let grid = Grid::new(bounds, cell_size);
        Self(Arc::new(Inner { position_of: Box::new(position_of), grid, parts: Parts::new() }))
    }

    /// Who is within `radius` of a place, in no order.
    #[must_use]
    pub fn within(&self, x: f64, y: f64, radius: f64) -> Vec<Found> {
        let mut found = Vec::new();
        self.within_into(x, y, radius, &mut found);
        found
    }

    /// As [`Area::within`], into a list that is emptied first: asked again and again, it need not be allocated anew.
    pub fn within_into(&self, x: f64, y: f64, radius: f64, found: &mut Vec<Found>) {
        found.clear();
        let Some(circle) = Circle::new(x, y, radius) else { return };
        self.0.parts.read(|parts| parts.iter().flatten().for_each(|part| part.within(&circle, found)));
    }

    /// How far each shard's part has come. Read before the players, it never says more than they show.
    #[must_use]
    pub fn positions(&self) -> Vec<(ShardId, Position)> {
        self.0.parts.positions()
    }
}

impl<A> Inner<A> {
    #[inline]
    fn position_of(&self, state: &A) -> Option<(f64, f64)> {
        (self.position_of)(state).filter(|(x, y)| is_somewhere(*x, *y))
    }
}

impl<A: Aggregate> View<A> for Area<A> {
    fn writer(&self, place: &Place) -> Box<dyn ViewWriter<A>> {
        let part = self.0.parts.begin(place, Players::new(self.0.grid));
        Box::new(writer::Writer::new(Arc::clone(&self.0), place, part))
    }
}

impl<A> Clone for Area<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A> fmt::Debug for Area<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Area").field("grid", &self.0.grid).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
