//! Maps positions to cells, and a circle to the cells that it may touch. Data only.
//!
//! Invariant: a position within a circle, as [`Circle::holds`] computes it, is in one of the cells that [`Grid::cover`]
//! returns for that circle.

use std::ops::Range;

/// The largest coordinate: beyond it a square overflows.
const FAR: f64 = 1e150;
/// The tolerance for rounding errors, relative to the lengths involved: thousands of times the largest error, and far
/// less than a cell.
const SLACK: f64 = 1e-12;
const CELLS_MAX: f64 = (1 << 22) as f64;

/// Returns `true` if the coordinates are numbers within ±[`FAR`].
#[inline]
pub(super) fn is_somewhere(x: f64, y: f64) -> bool {
    x.abs() <= FAR && y.abs() <= FAR
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Circle {
    x: f64,
    y: f64,
    radius: f64,
    radius_squared: f64,
}

impl Circle {
    /// Returns `None` if no position can be within the circle.
    pub(super) fn new(x: f64, y: f64, radius: f64) -> Option<Self> {
        let can_hold = is_somewhere(x, y) && radius >= 0.0;
        can_hold.then_some(Self { x, y, radius, radius_squared: radius * radius })
    }

    #[inline]
    pub(super) fn holds(&self, x: f64, y: f64) -> bool {
        let (dx, dy) = (x - self.x, y - self.y);
        dx * dx + dy * dy <= self.radius_squared
    }
}

/// Cells of one size over a rectangle. The cells at an edge extend to infinity.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    x0: f64,
    y0: f64,
    cell_size: f64,
    columns: u32,
    rows: u32,
    /// The largest coordinate of a corner; rounding errors are relative to it.
    scale: f64,
}

impl Grid {
    pub(super) fn new((x0, y0, x1, y1): (f64, f64, f64, f64), cell_size: f64) -> Self {
        assert!(
            is_somewhere(x0, y0) && is_somewhere(x1, y1) && x0 < x1 && y0 < y1,
            "an area from {x0},{y0} to {x1},{y1}"
        );
        assert!(cell_size > 0.0 && cell_size.is_finite(), "cells of size {cell_size}");
        let (columns, rows) = (((x1 - x0) / cell_size).ceil(), ((y1 - y0) / cell_size).ceil());
        assert!(columns * rows <= CELLS_MAX, "{columns} × {rows} cells; at most {CELLS_MAX} are possible");
        let scale = x0.abs().max(x1.abs()).max(y0.abs()).max(y1.abs());
        Self { x0, y0, cell_size, columns: columns as u32, rows: rows as u32, scale }
    }

    pub(super) fn cells(&self) -> usize {
        self.columns as usize * self.rows as usize
    }

    #[inline]
    pub(super) fn cell_of(&self, x: f64, y: f64) -> u32 {
        self.row(y) * self.columns + self.column(x)
    }

    // Both are monotone under any rounding, which `cover` relies on. `as` saturates.
    #[inline]
    fn column(&self, x: f64) -> u32 {
        (((x - self.x0) / self.cell_size) as u32).min(self.columns - 1)
    }

    #[inline]
    fn row(&self, y: f64) -> u32 {
        (((y - self.y0) / self.cell_size) as u32).min(self.rows - 1)
    }

    /// Passes the ranges of cells that the circle may touch, one per row, to `each` until it returns `false`. Returns
    /// its last result.
    #[inline]
    pub(super) fn cover(&self, circle: &Circle, mut each: impl FnMut(Range<u32>) -> bool) -> bool {
        let Circle { x, y, radius, radius_squared } = *circle;
        let slack = SLACK * (self.scale + self.cell_size + x.abs().max(y.abs()) + radius);
        let (first, last) = (self.row(y - radius - slack), self.row(y + radius + slack));
        (first..=last).all(|row| {
            let dy = self.distance_to_row(row, y) - slack;
            let half = if dy > 0.0 { (radius_squared - dy * dy).max(0.0).sqrt() } else { radius } + slack;
            let from = row * self.columns;
            each(from + self.column(x - half)..from + self.column(x + half) + 1)
        })
    }

    /// Returns the distance from `y` to the row; the rows at the edges have no end.
    fn distance_to_row(&self, row: u32, y: f64) -> f64 {
        let low = if row == 0 { f64::NEG_INFINITY } else { self.y0 + f64::from(row) * self.cell_size };
        let high = if row == self.rows - 1 { f64::INFINITY } else { self.y0 + f64::from(row + 1) * self.cell_size };
        (low - y).max(y - high).max(0.0)
    }
}
