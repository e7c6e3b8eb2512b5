//! A view by area: the players near a place, from any thread.
//!
//! One writer per part: its shard. [`grid`] maps positions to cells, [`part`] holds the cells' players as readers see
//! them, and [`writer`] moves the players.

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

/// A view of players by position.
///
/// A query keeps two promises while players move. A player that is within the radius during the whole query is found
/// exactly once. A player that is found was within the radius, at the returned position, at some moment of the query.
/// "Within" means `dx * dx + dy * dy <= radius * radius`, computed in `f64`.
///
/// Positions outside the bounds work too, but their search is slower: the cells at an edge hold all players beyond that
/// edge. A position that is not a number, infinite or beyond ±1e150 is in no area. Handles are cheap to clone.
///
/// ```
/// # use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # struct Moved { x: f64, y: f64 }
/// # impl Event for Moved {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "moved", 1)];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Player { at: Option<(f64, f64)> }
/// # impl Aggregate for Player {
/// #     type Event = Moved;
/// #     type Command = ();
/// #     type Rejection = ();
/// #     fn evolve(&mut self, event: &ArchivedMoved, _meta: &Meta) {
/// #         self.at = Some((event.x.to_native(), event.y.to_native()));
/// #     }
/// #     fn decide(&self, (): (), _emit: &mut Emit<Moved>) -> Result<(), ()> { Ok(()) }
/// # }
/// use corelane::view::Area;
/// use corelane::{Config, Deadline, Engine, Key};
///
/// let area = Area::new((0.0, 0.0, 1000.0, 1000.0), 10.0, |player: &Player| player.at);
/// # let dir = tempfile::tempdir()?;
/// let engine = Engine::<Player>::builder(Config::new(dir.path())).view(&area).open()?;
/// let mut producer = engine.producer();
/// producer.publish(Key(7), Moved { x: 500.0, y: 500.0 })?;
/// producer.publish(Key(8), Moved { x: 900.0, y: 100.0 })?;
/// engine.flush(Deadline::NEVER)?;
/// // The shard answers between two batches, when it has published the views.
/// engine.state(Key(7)).wait()?;
/// let near = area.within(510.0, 500.0, 50.0);
/// assert_eq!((near.len(), near[0].key), (1, Key(7)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Area<A>(Arc<Inner<A>>);

type PositionOf<A> = dyn Fn(&A) -> Option<(f64, f64)> + Send + Sync;

struct Inner<A> {
    position_of: Box<PositionOf<A>>,
    grid: Grid,
    parts: Parts<Players>,
}

impl<A: Aggregate> Area<A> {
    /// Creates a view of the positions that `position_of` reads from the states; `None` means that the player is in no
    /// area.
    ///
    /// `bounds` is (x0, y0, x1, y1). A good `cell_size` is about a fifth of the usual radius, with about ten players
    /// per cell. Memory per shard: 16 bytes per cell, 32 per player, and 464 per 16 players of a cell, rounded up.
    ///
    /// `position_of` runs on the shard's thread for every event, so it must be fast.
    ///
    /// # Panics
    /// If `bounds` is not a finite rectangle, if `cell_size` is not positive and finite, or if there are more than 2²²
    /// cells.
    #[must_use]
    pub fn new(
        bounds: (f64, f64, f64, f64),
        cell_size: f64,
        position_of: impl Fn(&A) -> Option<(f64, f64)> + Send + Sync + 'static,
    ) -> Self {
        let grid = Grid::new(bounds, cell_size);
        Self(Arc::new(Inner { position_of: Box::new(position_of), grid, parts: Parts::new() }))
    }

    /// Returns the players within `radius` of a place, in no particular order.
    #[must_use]
    pub fn within(&self, x: f64, y: f64, radius: f64) -> Vec<Found> {
        let mut found = Vec::new();
        self.within_into(x, y, radius, &mut found);
        found
    }

    /// Does the same as [`Area::within`], into `found`, which is cleared first. Repeated queries can reuse the
    /// allocation.
    pub fn within_into(&self, x: f64, y: f64, radius: f64, found: &mut Vec<Found>) {
        found.clear();
        let Some(circle) = Circle::new(x, y, radius) else { return };
        self.0.parts.read(|parts| parts.iter().flatten().for_each(|part| part.within(&circle, found)));
    }

    /// Returns the position of each shard's part. Players read afterwards include everything up to it.
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
