//! Operations: what is known of a store from its files alone.

pub mod check;
