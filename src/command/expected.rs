//! The version that a command expects of a key.

use crate::event::Version;

/// The version that a key must have for a command to be carried out.
///
/// An expected version protects against changes by other clients. A client needs no protection against its own
/// commands: commands for one key are carried out in the order in which the client sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ExpectedVersion {
    /// Any version.
    #[default]
    Any,
    /// The key has no event yet.
    NoEvents,
    /// The key has events.
    Exists,
    /// The key has exactly this version.
    Exact(Version),
}

impl ExpectedVersion {
    pub(crate) fn holds(self, version: Version) -> bool {
        match self {
            Self::Any => true,
            Self::NoEvents => version.0 == 0,
            Self::Exists => version.0 > 0,
            Self::Exact(expected) => version == expected,
        }
    }
}
