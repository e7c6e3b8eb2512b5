//! Operations: checks of a store from its files alone.

pub mod check;
