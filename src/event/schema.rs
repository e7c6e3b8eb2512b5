//! The event types that a program declares: their current schema versions, ids and upcasters.

use super::{Event, EventType, EventTypeId, Upcaster};

/// The current schema version of each event type.
#[derive(Debug, Clone)]
pub(crate) struct Schemas(Box<[Option<u16>]>);

impl Schemas {
    pub(crate) fn of<E: Event>() -> Self {
        let mut versions = vec![None; E::TYPES.iter().map(|t| usize::from(t.id.0) + 1).max().unwrap_or(0)];
        for t in E::TYPES {
            versions[usize::from(t.id.0)] = Some(t.schema_version);
        }
        Self(versions.into())
    }

    /// Returns the current schema version of a type, or `None` if the program does not declare the type.
    #[inline]
    pub(crate) fn current(&self, event_type: EventTypeId) -> Option<u16> {
        self.0.get(usize::from(event_type.0)).copied().flatten()
    }
}

/// The ids of a program's event types, computed at compile time.
#[derive(Debug)]
struct DeclaredIds {
    first: u16,
    last: u16,
    /// Every id between `first` and `last` is declared.
    is_dense: bool,
}

impl DeclaredIds {
    const fn of(types: &[EventType]) -> Self {
        let (mut first, mut last, mut i) = (u16::MAX, 0, 0);
        while i < types.len() {
            let id = types[i].id.0;
            first = if id < first { id } else { first };
            last = if id > last { id } else { last };
            i += 1;
        }
        // Ids are unique: opening a store refuses duplicates.
        Self { first, last, is_dense: !types.is_empty() && (last - first) as usize + 1 == types.len() }
    }
}

/// Returns `true` if `event_type` is in `E::TYPES`. If the ids are consecutive, as they nearly always are, this is one
/// comparison, and often none, because the compiler knows which values `event_type()` can return.
#[inline(always)]
pub(crate) fn is_declared<E: Event>(event_type: EventTypeId) -> bool {
    let declared = const { DeclaredIds::of(E::TYPES) };
    if declared.is_dense {
        (declared.first..=declared.last).contains(&event_type.0)
    } else {
        E::TYPES.iter().any(|declared| declared.id == event_type)
    }
}

/// Returns the upcaster for records of this type and schema version, if any.
pub(crate) fn upcaster<E: Event>(event_type: EventTypeId, schema_version: u16) -> Option<&'static Upcaster<E>> {
    E::UPCASTERS.iter().find(|u| u.event_type == event_type && u.schema_version == schema_version)
}
