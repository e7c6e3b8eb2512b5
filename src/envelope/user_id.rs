//! User ids in JSON.

use crate::event::Key;

/// A user id as written in the JSON.
#[derive(Debug, Clone, PartialEq, Eq, Hash, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, corelane::Bounded)]
#[rkyv(derive(Debug))]
pub enum UserId {
    /// A number, which is the key.
    Number(u64),
    /// A text, whose xxh3 hash is the key.
    Text(String),
}

impl UserId {
    /// Returns the key of this user.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Number(id) => Key::new(*id),
            Self::Text(text) => Key::of(text),
        }
    }
}

impl From<u64> for UserId {
    fn from(id: u64) -> Self {
        Self::Number(id)
    }
}

impl From<&str> for UserId {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}
