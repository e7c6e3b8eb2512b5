//! The nesting depth of stored types, as a constant of the type.
//!
//! Leaf module. Archiving, validating and dropping a value recurse as deeply as the value nests, and rkyv cannot be
//! stopped before it descends into a `Box`. So the type itself must bound the depth of all its values at compile time.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::num::NonZero;
use std::ops::{Bound, Range, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive};
use std::time::Duration;

/// The largest depth of a stored type. (Real types have fewer than ten levels.)
pub const DEPTH_MAX: u32 = 64;

/// A type whose values nest no deeper than a constant. Every type that corelane archives implements it: events, states,
/// rejections, older layouts, values of views, and the types of their fields. Derive it beside rkyv's traits:
///
/// ```
/// use corelane::Bounded;
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Bounded)]
/// struct Item { name: String, count: u32 }
///
/// #[derive(Archive, Serialize, Deserialize, Bounded)]
/// struct Bag { items: Vec<Item> }
///
/// assert_eq!(Item::DEPTH, 2, "a string in a struct");
/// assert_eq!(Bag::DEPTH, 4, "a list of items in a struct");
/// ```
///
/// A type that contains itself has no such constant and does not compile:
///
/// ```compile_fail,E0391
/// use corelane::Bounded;
///
/// #[derive(Bounded)]
/// struct Node { value: u64, next: Option<Box<Node>> }
///
/// const { assert!(Node::DEPTH > 0) };
/// ```
///
/// Store a tree as a list whose nodes refer to each other by index.
///
/// For a field whose type comes from another crate, give the depth at the field, `#[bounded(depth = 1)]`, or implement
/// the trait by hand. corelane verifies neither: a value that nests deeper may overflow the stack while it is archived.
/// Reading is always safe, because it refuses more than [`DEPTH_MAX`] levels.
#[diagnostic::on_unimplemented(
    message = "corelane does not know how deeply values of `{Self}` nest",
    label = "not `Bounded`",
    note = "add `#[derive(corelane::Bounded)]` to `{Self}`, beside rkyv's `Archive`",
    note = "if `{Self}` comes from another crate, give its depth at the field: `#[bounded(depth = 1)]`"
)]
pub trait Bounded {
    /// The largest number of levels of a value: 0 for a number, 1 for a string, one more for each list, box or struct
    /// around it.
    const DEPTH: u32;
}

pub use corelane_derive::Bounded;

/// Returns the greater of two depths.
const fn deeper(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

macro_rules! flat {
    ($($ty:ty),* $(,)?) => {
        $(impl Bounded for $ty {
            const DEPTH: u32 = 0;
        })*
    };
}

flat!(bool, char, u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64, str);
flat!(NonZero<u8>, NonZero<u16>, NonZero<u32>, NonZero<u64>, NonZero<u128>, NonZero<usize>);
flat!(NonZero<i8>, NonZero<i16>, NonZero<i32>, NonZero<i64>, NonZero<i128>, NonZero<isize>);
flat!(Duration, RangeFull, IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6);

/// Types whose archive refers to its content by a relative pointer: one more level.
macro_rules! behind_a_pointer {
    ($($(#[$why:meta])* [$($generics:tt)*] $ty:ty => $inner:expr),* $(,)?) => {
        $($(#[$why])* impl<$($generics)*> Bounded for $ty {
            const DEPTH: u32 = 1 + $inner;
        })*
    };
}

behind_a_pointer!(
    [] String => 0,
    [] std::ffi::CString => 0,
    [T: Bounded + ?Sized] Box<T> => T::DEPTH,
    [T: Bounded + ?Sized] &T => T::DEPTH,
    [T: Bounded] Vec<T> => T::DEPTH,
    [T: Bounded] VecDeque<T> => T::DEPTH,
    [K: Bounded, V: Bounded, S] HashMap<K, V, S> => deeper(K::DEPTH, V::DEPTH),
    [T: Bounded, S] HashSet<T, S> => T::DEPTH,
    [K: Bounded, V: Bounded] BTreeMap<K, V> => NODES_MAX + deeper(K::DEPTH, V::DEPTH),
    [T: Bounded] BTreeSet<T> => NODES_MAX + T::DEPTH,
);

/// The largest number of node levels of an archived B-tree. Nodes have at least six children, so no archive can hold
/// more.
const NODES_MAX: u32 = 12;

/// Types whose archive holds its content in place: no additional level.
macro_rules! inline {
    ($([$($generics:tt)*] $ty:ty => $inner:expr),* $(,)?) => {
        $(impl<$($generics)*> Bounded for $ty {
            const DEPTH: u32 = $inner;
        })*
    };
}

inline!(
    [T: Bounded] Option<T> => T::DEPTH,
    [T: Bounded, E: Bounded] Result<T, E> => deeper(T::DEPTH, E::DEPTH),
    [T: Bounded, const N: usize] [T; N] => T::DEPTH,
    [T: Bounded] [T] => T::DEPTH,
    [T: ?Sized] PhantomData<T> => 0,
    [T: Bounded] Range<T> => T::DEPTH,
    [T: Bounded] RangeInclusive<T> => T::DEPTH,
    [T: Bounded] RangeFrom<T> => T::DEPTH,
    [T: Bounded] RangeTo<T> => T::DEPTH,
    [T: Bounded] RangeToInclusive<T> => T::DEPTH,
    [T: Bounded] Bound<T> => T::DEPTH,
);

macro_rules! tuples {
    () => {
        impl Bounded for () {
            const DEPTH: u32 = 0;
        }
    };
    ($first:ident $($rest:ident)*) => {
        impl<$first: Bounded, $($rest: Bounded),*> Bounded for ($first, $($rest,)*) {
            const DEPTH: u32 = deeper($first::DEPTH, <($($rest,)*) as Bounded>::DEPTH);
        }
        tuples!($($rest)*);
    };
}

tuples!(A B C D E F G H I J K L M);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_as_deep_as_its_deepest_field() {
        assert_eq!(<(u8, Option<[u64; 3]>, Duration)>::DEPTH, 0);
        assert_eq!(<(u8, String)>::DEPTH, 1);
        assert_eq!(Vec::<Option<Box<(String, u8)>>>::DEPTH, 3);
        assert_eq!(HashMap::<u64, Vec<u8>>::DEPTH, 2);
        assert_eq!(HashMap::<Vec<String>, u8>::DEPTH, 3);
        assert_eq!(<&'static str>::DEPTH, 1);
    }

    #[derive(Bounded)]
    #[expect(dead_code, reason = "only its depth matters")]
    enum Choice<T> {
        Nothing,
        Text(String),
        Of { value: T },
        Foreign(#[bounded(depth = 7)] std::path::PathBuf),
    }

    #[test]
    fn a_derived_depth_is_one_more_than_the_deepest_field() {
        assert_eq!(Choice::<u8>::DEPTH, 8, "the depth given by the attribute");
        assert_eq!(Choice::<Vec<Choice<Vec<u8>>>>::DEPTH, 10);
    }
}
