//! The derive macros of corelane's traits `Bounded` and `Event`. Use them through the crate `corelane`.

mod bounded;
mod event;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Implements `Bounded` with the depth of the deepest field plus one. A type that contains itself does not compile.
///
/// For a field whose type does not implement `Bounded`, state the depth at the field: `#[bounded(depth = 2)]`.
#[proc_macro_derive(Bounded, attributes(bounded))]
pub fn derive_bounded(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    bounded::expand(input).unwrap_or_else(|error| error.into_compile_error()).into()
}

/// Implements `Event` for an enum whose variants are the event types, or for a struct that is the only one.
///
/// Every variant states its type: `#[event(id = 1, name = "player_moved", version = 2)]`. The id (1 to 65,535) and the
/// name are stored with the data, so never change them. The default schema version is 1. A variant without an id, an id
/// or name used twice, and id 0 do not compile.
///
/// An older schema version of a variant is read in one of two ways:
///
/// - `same(1 = GameEventV1)`: version 1 is stored as the variant of this name in `GameEventV1`, with the same fields;
/// - `upcast(1 = GameEvent::moved_from_v1)`: this function reads version 1. It has the type
///   `fn(&[u8]) -> Result<Self, rkyv::rancor::Error>`.
///
/// On the enum or struct itself, `#[event(time = path)]` and `#[event(correlation = path)]` name functions that take
/// `&Self` and implement the trait's methods `time` and `correlation`.
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    event::expand(&input).unwrap_or_else(|error| error.into_compile_error()).into()
}
