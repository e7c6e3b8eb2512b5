//! The event types that a follower of the log wants.

use super::{Event, EventTypeId};

/// A set of event types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TypeFilter(Option<Box<[bool]>>);

/// The reason why names do not select event types.
#[derive(Debug)]
pub(crate) enum BadTypes {
    /// There are no names.
    None,
    /// No event type has this name.
    Unknown(String),
}

impl TypeFilter {
    /// Returns the filter that wants every type.
    pub(crate) fn all() -> Self {
        Self(None)
    }

    /// Returns a filter for the types with these names.
    pub(crate) fn named<E: Event>(names: &[String]) -> Result<Self, BadTypes> {
        if names.is_empty() {
            return Err(BadTypes::None);
        }
        let ids = E::TYPES.iter().map(|t| usize::from(t.id.0) + 1).max().unwrap_or(0);
        let mut wanted = vec![false; ids].into_boxed_slice();
        for name in names {
            let known = E::TYPES.iter().find(|t| t.name == name);
            let known = known.ok_or_else(|| BadTypes::Unknown(name.clone()))?;
            wanted[usize::from(known.id.0)] = true;
        }
        Ok(Self(Some(wanted)))
    }

    #[inline]
    pub(crate) fn wants(&self, event_type: EventTypeId) -> bool {
        match &self.0 {
            None => true,
            Some(wanted) => wanted.get(usize::from(event_type.0)).copied().unwrap_or(false),
        }
    }
}
